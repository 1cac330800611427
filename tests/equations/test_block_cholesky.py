import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose

from rgap.equations.block_cholesky import MIN_BLOCK, block_cholesky


def banded(n, band, seed=0):
    """A positive definite matrix of a bandwidth, with its rows in disorder, and the order that narrows it."""
    A = np.tril(np.triu(np.random.default_rng(seed).standard_normal((n, n)), -band), 0)
    order = np.random.default_rng(seed + 1).permutation(n)
    S = np.empty((n, n))
    S[np.ix_(order, order)] = A @ A.T + n * np.eye(n)
    return S, order


@pytest.mark.parametrize(("n", "band", "blocks"), [(300, 70, 5), (200, 3, 4), (100, 60, 1), (MIN_BLOCK, 1, 1)])
def test_columns_are_solved_for_block_by_block(n, band, blocks):
    S, order = banded(n, band)
    found = block_cholesky(sp.csr_array(S), order)
    assert len(found.diagonal) == blocks and len(found.below) == blocks - 1
    for right in (np.eye(n), np.ones((n, 1)), np.zeros((n, 0))):
        before = right.copy()
        assert_allclose(S @ found.solve(right), right, atol=1e-12)
        assert (right == before).all()
    assert_allclose(S @ found.rough.solve(np.eye(n)), np.eye(n), atol=1e-4)
    assert found.rough.solve(np.eye(n)).dtype == np.float32
    assert_allclose(2 * np.log(found.pivots).sum(), np.linalg.slogdet(S)[1])


@pytest.mark.parametrize("row", [0, 299])
def test_a_matrix_that_is_not_positive_definite_has_no_factor(row):
    S, order = banded(300, 70)
    S[order[row], order[row]] = -1.0
    assert block_cholesky(sp.csr_array(S), order) is None
