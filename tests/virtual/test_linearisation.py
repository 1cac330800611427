from itertools import pairwise

import numpy as np
import pytest
from cases import ASINH, ELU, TANH, drawn
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from rgap.network.activations import IDENTITY, leaky_relu
from rgap.virtual.linearisation import fit, inverse, slope


def moments(activation, m, sd):
    """The fit of one entry from its definition, by quadrature over both sides of 0 apart."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    edges = [m - 8 * sd, *([0.0] if abs(m) < 8 * sd else []), m + 8 * sd]
    pieces = [(a + (b - a) * (nodes + 1) / 2, (b - a) / 2 * weights) for a, b in pairwise(edges)]
    x, w = (np.concatenate(part) for part in zip(*pieces, strict=True))
    w = w * np.exp(-(((x - m) / sd) ** 2) / 2) / (sd * np.sqrt(2 * np.pi))
    f, h = inverse(activation, x), slope(activation, x)
    beta, rho = (w @ (g * (x - m)) / sd**2 for g in (f, h))
    eps, eta = f - w @ f - beta * (x - m), h - w @ h - rho * (x - m)
    return w @ f - beta * m, beta, w @ eps**2, w @ h, rho, w @ eta**2, w @ (eps * eta)


def fields(found):
    return [getattr(found, name)[0] for name in ("alpha", "beta", "var_eps", "pi", "rho", "var_eta", "cov")]


@drawn
@given(st.floats(0.05, 4), st.floats(-3, 3), st.floats(0.05, 3))
def test_the_closed_form_of_leaky_relu_is_the_best_fit(a, m, sd):
    found = fit(leaky_relu(a), np.array([m]), np.array([sd**2]))
    assert_allclose(fields(found), moments(leaky_relu(a), m, sd), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("activation", "sd"), [(TANH, 0.03), (ELU, 0.05), (ASINH, 0.4)])
@pytest.mark.parametrize("m", [-0.5, 0.4, 0.7])
def test_the_quadrature_of_smooth_activations_is_the_best_fit(activation, sd, m):
    found = fit(activation, np.array([m]), np.array([sd**2]))
    assert_allclose(fields(found), moments(activation, m, sd), rtol=1e-6, atol=1e-9)


def test_on_a_kink_the_fit_is_the_mean_of_both_sides():
    found = fit(leaky_relu(0.25), np.zeros(3), np.array([1e-6, 1.0, 1e6]))
    assert_allclose(found.beta, 2.5)
    assert_allclose(found.pi, 0.625)
    assert (found.var_eps > 0).all() and (found.var_eta > 0).all()


@pytest.mark.parametrize("v", [0.0, 1e-60, 1e-14])
@pytest.mark.parametrize("activation", [leaky_relu(0.2), leaky_relu(3.0), IDENTITY, TANH, ASINH])
def test_as_the_variance_vanishes_the_fit_becomes_the_tangent(activation, v):
    x = np.array([-0.9, -0.3, 0.2, 0.8])
    found = fit(activation, x, np.full(4, v))
    assert_allclose(found.alpha + found.beta * x, inverse(activation, x), rtol=1e-9)
    assert_allclose(found.beta, 1 / slope(activation, x), rtol=1e-7)
    assert_allclose(found.pi, slope(activation, x), rtol=1e-9)
    for rest in (found.var_eps, found.var_eta, found.cov):
        assert np.abs(rest).max() < 1e-14


def test_the_tangent_of_leaky_relu_has_no_offset_and_no_curvature():
    found = fit(leaky_relu(0.2), np.array([-1e-3, 2.0]), np.full(2, 1e-60))
    assert_allclose(found.alpha, 0, atol=1e-15)
    assert found.rho.tolist() == pytest.approx([0, 0], abs=1e-200)


def test_the_derivative_of_a_smooth_activation_is_followed():
    """d σ′(σ⁻¹(x)) / dx of tanh is −2x."""
    x = np.array([-0.6, 0.1, 0.5])
    assert_allclose(fit(TANH, x, np.full(3, 1e-8)).rho, -2 * x, rtol=1e-4)


def test_the_identity_is_fitted_exactly():
    found = fit(IDENTITY, np.array([-1.0, 0.0, 2.0]), np.array([1.0, 2.0, 1e-3]))
    assert_allclose(found.beta, 1)
    for zero in (found.alpha, found.var_eps, found.rho, found.var_eta, found.cov):
        assert_allclose(zero, 0, atol=1e-15)
