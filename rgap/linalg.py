"""Dense least squares with its rank: the cutoff is an argument, the singular values around it are in the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

SAFE_RATIO = 1e-4
"""Smallest σ_min / σ_max for which the normal equations, refined once, are as good as a singular decomposition."""

RESOLUTION = 1e-6
"""Smallest cutoff at which singular values are told apart by their squares."""

SETTLED = 0.01
"""Relative gain of a Lanczos step below which the largest eigenvalue counts as found."""

WEAK_RATIO = 1e-1
"""Directions with σ / σ_max below this are named weak where the rank is not full: they are worth other equations."""


@dataclass(frozen=True)
class Operator:
    """A matrix A of m rows and k columns that need not be formed.

    Attributes:
        gram: AᵀA, (k, k).
        apply: Y -> A Y, (k, p) -> (m, p).
        adjoint: R -> Aᵀ R, (m, p) -> (k, p).
    """

    gram: Tensor
    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]

    def matrix(self) -> Tensor:
        """A itself, column by column."""
        return self.apply(torch.eye(len(self.gram), dtype=self.gram.dtype))


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


def dense_operator(A: Tensor) -> Operator:
    """A matrix (m, k) as an operator."""
    return Operator(gram_matrix(A), lambda Y: A @ Y, lambda R: A.T @ R)


def least_squares(A: Operator, b: Tensor, rcond: float, damping: Tensor | None = None) -> LeastSquares:
    """Solves min ‖A y − b‖² + ‖damping ∘ y‖².

    Args:
        A: (m, k), as by `dense_operator`.
        b: (m,).
        rcond: Singular values below rcond times the largest count as zero.
        damping: One more equation, damping_j y_j = 0, for each entry where it is not zero, (k,).

    Returns:
        A `LeastSquares` of the whole system.
    """
    if damping is None:
        damping = A.gram.new_zeros(len(A.gram))
    gram = A.gram.clone()
    gram.diagonal().add_(damping.square())
    normal = _Normal(A, b[:, None], damping, gram)
    return _of_full_rank(normal, rcond) or _by_pivots(normal, rcond) or _by_directions(normal, rcond)


@dataclass(frozen=True)
class _Normal:
    """The system and its normal equations."""

    A: Operator
    b: Tensor  # (m, 1)
    damping: Tensor
    gram: Tensor  # AᵀA + diag(damping²)

    def solve(self, invert: Callable[[Tensor], Tensor]) -> Tensor:
        """By the pseudo-inverse of the Gram matrix; a second pass refines."""
        y = invert(self.A.adjoint(self.b))
        return (y + invert(self.A.adjoint(self.b - self.A.apply(y)) - self.damping.square()[:, None] * y))[:, 0]


def _of_full_rank(normal: _Normal, rcond: float) -> LeastSquares | None:
    """By Cholesky factors of the normal equations; None where the rank is not full, or the condition not safe."""
    factor, failed = scipy.linalg.lapack.dpotrf(normal.gram.numpy(), lower=1)
    if failed or not len(factor):
        return None

    def invert(v: Tensor) -> Tensor:
        return torch.from_numpy(scipy.linalg.lapack.dpotrs(factor, v.numpy(), lower=1)[0])

    _, ratio = _singular_values(normal.gram, invert)
    if not ratio >= max(SAFE_RATIO, 2 * rcond):
        return None
    none = normal.gram[:, :0]
    return LeastSquares(normal.solve(invert), None, none, none[0], len(none), ratio, None, invert)


def _by_pivots(normal: _Normal, rcond: float) -> LeastSquares | None:
    """By pivoted Cholesky of the normal equations, or None where singular values show no wide gap at the cutoff.

    The constraint systems here either determine a direction or do not see it at all (the rank laws say which), so that
    squaring the singular values loses nothing, at a tenth of the cost of a singular decomposition.
    """
    gram, A, damping = normal.gram, normal.A, normal.damping
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(gram.numpy(), lower=0)
    if rank in (0, len(gram)):
        return None
    order = torch.from_numpy(pivots.astype("int64") - 1)
    kept, left = order[:rank], order[rank:]
    R = torch.from_numpy(factor).T.tril().T[:rank]  # columns first, as LAPACK wants it: no copy at every solve
    if R[-1].norm() < WEAK_RATIO * R[0].norm():  # bounds of the smallest and the largest singular value
        return None
    null = torch.zeros(len(order), len(left), dtype=gram.dtype)
    null[kept] = torch.linalg.solve_triangular(R[:, :rank], -R[:, rank:], upper=True)
    null[left] = torch.eye(len(left), dtype=gram.dtype)
    null = torch.linalg.qr(null)[0]

    def invert(v: Tensor) -> Tensor:  # the pseudo-inverse of the Gram matrix
        v, y = v - null @ (null.T @ v), torch.zeros_like(v)
        y[kept] = torch.cholesky_solve(v[kept], R[:, :rank], upper=True)
        return y - null @ (null.T @ y)

    largest, ratio = _singular_values(gram, invert)
    if not ratio >= max(WEAK_RATIO, 2 * rcond):
        return None
    unseen = torch.cat([A.apply(null), damping[:, None] * null]).norm(dim=0).max().item() / largest
    if unseen > rcond:
        return None
    none = gram[:, :0]
    return LeastSquares(normal.solve(invert), null, none, none[0], rank, ratio, unseen, invert)


def _by_directions(normal: _Normal, rcond: float) -> LeastSquares:
    """Through every singular direction: from AᵀA, which holds σ down to 1e-8 of the largest, or from A below that."""
    count = len(normal.gram)
    if rcond >= RESOLUTION:
        values, V = torch.linalg.eigh(normal.gram)
        S, V = values.clamp(min=0).sqrt().flip(0), V.flip(1)
    else:
        A = torch.cat([normal.A.matrix(), torch.diag(normal.damping)[normal.damping > 0]])
        _, S, Vh = svd(A, full_matrices=A.shape[0] < A.shape[1])
        S, V = torch.cat([S, S.new_zeros(count - len(S))]), Vh.T
    largest = S[0].item()
    rank = int((S > rcond * largest).sum()) if largest > 0 else 0
    seen, full = V[:, :rank], rank == count

    def invert(v: Tensor) -> Tensor:
        return seen @ ((seen.T @ v) / S[:rank, None].square())

    weak = 0 if full else int((S[:rank] <= WEAK_RATIO * largest).sum())
    return LeastSquares(
        normal.solve(invert),
        None if full else V[:, rank:],
        V[:, rank - weak : rank],
        S[rank - weak : rank],
        rank,
        S[rank - 1].item() / largest if rank else 0.0,
        None if full else (S[rank].item() / largest if largest > 0 else 0.0),
        invert,
    )


def _singular_values(gram: Tensor, invert: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """σ_max of A and its smallest σ above zero relative to it, by Lanczos on AᵀA and on its inverse."""
    largest = _largest_eigenvalue(lambda v: gram @ v, len(gram), gram.dtype)
    inverse = _largest_eigenvalue(invert, len(gram), gram.dtype)
    return largest**0.5, (largest * inverse) ** -0.5 if largest * inverse > 0 else 0.0


def _largest_eigenvalue(multiply: Callable[[Tensor], Tensor], size: int, dtype: torch.dtype, steps: int = 30) -> float:
    """Of a symmetric matrix that is not negative, from below: Lanczos until a step gains less than `SETTLED`."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(size, 1, generator=generator, dtype=dtype)
    basis, diagonal, beside, found = v / v.norm(), [], [], 0.0
    for _ in range(min(steps, size)):
        w = multiply(basis[:, -1:])
        diagonal.append((basis[:, -1] @ w[:, 0]).item())
        last, found = found, eigvalsh_tridiagonal(diagonal, beside)[-1] if beside else diagonal[0]
        w = w - basis @ (basis.T @ w)
        w = w - basis @ (basis.T @ w)
        beside.append(w.norm().item())
        if not found * (1 - SETTLED) > last or not beside[-1] > 1e-12 * found:
            break
        basis = torch.cat([basis, w / beside[-1]], 1)
    return float(found)


def rms(g: Tensor) -> Tensor:
    """Root mean square."""
    size = g.norm()
    if 1e-140 < size < 1e140:
        return size / g.numel() ** 0.5
    largest = g.abs().max()  # squares of the smallest gradients underflow
    return largest if largest == 0 else largest * (g / largest).square().mean().sqrt()
