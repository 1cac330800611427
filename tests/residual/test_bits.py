"""Wrong bits of a walk are found and corrected by division."""

from functools import partial

import pytest
import torch
from torch import nn

from rgap import models
from rgap.linalg import rms
from rgap.network.chain import prepare_graph
from rgap.residual.bits import activation_above, correct_bits, correct_maxima, decide
from rgap.residual.reconstruct import MAX_ROUNDING_ERRORS, WalkedImage, _verdict
from rgap.residual.walk import Walk
from rgap.results import Candidate, PixelRange
from tests.residual.test_walk import walk_from_the_last_block


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_wrong_bits_are_corrected_by_division(slope):
    activation = nn.ReLU if slope == 0 else partial(nn.LeakyReLU, slope)
    walk, values, deltas = walk_from_the_last_block(models.resnet(0, (24, 48), activation=activation))
    walk.run()
    reader = next(name for name, node in walk.graph.nodes.items() if node.has_weight and node.path.endswith("path.0"))
    act, x = activation_above(walk.graph, reader), values[walk.graph.nodes[reader].sources[0]]
    right, doubt = walk.slopes[act].clone(), torch.zeros_like(walk.slopes[act], dtype=torch.bool)
    doubt.view(-1)[[3, 50, 200, 301]] = True
    walk.slopes[act] = torch.where(doubt, 1 + slope - right, right)
    walk.deltas[reader] = walk.slopes[act] * walk.deltas[act]
    assert correct_bits(walk, reader, x, doubt) == 4
    assert torch.equal(walk.slopes[act], right)
    assert torch.allclose(walk.deltas[reader], deltas[reader], rtol=1e-6, atol=1e-12)
    assert correct_bits(walk, reader, x, doubt) == 0


def test_a_wrong_bit_far_below_the_doubt_is_found_by_its_filter():
    walk, values, _ = walk_from_the_last_block(models.resnet(0, (24, 48)))
    walk.run()
    reader = next(name for name, node in walk.graph.nodes.items() if node.has_weight and node.path.endswith("path.0"))
    act, source = activation_above(walk.graph, reader), walk.graph.nodes[reader].sources[0]
    right = walk.slopes[act].clone()
    off = ((right == 0) & (walk.values[act].value.abs() < 1e-12)).flatten().nonzero()[0]
    walk.slopes[act].view(-1)[off] = 1
    walk.deltas[reader] = walk.slopes[act] * walk.deltas[act]
    walk.decided.clear()
    assert decide(walk, source, values[source]) == 1
    assert torch.equal(walk.slopes[act], right)
    assert decide(walk, source, values[source]) == 0


def test_a_maximum_that_rounding_moved_is_found_by_division():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 64, 10)
    )
    graph = prepare_graph(model.double(), (3, 16, 16))
    conv, act, pool, *_, head = (name for name in graph.nodes if name != graph.image)
    values = graph.forward({graph.image: torch.rand(3, 16, 16).double()}, graph.below([head]))
    slopes, delta = graph.slopes(values), torch.randn(8, 8, 8).double()
    first, flat = slopes[pool], values[act].flatten(1)
    second = graph.nodes[pool].slope(flat.scatter(1, first.flatten(1), -torch.inf).reshape(values[act].shape))
    runner_up = flat.gather(1, second.flatten(1)).reshape(first.shape)
    gaps = torch.where(runner_up > 0, values[pool] - runner_up, torch.inf)
    margin = gaps.flatten().sort().values[5]
    moved = gaps < margin  # five windows
    theirs = graph.pull({**slopes, pool: torch.where(moved, second, first)}, {pool: delta}, [act, pool])
    ours = graph.pull(slopes, {pool: delta}, [act, pool])
    x, layer = values[graph.image], graph.nodes[conv].layer
    gradients = {layer.weight_name: layer.weight_gradient(x, theirs[conv])}
    walk = Walk(graph, gradients, pool, 1e-12, 1e-8, deltas=ours, slopes=slopes)
    assert correct_maxima(walk, conv, x, values[act], gaps.min() / 2) == 0
    assert correct_maxima(walk, conv, x, values[act], margin) == 5
    assert torch.equal(walk.slopes[pool], torch.where(moved, second, first))
    torch.testing.assert_close(walk.deltas[conv], theirs[conv])
    precision = margin.item() / MAX_ROUNDING_ERRORS / rms(values[conv]).item()
    walk = Walk(graph, gradients, pool, precision, 1e-8, deltas={pool: delta})
    missed, swapped = WalkedImage(walk, x, 0.0, (), ()).lower_residual()
    assert missed < 1e-12 and swapped == "5 maxima within rounding of another entry"
    found = Candidate(x[None], torch.tensor([1]), missed, True, residual_allowed=1e-8, predicted_error=0.0)
    verdict, (why,) = _verdict(found, 0.1, missed, swapped, PixelRange())
    assert verdict == "exact" and why.endswith(f"or the client's arithmetic decided {swapped} the other way")
