import pytest
import torch
import torch.nn.functional as F
from cases import conv_layer, conv_layers, drawn, randn, sequential, small_cnn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.network.tracing import trace

IMAGE = (3, 8, 8)
CONV = [nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.2)]
HEAD = [nn.Flatten(), nn.Linear(4 * 64, 1)]


class Custom(nn.Module):
    """A small network with a forward of one's own, `combine(self, x)`."""

    def __init__(self, combine):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Linear(3 * 64, 1)
        self.combine = combine

    def forward(self, x):
        return self.combine(self, x)


def with_tied_weights():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 1))
    network[2].weight = network[1].weight
    return network


def squared(x):
    return x * x


def zeroed(norm):
    """A batch normalisation that loses its first channel."""
    norm.weight.data[0] = 0
    return norm


def twice(module):
    return nn.Sequential(module, nn.LeakyReLU(0.2), module, nn.Flatten(), nn.Linear(3 * 64, 1))


def branching(self, x):
    return self.fc(self.act(self.conv(x)).flatten(1)) if x.sum() > 0 else x


def nested(module):
    return nn.Sequential(nn.Sequential(*CONV, nn.Sequential(module)), *HEAD)


UNSUPPORTED = [
    (nested(nn.MaxPool2d(3, 1, 1)), r"'0.2.0' \(MaxPool2d\) cannot be inverted: max pooling discards"),
    (nested(nn.AdaptiveMaxPool2d(8)), r"'0.2.0' \(AdaptiveMaxPool2d\) cannot be inverted: max pooling discards"),
    (nested(nn.BatchNorm2d(4)), r"'0.2.0' \(BatchNorm2d\).* in training mode it couples the images"),
    (
        nested(nn.BatchNorm2d(4, track_running_stats=False).eval()),
        r"'0.2.0' \(BatchNorm2d\) cannot be inverted: it keeps no running statistics",
    ),
    (nested(zeroed(nn.BatchNorm2d(4).eval())), r"'0.2.0' \(BatchNorm2d\) multiplies 64 of 256 entries by zero"),
    (nested(nn.InstanceNorm2d(4)), r"'0.2.0' \(InstanceNorm2d\) .*: its statistics depend on the image"),
    (nested(nn.GroupNorm(2, 4)), r"'0.2.0' \(GroupNorm\) .*: its statistics depend on the image"),
    (nested(nn.LayerNorm(8)), r"'0.2.0' \(LayerNorm\) .*: its statistics depend on the image"),
    (nested(nn.ConstantPad2d(0, 1.0)), r"'0.2.0' \(ConstantPad2d\) .*: it pads with a value other than zero"),
    (nested(nn.GELU()), r"'0.2.0' \(GELU\) .*: it is not monotone: two pre-activations have one value"),
    (nested(nn.SiLU()), r"'0.2.0' \(SiLU\) .*: it is not monotone"),
    (nested(nn.LeakyReLU(-0.1)), r"'0.2.0' \(LeakyReLU\) .*: with a negative slope two pre-activations have one value"),
    (nested(nn.PReLU(init=0.0)), r"'0.2.0' \(PReLU\) .*: a slope that is not positive makes it lose"),
    (nested(nn.Dropout(0.1)), r"'0.2.0' \(Dropout\) cannot be inverted: dropout in training mode.*model.eval\(\)"),
    (nested(nn.PixelShuffle(1)), r"'0.2.0' \(PixelShuffle\).* has no closed-form inverse here"),
    (nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 1, 1), *HEAD), r"'0' .*: transposed convolutions are not supported"),
    (nn.Sequential(*CONV), "the last layer '0' must be a Linear, with nothing but activations"),
    (Custom(lambda s, x: s.fc((x + s.act(s.conv(x))).flatten(1))), "cannot be inverted: the operation .*add"),
    (Custom(lambda s, x: s.fc(F.leaky_relu(s.conv(x), -0.2).flatten(1))), "'leaky_relu' .*: with a negative slope"),
    (Custom(lambda s, x: s.fc(F.elu(s.conv(x), 0.0).flatten(1))), "'elu' .*: with an alpha that is not positive"),
    (Custom(lambda s, x: s.fc(F.silu(s.conv(x)).flatten(1))), "'silu' cannot be inverted: it is not monotone"),
    (Custom(lambda s, x: s.fc(F.max_pool2d(s.conv(x), 1).flatten(1))), "max pooling discards the positions"),
    (Custom(lambda s, x: s.fc(F.dropout(s.conv(x)).flatten(1))), "'dropout' .* dropout in training mode is random"),
    (Custom(lambda s, x: s.fc(squared(s.conv(x)).flatten(1))), "'mul' is not a scale and a shift of every entry"),
    (Custom(lambda s, x: s.fc((1 / s.conv(x)).flatten(1))), "'truediv' is not a scale and a shift of every entry"),
    (Custom(lambda s, x: s.fc((s.conv(x) * 0).flatten(1))), "'mul' multiplies 192 of 192 entries by zero"),
    (Custom(lambda s, x: s.fc(F.pad(s.conv(x), (0, 0, 0, 0, 1, -1)).flatten(1))), "'pad' .* no linear map of pixels"),
    (Custom(lambda s, x: s.fc(torch.stack([x, s.conv(x)]).mean(0).flatten(1))), "'stack' cannot be inverted"),
    (Custom(branching), r"Custom decides on values of the image .*line \d+: .*x.sum\(\) > 0"),
    (twice(nn.Conv2d(3, 3, 3, 1, 1)), "parameter '0.weight' is used by 2 layers; it must be one"),
    (with_tied_weights(), "parameter '1.weight' is used by 2 layers"),
    (nn.Sequential(nn.Linear(8, 1)), r"'0' \(Linear\) gets an input of shape \(3, 8, 8\); put a Flatten before it"),
    (nn.Sequential(nn.Flatten()), "the network has no linear layer"),
    (nn.Identity(), "the network has no linear layer"),
]


