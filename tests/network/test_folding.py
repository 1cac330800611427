import copy

import pytest
import torch
import torch.nn.functional as F
from cases import drawn, rand, randn, sequential
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations.weights import weight_matrix
from rgap.experiments.random_networks import random_chain
from rgap.network.activations import IDENTITY

IMAGE = (3, 8, 8)
CONV, NEXT = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)


def with_head(*modules, image=IMAGE):
    """The modules with a linear layer to one logit behind them, in eval mode."""
    body = nn.Sequential(*copy.deepcopy(modules)).double().eval()
    size = body(rand(2, *image))[0].numel()
    return sequential(*body, nn.Flatten(), nn.Linear(size, 1)).eval()


def norm(channels, axes=2):
    module = (nn.BatchNorm2d if axes == 2 else nn.BatchNorm1d)(channels)
    module.running_mean, module.running_var = rand(channels, seed=1), rand(channels, seed=2) + 0.5
    return module


def check(network, image_shape=IMAGE):
    """The chain computes what the network does, and its adjoints and weight gradients are autograd's."""
    chain = rgap.prepare(network, image_shape)
    images = rand(2, *image_shape)
    x = images
    for layer in chain.layers:
        x = layer.activation.forward(layer.apply(x.reshape(2, *layer.input_shape)) + layer.pre_bias())
        dz, v = randn(*layer.output_shape), randn(*layer.input_shape).requires_grad_()
        (expected,) = torch.autograd.grad(layer.apply(v), v, dz)
        assert_close(layer.adjoint(dz), expected, rtol=0, atol=1e-10)
        if layer.groups == 1:
            W = torch.from_numpy(weight_matrix(layer) @ v.detach().flatten().numpy())
            assert_close(W, layer.apply(v.detach()).flatten(), rtol=0, atol=1e-10)
    assert_close(x.flatten(1), network(images).detach(), rtol=1e-9, atol=1e-9)
    return chain


@drawn
@given(st.integers(0, 10_000))
def test_a_random_chain_computes_what_its_network_does(seed):
    network, shape, *_ = random_chain(seed, 400)
    check(network, shape)


def test_pooling_behind_a_convolution_makes_one_layer_with_it():
    chain = check(with_head(CONV, nn.AvgPool2d(2), nn.ReLU()))
    assert [layer.name for layer in chain.layers] == ["0", "4"]
    assert chain.layers[0].after.shape == (4, 4) and chain.layers[0].activation.name == "relu"


def test_pooling_behind_an_activation_is_a_fixed_layer():
    chain = check(with_head(CONV, nn.Tanh(), nn.AvgPool2d(2), nn.ZeroPad2d(1), nn.AdaptiveAvgPool2d(3), NEXT))
    assert [(layer.name, layer.is_fixed) for layer in chain.layers] == [
        ("0", False),
        ("2", True),
        ("5", False),
        ("7", False),
    ]
    assert chain.layers[1].unknowns == 256 and chain.layers[1].weight_name == ""


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("layer", [None, nn.ZeroPad2d((1, 0, 2, 1)), nn.ReflectionPad2d((1, 0, 2, 1))])
def test_padding_belongs_to_the_convolution_that_reads_it(mode, layer):
    conv = nn.Conv2d(3, 4, 3, 2, (1, 2), padding_mode=mode)
    chain = check(with_head(*filter(None, [layer, conv]), nn.Tanh()))
    assert len(chain.layers) == 2 and chain.layers[0].unknowns == 192
    plain = mode == "zeros" and not isinstance(layer, nn.ReflectionPad2d)
    assert (chain.layers[0].before is None) == plain


def test_padding_that_no_convolution_reads_is_a_fixed_layer():
    chain = check(with_head(nn.ZeroPad2d(1), nn.Tanh(), CONV, nn.ReplicationPad2d(1)))
    assert [layer.is_fixed for layer in chain.layers] == [True, False, True, False]
    assert [layer.activation.name for layer in chain.layers][:2] == ["tanh", "identity"]


