"""Linear algebra modulo a prime, exact in float64: the rank and the null space of a matrix.

Residues stay below 2²², so that 256 products add up below 2⁵³, and BLAS multiplies them without any rounding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PRIME_MODULUS = 4_194_301  # the largest prime below 2²²
EXACT_TERMS = 256  # products of two residues that add up to a float64 without rounding
BASE_COLUMNS = 24  # columns that are eliminated one by one; more are halved, so that nearly all work is matrix products


def residues(values: NDArray) -> NDArray:
    """Whole numbers below 2⁵³ in size, modulo the prime."""
    return values - PRIME_MODULUS * np.floor(values / PRIME_MODULUS)


def product(A: NDArray, B: NDArray) -> NDArray:
    """A (m, k) times B (k, n)."""
    total = np.zeros((len(A), B.shape[1]))
    for start in range(0, A.shape[1], EXACT_TERMS):
        total = residues(total + residues(A[:, start : start + EXACT_TERMS] @ B[start : start + EXACT_TERMS]))
    return total


def factor(A: NDArray) -> tuple[NDArray, NDArray]:
    """An order of the rows (m,), and L (m, r) with ones on its diagonal and zeros above: A[order] = L E, E of rank r.

    The columns are halved: what the left ones determine is taken off the right ones (Jeannerod, Pernet and Storjohann's
    PLE decomposition).
    """
    if A.shape[1] <= BASE_COLUMNS:
        return _factor_by_columns(A.copy())
    half = A.shape[1] // 2
    order, L = factor(A[:, :half])
    r = L.shape[1]
    right = A[order, half:]
    top = solve_lower(L[:r], right[:r])
    inner, M = factor(residues(right[r:] - product(L[r:], top)))
    below = np.hstack([L[r:][inner], M])
    return np.r_[order[:r], order[r:][inner]], np.vstack([np.pad(L[:r], ((0, 0), (0, M.shape[1]))), below])


def _factor_by_columns(A: NDArray) -> tuple[NDArray, NDArray]:
    order, L, r = np.arange(len(A)), np.zeros((len(A), min(A.shape))), 0
    for j in range(A.shape[1]):
        pivots = np.flatnonzero(A[r:, j])
        if not len(pivots):
            continue
        if (pivot := r + pivots[0]) != r:
            for each in (A, L, order):
                each[[r, pivot]] = each[[pivot, r]]
        L[r:, r] = residues(A[r:, j] * pow(int(A[r, j]), -1, PRIME_MODULUS))
        A[r + 1 :, j + 1 :] = residues(A[r + 1 :, j + 1 :] - np.outer(L[r + 1 :, r], A[r, j + 1 :]))
        r += 1
        if r == len(A):
            break
    return order, L[:, :r]


def solve_lower(L: NDArray, B: NDArray) -> NDArray:
    """X with L X = B for L (r, r) with ones on its diagonal and zeros above."""
    if len(L) <= BASE_COLUMNS:
        X = B.copy()
        for i in range(1, len(L)):
            X[i] = residues(X[i] - L[i, :i] @ X[:i])
        return X
    half = len(L) // 2
    top = solve_lower(L[:half, :half], B[:half])
    return np.vstack([top, solve_lower(L[half:, half:], residues(B[half:] - product(L[half:, :half], top)))])


def rank(A: NDArray) -> int:
    """The rank of a matrix of residues."""
    return factor(A if A.shape[0] >= A.shape[1] else A.T)[1].shape[1]


def null_space(A: NDArray) -> NDArray:
    """A basis of the vectors that A (m, n) maps to zero, as columns (n, n − r)."""
    order, L = factor(A.T)
    r = L.shape[1]
    free = solve_lower(L[:r].T[::-1, ::-1], L[r:].T[::-1])[::-1]  # L₁ᵀ is upper triangular; turned about it is lower
    basis = np.empty((A.shape[1], A.shape[1] - r))
    basis[order] = np.vstack([residues(-free), np.eye(len(L) - r)])
    return basis