@pytest.mark.parametrize(("network", "message"), UNSUPPORTED, ids=lambda value: str(value)[:30].split("(")[0])
def test_what_is_no_invertible_chain_is_refused_by_its_path(network, message):
    with pytest.raises(rgap.UnsupportedLayerError, match=message):
        rgap.prepare(network, IMAGE)


@pytest.mark.parametrize("flatten", [lambda x: x.flatten(1), lambda x: torch.flatten(x, 1), lambda x: x.view(-1, 192)])
def test_functional_flattening_is_a_reshape(flatten):
    chain = rgap.prepare(Custom(lambda s, x: s.fc(flatten(s.act(s.conv(x))))), IMAGE)
    assert [layer.name for layer in chain.layers] == ["conv", "fc"]


@pytest.mark.parametrize("rows", [lambda x: x.size(0), lambda x: x.shape[0]], ids=["size", "shape"])
def test_flattening_by_the_batch_size_is_a_reshape(rows):
    chain = rgap.prepare(Custom(lambda s, x: s.fc(s.act(s.conv(x)).view(rows(x), -1))), IMAGE)
    assert [layer.name for layer in chain.layers] == ["conv", "fc"]


@pytest.mark.parametrize("module", [nn.Identity(), nn.Dropout(0.5).eval(), nn.Sequential()])
def test_what_does_nothing_is_passed_over(module):
    network = nn.Sequential(*CONV, module, *HEAD)
    assert [layer.name for layer in rgap.prepare(network, IMAGE).layers] == ["0", str(len(network) - 1)]


@pytest.mark.parametrize("image_shape", [(3, 7, 8), (1, 8, 8), (3, 80, 80)])
def test_an_image_shape_that_does_not_fit_names_the_layer(image_shape):
    place = "'0'" if image_shape[0] == 1 else "'3'"
    with pytest.raises(ValueError, match=rf"does not fit the network at layer {place}: .*"):
        rgap.prepare(nn.Sequential(*CONV, *HEAD), image_shape)


def test_an_image_shape_that_does_not_fit_an_operation_names_it():
    with pytest.raises(ValueError, match="does not fit the network at operation 'view'"):
        rgap.prepare(Custom(lambda s, x: s.fc(s.conv(x).view(1, 100))), IMAGE)


def test_a_convolution_in_two_dimensions_is_not_mistaken_for_one_of_a_row():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 1))
    with pytest.raises(
        rgap.UnsupportedLayerError, match=r"gets an input of shape \(8, 8\); it takes channels and 2 axes"
    ):
        rgap.prepare(network, (8, 8))


@pytest.mark.parametrize("image_shape", [(3, 8, 8, 1), (3, 0, 8), (3, 8.0, 8), (), 8])
def test_what_is_no_image_shape_is_refused(image_shape):
    with pytest.raises(ValueError, match=r"it must be \(channels, height, width\)"):
        rgap.prepare(nn.Sequential(*CONV, *HEAD), image_shape)


