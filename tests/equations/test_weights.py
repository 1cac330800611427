import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import conv_layer, conv_layers, drawn, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from rgap.equations import banded
from rgap.equations import weights as sparse
from rgap.equations.complement import complement, weak_subspace
from rgap.equations.weights import ConjugateGradients, SparseFactor, weight_factor, weight_matrix


def tall():
    """48 unknowns, 108 rows; the image's border is seen by padding."""
    return conv_layer(nn.Conv2d(3, 12, 4, 2, 2, bias=False), 4, 4)


def square():
    return conv_layer(nn.Conv2d(3, 3, 3, 1, 1, bias=False), 8, 8)


def condition_of(layer):
    return np.linalg.cond(weight_matrix(layer).toarray())


@drawn
@given(conv_layers(), st.integers(0, 1000))
def test_the_weight_matrix_is_the_convolution(layer, seed):
    x = randn(*layer.input_shape, seed=seed)
    z = [
        torch.from_numpy(weight_matrix(part) @ x_part.flatten().numpy())
        for part, x_part in zip(layer.split_groups(), x.chunk(layer.groups), strict=True)
    ]
    assert_close(torch.cat(z), layer.apply(x).flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [tall(), square()], ids=["tall", "square"])
def test_the_factor_solves_consistent_equations_and_knows_their_condition(layer):
    x = randn(*layer.input_shape)
    factor = weight_factor(layer)
    found, residual, steps = factor.solve(layer.apply(x))
    assert factor.full_rank and residual < 1e-13 and 1 <= steps <= 5
    assert_close(found, x.flatten(), rtol=0, atol=1e-10)
    assert condition_of(layer) / 3 < factor.condition < 1.01 * condition_of(layer)
    assert weight_factor(layer) is factor


def test_the_solution_of_inconsistent_equations_is_that_of_least_squares():
    layer = tall()
    W, b = torch.from_numpy(weight_matrix(layer).toarray()), randn(*layer.output_shape)
    expected = torch.linalg.lstsq(W, b.reshape(-1, 1)).solution[:, 0]
    for solver in (weight_factor(layer), ConjugateGradients(layer)):
        found, residual, _ = solver.solve(b)
        assert_close(found, expected, rtol=0, atol=1e-9)
        assert residual == pytest.approx(((W @ expected - b.flatten()).norm() / b.norm()).item(), rel=1e-9)


def test_conjugate_gradients_take_over_from_a_size_on_and_agree():
    layer, x = tall(), randn(3, 4, 4)
    solver = weight_factor(layer, max_unknowns=40)
    assert isinstance(solver, ConjugateGradients) and math.isnan(solver.condition)
    found, residual, iterations = solver.solve(layer.apply(x))
    assert_close(found, x.flatten(), rtol=0, atol=1e-9)
    assert residual < 1e-11 and 0 < iterations < 200
    assert solver.condition == pytest.approx(condition_of(layer), rel=0.05)
    assert weight_factor(layer, max_unknowns=40) is solver


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_conjugate_gradients_take_over_where_a_band_would_be_too_large(padding, monkeypatch):
    monkeypatch.setattr(banded, "MAX_BAND_ENTRIES", 100)
    layer = conv_layer(nn.Conv2d(3, 16, 4, 2, 2, bias=False, padding_mode=padding), 4, 4)
    x, known = randn(3, 4, 4), torch.ones(layer.output_shape, dtype=torch.bool)
    known[0, 0, 0] = False
    for solver in (weight_factor(layer), weight_factor(layer, known)):
        assert isinstance(solver, ConjugateGradients)
        assert_close(solver.solve(layer.apply(x))[0], x.flatten(), rtol=0, atol=1e-8)
    assert weight_factor(layer) is weight_factor(layer)


def test_conjugate_gradients_leave_a_vanishing_right_side_at_zero():
    solver = ConjugateGradients(tall())
    found, residual, iterations = solver.solve(torch.zeros(12, 3, 3).double())
    assert not found.any() and residual == 0.0 and iterations == 0 and math.isnan(solver.condition)


def test_one_step_of_conjugate_gradients_shows_a_condition_of_one():
    layer = conv_layer(nn.Conv2d(1, 1, 1, bias=False), 3, 3)
    solver = ConjugateGradients(layer)
    _, _, iterations = solver.solve(randn(1, 3, 3))
    assert iterations == 1 and solver.condition == pytest.approx(1.0)


