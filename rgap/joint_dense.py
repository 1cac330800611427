"""Least squares by the normal equations of a structured matrix: it is never formed, its Gram matrix is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from rgap.dense import LeastSquares
from rgap.rank_numbers import power_ratio

RESOLUTION = 1e-6
"""Smallest σ / σ_max that a float64 Gram matrix of a few thousand rows can tell from zero."""

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
    """Solves the normal equations with their rank: by Cholesky where it is full, else by eigenvectors.

    Args:
        problem: The system.
        b: Right-hand side.
        rcond: Singular values of the damped system below rcond times the largest count as zero; no less than
            `RESOLUTION` is used.

    Returns:
        A `LeastSquares`; its weak directions are not looked for.
    """
    gram, rcond = problem.gram, max(rcond, RESOLUTION)
    factor, failed = scipy.linalg.lapack.dpotrf(gram.numpy(), lower=1)
    ratio = 0.0 if failed else power_ratio(gram.numpy(), factor)
    if ratio > 2 * rcond:
        lower = torch.from_numpy(factor).tril()

        def invert(v: Tensor) -> Tensor:
            return torch.cholesky_solve(v, lower)

        y = _refined(problem, b, invert)
        return LeastSquares(y, None, gram[:, :0], gram[0, :0], len(gram), ratio, None, invert)
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


def _refined(problem: Normal, b: Tensor, invert: Callable[[Tensor], Tensor]) -> Tensor:
    y = invert(problem.adjoint(b)[:, None])[:, 0]
    for _ in range(REFINEMENTS):
        rest = problem.adjoint(b - problem.apply(y)) - problem.damping.square() * y
        y = y + invert(rest[:, None])[:, 0]
    return y
