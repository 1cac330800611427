"""Dense least squares with its rank: the cutoff is an argument, the singular values around it are in the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

SAFE_RATIO = 1e-4
"""Smallest σ_min / σ_max for which the normal equations, refined once, are as good as a singular decomposition."""

WEAK_RATIO = 1e-1
"""Directions with σ / σ_max below this are named weak where the rank is not full: they are worth other equations."""


@dataclass(frozen=True)
class LeastSquares:
    """The minimum-norm minimiser of ‖A y − b‖ and the directions that A does not see.

    Attributes:
        y: (k,).
        null: Orthonormal basis of the numerical null space, (k, k − rank), or None where it is empty.
        weak: Where rank is not full, orthonormal basis of the directions kept that are below WEAK_RATIO, (k, w).
        weak_sigmas: Their singular values, (w,).
        rank: Number of singular values kept.
        above: Smallest singular value kept, relative to the largest; an estimate where rank is full.
        below: Largest singular value dropped, relative to the largest; None where none was.
        invert: The pseudo-inverse of AᵀA, damping included, (k, p) -> (k, p): y = invert(Aᵀ b).
    """

    y: Tensor
    null: Tensor | None
    weak: Tensor
    weak_sigmas: Tensor
    rank: int
    above: float
    below: float | None
    invert: Callable[[Tensor], Tensor]


def svd(A: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Singular decomposition A = U diag(S) Vh; falls back to another LAPACK where the first fails to converge.

    MKL's divide-and-conquer driver gives up on some of the well-conditioned matrices that arise here.
    """
    try:
        return torch.linalg.svd(A, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        factors = scipy.linalg.svd(A.numpy(), full_matrices=full_matrices, lapack_driver="gesvd")
        return tuple(torch.from_numpy(f) for f in factors)


def gram_matrix(A: Tensor) -> Tensor:
    """AᵀA by half the multiplications, for it is symmetric: (m, k) -> (k, k)."""
    if not A.numel():
        return A.new_zeros(A.shape[1], A.shape[1])
    upper = torch.from_numpy(scipy.linalg.blas.dsyrk(1.0, A.T.numpy())).triu()
    return upper + upper.triu(1).T


def least_squares(A: Tensor, b: Tensor, rcond: float, damping: Tensor | None = None) -> LeastSquares:
    """Solves min ‖A y − b‖² + ‖damping ∘ y‖².

    Args:
        A: (m, k).
        b: (m,).
        rcond: Singular values below rcond times the largest count as zero.
        damping: One more equation, damping_j y_j = 0, for each entry where it is not zero, (k,).

    Returns:
        A `LeastSquares` of the whole system.
    """
    if damping is None:
        damping = A.new_zeros(A.shape[1])
    return _by_cholesky(A, b, rcond, damping) or _by_directions(A, b, rcond, damping)


def _by_cholesky(A: Tensor, b: Tensor, rcond: float, damping: Tensor) -> LeastSquares | None:
    """Pivoted Cholesky of the normal equations, or None where the singular values show no wide gap at the cutoff.

    The constraint systems here either determine a direction or do not see it at all (the rank laws say which), so that
    squaring the singular values loses nothing, at a tenth of the cost of a singular decomposition.
    """
    gram = gram_matrix(A)
    gram.diagonal().add_(damping.square())
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(gram.numpy(), lower=0)
    if rank == 0:
        return None
    order = torch.from_numpy(pivots.astype("int64") - 1)
    kept, left = order[:rank], order[rank:]
    R = torch.from_numpy(factor).T.tril().T[:rank]  # columns first, as LAPACK wants it: no copy at every solve
    null = torch.zeros(len(order), len(left), dtype=A.dtype)
    null[kept] = torch.linalg.solve_triangular(R[:, :rank], -R[:, rank:], upper=True)
    null[left] = torch.eye(len(left), dtype=A.dtype)
    null = torch.linalg.qr(null)[0]

    def invert(v: Tensor) -> Tensor:  # the pseudo-inverse of the Gram matrix
        v, y = v - null @ (null.T @ v), torch.zeros_like(v)
        y[kept] = torch.cholesky_solve(v[kept], R[:, :rank], upper=True)
        return y - null @ (null.T @ y)

    largest, ratio = _singular_values(gram, invert)
    unseen = torch.cat([A @ null, damping[:, None] * null]).norm(dim=0).max().item() / largest if len(left) else None
    if ratio < max(WEAK_RATIO if len(left) else SAFE_RATIO, 2 * rcond) or (unseen or 0.0) > rcond:
        return None
    y = A.new_zeros(A.shape[1], 1)
    for _ in range(2):  # the second pass refines
        y = y + invert(A.T @ (b[:, None] - A @ y) - damping.square()[:, None] * y)
    none = A.new_zeros(A.shape[1], 0)
    return LeastSquares(y[:, 0], null if len(left) else None, none, none[0], rank, ratio, unseen, invert)


def _by_directions(A: Tensor, b: Tensor, rcond: float, damping: Tensor) -> LeastSquares:
    """Through every singular direction: from AᵀA, which holds σ down to 1e-8 of the largest, or from A below that."""
    rows = torch.diag(damping)[damping > 0]
    A, b = torch.cat([A, rows]), torch.cat([b, b.new_zeros(len(rows))])
    if rcond >= 1e-6:
        values, V = torch.linalg.eigh(gram_matrix(A))
        S, V = values.clamp(min=0).sqrt().flip(0), V.flip(1)
    else:
        _, S, Vh = svd(A, full_matrices=A.shape[0] < A.shape[1])
        S, V = torch.cat([S, S.new_zeros(A.shape[1] - len(S))]), Vh.T
    largest = S[0].item()
    rank = int((S > rcond * largest).sum()) if largest > 0 else 0
    seen, y = V[:, :rank], A.new_zeros(A.shape[1])
    for _ in range(2):
        y = y + seen @ ((seen.T @ (A.T @ (b - A @ y))) / S[:rank].square())
    full = rank == A.shape[1]
    weak = 0 if full else int((S[:rank] <= WEAK_RATIO * largest).sum())
    return LeastSquares(
        y,
        None if full else V[:, rank:],
        V[:, rank - weak : rank],
        S[rank - weak : rank],
        rank,
        S[rank - 1].item() / largest if rank else 0.0,
        None if full else (S[rank].item() / largest if largest > 0 else 0.0),
        lambda v: seen @ ((seen.T @ v) / S[:rank, None].square()),
    )


def _singular_values(gram: Tensor, invert: Callable[[Tensor], Tensor], steps: int = 8) -> tuple[float, float]:
    """σ_max of A and its smallest σ above zero relative to it, by block power iteration on AᵀA and its inverse."""
    generator = torch.Generator().manual_seed(0)
    large = small = torch.randn(len(gram), min(4, len(gram)), generator=generator, dtype=gram.dtype)
    for _ in range(steps):
        large = torch.linalg.qr(gram @ large)[0]
        small = torch.linalg.qr(invert(small))[0]
    largest = torch.linalg.eigvalsh(large.T @ gram @ large)[-1].item()
    inverse = torch.linalg.eigvalsh(small.T @ invert(small))[-1].item()
    return largest**0.5, (1 / (largest * inverse)) ** 0.5