def test_batch_normalisation_behind_a_convolution_is_part_of_its_weight():
    network = with_head(CONV, norm(4), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(2, 1), norm(4))
    chain = check(network)
    assert [layer.name for layer in chain.layers] == ["0", "3", "7"]
    assert chain.layers[0].activation.negative_slope == 0.1 and chain.layers[1].activation is IDENTITY
    assert not chain.homogeneous
    image = rand(1, *IMAGE)
    gradients = dict(zip(chain.parameters, rgap.client_gradients(network, image, torch.tensor([1])), strict=True))
    scale = network[1].weight / (network[1].running_var + 1e-5).sqrt()
    assert_close(chain.layers[0].gradient(gradients) * scale[:, None, None, None], gradients["0.weight"])


def test_affine_maps_behind_an_activation_join_it():
    chain = check(with_head(CONV, nn.Tanh(), norm(4), nn.Sigmoid()))
    assert chain.layers[0].activation.name == "tanh, affine, sigmoid" and len(chain.layers) == 2


def test_normalisation_by_entries_joins_the_activation():
    chain = check(
        with_head(nn.Flatten(), nn.Linear(192, 6), norm(6, 1), nn.Tanh(), nn.Unflatten(1, (2, 3)), norm(2, 1))
    )
    assert chain.layers[0].output_scale is not None and chain.layers[0].activation.name == "tanh, affine"


@pytest.mark.parametrize(
    "first", [norm(3), nn.Conv2d(3, 3, 1, groups=3), nn.Tanh()], ids=["batch norm", "depthwise 1×1", "activation"]
)
def test_what_happens_to_the_image_first_is_a_fixed_layer(first):
    chain = check(with_head(first, CONV, nn.Tanh()))
    assert [(layer.name, layer.is_fixed) for layer in chain.layers] == [("0", True), ("1", False), ("4", False)]


def test_a_module_that_is_used_twice_gives_layers_of_two_names():
    pool = nn.AvgPool2d(3, 2)
    chain = check(with_head(nn.Tanh(), pool, nn.Tanh(), pool, nn.Tanh()))
    assert len({layer.name for layer in chain.layers}) == len(chain.layers) == 4


class Functional(nn.Module):
    """Normalisation by buffers, functions of every kind, and shared slopes."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 1)
        self.slope, self.gain = nn.PReLU(4), nn.Parameter(torch.tensor(1.5))
        self.slope.weight.data = torch.tensor([0.1, 0.2, 0.3, 0.4])
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))

    def forward(self, x):
        x = (x - self.mean.view(1, 3, 1, 1)) / 0.25
        x = self.slope(self.first(F.pad(x, (1, 0))))
        x = self.slope(self.second(x) * self.gain).sigmoid()
        x = F.dropout(F.elu(F.avg_pool2d(x, 2), alpha=0.5), training=self.training)
        return self.fc(torch.relu(x).mean((2, 3)))


def test_functions_count_as_the_modules_of_their_name():
    chain = check(Functional().double().eval())
    names = [layer.name for layer in chain.layers]
    assert names == ["sub", "first", "second", "avg_pool2d", "mean", "fc"]
    assert chain.layers[1].activation.negative_slope.shape == (4, 1, 1)


def test_rows_of_pixels_are_taken():
    network = with_head(
        nn.Conv1d(2, 6, 3, 2, 1), norm(6, 1), nn.Tanh(), nn.Conv1d(6, 4, 2, padding="same"), image=(2, 16)
    )
    chain = check(network, (2, 16))
    assert chain.layers[0].input_shape == (2, 1, 16) and chain.layers[0].feature_shape == (2, 16)
    image = rand(1, 2, 16)
    result = rgap.reconstruct(chain, rgap.client_gradients(network, image, torch.tensor([0])), gradient_scale=1.0)
    assert result.images.shape == (1, 2, 16) and result.verdict == "exact"
    assert_close(result.images, image, rtol=0, atol=1e-9)


def test_gradients_of_weights_that_are_frozen_here_are_used_where_they_are_shared():
    network = with_head(norm(3), nn.Conv2d(3, 12, 3, 2, 1), norm(12), nn.Tanh())
    image = rand(1, *IMAGE)
    gradients = rgap.client_gradients(network, image, torch.tensor([1]))
    for parameter in network[:3].parameters():
        parameter.requires_grad_(False)
    assert len(gradients) == len(list(network.parameters()))
    assert_close(rgap.reconstruct(network, gradients, IMAGE, gradient_scale=1.0).images, image, rtol=0, atol=1e-9)
