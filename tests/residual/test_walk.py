"""The walk down blocks: values and δ against the truth, contradictions told."""

from functools import partial

import pytest
import torch
from torch import nn

from rgap import models
from rgap.network.chain import prepare_graph
from rgap.residual.bits import Known
from rgap.residual.walk import Walk
from tests.cases import rand

SHAPE = (3, 8, 8)


def truth(network, label=1):
    """The graph, its values and δ for an image, and the gradients by name."""
    graph = prepare_graph(network.double(), SHAPE)
    last = list(graph.nodes)[-1]
    values = graph.forward({graph.image: rand(*SHAPE)}, [last])
    error = torch.softmax(values[last].flatten(), 0) - nn.functional.one_hot(torch.tensor(label), 10)
    deltas = graph.pull(graph.slopes(values), {last: error.reshape(-1, 1, 1)}, graph.below([last]))
    loss = nn.functional.cross_entropy(network(rand(*SHAPE)[None]), torch.tensor([label]))
    gradients = dict(zip(graph.parameters, torch.autograd.grad(loss, list(network.parameters())), strict=True))
    return graph, values, deltas, gradients


def walk_from_the_last_block(network, noise=0.0):
    graph, values, deltas, gradients = truth(network)
    top = [name for name, node in graph.nodes.items() if node.kind == "addition"][-1]
    cut = graph.nodes[top].sources[0]
    source = graph.nodes[cut].sources[0]
    walk = Walk(graph, gradients, top, 2.2e-16, 1e-5)
    walk.values[source] = Known(values[source])
    walk.deltas[top] = walk.deltas[cut] = deltas[top] * (1 + noise * rand(*deltas[top].shape, seed=5))
    return walk, values, deltas


@pytest.mark.parametrize("activation", [nn.ReLU, partial(nn.LeakyReLU, 0.2), nn.ELU, nn.Softplus])
@pytest.mark.parametrize("blocks", [1, 2])
def test_values_and_deltas_are_the_true_ones(activation, blocks):
    walk, values, deltas = walk_from_the_last_block(models.resnet(0, (24, 48), blocks, activation=activation))
    walk.run()
    assert walk.frontier == "" and len(walk.reports) == 2 + 4 * (blocks - 1) + 2
    for name, known in walk.values.items():
        assert torch.allclose(known.value, values[name], rtol=1e-6, atol=1e-7), name
    for name, delta in walk.deltas.items():
        assert torch.allclose(delta, deltas[name], rtol=1e-6, atol=1e-9), name


def test_a_tensor_that_is_open_ends_the_walk():
    walk, _, _ = walk_from_the_last_block(models.resnet(0, (6, 48)))
    walk.run()
    assert walk.frontier and "lack" in walk.why and not walk.contradicted
    assert walk.reports[-1].deficit > 0


def test_a_wrong_delta_is_told_by_the_equations():
    walk, _, _ = walk_from_the_last_block(models.resnet(0, (24, 48)), noise=1e-3)
    walk.run()
    assert walk.contradicted and "contradict each other" in walk.why
