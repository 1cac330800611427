from dataclasses import replace

import numpy as np
import pytest
from cases import open_problem, randn
from numpy.testing import assert_allclose

from rgap.equations import block_cholesky
from rgap.network.activations import IDENTITY, softplus
from rgap.virtual import certificate as virtual
from rgap.virtual.closure import solve_virtual
from rgap.virtual.linearisation import slope


def relative(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


def certify(problem, x, image=None):
    """The certificate for the signs of x."""
    channels = np.arange(len(problem.G))
    lifted = image if image is not None else np.zeros(len(problem.previous.pinv))
    return virtual.certify(problem, problem.N.T @ (x - problem.x), lifted, channels, [])


def test_redundant_gradient_equations_are_not_counted():
    """⟨G′[o], W′[o′]⟩ = ⟨δx[o], x[o′]⟩: 12 of one channel with itself, 144 of all pairs where σ keeps every sign."""
    kinked, linear = (open_problem(30, activation)[0] for activation in (None, IDENTITY))
    left, rank = kinked.previous.left.shape[1], kinked.previous.gradient_rank(kinked.dx)
    assert certify(kinked, open_problem(30)[1]).equations == left + rank - 12
    assert certify(linear, open_problem(30, IDENTITY)[1]).equations == left + rank - 144


def test_a_wrong_sign_is_never_certified(monkeypatch):
    problem, x = open_problem(60)
    assert certify(problem, x).certified
    t = problem.N.T @ (x - problem.x)
    reach = np.abs(problem.N).max(1)
    i = np.argmin(np.abs(x) / reach)
    j = np.argmax(np.abs(problem.N[i]))
    t[j] -= 1.5 * x[i] / problem.N[i, j]  # past zero for x_i alone, the entry that is nearest to it
    wrong = problem.x + problem.N @ t
    assert ((wrong > 0) != (x > 0)).sum() >= 1
    polished = certify(problem, wrong)
    assert not polished.certified or relative(polished.x, x) < 1e-12
    monkeypatch.setattr(virtual, "MAX_PIECES", 1)
    monkeypatch.setattr(virtual, "MAX_SIGN_TRIALS", 0)
    refused = certify(problem, wrong)
    assert not refused.certified and refused.residual > 20 * problem.noise
    assert_allclose(refused.x, wrong)  # the belief stays as it was


@pytest.mark.parametrize("what", ["G", "dx", "x"])
def test_data_that_do_not_fit_together_are_not_certified(what):
    problem, _ = open_problem(30)
    value = getattr(problem, what)
    wrong = replace(problem, **{what: value * (1 + 1e-6 * randn(*value.shape, seed=9).numpy())})
    found = solve_virtual(wrong)
    assert not found.certified and found.residual > virtual.MAX_CERTIFIED_RESIDUAL * problem.noise
    assert solve_virtual(replace(wrong, noise=1e-5)).certified


def test_the_surplus_of_equations_decides(monkeypatch):
    problem, x = open_problem(30)
    surplus = certify(problem, x).equations - problem.unknowns
    monkeypatch.setattr(virtual, "CERTIFICATE_SURPLUS", surplus)
    assert certify(problem, x).certified
    monkeypatch.setattr(virtual, "CERTIFICATE_SURPLUS", surplus + 1)
    refused = certify(problem, x)
    assert not refused.certified and refused.residual < 1e-12
    assert relative(refused.x, x) < 1e-12


def test_a_system_too_ill_conditioned_is_not_certified(monkeypatch):
    problem, x = open_problem(30)
    monkeypatch.setattr(virtual, "MAX_CERTIFIED_CONDITION", 1.0)
    assert not certify(problem, x).certified


def test_a_direction_that_no_equation_sees_is_not_certified():
    """A change of x along the range of W: the range says nothing of it, and δx = 0 leaves the gradient silent."""
    problem, x = open_problem(30)
    layer = problem.previous.layer
    change = (slope(problem.activation, x) * layer.apply(randn(*layer.input_shape, seed=3)).flatten().numpy())[:, None]
    N = np.linalg.qr(np.hstack([problem.N[:, 1:], change]))[0]
    blind = replace(problem, x=x - N @ (N.T @ x), N=N, G=0 * problem.G, dx=0 * problem.dx)
    refused = certify(blind, x)
    assert not refused.certified and refused.condition > virtual.MAX_CERTIFIED_CONDITION
    assert certify(replace(problem, G=blind.G, dx=blind.dx), x).certified


@pytest.mark.parametrize(
    ("module", "constant", "value"),
    [(virtual, "MAX_ROUGH_CONDITION", 0.0), (block_cholesky, "MIN_SHARP_PIVOT", 1.0)],
)
def test_what_is_made_in_float32_is_refined(monkeypatch, module, constant, value):
    problem, x = open_problem(30)
    assert problem.previous.is_sharp
    rough = certify(problem, x)
    monkeypatch.setattr(module, constant, value)
    precise = certify(problem, x)
    assert rough.certified and relative(rough.x, x) < 1e-12 and relative(rough.x, precise.x) < 1e-12
    assert rough.condition == pytest.approx(precise.condition, rel=1e-3)


def test_a_rough_inverse_that_is_wrong_certifies_nothing(monkeypatch):
    problem, x = open_problem(30)
    monkeypatch.setattr(
        type(problem.previous.factor.factor),
        "rough",
        property(lambda factor: replace(factor, below=[0 * L for L in factor.below])),
    )
    found = certify(problem, x)
    assert not found.certified or relative(found.x, x) < 1e-12


def test_an_entry_beyond_zero_by_its_error_is_put_on_its_side():
    """A sign is decided by the residual, which a wrong one spoils, not by an entry that could as well be zero."""
    problem, x = open_problem(30)
    i = np.argmin(np.abs(x) / np.abs(problem.N).max(1))
    j = np.argmax(np.abs(problem.N[i]))
    t, error, fits = problem.N.T @ (x - problem.x), np.zeros(len(problem.N.T)), np.zeros(9)
    t[j] -= 1.001 * x[i] / problem.N[i, j]
    beyond = (problem.x + problem.N @ t)[i]
    error[j] = np.abs(beyond) * len(x) ** 0.5  # N has orthonormal columns
    assert beyond * x[i] < 0
    put = virtual._piece(problem, x, t, error, fits, np.ones(1))
    assert put.fits and put.x[i] * x[i] > 0 and np.abs(put.x[i]) < np.abs(beyond)
    for why in ({"error": 0.01 * error}, {"rest": fits + 100}):
        assert not virtual._piece(
            **{"problem": problem, "m": x, "t": t, "error": error, "rest": fits, "values": np.ones(1)} | why
        ).stays


def test_a_smooth_activation_is_solved_by_tangents_until_they_stay(monkeypatch):
    problem, x = open_problem(30, softplus(), noise=1e-12)
    away = problem.x + problem.N @ (problem.N.T @ (x - problem.x) * (1 + 0.3 * randn(30, seed=5).numpy()))
    assert relative(away, x) > 0.01
    found = certify(problem, away)
    assert found.certified and relative(found.x, x) < 1e-11
    monkeypatch.setattr(virtual, "MAX_TANGENTS", 1)
    assert not certify(problem, away).certified  # one tangent, from as far
