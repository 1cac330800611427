import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import drawn, randn
from torch import nn
from torch.testing import assert_close

from rgap.activations import IDENTITY, from_module, leaky_relu

positive_slopes = st.floats(1e-6, 1e6)


@drawn
@given(positive_slopes, st.integers(0, 1000))
def test_leaky_relu_agrees_with_torch_and_its_derivative_with_autograd(slope, seed):
    z = randn(50, seed=seed).requires_grad_()
    activation, reference = leaky_relu(slope), nn.functional.leaky_relu(z, slope)
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
    (expected,) = torch.autograd.grad(nn.functional.leaky_relu(z, 0.3).sum(), z)
    assert leaky_relu(0.3).derivative(z).equal(expected)


def test_identity_changes_nothing():
    z = randn(2, 3)
    assert IDENTITY.forward(z) is z and IDENTITY.inverse(z) is z
    assert IDENTITY.derivative(z).equal(torch.ones_like(z))


@pytest.mark.parametrize("slope", [0, 0.0, -0.1, float("nan")])
def test_a_slope_that_is_not_positive_is_refused(slope):
    with pytest.raises(ValueError, match="is not one-to-one; its slope must be positive"):
        leaky_relu(slope)


def test_modules_map_to_their_activation_or_to_none():
    assert from_module(nn.Identity()) is IDENTITY
    assert from_module(nn.LeakyReLU(0.25)).name == "leaky_relu(0.25)"
    for module in (nn.LeakyReLU(0.0), nn.LeakyReLU(-1.0), nn.ReLU(), nn.Linear(1, 1)):
        assert from_module(module) is None
