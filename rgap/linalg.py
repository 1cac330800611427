"""Least squares with its rank, Gram matrices, orthonormal bases and norms; knows no network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rgap.isolation import accelerator
from rgap.krylov import largest_eigenvalue

CHOLESKY_MIN_RATIO = 1e-4
"""Smallest σ_min / σ_max for which the normal equations, refined once, are as good as a singular decomposition."""

GRAM_RESOLUTION = 1e-6  # smallest cutoff at which the squares of singular values still resolve them

PIVOTED_GAP = 10.0
"""Smallest singular value kept, in units of the cutoff, from which a pivoted Cholesky factor shows the rank."""

ILL_CONDITIONED_RATIO = 1e-1
"""Where the rank is not full, kept directions with σ / σ_max below this are reported, for other equations to decide."""


WIDE_RATIO = 8  # columns over rows from which a Gram matrix is made without use of its symmetry
MIN_ON_ACCELERATOR = 256  # unknowns from which a system is worth the way to an accelerator and back
WEAK_SURPLUS = 16  # directions iterated beside those that are expected to be ill-conditioned

INVERSE_ITERATIONS = 2
"""Block inverse iterations for ill-conditioned directions, from those that the smallest pivots show."""

DROPPED_STEPS = 4  # Lanczos steps for the largest singular value dropped: of rounding, only its size counts

MAX_NEIGHBOUR_STEPS = 40
"""Steps of conjugate gradients with a neighbour's inverse up to which they are quicker than factors of its own."""

NEIGHBOUR_TOLERANCE = 1e-6  # relative residual down to which they are led, in each of the rounds
NEIGHBOUR_ROUNDS = 3  # solves, each with the residual that the last one has left
SKETCH_SIZE = 24  # columns of a random sketch at first
SKETCH_SURPLUS = 12  # columns that it must have beyond the singular values that count


@dataclass(frozen=True)
class Operator:
    """A matrix A of m rows and k columns that need not be formed."""

    columns: int  # k
    make_gram: Callable[[], Tensor]
    apply: Callable[[Tensor], Tensor]  # Y -> A Y, (k, p) -> (m, p)
    adjoint: Callable[[Tensor], Tensor]  # R -> Aᵀ R, (m, p) -> (k, p)

    @cached_property
    def gram(self) -> Tensor:
        """AᵀA, (k, k)."""
        return self.make_gram()

    def matrix(self) -> Tensor:
        """A itself, column by column."""
        return self.apply(torch.eye(self.columns, dtype=torch.float64))


@dataclass(frozen=True)
class LeastSquares:
    """The minimum-norm minimiser of ‖A y − b‖ and the null space of A.

    Where the rank is not full, `ill_conditioned` is an orthonormal basis of the directions kept whose singular value is
    below ILL_CONDITIONED_RATIO of the largest.
    """

    y: Tensor  # (k,)
    null: Tensor | None  # orthonormal basis of the numerical null space, (k, k − rank), None where it is empty
    ill_conditioned: Tensor  # (k, w)
    ill_conditioned_sigmas: Tensor  # (w,)
    rank: int  # number of singular values kept
    sigma_min_kept: float  # relative to the largest; an estimate unless a decomposition was made
    sigma_max_dropped: float | None  # relative to the largest; None where none was dropped
    invert: Callable[[Tensor], Tensor]  # pseudo-inverse of AᵀA, damping included, (k, p): y = invert(Aᵀ b)

    @property
    def condition(self) -> float:
        """Largest over smallest singular value kept; infinite where none is."""
        return 1 / self.sigma_min_kept if self.sigma_min_kept else float("inf")


