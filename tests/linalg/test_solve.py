import math

import numpy as np
import pytest
import torch
from cases import drawn, matrix, randn
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rgap.isolation import accelerator, dense_systems_on
from rgap.linalg import BorderedGram, Operator, dense_operator, least_squares
from rgap.linalg.solve import _by_decomposition
from rgap.linalg.systems import NormalEquations


@drawn
@given(st.integers(1, 30), st.integers(1, 15), st.integers(0, 6), st.booleans(), st.integers(0, 1000))
def test_solution_and_rank_are_those_of_the_pseudoinverse(rows, columns, lost, damped, seed):
    values = [*np.logspace(0, -2, min(rows, columns))]
    values[max(1, len(values) - lost) :] = [0.0] * min(lost, len(values) - 1)
    A, b = matrix(rows, columns, values, seed), randn(rows, seed=seed + 2)
    damping = randn(columns, seed=seed + 3).clamp(min=0) if damped else None
    stacked = A if damping is None else torch.cat([A, torch.diag(damping)])
    found = least_squares(dense_operator(A), b, 1e-8, damping)
    expected = torch.linalg.pinv(stacked, rtol=1e-8) @ torch.cat([b, b.new_zeros(len(stacked) - rows)])
    assert found.rank == torch.linalg.matrix_rank(stacked, rtol=1e-8)
    assert_close(found.y, expected, rtol=1e-7, atol=1e-7)
    if found.rank == columns:
        assert found.null is None and found.sigma_max_dropped is None
    else:
        assert found.null.shape == (columns, columns - found.rank)
        assert_close(stacked @ found.null, torch.zeros(len(stacked), columns - found.rank).double(), rtol=0, atol=1e-9)
        assert_close(found.null.T @ found.null, torch.eye(columns - found.rank).double())
        assert found.sigma_max_dropped <= 1e-8 < found.sigma_min_kept


@pytest.mark.parametrize("smallest", [1e-2, 1e-3, 1e-6])
def test_the_smallest_singular_value_is_told_by_either_way(smallest):
    A = matrix(40, 20, np.geomspace(1, smallest, 20))
    y = randn(20)
    found = least_squares(dense_operator(A), A @ y, 1e-8)
    assert found.sigma_min_kept == pytest.approx(smallest, rel=0.05)
    assert_close(found.y, y, rtol=1e-8, atol=1e-8)


def test_values_on_each_side_of_the_cut_are_reported():
    found = least_squares(dense_operator(matrix(10, 4, [2.0, 1.0, 2e-4, 2e-6])), randn(10), 1e-5)
    assert (found.rank, found.sigma_min_kept, found.sigma_max_dropped) == (
        3,
        pytest.approx(1e-4, rel=0.05),
        pytest.approx(1e-6, rel=0.05),
    )


@pytest.mark.parametrize("rank", [12, 7])
@pytest.mark.parametrize("gap", [1.0, 1e-3])
def test_the_gram_matrix_alone_tells_the_rank_with_and_without_a_gap(rank, gap):
    A = randn(20, 12) @ torch.diag(torch.logspace(0, math.log10(gap), 12, dtype=torch.float64))
    A = A[:, :rank] @ randn(rank, 12, seed=1) if rank < 12 else A
    b = A @ randn(12, seed=2)
    found = least_squares(dense_operator(A), b, 1e-5, gram_only=True)
    assert found.rank == rank and (found.null is None) == (rank == 12)
    expected = torch.linalg.lstsq(A, b[:, None], driver="gelsd", rcond=1e-9).solution[:, 0]
    assert_close(found.y, expected, rtol=0, atol=1e-5)
    if found.null is not None:
        assert (A @ found.null).abs().max() < 1e-7 and found.sigma_min_kept > 1e-5 > found.sigma_max_dropped


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_matrix_of_zeros_has_rank_zero(shape):
    found = least_squares(dense_operator(torch.zeros(shape).double()), randn(shape[0]), 1e-5)
    assert (found.rank, found.sigma_min_kept, found.sigma_max_dropped) == (0, 0.0, 0.0)
    assert found.y.equal(torch.zeros(shape[1]).double())
    assert found.null.shape == (shape[1], shape[1])


@pytest.mark.parametrize("gram_only", [False, True])
def test_a_deficient_system_of_which_a_part_stands_apart_is_factored_by_its_parts(gram_only):
    """Columns (c, k), the last q of every c orthonormal up to c's own factor, the others of less than full rank."""
    c, r, q = 3, 12, 5
    apart = torch.kron(randn(6, c, seed=1), torch.linalg.qr(randn(20, q, seed=2))[0].contiguous())
    rest = randn(120, 30, seed=3) @ randn(30, c * r, seed=4)
    A = torch.cat([rest.reshape(120, c, r), apart.reshape(120, c, q)], 2).flatten(1)
    R = (apart.T @ apart).reshape(c, q, c, q)[:, 0, :, 0]
    parted = Operator(
        A.shape[1],
        lambda dtype: BorderedGram(*(t.to(dtype) for t in (R, apart.T @ rest, rest.T @ rest))),
        lambda Y: A @ Y,
        A.T.matmul,
    )
    found, whole = (
        least_squares(a, A @ randn(A.shape[1]), 1e-5, gram_only=gram_only) for a in (parted, dense_operator(A))
    )
    assert found.rank == whole.rank == 45
    assert abs(len(found.ill_conditioned_sigmas) - len(whole.ill_conditioned_sigmas)) <= 1  # near the limit, roughly
    assert (found.null.T @ whole.null).det().abs() > 1 - 1e-9
    assert_close(found.y, whole.y, rtol=0, atol=1e-8)
    assert_close(found.sigma_min_kept, whole.sigma_min_kept, rtol=0.05, atol=0)


