"""Least squares with its rank: by the factors that its condition allows, the cheapest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rgap.linalg.matrices import BorderedGram, accelerator_for, orthonormal, svd
from rgap.linalg.pivoted import pivoted_factor, weak_directions
from rgap.linalg.systems import ILL_CONDITIONED_RATIO, LeastSquares, NormalEquations, Operator

CHOLESKY_MIN_RATIO = 1e-4  # smallest σ_min / σ_max for which refined normal equations are as good as singular values
GRAM_RESOLUTION = 1e-6  # smallest cutoff at which the squares of singular values still resolve them
PIVOTED_GAP = 10.0  # smallest singular value kept, in cutoffs, from which a pivoted Cholesky factor shows the rank
MAX_NEIGHBOUR_STEPS = 40  # conjugate gradients by a neighbour's inverse up to which they beat factors of its own
NEIGHBOUR_TOLERANCE = 1e-6  # relative residual down to which they are led, in each of the rounds
NEIGHBOUR_ROUNDS = 3  # solves, each with the residual that the last one has left
DEFICIENT_RESIDUAL = 1e-10  # where they end beside a null space, into which rounding leads them
MIN_SINGLE_UNKNOWNS = 1500  # unknowns from which a factor in float32 saves time
MIN_SINGLE_RATIO = 2e-3  # smallest σ_min / σ_max that a factor in float32 proves: its square is far above rounding


def least_squares(
    A: Operator, b: Tensor, rcond: float, damping: Tensor | None = None, *, gram_only: bool = False,
    most: int | None = None, near: LeastSquares | None = None,
) -> LeastSquares:  # fmt: skip
    """Solves min ‖A y − b‖² + ‖damping ∘ y‖², with the null space of the whole system.

    A is (m, k), as by `dense_operator`, b (m,), damping (k,): one more equation, damping_j y_j = 0, for each entry that
    is not zero. Singular values below rcond times the largest count as zero.

    `gram_only` is for systems too large for A to be applied to many columns: AᵀA alone decides the rank, at a cutoff of
    `GRAM_RESOLUTION` at least; Cholesky factors, refined twice, serve below `CHOLESKY_MIN_RATIO`, too; no directions
    are reported as ill-conditioned, and a null space may be known to single precision only. `most` is a rank that
    cannot be exceeded, if known, which saves trials. `near` is the solution of a system that is almost this one: where
    conjugate gradients with its factors converge at once, this system has that rank and condition, too, and its Gram
    matrix is not made. The factors of a deficient one are taken as they are.
    """
    damping = b.new_zeros(A.columns) if damping is None else damping
    normal = NormalEquations(A, b[:, None], damping, max(rcond, GRAM_RESOLUTION) if gram_only else rcond, gram_only)
    if near is not None and near.null is not None:
        return replace(near, y=normal.solve(near.rough or near.invert))
    if near is not None and (found := _by_neighbour(normal, near.rough or near.invert, near.sigma_min_kept)):
        return found
    if (device := accelerator_for(A.columns)) is not None:
        return _by_cholesky_on(device, normal) or _by_decomposition(normal, device)
    deficient, found = most is not None and most < A.columns, None
    if gram_only and A.columns >= MIN_SINGLE_UNKNOWNS:
        found = _by_pivoted_cholesky(normal, most) if deficient else _in_single_precision(normal)
    found = found or (None if deficient else _by_cholesky(normal))
    return found or _by_pivoted_cholesky(normal) or _by_decomposition(normal)


def _by_neighbour(
    normal: NormalEquations, approximate: Callable[[Tensor], Tensor], ratio: float, enough: float = 0.0,
) -> LeastSquares | None:  # fmt: skip
    """By conjugate gradients, preconditioned by the inverse of a neighbour's Gram matrix; None where they are slow.

    A relative residual of the normal equations that is `enough` ends the rounds.
    """
    A, b, squares = normal.A, normal.b, normal.damping.square()[:, None]

    def invert(v: Tensor) -> Tensor | None:
        y, rest, size, p, before = torch.zeros_like(v), v, v.norm(), None, 0.0
        for _ in range(MAX_NEIGHBOUR_STEPS):
            z = approximate(rest)
            product = (rest * z).sum()
            p, before = z if p is None else z + product / before * p, product
            q = A.adjoint(A.apply(p)) + squares * p
            step = product / (p * q).sum()
            y, rest = y + step * p, rest - step * q
            if not rest.norm() > NEIGHBOUR_TOLERANCE * size:
                return y
        return None

    y, first = torch.zeros_like(squares), A.adjoint(b).norm()
    for _ in range(NEIGHBOUR_ROUNDS):
        rest = A.adjoint(b - A.apply(y)) - squares * y
        if rest.norm() <= enough * first:
            break
        further = invert(rest)
        if further is None or not torch.isfinite(further).all():
            return None
        y = y + further
    none = b.new_zeros(A.columns, 0)
    return LeastSquares(y[:, 0], None, none, none[0], A.columns, ratio, None, invert, approximate)


def _by_cholesky(normal: NormalEquations) -> LeastSquares | None:
    """By Cholesky factors of the normal equations; None where the rank is not full, or the condition not safe."""
    invert = _cholesky(normal, torch.float64)
    return None if invert is None else _of_full_rank(normal, invert)


def _cholesky(normal: NormalEquations, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """The inverse of the Gram matrix by a factor of a dtype, on float64 vectors; None where it is not definite."""
    made = normal.A.made_gram if dtype == torch.float64 else normal.A.made_rough
    if isinstance(made, BorderedGram):
        invert = made.factored(normal.damping)
        return None if invert is None else lambda v: invert(v.to(dtype)).double()
    gram = normal.gram(dtype).numpy()
    potrf, potrs = scipy.linalg.get_lapack_funcs(("potrf", "potrs"), (gram,))
    factor, failed = potrf(gram.T, lower=1, overwrite_a=1, clean=0)
    if failed or not len(factor):
        return None
    return lambda v: torch.from_numpy(potrs(factor, v.to(dtype).numpy(), lower=1)[0]).double()


def _in_single_precision(normal: NormalEquations) -> LeastSquares | None:
    """By a Cholesky factor in float32, with which A itself is solved; None where it does not prove the rank."""
    invert = _cholesky(normal, torch.float32)
    ratio = 0.0 if invert is None else normal.smallest(invert)
    if not ratio >= max(MIN_SINGLE_RATIO, 2 * normal.rcond):
        return None
    return _by_neighbour(normal, invert, ratio)


def _by_cholesky_on(device: torch.device, normal: NormalEquations) -> LeastSquares | None:
    """The same with the factors on another device."""
    factor, failed = torch.linalg.cholesky_ex(normal.gram().to(device))
    if failed:
        return None
    return _of_full_rank(normal, lambda v: torch.cholesky_solve(v.to(device), factor).to(v.device))


def _of_full_rank(normal: NormalEquations, invert: Callable[[Tensor], Tensor]) -> LeastSquares | None:
    """The solution by factors of a Gram matrix, None where its condition is not safe."""
    ratio = normal.smallest(invert)
    if not ratio >= max(0.0 if normal.gram_only else CHOLESKY_MIN_RATIO, 2 * normal.rcond):
        return None
    none = normal.b.new_zeros(normal.unknowns, 0)
    return LeastSquares(normal.solve(invert), None, none, none[0], len(none), ratio, None, invert)


def _by_pivoted_cholesky(normal: NormalEquations, most: int | None = None) -> LeastSquares | None:
    """By pivoted Cholesky of the normal equations, or None where singular values show no wide gap at the cutoff.

    The systems of layers either determine a direction or do not see it at all (by the rank laws), so that squaring
    the singular values loses nothing, at a tenth of the cost of a singular decomposition. With `most`, which the rank
    cannot exceed, factors in float32 tell whether it is reached.
    """
    factor, single = pivoted_factor(normal, most), most is not None
    rank, safe = factor.rank, MIN_SINGLE_RATIO if single else 0.0 if normal.gram_only else CHOLESKY_MIN_RATIO
    if len(factor.U) in (0, len(factor.pivots)):
        return None
    null = orthonormal(factor.null()).double()

    def invert_beside(v: Tensor) -> Tensor:  # of vectors without a part in the null space
        y = factor.solve(v)
        return y - null @ (null.T @ y)

    def invert(v: Tensor) -> Tensor:  # the pseudo-inverse of the Gram matrix
        return invert_beside(v - null @ (null.T @ v))

    weak, sigmas, limit = null[:, :0], null[0, :0], ILL_CONDITIONED_RATIO * normal.largest
    guess = int((np.diag(factor.U) < 1.2 * limit).sum())  # the pivots nearly show how many directions are weak
    ratio = normal.smallest(invert) if normal.gram_only or not guess else 0.0
    if ratio < ILL_CONDITIONED_RATIO and not normal.gram_only:
        U, values = weak_directions(factor, null, limit, guess)
        low, ratio = values <= limit, (values[-1] / normal.largest).item()
        weak, sigmas = U[:, low], values[low]
    if not ratio >= max(safe, PIVOTED_GAP * normal.rcond):
        return None
    dropped = normal.largest_dropped(null, invert_beside if single else None)
    if dropped > normal.rcond:
        return None
    if not single:
        return LeastSquares(normal.solve(invert), null, weak, sigmas, rank, ratio, dropped, invert)
    found = _by_neighbour(normal, invert_beside, ratio, DEFICIENT_RESIDUAL)
    return found and replace(found, null=null, rank=rank, sigma_max_dropped=dropped)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; of a large matrix of zeros, which no equation makes, LAPACK's would take seconds too."""
    return torch.linalg.eigh(gram) if gram.any() else (gram[0], torch.eye(len(gram), dtype=gram.dtype))


