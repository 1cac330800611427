"""Least squares by the normal equations of a structured matrix: it is never formed, its Gram matrix is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rgap.linalg import LeastSquares

RESOLUTION = 1e-6
"""Smallest σ / σ_max that a float64 Gram matrix of a few thousand rows can tell from zero."""

CLEAR = 10.0
"""Smallest singular value kept, in units of the cutoff, from which a pivoted Cholesky factor tells the rank."""

REFINEMENTS = 2
"""Solves with the residual of the matrix itself: they give back what squaring its singular values costs."""


@dataclass(frozen=True)
class Normal:
    """A least-squares problem min ‖A y − b‖² + ‖damping ∘ y‖² through its normal equations.

    Attributes:
        gram: AᵀA + diag(damping²), (k, k).
        apply: y -> A y.
        adjoint: r -> Aᵀ r.
        damping: (k,).
    """

    gram: Tensor
    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    damping: Tensor


def solve_normal(problem: Normal, b: Tensor, rcond: float) -> LeastSquares:
    """Solves the normal equations with their rank: by Cholesky, pivoted where it is not full, else by eigenvectors.

    Args:
        problem: The system.
        b: Right-hand side.
        rcond: Singular values of the damped system below rcond times the largest count as zero; no less than
            `RESOLUTION` is used.

    Returns:
        A `LeastSquares`; its weak directions are not looked for.
    """
    gram, rcond = problem.gram, max(rcond, RESOLUTION)
    factor, failed = scipy.linalg.lapack.dpotrf(gram.numpy().T, lower=1)  # symmetric: columns first at no cost

    def invert(v: Tensor) -> Tensor:
        return torch.from_numpy(scipy.linalg.cho_solve((factor, True), v.numpy(), check_finite=False))

    if not failed and (ratio := _extremes(gram, invert)[1]) > 2 * rcond:
        y = _refined(problem, b, invert)
        return LeastSquares(y, None, gram[:, :0], gram[0, :0], len(gram), ratio, None, invert)
    return _pivoted(problem, b, rcond) or _by_directions(problem, b, rcond)


def _pivoted(problem: Normal, b: Tensor, rcond: float) -> LeastSquares | None:
    """Pivoted Cholesky, or None where the singular values show no wide gap at the cutoff."""
    gram = problem.gram
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(gram.numpy().T, lower=1, tol=1e-13 * gram.diagonal().max())
    if not 0 < rank < len(gram):
        return None
    order = torch.from_numpy(pivots.astype("int64") - 1)
    kept, left, lower = order[:rank], order[rank:], np.asfortranarray(factor[:rank, :rank])
    null = gram.new_zeros(len(gram), len(left))
    null[left] = torch.eye(len(left), dtype=gram.dtype)
    null[kept] = torch.from_numpy(-scipy.linalg.solve_triangular(lower, factor[rank:, :rank].T, trans=1, lower=True))
    null = torch.linalg.qr(null)[0]

    def invert(v: Tensor) -> Tensor:
        v, y = v - null @ (null.T @ v), torch.zeros_like(v)
        y[kept] = torch.from_numpy(scipy.linalg.cho_solve((lower, True), v[kept].numpy(), check_finite=False))
        return y - null @ (null.T @ y)

    largest, above = _extremes(gram, invert)
    below = (gram @ null).norm(dim=0).max().item() ** 0.5 / largest
    if above < CLEAR * rcond or below > rcond:
        return None
    y = _refined(problem, b, invert)
    return LeastSquares(y, null, gram[:, :0], gram[0, :0], rank, above, below, invert)


def _by_directions(problem: Normal, b: Tensor, rcond: float) -> LeastSquares:
    gram = problem.gram
    values, Q = torch.linalg.eigh(gram)
    S, Q = values.clamp(min=0).sqrt().flip(0), Q.flip(1)
    largest = S[0].item()
    rank = int((S > rcond * largest).sum()) if largest > 0 else 0
    seen, kept = Q[:, :rank], S[:rank]

    def invert(v: Tensor) -> Tensor:
        return seen @ ((seen.T @ v) / kept.square()[:, None])

    y = _refined(problem, b, invert)
    full = rank == len(S)
    above, below = (S[i].item() / largest if largest > 0 and 0 <= i < len(S) else 0.0 for i in (rank - 1, rank))
    return LeastSquares(y, None if full else Q[:, rank:], Q[:, :0], S[:0], rank, above, None if full else below, invert)


def _extremes(gram: Tensor, invert: Callable[[Tensor], Tensor], steps: int = 10) -> tuple[float, float]:
    """σ_max and the smallest σ above zero relative to it, by block power iteration (an upper bound, close)."""
    generator = torch.Generator().manual_seed(0)
    large = small = torch.randn(len(gram), min(4, len(gram)), generator=generator, dtype=gram.dtype)
    for _ in range(steps):
        large = torch.linalg.qr(gram @ large)[0]
        small = torch.linalg.qr(invert(small))[0]
    largest = torch.linalg.eigvalsh(large.T @ gram @ large)[-1].item()
    smallest = torch.linalg.eigvalsh(small.T @ gram @ small)[0].item()
    return largest**0.5, (max(smallest, 0.0) / largest) ** 0.5


def _refined(problem: Normal, b: Tensor, invert: Callable[[Tensor], Tensor]) -> Tensor:
    y = invert(problem.adjoint(b)[:, None])[:, 0]
    for _ in range(REFINEMENTS):
        rest = problem.adjoint(b - problem.apply(y)) - problem.damping.square() * y
        y = y + invert(rest[:, None])[:, 0]
    return y