def test_the_trace_lists_every_step_with_shapes_and_marks_what_is_unsupported():
    steps = trace(nn.Sequential(*CONV, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 1)), IMAGE)
    assert [step.kind for step in steps] == ["input", "linear", "activation", "unsupported", "reshape", "linear"]
    assert [step.output_shape for step in steps] == [IMAGE, (4, 8, 8), (4, 8, 8), (4, 4, 4), (64,), (1,)]
    assert [bool(step.reason) for step in steps] == [False] * 3 + [True] + [False] * 2
    assert steps[1].title == "'0' (Conv2d)" and steps[0].title == "'input'"


@drawn
@given(conv_layers(), st.integers(0, 1000))
def test_the_adjoint_is_autograds_vector_jacobian_product(layer, seed):
    x, dz = randn(*layer.input_shape, seed=seed).requires_grad_(), randn(*layer.output_shape, seed=seed + 1)
    (expected,) = torch.autograd.grad(layer.apply(x), x, dz)
    assert_close(layer.adjoint(dz), expected, rtol=0, atol=1e-12)
    batch = torch.stack([dz, 2 * dz])[None]
    assert_close(layer.adjoint(batch), torch.stack([expected, 2 * expected])[None], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # the even kernel pads unevenly, that is the point
@pytest.mark.parametrize("padding", ["same", "valid", (0, 2)])
def test_layers_compute_what_the_modules_compute_however_padding_is_given(padding):
    conv = nn.Conv2d(3, 4, (2, 3), padding=padding, dilation=(1, 2))
    size = conv(torch.zeros(1, *IMAGE)).numel()
    network = sequential(conv, nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(size, 5), nn.LeakyReLU(2.0), nn.Linear(5, 1))
    images = randn(2, *IMAGE)
    chain = rgap.prepare(network, IMAGE)
    inputs = chain.layer_inputs(images)
    hidden = network[:3](images)
    for found, expected in zip(inputs.values(), (images, hidden, network[3:5](hidden)), strict=True):
        assert_close(found, expected, rtol=0, atol=1e-12)
    assert list(inputs) == ["0", "3", "5"]
    assert [layer.is_dense for layer in chain.layers] == [False, True, True]
    assert [layer.unknowns for layer in chain.layers] == [192, size, 5]


def test_homogeneous_are_networks_without_biases():
    assert rgap.prepare(small_cnn(), IMAGE).homogeneous
    assert not rgap.prepare(small_cnn(bias=True), IMAGE).homogeneous


def test_a_chain_holds_float64_values_and_parameter_names_and_leaves_the_model_alone():
    network = small_cnn(bias=True).float().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    chain = rgap.prepare(network, list(IMAGE))
    assert list(chain.parameters) == list(state)
    assert {p.dtype for p in chain.parameters.values()} == {torch.float64}
    assert [(layer.weight_name, layer.bias_name) for layer in chain.layers][1] == ("2.weight", "2.bias")
    assert network.training and all(p.grad is None for p in network.parameters())
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())
    assert torch.get_rng_state().equal(generator)


def test_training_a_float64_model_on_does_not_change_its_chain():
    network = small_cnn()
    chain = rgap.prepare(network, IMAGE)
    kept = chain.layers[0].weight.clone()
    with torch.no_grad():
        network[0].weight.mul_(2)
    assert chain.layers[0].weight.equal(kept)


def test_a_chain_is_its_own_preparation_for_its_image_shape_alone():
    chain = rgap.prepare(small_cnn(), IMAGE)
    assert rgap.prepare(chain, list(IMAGE)) is chain
    with pytest.raises(ValueError, match=r"image_shape is \(3, 9, 9\); the chain was prepared for images \(3, 8, 8\)"):
        rgap.prepare(chain, (3, 9, 9))


def test_the_cache_builds_once():
    layer = rgap.prepare(small_cnn(), IMAGE).layers[0]
    calls = []
    assert layer.cached("key", lambda: calls.append(1) or "value") == "value"
    assert layer.cached("key", lambda: calls.append(1) or "other") == "value"
    assert calls == [1]


def test_groups_are_independent_layers_with_their_own_biases():
    layer = conv_layer(nn.Conv2d(4, 6, 3, groups=2), 5, 5)
    x = randn(4, 5, 5)
    parts = layer.split_groups()
    z = torch.cat([part.apply(chunk) + part.pre_bias() for part, chunk in zip(parts, x.chunk(2), strict=True)])
    assert_close(z, layer.apply(x) + layer.pre_bias())
    assert layer.split_groups() is parts
    assert parts[0].split_groups() == [parts[0]]
