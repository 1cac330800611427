import pytest
import torch
from cases import randn
from torch.testing import assert_close

from rgap.linalg import BorderedGram, Operator, dense_operator, orthonormal
from rgap.linalg.pivoted import pivoted_factor, weak_directions
from rgap.linalg.systems import NormalEquations

C, R, Q, SEEN = 3, 12, 5, 25  # unknowns (c, k), the last q of every c apart, the others of rank 25


def deficient(bordered):
    """A (126, 51) of rank 40, its normal equations, their Gram matrix by its parts where it is bordered."""
    apart = torch.kron(randn(6, C, seed=1), torch.linalg.qr(randn(20, Q, seed=2))[0].contiguous())
    rest = randn(120, SEEN, seed=3) @ randn(SEEN, C * R, seed=4)
    A = torch.cat([rest.reshape(120, C, R), apart.reshape(120, C, Q)], 2).flatten(1)
    block = (apart.T @ apart).reshape(C, Q, C, Q)[:, 0, :, 0]
    operator = dense_operator(A)
    if bordered:
        parts = block, apart.T @ rest, rest.T @ rest
        operator = Operator(A.shape[1], lambda dtype: BorderedGram(*(t.to(dtype) for t in parts)), A.matmul, A.T.matmul)
    return A, NormalEquations(operator, randn(120)[:, None], torch.zeros(A.shape[1]).double(), 1e-6, False)


@pytest.mark.parametrize("most", [None, 40])
@pytest.mark.parametrize("bordered", [False, True])
def test_a_factor_shows_what_is_left_open_and_inverts_the_rest(bordered, most):
    A, normal = deficient(bordered)
    factor, tolerance = pivoted_factor(normal, most), 1e-9 if most is None else 1e-2
    null = factor.null().double()
    assert factor.rank == 40 and null.shape == (51, 11) and torch.linalg.matrix_rank(null) == 11
    assert (A @ null).norm() < tolerance * A.norm() * null.norm()
    some = A.T @ (A @ randn(51, 2, seed=7))
    assert_close(A.T @ (A @ factor.solve(some)), some, rtol=0, atol=tolerance * some.norm().item())


def test_a_rank_that_is_not_reached_is_no_factor():
    assert pivoted_factor(deficient(True)[1], 51).rank == pivoted_factor(deficient(False)[1], 52).rank == 0


@pytest.mark.parametrize("bordered", [False, True])
def test_the_weakest_directions_are_those_of_the_decomposition(bordered):
    A, normal = deficient(bordered)
    factor = pivoted_factor(normal, None)
    _, sigmas, Vh = torch.linalg.svd(A)
    U, values = weak_directions(factor, orthonormal(factor.null()), 1.01 * sigmas[36].item(), 4)
    assert_close(values[-4:], sigmas[36:40], rtol=0.05, atol=0)
    assert (Vh[39] @ U).norm() > 0.999