def test_the_weak_directions_of_a_square_w_are_those_of_its_smallest_singular_values():
    layer = conv_layer(nn.Conv2d(4, 4, 3, 1, 1), 6, 6)
    weak = weak_subspace(layer, 0.2)
    values = torch.linalg.svdvals(torch.from_numpy(weight_matrix(layer).toarray()))
    assert 0 < len(weak.sigmas) < 72 and abs(len(weak.sigmas) - (values < 0.2 * values[0]).sum()) <= 6
    assert_close(weak.sigmas.min(), values[-1], rtol=1e-3, atol=0)
    assert_close(weak.basis.T @ weak.basis, torch.eye(len(weak.sigmas)).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv", [(3, 12, 4, 2, 2), (4, 3, 3, 2, 1), (3, 3, 3, 1, 1)])
def test_the_complement_has_the_pseudo_inverse_and_what_the_range_leaves(conv):
    layer = conv_layer(nn.Conv2d(*conv, bias=False), 6, 6)
    W, found = torch.from_numpy(weight_matrix(layer).toarray()), complement(layer)
    assert_close(torch.from_numpy(found.pseudo_inverse()), torch.linalg.pinv(W), rtol=0, atol=1e-9)
    A = W.T if found.is_wide else W
    assert found.basis.shape == (len(A), len(A) - A.shape[1])
    assert_close(found.basis.T @ found.basis, torch.eye(found.basis.shape[1]).double(), rtol=0, atol=1e-12)
    assert_close(A.T @ found.basis, torch.zeros(A.shape[1], found.basis.shape[1]).double(), rtol=0, atol=1e-12)
    if found.is_wide:
        z = randn(2, *layer.output_shape)
        assert_close(found.minimum_norm(z).flatten(1), z.flatten(1) @ torch.linalg.pinv(W).T, rtol=0, atol=1e-9)


def test_a_w_short_of_full_rank_or_too_large_has_no_complement():
    layer = conv_layer(nn.Conv2d(4, 3, 3, 2, 1, bias=False), 6, 6)
    layer.weight[1] = layer.weight[0]
    assert complement(layer) is None and weak_subspace(layer, 0.03) is None
    assert complement(square(), max_side=10) is None


def matrix_layer(W):
    """A layer that is this matrix."""
    layer = conv_layer(nn.Conv2d(W.shape[1], W.shape[0], 1, bias=False), 1, 1)
    return replace(layer, weight=torch.from_numpy(W)[:, :, None, None], cache={})


@pytest.mark.parametrize("rows", [4, 6])
def test_a_singular_matrix_is_not_of_full_rank(rows):
    W = np.eye(rows, 4)
    W[:, 3] = 0.0
    factor = weight_factor(matrix_layer(W))
    assert isinstance(factor, SparseFactor) and not factor.full_rank and factor.condition == math.inf


@pytest.mark.parametrize(("rows", "angle"), [(4, 1e-13), (6, 1e-9)])
def test_a_nearly_singular_matrix_is_not_of_full_rank(rows, angle):
    W = np.eye(rows, 4)
    W[:, 3] = W[:, 2] + angle * W[:, 3]
    assert not weight_factor(matrix_layer(W)).full_rank


def test_a_factor_that_overflows_is_of_infinite_condition():
    factor = weight_factor(matrix_layer(np.diag([1.0, 1e-200])))
    assert factor.condition == math.inf and not factor.full_rank


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_rows_that_are_not_known_are_not_used(padding):
    layer = conv_layer(nn.Conv2d(2, 12, 3, 2, 1, bias=False, padding_mode=padding), 6, 6)
    known = torch.rand(layer.output_shape, generator=torch.Generator().manual_seed(0)) < 0.9
    W, b = torch.from_numpy(weight_matrix(layer).toarray())[known.flatten()], randn(*layer.output_shape)
    found, residual, _ = weight_factor(layer, known).solve(b)
    expected = torch.linalg.lstsq(W, b[known][:, None]).solution[:, 0]
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert residual == pytest.approx(((W @ expected - b[known]).norm() / b[known].norm()).item(), rel=1e-9)
    assert_close(weight_factor(layer, known).sensitivity(b), expected, rtol=0, atol=1e-10)
    assert weight_factor(layer, known).condition == pytest.approx(np.linalg.cond(W.numpy()), rel=0.1)


def test_a_vanishing_right_side_has_residual_zero():
    found, residual, _ = weight_factor(tall()).solve(torch.zeros(12, 3, 3).double())
    assert not found.any() and residual == 0.0


def test_gradient_rows_join_the_iterations():
    layer = conv_layer(nn.Conv2d(4, 8, 3, 2, 1, bias=False), 9, 9)
    x, dz = randn(4, 9, 9), randn(*layer.output_shape, seed=1)
    solver = ConjugateGradients(layer, dz=dz)
    z, G = layer.apply(x), layer.weight_gradient(x, dz)
    found, residual, iterations = solver.solve(z, G)
    assert solver.full_rank and residual < 1e-10 and iterations > 10
    assert_close(found, x.flatten(), rtol=0, atol=1e-7)
    assert not ConjugateGradients(layer).full_rank


def test_iterations_in_single_precision_end_where_those_in_double_precision_do(monkeypatch):
    monkeypatch.setattr(sparse, "MIN_SINGLE_UNKNOWNS", 1)
    layer = tall()
    W, b = torch.from_numpy(weight_matrix(layer).toarray()), randn(*layer.output_shape)
    solver = ConjugateGradients(layer)
    expected, found = torch.linalg.lstsq(W, b.reshape(-1, 1)).solution[:, 0], solver._in_single_precision([b])
    assert found.residual == pytest.approx(((W @ expected - b.flatten()).norm() / b.norm()).item(), rel=1e-9)
    assert_close(found.x.flatten(), expected, rtol=0, atol=1e-10)
    assert found.condition == pytest.approx(condition_of(layer), rel=0.2)
    assert solver._in_single_precision([torch.zeros_like(b)]) is None


def test_single_precision_gives_way_where_its_rounds_do_not_lower_the_residual(monkeypatch):
    monkeypatch.setattr(sparse, "MIN_SINGLE_UNKNOWNS", 1)
    monkeypatch.setattr(sparse, "MAX_ROUND_RATIO", 0.0)
    layer, x = tall(), randn(3, 4, 4)
    solver = ConjugateGradients(layer)
    assert solver._in_single_precision([layer.apply(x)]) is None
    assert_close(solver.solve(layer.apply(x))[0], x.flatten(), rtol=0, atol=1e-9)
