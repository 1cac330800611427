"""Pivoted Cholesky factors of a Gram matrix: what the system determines, badly or well, and what it leaves open."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.linalg import get_blas_funcs, get_lapack_funcs
from torch import Tensor

from rgap.linalg.matrices import BorderedGram, Eliminated, orthonormal
from rgap.linalg.systems import NormalEquations

WEAK_SURPLUS = 16  # directions iterated beside those that are expected to be ill-conditioned


@dataclass(frozen=True)
class PivotedFactor:
    """U, upper triangular, and V with the Gram matrix [U V]ᵀ[U V] in the order of the pivots.

    Unknowns that stand apart come first, without pivoting: the matrix is then the Schur complement of the rest.
    """

    U: np.ndarray  # (r, r); its lower half is never read
    V: np.ndarray  # (r, m − r)
    pivots: Tensor  # (m,)
    apart: Eliminated | None

    @property
    def rank(self) -> int:
        """Of the whole matrix."""
        return len(self.U) + (0 if self.apart is None else len(self.apart.half))

    def null(self) -> Tensor:
        """A basis of what is left open, not orthonormal, (k, k − rank)."""
        (trsm,) = get_blas_funcs(("trsm",), (self.U,))
        return self._placed(np.vstack([trsm(-1.0, self.U, self.V), np.eye(self.V.shape[1], dtype=self.U.dtype)]))

    def last(self, count: int) -> Tensor:
        """Columns (k, count) of the smallest pivots: of the inverse of [U V]'s part of full rank."""
        (trsm,) = get_blas_funcs(("trsm",), (self.U,))
        n = len(self.U)
        return self._placed(trsm(1.0, self.U, np.eye(n, count, count - n, dtype=self.U.dtype)))

    def _placed(self, rows: np.ndarray) -> Tensor:
        """Vectors of all unknowns from the first of the pivots', by which those apart are determined."""
        rest = torch.from_numpy(np.zeros((len(self.pivots), rows.shape[1]), rows.dtype))
        rest[self.pivots[: len(rows)]] = torch.from_numpy(rows)
        return rest if self.apart is None else self.apart.extend(rest)

    def solve(self, v: Tensor) -> Tensor:
        """The inverse of the part of full rank, on float64 or the factor's own vectors; other unknowns are 0."""
        (potrs,), kept = get_lapack_funcs(("potrs",), (self.U,)), self.pivots[: len(self.U)]

        def on_rest(rest: Tensor) -> Tensor:
            y = torch.zeros_like(rest)
            y[kept] = torch.from_numpy(potrs(self.U, rest[kept].numpy(), lower=0)[0])
            return y

        rough = v.to(torch.from_numpy(self.V).dtype)
        return (on_rest(rough) if self.apart is None else self.apart.inverse(on_rest)(rough)).to(v.dtype)

    def single(self, unit: float) -> PivotedFactor:
        """The factor of the Gram matrix divided by unit², in float32."""
        U, V = (np.asfortranarray(part / unit, np.float32) for part in (self.U, self.V))
        return replace(self, U=U, V=V, apart=None if self.apart is None else self.apart.single(unit))


def pivoted_factor(normal: NormalEquations, most: int | None) -> PivotedFactor:
    """By LAPACK, in float64; with the `most` that the rank can be in float32, and of rank 0 where it is less."""
    gram, dtype = (normal.A.made_gram, torch.float64) if most is None else (normal.A.made_rough, torch.float32)
    apart = gram.eliminated(normal.damping) if isinstance(gram, BorderedGram) else None
    schur = (normal.gram(dtype) if apart is None else apart.schur).numpy()
    (pstrf,) = get_lapack_funcs(("pstrf",), (schur,))
    factor, pivots, rank, _ = pstrf(schur.T, lower=0, overwrite_a=1, **({} if most is None else {"tol": 0.0}))
    if most is not None:
        first = 0 if apart is None else len(apart.half)
        rank, apart = (most - first, apart) if first < most <= first + rank else (0, None)
    U = np.asfortranarray(factor[:rank, :rank])
    return PivotedFactor(U, factor[:rank, rank:], torch.from_numpy(pivots.astype("int64") - 1), apart)


def weak_directions(factor: PivotedFactor, null: Tensor, limit: float, guess: int) -> tuple[Tensor, Tensor]:
    """Singular directions and their σ, all up to a limit and some above, by block inverse iteration on a Gram matrix.

    The weakest directions, which matter most, come out well, those near the limit roughly: one iteration from what the
    smallest pivots show, in float32, is enough. The block is doubled as long as all of it is below the limit.
    """
    null, unit = null.float(), factor.U[0, 0]
    rough = factor.single(unit)

    def beside(y: Tensor) -> Tensor:
        return y - null @ (null.T @ y)

    while True:
        guess = min(guess + WEAK_SURPLUS, len(factor.U))
        U, T = torch.linalg.qr(beside(rough.solve(orthonormal(beside(rough.last(guess))))))
        turn, inverse, _ = torch.linalg.svd(T)
        values = unit * inverse.double().rsqrt()
        if values[-1] > limit or guess == len(factor.U):
            return (U @ turn).double().flip(1), values.flip(0)
        guess *= 2
