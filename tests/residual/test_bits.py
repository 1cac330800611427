"""Wrong bits of a walk are found and corrected by division."""

from functools import partial

import pytest
import torch
from torch import nn

from rgap import models
from rgap.residual.bits import activation_above, correct_bits, decide
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