def _by_decomposition(normal: NormalEquations, device: torch.device | str = "cpu") -> LeastSquares:
    """By every singular direction: from AᵀA, which holds σ down to 1e-8 of the largest, or from A below that."""
    if normal.rcond >= GRAM_RESOLUTION:
        values, V = (t.cpu() for t in _eigen(normal.gram().to(device)))
        S, V = values.clamp(min=0).sqrt().flip(0), V.flip(1)
    else:
        A = torch.cat([normal.A.matrix(), torch.diag(normal.damping)[normal.damping > 0]])
        _, S, Vh = svd(A, full_matrices=A.shape[0] < A.shape[1])
        S, V = torch.cat([S, S.new_zeros(len(Vh) - len(S))]), Vh.T
    largest = S[0].item()
    rank = int((S > normal.rcond * largest).sum()) if largest > 0 else 0
    seen, full = V[:, :rank], rank == len(S)

    def invert(v: Tensor) -> Tensor:
        return seen @ ((seen.T @ v) / S[:rank, None].square())

    weak = 0 if full or normal.gram_only else int((S[:rank] <= ILL_CONDITIONED_RATIO * largest).sum())
    weak = slice(rank - weak, rank)
    kept = S[rank - 1].item() / largest if rank else 0.0
    dropped = None if full else (S[rank].item() / largest if largest > 0 else 0.0)
    null = None if full else V[:, rank:]
    return LeastSquares(normal.solve(invert), null, V[:, weak], S[weak], rank, kept, dropped, invert)