def test_ill_conditioned_directions_beside_a_null_space_are_those_of_the_decomposition():
    values = [*np.geomspace(1, 0.2, 150), *np.geomspace(0.06, 2e-3, 40), *[0.0] * 10]
    A, b = dense_operator(matrix(260, 200, values)), randn(260)
    found, normal = least_squares(A, b, 1e-5), NormalEquations(A, b[:, None], b.new_zeros(200), 1e-5, False)
    whole = _by_decomposition(normal)
    assert found.rank == whole.rank == 190 and found.ill_conditioned.shape == whole.ill_conditioned.shape == (200, 40)
    assert_close(found.y, whole.y, rtol=0, atol=1e-8 * whole.y.abs().max().item())
    assert_close(found.ill_conditioned_sigmas, whole.ill_conditioned_sigmas, rtol=2e-3, atol=0)
    assert (found.null.T @ whole.null).det().abs() > 1 - 1e-9
    assert (whole.ill_conditioned.T @ found.ill_conditioned).norm() ** 2 > 39.99
    assert (found.null.T @ found.ill_conditioned).norm() < 1e-4  # they are found in float32


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lost", [0, 3])
def test_a_system_factored_on_an_accelerator_has_the_solution_of_the_cpu(device, lost, monkeypatch):
    monkeypatch.setattr("rgap.linalg.matrices.MIN_ON_ACCELERATOR", 1)
    A, b = matrix(60, 30, [*np.geomspace(1, 0.1, 30 - lost), *[0.0] * lost]), randn(60)
    expected = least_squares(dense_operator(A), b, 1e-5)
    with dense_systems_on(torch.device(device)):
        assert accelerator.get() == torch.device(device)
        found = least_squares(dense_operator(A), b, 1e-5)
    assert accelerator.get() is None
    assert found.rank == expected.rank == 30 - lost and found.y.device.type == "cpu"
    assert_close(found.y, expected.y, rtol=1e-10, atol=1e-12)
    assert_close(found.invert(b[:30, None]), expected.invert(b[:30, None]), rtol=1e-8, atol=1e-10)
    assert (found.null is None) == (lost == 0)


def test_the_factors_of_a_neighbour_solve_a_system_whose_gram_matrix_is_not_made():
    A, b = matrix(80, 50, np.geomspace(1, 1e-2, 50)), randn(80)
    first, damping = least_squares(dense_operator(A), b, 1e-6, gram_only=True), 1e-3 * torch.ones(50).double()
    moved = A + 1e-5 * randn(80, 50, seed=3)
    operator = Operator(50, lambda _: pytest.fail("a Gram matrix"), lambda Y: moved @ Y, lambda R: moved.T @ R)
    found = least_squares(operator, b, 1e-6, damping, near=first)
    stacked = torch.cat([moved, torch.diag(damping)])
    assert_close(found.y, torch.linalg.lstsq(stacked, torch.cat([b, b.new_zeros(50)])).solution, rtol=1e-10, atol=0)
    assert found.null is None and found.rank == 50 and found.condition == first.condition
    far = matrix(80, 50, np.geomspace(1, 1e-3, 50), seed=9)
    found = least_squares(dense_operator(far), b, 1e-6, near=first)
    assert_close(found.y, torch.linalg.lstsq(far, b).solution, rtol=1e-8, atol=0)
    assert found.condition > 800


@pytest.mark.parametrize("lost", [0, 20])
@pytest.mark.parametrize("gap", [0.05, 1e-4])
def test_factors_in_float32_serve_where_they_prove_the_rank_and_only_there(lost, gap, monkeypatch):
    monkeypatch.setattr("rgap.linalg.solve.MIN_SINGLE_UNKNOWNS", 50)
    values = [*np.geomspace(1, gap, 60 - lost), *[0.0] * lost]
    A, b, wanted = matrix(90, 60, values), randn(90), []
    operator = Operator(
        60, lambda dtype: wanted.append(dtype) or (A.T @ A).to(dtype), lambda Y: A @ Y, lambda R: A.T @ R
    )
    found = least_squares(operator, b, 1e-6, gram_only=True, most=60 - lost)
    single = gap == 0.05
    assert (torch.float64 in wanted) != single and found.rank == 60 - lost
    assert found.sigma_min_kept == pytest.approx(gap, rel=0.05)
    expected = torch.linalg.pinv(A, rtol=1e-7) @ b
    assert_close(found.y, expected, rtol=0, atol=(1e-5 if lost or not single else 1e-12) * expected.abs().max().item())
    assert (found.null is None) == (not lost)
    if lost:
        assert (A @ found.null).norm() < 1e-4 and found.sigma_max_dropped < 1e-6


def test_a_rank_that_is_not_reached_is_found_in_float64(monkeypatch):
    monkeypatch.setattr("rgap.linalg.solve.MIN_SINGLE_UNKNOWNS", 50)
    A = matrix(90, 60, [*np.geomspace(1, 0.1, 30), *[0.0] * 30])
    found = least_squares(dense_operator(A), randn(90), 1e-6, gram_only=True, most=40)
    assert found.rank == 30 and (A @ found.null).norm() < 1e-8
