import numpy as np
import pytest

from rgap.equations.prime_field import PRIME_MODULUS, factor, null_space, product, rank, residues, solve_lower


def random(rng, *shape):
    return rng.integers(0, PRIME_MODULUS, shape).astype(float)


def exact(A, B):
    """The product by Python's integers."""
    return (A.astype(int).astype(object) @ B.astype(int).astype(object)) % PRIME_MODULUS


def test_the_modulus_is_prime_and_small_enough():
    assert all(PRIME_MODULUS % k for k in range(2, 2049)) and 256 * (PRIME_MODULUS - 1) ** 2 < 2**53


def test_products_are_those_of_whole_numbers():
    A, B = np.full((3, 700), PRIME_MODULUS - 1.0), np.full((700, 2), PRIME_MODULUS - 1.0)
    assert (product(A, B) == exact(A, B)).all()
    rng = np.random.default_rng(0)
    A, B = random(rng, 20, 300), random(rng, 300, 7)
    assert (product(A, B) == exact(A, B)).all()
    assert residues(np.array([-1.0, 0.0, PRIME_MODULUS])).tolist() == [PRIME_MODULUS - 1, 0, 0]


@pytest.mark.parametrize(
    ("m", "n", "r"), [(50, 70, 33), (120, 90, 60), (90, 90, 90), (5, 100, 5), (40, 30, 0), (3, 0, 0)]
)
def test_factors_rank_and_null_space(m, n, r):
    rng = np.random.default_rng(m)
    A = product(random(rng, m, r), random(rng, r, n))
    order, L = factor(A)
    assert L.shape == (m, r) and sorted(order) == list(range(m)) and rank(A) == r
    assert (np.diag(L) == 1).all() and not np.triu(L, 1).any()
    E = solve_lower(L[:r], A[order[:r]])
    assert not residues(product(L, E) - A[order]).any()
    basis = null_space(A)
    assert basis.shape == (n, n - r) and not product(A, basis).any() and rank(basis) == n - r


def test_columns_of_zeros_and_equal_rows_have_no_pivots():
    A = np.zeros((60, 60))
    A[10:13, 40] = 5.0
    A[:, 7] = 1.0
    assert rank(A) == 2
