"""The graph of a network computes, pushes and pulls what torch does, and says what it cannot pass."""

import pytest
import torch
from torch import nn

from rgap import models
from rgap.network.chain import prepare_graph
from rgap.results import UnsupportedLayerError
from tests.cases import rand, randn


class PreActivation(nn.Module):
    """Two pre-activation blocks, one with a projection, on a stem with max pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(3, 2, 1))
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, 2, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, 1, 1)
        self.skip, self.head = nn.Conv2d(6, 8, 1, 2), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(2 * x - 1)
        a = torch.relu(self.bn1(x))
        x = self.conv2(torch.relu(self.bn2(self.conv1(a)))).add_(self.skip(a))
        return self.head(torch.nn.functional.max_pool2d(torch.relu(x), 2).mean((2, 3)))


NETWORKS = {
    "basic": lambda: models.resnet(0, (4, 6), 2),
    "bottleneck": lambda: models.resnet(1, (3, 4), activation=nn.ELU, expansion=2, flat_pixels=16),
    "pre-activation, max pooling": PreActivation,
}


def warmed(network):
    """In float64, with running statistics that are not 0 and 1."""
    network = network.double()
    for i, module in enumerate(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        module.running_mean.copy_(0.1 * randn(module.num_features, seed=i))
        module.running_var.copy_(0.5 + rand(module.num_features, seed=i))
        nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_values_changes_and_gradients_are_torchs(name):
    network, image = warmed(NETWORKS[name]()), rand(3, 8, 8).requires_grad_()
    graph = prepare_graph(network, (3, 8, 8))
    last = list(graph.nodes)[-1]
    values, names = graph.forward({graph.image: image.detach()}, [last]), graph.below([last])
    out, slopes = network(image[None])[0], graph.slopes(values)
    assert torch.allclose(values[last].flatten(), out, rtol=1e-12, atol=1e-13)
    seed, change = randn(*graph.nodes[last].shape), randn(3, 8, 8)
    (expected,) = torch.autograd.grad((out * seed.flatten()).sum(), image)
    pulled = graph.pull(slopes, {last: seed}, names)
    assert torch.allclose(pulled[graph.image], expected, rtol=1e-10, atol=1e-12)
    pushed = graph.push(slopes, change, names)[last]
    assert torch.allclose((pushed * seed).sum(), (expected * change).sum(), rtol=1e-10)


def test_gradients_belong_to_folded_layers_and_their_sums():
    network, image = warmed(PreActivation()), rand(3, 8, 8)
    graph = prepare_graph(network, (3, 8, 8))
    last = list(graph.nodes)[-1]
    values, names = graph.forward({graph.image: image}, [last]), graph.below([last])
    deltas = graph.pull(graph.slopes(values), {last: torch.ones(3, 1, 1, dtype=torch.float64)}, names)
    shared = torch.autograd.grad(network(image[None]).sum(), list(network.parameters()))
    shared = dict(zip(graph.parameters, shared, strict=True))
    layers = [node for node in graph.nodes.values() if node.has_weight]
    assert len(layers) == 5
    for node in layers:
        expected = node.layer.weight_gradient(values[node.sources[0]], deltas[node.name])
        assert torch.allclose(node.layer.gradient(shared), expected, rtol=1e-9, atol=1e-12)
        total = shared[node.total] * (1 if node.total_factor is None else node.total_factor)
        assert torch.allclose(total, deltas[node.name].sum((1, 2)), rtol=1e-9, atol=1e-12)


def test_articulation_points_are_where_every_path_goes():
    graph = prepare_graph(models.resnet(0, (4, 6)), (3, 8, 8))
    inside = [name for name, node in graph.nodes.items() if node.kind == "layer" and not graph.articulates(name)]
    assert len(inside) == 5  # two convolutions in each of two blocks, and a projection
    assert all(graph.articulates(name) for name, node in graph.nodes.items() if node.kind == "addition")


class Odd(nn.Module):
    """A layer used twice, a product of branches, and a normalisation."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Linear(48, 2)

    def forward(self, x):
        a = self.conv(self.conv(x))
        return self.head(torch.flatten(self.norm(a) * a, 1))


def test_what_cannot_be_passed_says_why():
    graph = prepare_graph(Odd(), (3, 4, 4))
    reasons = {node.path: node.reason for node in graph.nodes.values() if node.kind == "opaque"}
    assert "its weight serves several layers" in reasons["conv"]
    assert "its statistics depend on the image" in reasons["norm"]
    assert "no closed-form inverse" in reasons["mul"]
    with pytest.raises(UnsupportedLayerError, match="'conv' cannot be passed: its weight serves"):
        graph.forward({graph.image: rand(3, 4, 4)}, ["norm"])


def test_batch_norm_in_training_mode_is_opaque():
    graph = prepare_graph(models.resnet(0, (4,)).train(), (3, 8, 8))
    assert "call model.eval() first" in next(n.reason for n in graph.nodes.values() if n.kind == "opaque")


def test_another_precision():
    graph = prepare_graph(PreActivation().eval(), (3, 8, 8)).to(torch.float32)
    last = list(graph.nodes)[-1]
    assert graph.forward({graph.image: rand(3, 8, 8).float()}, [last])[last].dtype == torch.float32
