import pytest
import torch
from cases import matrix, randn
from torch.testing import assert_close

from rgap.linalg import gram_matrix, leading_svd, svd


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (3, 9), (0, 3), (3, 0)])
def test_the_gram_matrix_is_the_product_whole_and_symmetric(rows, columns):
    for A in (randn(rows, columns), randn(columns, rows, seed=1).T):  # rows first in memory, and columns first
        assert_close(gram_matrix(A), A.T @ A, rtol=1e-13, atol=1e-13)
        assert gram_matrix(A).equal(gram_matrix(A).T)


@pytest.mark.parametrize("full_matrices", [False, True])
def test_the_other_driver_takes_over_where_the_first_does_not_converge(monkeypatch, full_matrices):
    def gives_up(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    A = randn(3, 6)
    expected = torch.linalg.svd(A, full_matrices=full_matrices)
    monkeypatch.setattr(torch.linalg, "svd", gives_up)
    U, S, Vh = svd(A, full_matrices=full_matrices)
    assert Vh.shape == expected[2].shape
    assert_close(S, expected[1])
    assert_close(U * S @ Vh[:3], A)


@pytest.mark.parametrize(
    ("shape", "values"), [((400, 300), (1.0, 1e-3, 2e-6)), ((90, 400), (1.0,)), ((40, 30), (1.0,))]
)
def test_the_leading_singular_values_of_a_low_rank_are_those_of_the_whole_decomposition(shape, values):
    A = matrix(*shape, [*values, *[0.0] * (min(shape) - len(values))]) + 1e-10 * randn(*shape, seed=5)
    (U, S, Vh), (_, whole, right) = leading_svd(A, 1e-7), svd(A)
    count = len(values)
    assert int((S > 1e-7 * S[0]).sum()) == count
    assert_close(S[:count], whole[:count], rtol=1e-9, atol=0)
    assert 0.8 * whole[count] < S[count] < 1.001 * whole[count]
    assert_close((U[:, :count] * S[:count]) @ Vh[:count], A, rtol=0, atol=1e-8)
    assert (right[:count] - right[:count] @ Vh[:count].T @ Vh[:count]).norm() < 1e-8


def test_more_singular_values_than_the_sketch_holds_enlarge_it():
    assert (leading_svd(matrix(420, 410, [1.0] * 60 + [0.0] * 350), 1e-7)[1] > 0.5).sum() == 60
