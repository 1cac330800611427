import math

import pytest
import torch
import torch.nn.functional as F
from cases import drawn, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rgap.network.activations import (
    IDENTITY,
    RELU,
    SIGMOID,
    TANH,
    affine,
    clipped,
    compose,
    exponential,
    leaky_relu,
    softplus,
)
from rgap.network.operations import as_module, from_module

positive_slopes = st.floats(1e-6, 1e6)
INVERTIBLE = [
    nn.Identity(),
    nn.LeakyReLU(0.3),
    nn.PReLU(),
    nn.ELU(),
    nn.ELU(0.4),
    nn.SELU(),
    nn.CELU(0.7),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.Softplus(2.0, 5.0),
    nn.Softsign(),
    nn.LogSigmoid(),
]
CLIPPED = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 2.0), nn.LeakyReLU(0.0)]


def with_slopes(*slopes):
    module = nn.PReLU(len(slopes))
    module.weight.data = torch.tensor(slopes)
    return module


@pytest.mark.parametrize("module", INVERTIBLE + CLIPPED, ids=str)
def test_activations_agree_with_torch_and_their_derivatives_with_autograd(module):
    activation = from_module(module.double())
    z = torch.cat([3 * randn(200), torch.tensor([-30.0, 0.0, 6.0, 30.0])]).double().requires_grad_()
    reference = module(z)
    assert_close(activation.forward(z), reference, rtol=1e-13, atol=1e-15)
    if activation is not IDENTITY:
        (expected,) = torch.autograd.grad(reference.sum(), z)
        assert_close(activation.derivative(z), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("module", INVERTIBLE, ids=str)
def test_activations_are_undone_by_their_inverse(module):
    activation, z = from_module(module), 3 * randn(200)
    x = activation.forward(z)
    assert_close(activation.inverse(x), z, rtol=1e-9, atol=1e-9)
    found, known = activation.invert(x)
    assert known is None and found.equal(activation.inverse(x)) and activation.one_to_one


@pytest.mark.parametrize("module", INVERTIBLE + CLIPPED, ids=str)
def test_no_inverse_is_ever_infinite(module):
    activation = from_module(module)
    extreme = torch.tensor([-1e300, -1.0 - 1e-9, -1.0, 0.0, 1e-310, 1.0, 1 + 1e-9, 1e300], dtype=torch.float64)
    for x in (extreme, activation.forward(100 * randn(50)), activation.forward(1e4 * randn(50))):
        for z in (activation.inverse(x), activation.invert(x, 1e-6)[0]):
            assert torch.isfinite(z).all() and torch.isfinite(activation.derivative(z)).all()


@drawn
@given(positive_slopes, st.integers(0, 1000))
def test_leaky_relu_agrees_with_torch_and_its_derivative_with_autograd(slope, seed):
    z = randn(50, seed=seed).requires_grad_()
    activation, reference = leaky_relu(slope), F.leaky_relu(z, slope)
    assert_close(activation.forward(z), reference, rtol=1e-15, atol=0)
    (expected,) = torch.autograd.grad(reference.sum(), z)
    assert_close(activation.derivative(z), expected, rtol=0, atol=0)


@drawn
@given(positive_slopes, st.integers(0, 1000))
def test_leaky_relu_is_undone_by_its_inverse_and_homogeneous(slope, seed):
    z, activation = randn(50, seed=seed), leaky_relu(slope)
    assert_close(activation.inverse(activation.forward(z)), z, rtol=1e-14, atol=0)
    assert activation.homogeneous
    assert_close(activation.forward(3 * z), 3 * activation.forward(z), rtol=1e-14, atol=0)


def test_the_derivative_at_zero_is_that_of_torch():
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(F.leaky_relu(z, 0.3).sum(), z)
    assert leaky_relu(0.3).derivative(z).equal(expected)
    assert not RELU.derivative(z.detach()).any()


def test_identity_changes_nothing():
    z = randn(2, 3)
    assert IDENTITY.forward(z) is z and IDENTITY.inverse(z) is z
    assert IDENTITY.derivative(z).equal(torch.ones_like(z))


@pytest.mark.parametrize("slope", [0, 0.0, -0.1, float("nan")])
def test_a_slope_that_is_not_positive_is_refused(slope):
    with pytest.raises(ValueError, match="is not one-to-one; its slope must be positive"):
        leaky_relu(slope)


def test_parameters_that_are_not_positive_are_refused():
    with pytest.raises(ValueError, match="elu with alpha 0 is not one-to-one; its alpha must be positive"):
        exponential("elu", 0)
    with pytest.raises(ValueError, match="Softplus with beta -1 is not increasing; its beta must be positive"):
        softplus(-1)


def test_relu_tells_the_pre_activation_where_it_is_positive():
    x = torch.tensor([0.5, 0.0, 2e-7, 1e-5, 0.0, 1.0], dtype=torch.float64)
    z, known = RELU.invert(x)
    assert known.tolist() == [True, False, True, True, False, True]
    assert z[known].equal(x[known]) and RELU.derivative(z).tolist() == known.to(torch.float64).tolist()
    assert RELU.invert(x, accuracy=1e-6)[1].tolist() == [True, False, False, True, False, True]
    assert RELU.homogeneous and not RELU.one_to_one and not clipped("relu6", 0.0, 6.0).homogeneous


@drawn
@given(st.integers(0, 1000), st.floats(1e-15, 1e-5))
def test_errors_beyond_the_bound_say_how_close_to_it_a_zero_is(seed, noise):
    truth = randn(300, seed=seed).clamp(min=0)
    known = RELU.invert(truth + noise * randn(300, seed=seed + 1))[1]
    assert known[truth > 20 * noise].all() and not known[truth == 0].any()


def test_a_map_clipped_on_both_sides_tells_what_lies_between():
    x = torch.tensor([-1.0, -0.5, 0.0, 2.0], dtype=torch.float64)
    activation = clipped("hardtanh", -1.0, 2.0)
    z, known = activation.invert(x)
    assert known.tolist() == [False, True, True, False]
    assert activation.derivative(z).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("activation", [TANH, SIGMOID])
def test_saturated_entries_are_clamped_and_marked(activation):
    x = activation.forward(torch.tensor([0.3, 5.0, 60.0, -60.0], dtype=torch.float64))
    z, known = activation.invert(x, accuracy=1e-6)
    assert known.tolist() == [True, True, False, False]
    assert_close(z[:2], torch.tensor([0.3, 5.0], dtype=torch.float64))
    assert z[2:].abs().max() < 15 and activation.derivative(z)[2:].max() < 1e-5


def test_maps_are_composed_in_order():
    scale, shift = torch.tensor([2.0, -3.0]).double(), torch.tensor([1.0, 0.5]).double()
    z = randn(5, 2).requires_grad_()
    both = compose(RELU, affine(scale, shift))
    assert_close(both.forward(z), z.relu() * scale + shift)
    (expected,) = torch.autograd.grad(both.forward(z).sum(), z)
    assert_close(both.derivative(z), expected)
    found, known = both.invert(both.forward(z).detach())
    assert known.equal(z > 0) and not both.one_to_one and not both.homogeneous
    assert_close(found[known], z[known].detach())
    smooth = compose(TANH, affine(scale, 0 * shift))
    assert_close(smooth.inverse(smooth.forward(z)), z, rtol=1e-9, atol=1e-9)
    assert (
        smooth.one_to_one and not smooth.homogeneous and compose(leaky_relu(0.1), affine(scale, 0 * shift)).homogeneous
    )
    assert compose(IDENTITY, TANH) is TANH and compose(TANH, IDENTITY) is TANH
    x = torch.tensor([[3.0, 0.0]]).double()
    assert compose(RELU, SIGMOID).invert(x.sigmoid() + 0.6, 0.0)[1].tolist() == [[False, False]]


def test_modules_map_to_their_activation_or_to_none():
    assert from_module(nn.Identity()) is IDENTITY
    assert from_module(nn.LeakyReLU(0.25)).name == "leaky_relu(0.25)"
    assert from_module(with_slopes(0.25, 0.25)).negative_slope == 0.25
    prelu, z = with_slopes(0.25, 0.5), randn(2, 3, 3)
    assert_close(from_module(prelu).forward(z), prelu.double()(z[None])[0].detach())
    assert from_module(nn.LeakyReLU(0.0)) is from_module(nn.ReLU())
    for module in (nn.LeakyReLU(-1.0), nn.ELU(-1.0), nn.PReLU(init=0.0), nn.GELU(), nn.Linear(1, 1), None):
        assert from_module(module) is None


@pytest.mark.parametrize(
    ("operation", "arguments", "options"),
    [
        (F.leaky_relu, (0.3,), {}),
        (F.leaky_relu, (), {"negative_slope": 0.3, "inplace": False}),
        (F.elu, (0.5,), {}),
        (F.celu, (), {"alpha": 0.5}),
        (F.softplus, (2.0,), {"threshold": 10.0}),
        (F.hardtanh, (-2.0, 0.5), {}),
        (F.prelu, (torch.tensor([0.3]).double(),), {}),
        (torch.tanh, (), {}),
        (F.selu, (), {}),
        ("sigmoid", (), {}),
    ],
)
def test_a_function_counts_as_the_module_of_its_name(operation, arguments, options):
    z = randn(20)
    expected = getattr(z, operation)() if isinstance(operation, str) else operation(z, *arguments, **options)
    found = from_module(as_module(operation, arguments, options))
    assert_close(found.forward(z), expected, rtol=1e-12, atol=1e-15)


def test_a_function_with_arguments_of_no_module_counts_as_none():
    assert as_module(F.elu, (1.0, False, "more"), {}) is None
    assert as_module(math.sqrt, (), {}) is None