def svd(A: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Singular decomposition A = U diag(S) Vh, by a second LAPACK driver where MKL's fast one does not converge."""
    try:
        return torch.linalg.svd(A, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        factors = scipy.linalg.svd(A.numpy(), full_matrices=full_matrices, lapack_driver="gesvd")
        return tuple(torch.from_numpy(f) for f in factors)


def leading_svd(A: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of A with every singular value above cut · σ_max, and some below: of low rank in a few products.

    A random sketch (Halko, Martinsson & Tropp 2011, with a power iteration) is enlarged until it holds them all; the
    largest value below the cut may come out some per cent too small. The whole decomposition where that is cheaper.
    """
    generator, size = torch.Generator().manual_seed(0), SKETCH_SIZE
    while 4 * size < min(A.shape):
        Q = A @ torch.randn(A.shape[1], size, generator=generator, dtype=A.dtype)
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ torch.linalg.qr(Q)[0])[0])[0]
        U, S, Vh = svd(Q.T @ A)
        if S[-SKETCH_SURPLUS] <= cut * S[0]:
            return Q @ U, S, Vh
        size *= 4
    return svd(A)


def gram_matrix(A: Tensor) -> Tensor:
    """AᵀA at half the multiplications of a product, for it is symmetric: (m, k) -> (k, k)."""
    if not A.numel():
        return A.new_zeros(A.shape[1], A.shape[1])
    if (device := accelerator.get()) is not None and A.shape[1] >= MIN_ON_ACCELERATOR:
        there = A.to(device)
        return (there.T @ there).to(A.device)
    if WIDE_RATIO * len(A) < A.shape[1]:  # mirroring would cost more than it saves
        return A.T @ A
    upper = torch.from_numpy(scipy.linalg.blas.dsyrk(1.0, A.T.numpy())).triu()
    return upper + upper.triu(1).T


def orthonormal(A: Tensor, times: int = 2) -> Tensor:
    """Orthonormal columns with the span of A's, by Cholesky factors of Gram matrices; QR where A is ill-conditioned."""
    for _ in range(times if A.shape[1] else 0):
        factor, failed = torch.linalg.cholesky_ex(gram_matrix(A))
        if failed:
            return torch.linalg.qr(A)[0]
        A = torch.linalg.solve_triangular(factor.T, A, upper=True, left=False)
    return A


def dense_operator(A: Tensor) -> Operator:
    """A matrix (m, k) as an operator."""
    return Operator(A.shape[1], lambda: gram_matrix(A), lambda Y: A @ Y, lambda R: A.T @ R)


def least_squares(
    A: Operator,
    b: Tensor,
    rcond: float,
    damping: Tensor | None = None,
    *,
    gram_only: bool = False,
    deficient: bool = False,
    near: tuple[Callable[[Tensor], Tensor], float] | None = None,
) -> LeastSquares:
    """Solves min ‖A y − b‖² + ‖damping ∘ y‖², with the null space of the whole system.

    A is (m, k), as by `dense_operator`, b (m,), damping (k,): one more equation, damping_j y_j = 0, for each entry that
    is not zero. Singular values below rcond times the largest count as zero.

    `gram_only` is for systems too large for A to be applied to many columns: AᵀA alone decides the rank, at a cutoff of
    `GRAM_RESOLUTION` at least; Cholesky factors, refined twice, serve below `CHOLESKY_MIN_RATIO`, too; no directions
    are reported as ill-conditioned. `deficient` tells that the rank cannot be full, which saves a trial. `near` is the
    inverse of the Gram matrix of a system of full rank that is almost this one, and its σ_min / σ_max: where conjugate
    gradients with it converge at once this system has that rank and condition, too, and its Gram matrix is not made.
    """
    damping = b.new_zeros(A.columns) if damping is None else damping
    if near is not None and (found := _by_neighbour(A, b[:, None], damping, *near)) is not None:
        return found
    normal = _Normal(A, b[:, None], damping, max(rcond, GRAM_RESOLUTION) if gram_only else rcond, gram_only)
    device = accelerator.get()
    if device is not None and A.columns >= MIN_ON_ACCELERATOR:
        return _by_cholesky_on(device, normal) or _by_decomposition(normal, device)
    full = None if deficient else _by_cholesky(normal)
    return full or _by_pivoted_cholesky(normal) or _by_decomposition(normal)


def _by_neighbour(
    A: Operator, b: Tensor, damping: Tensor, approximate: Callable[[Tensor], Tensor], ratio: float
) -> LeastSquares | None:
    """By conjugate gradients, preconditioned by the inverse of a neighbour's Gram matrix; None where they are slow."""
    squares = damping.square()[:, None]

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

    y = torch.zeros_like(damping)[:, None]
    for _ in range(NEIGHBOUR_ROUNDS):
        further = invert(A.adjoint(b - A.apply(y)) - squares * y)
        if further is None or not torch.isfinite(further).all():
            return None
        y = y + further
    none = b.new_zeros(A.columns, 0)
    return LeastSquares(y[:, 0], None, none, none[0], A.columns, ratio, None, invert)


@dataclass(frozen=True)
class _Normal:
    """The system, b (m, 1), and its normal equations."""

    A: Operator
    b: Tensor
    damping: Tensor
    rcond: float
    gram_only: bool

    @property
    def unknowns(self) -> int:
        """Columns of A."""
        return len(self.damping)

    def gram(self) -> Tensor:
        """AᵀA + diag(damping²), for a factor to overwrite."""
        gram = self.A.gram.clone()
        gram.diagonal().add_(self.damping.square())
        return gram

    def multiply(self, v: Tensor) -> Tensor:
        """The same times v, (k, p)."""
        return torch.addcmul(self.A.gram @ v, self.damping.square()[:, None], v)

    def solve(self, invert: Callable[[Tensor], Tensor]) -> Tensor:
        """By the pseudo-inverse of the Gram matrix, refined with the residual of the matrix itself."""
        y = invert(self.A.adjoint(self.b))
        for _ in range(2 if self.gram_only else 1):
            rest = self.A.adjoint(self.b - self.A.apply(y)) - self.damping.square()[:, None] * y
            y = y + invert(rest)
        return y[:, 0]

    @cached_property
    def largest(self) -> float:
        """σ_max, by Lanczos on the Gram matrix."""
        return largest_eigenvalue(self.multiply, self.unknowns) ** 0.5

    def smallest(self, invert: Callable[[Tensor], Tensor]) -> float:
        """The smallest σ above zero relative to σ_max, by Lanczos on the Gram matrix's inverse."""
        inverse = largest_eigenvalue(invert, self.unknowns) ** 0.5 * self.largest
        return 1 / inverse if inverse > 0 else 0.0

    def largest_dropped(self, null: Tensor) -> float:
        """About the largest σ of a null space, damping included, relative to σ_max."""
        if self.gram_only:
            return self.multiply(null).norm(dim=0).max().item() ** 0.5 / self.largest

        def multiply(v: Tensor) -> Tensor:
            v = null @ v
            return null.T @ (self.A.adjoint(self.A.apply(v)) + self.damping.square()[:, None] * v)

        return max(largest_eigenvalue(multiply, null.shape[1], DROPPED_STEPS), 0.0) ** 0.5 / self.largest


def _by_cholesky(normal: _Normal) -> LeastSquares | None:
    """By Cholesky factors of the normal equations; None where the rank is not full, or the condition not safe."""
    factor, failed = scipy.linalg.lapack.dpotrf(normal.gram().numpy().T, lower=1, overwrite_a=1)
    if failed or not len(factor):
        return None

    def invert(v: Tensor) -> Tensor:
        return torch.from_numpy(scipy.linalg.lapack.dpotrs(factor, v.numpy(), lower=1)[0])

    return _of_full_rank(normal, invert)


def _by_cholesky_on(device: torch.device, normal: _Normal) -> LeastSquares | None:
    """The same with the factors on another device."""
    factor, failed = torch.linalg.cholesky_ex(normal.gram().to(device))
    if failed:
        return None
    return _of_full_rank(normal, lambda v: torch.cholesky_solve(v.to(device), factor).to(v.device))


def _of_full_rank(normal: _Normal, invert: Callable[[Tensor], Tensor]) -> LeastSquares | None:
    """The solution by factors of a Gram matrix, None where its condition is not safe."""
    ratio = normal.smallest(invert)
    if not ratio >= max(0.0 if normal.gram_only else CHOLESKY_MIN_RATIO, 2 * normal.rcond):
        return None
    none = normal.A.gram[:, :0]
    return LeastSquares(normal.solve(invert), None, none, none[0], len(none), ratio, None, invert)


def _by_pivoted_cholesky(normal: _Normal) -> LeastSquares | None:
    """By pivoted Cholesky of the normal equations, or None where singular values show no wide gap at the cutoff.

    The systems of layers either determine a direction or do not see it at all (by the rank laws), so that squaring
    the singular values loses nothing, at a tenth of the cost of a singular decomposition.
    """
    gram, safe = normal.A.gram, 0.0 if normal.gram_only else CHOLESKY_MIN_RATIO
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(normal.gram().numpy().T, lower=0, overwrite_a=1)
    if rank in (0, len(gram)):
        return None
    order = torch.from_numpy(pivots.astype("int64") - 1)
    kept, left = order[:rank], order[rank:]
    square = np.asfortranarray(factor[:rank, :rank])  # triangular: the lower half is never read
    null = torch.zeros(len(order), len(left), dtype=gram.dtype)
    null[kept] = torch.from_numpy(scipy.linalg.blas.dtrsm(-1.0, square, factor[:rank, rank:]))
    null[left] = torch.eye(len(left), dtype=gram.dtype)
    null = orthonormal(null)

    def beside_null(y: Tensor) -> Tensor:
        return y - null @ (null.T @ y)

    def invert_beside(v: Tensor) -> Tensor:  # of vectors without a part in the null space
        y = torch.zeros_like(v)
        y[kept] = torch.from_numpy(scipy.linalg.lapack.dpotrs(square, v[kept].numpy(), lower=0)[0])
        return beside_null(y)

    def invert(v: Tensor) -> Tensor:  # the pseudo-inverse of the Gram matrix
        return invert_beside(beside_null(v))

    def weakest(count: int) -> Tensor:  # roughly, by the smallest pivots
        y, last = torch.zeros(len(gram), count, dtype=gram.dtype), np.eye(rank, count, count - rank)
        y[kept] = torch.from_numpy(scipy.linalg.blas.dtrsm(1.0, square, last))
        return beside_null(y)

    weak, sigmas = gram[:, :0], gram[0, :0]
    guess = int(
        (np.diag(square) < 2 * ILL_CONDITIONED_RATIO * square[0, 0]).sum()
    )  # the factor nearly shows their number
    ratio = normal.smallest(invert) if normal.gram_only or not guess else 0.0
    if ratio < ILL_CONDITIONED_RATIO and not normal.gram_only:
        U, values = _weak_directions(invert_beside, weakest, rank, ILL_CONDITIONED_RATIO * normal.largest, guess)
        low, ratio = values <= ILL_CONDITIONED_RATIO * normal.largest, (values[-1] / normal.largest).item()
        weak, sigmas = U[:, low], values[low]
    if not ratio >= max(safe, PIVOTED_GAP * normal.rcond):
        return None
    dropped = normal.largest_dropped(null)
    if dropped > normal.rcond:
        return None
    return LeastSquares(normal.solve(invert), null, weak, sigmas, rank, ratio, dropped, invert)


def _weak_directions(
    invert: Callable[[Tensor], Tensor], start: Callable[[int], Tensor], rank: int, limit: float, guess: int
) -> tuple[Tensor, Tensor]:
    """Singular directions and their σ, all up to a limit and some above, by block inverse iteration on a Gram matrix.

    The weakest, which matter most, come out exactly, those near the limit roughly. The block that `start` makes is
    doubled as long as all of it is below the limit.
    """
    while True:
        guess = min(guess + WEAK_SURPLUS, rank)
        U = start(guess)
        for _ in range(INVERSE_ITERATIONS):
            U, T = torch.linalg.qr(invert(U))
        turn, inverse, _ = torch.linalg.svd(T)
        if inverse[-1].rsqrt() > limit or guess == rank:
            return (U @ turn).flip(1), inverse.rsqrt().flip(0)
        guess *= 2


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors; of a large matrix of zeros, which no equation makes, LAPACK's would take seconds too."""
    return torch.linalg.eigh(gram) if gram.any() else (gram[0], torch.eye(len(gram), dtype=gram.dtype))


def _by_decomposition(normal: _Normal, device: torch.device | str = "cpu") -> LeastSquares:
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


def largest_entry(g: Tensor) -> float:
    """The largest absolute value, NaN where an entry is, 0 without entries; several times as fast as `abs().max()`."""
    return max(end.abs().item() for end in torch.aminmax(g)) if g.numel() else 0.0


def norm(g: Tensor) -> float:
    """The root of the sum of squares, which neither underflow nor overflow."""
    size = g.norm().item()
    if 1e-140 < size < 1e140:
        return size
    unit = largest_entry(g)
    return unit * (g / unit).norm().item() if 0 < unit < math.inf else unit


def distance(a: Tensor, b: Tensor) -> float:
    """`norm(a - b)`, mostly without the difference."""
    size = torch.dist(a, b).item()
    return size if 1e-140 < size < 1e140 else norm(a - b)


def rms(g: Tensor) -> Tensor:
    """Root mean square."""
    return g.new_tensor(norm(g) / g.numel() ** 0.5)
