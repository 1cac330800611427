"""Cholesky factors of a banded matrix, block by block: WᵀW of a convolution couples pixels of near rows only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg.blas import dtrsm, get_blas_funcs
from scipy.linalg.lapack import dpotrf

MIN_SHARP_PIVOT = 1e-2  # smallest over largest pivot from which a factor serves in float32
MIN_BLOCK = 64  # rows of a block at least, for products of smaller ones are slow


@dataclass(frozen=True)
class BlockCholesky:
    """S = L Lᵀ of a symmetric positive definite S whose blocks beyond the neighbours of the diagonal are zero."""

    order: NDArray  # rows of S as the blocks have them
    diagonal: list[NDArray]  # lower triangular, columns first
    below: list[NDArray]  # one fewer

    @property
    def pivots(self) -> NDArray:
        """The diagonal of L."""
        return np.concatenate([np.diag(L) for L in self.diagonal])

    @property
    def is_sharp(self) -> bool:
        """Whether S is so well-conditioned that its inverse in float32 shows the way to a solution."""
        return bool(self.pivots.min() > MIN_SHARP_PIVOT * self.pivots.max())

    @cached_property
    def rough(self) -> BlockCholesky:
        """The factor in float32."""
        diagonal, below = ([L.astype(np.float32) for L in part] for part in (self.diagonal, self.below))
        return BlockCholesky(self.order, diagonal, below)

    def solve(self, right: NDArray) -> NDArray:
        """S⁻¹ of columns, (n, k), in the precision of the factor."""
        solved = np.ascontiguousarray(right[self.order], self.diagonal[0].dtype)
        (trsm,), result = get_blas_funcs(("trsm",), (solved,)), np.empty_like(solved)
        parts = np.split(solved, np.cumsum([len(L) for L in self.diagonal])[:-1])
        last = len(parts) - 1
        for i, part in enumerate(parts if right.size else ()):  # rows first in memory: as its transpose, in place
            if i:
                part -= self.below[i - 1] @ parts[i - 1]
            trsm(1.0, self.diagonal[i], part.T, side=1, lower=1, trans_a=1, overwrite_b=1)
        for i in range(last, -1, -1) if right.size else ():
            if i < last:
                parts[i] -= self.below[i].T @ parts[i + 1]
            trsm(1.0, self.diagonal[i], parts[i].T, side=1, lower=1, overwrite_b=1)
        result[self.order] = solved
        return result


def block_cholesky(S: sp.csr_array, order: NDArray) -> BlockCholesky | None:
    """The factor of a sparse S, whose bandwidth in an order decides the blocks; None where S is not positive definite.

    A matrix whose bandwidth is more than half its side is one dense block.
    """
    S, n = S[order][:, order].tocsr(), S.shape[0]
    rows, columns = S.nonzero()
    size = max(int(np.abs(rows - columns).max(initial=0)), MIN_BLOCK)
    ends = [*range(size, n, size), n] if 2 * size < n else [n]
    diagonal, below, start = [], [], 0
    for end, following in zip(ends, [*ends[1:], n], strict=True):
        block = S[start:end, start:end].toarray()
        if below:
            block -= below[-1] @ below[-1].T
        L, failed = dpotrf(block.T, lower=1, overwrite_a=1)
        if failed:
            return None
        diagonal.append(L)
        if end < n:
            beside = S[end:following, start:end].toarray()
            dtrsm(1.0, L, beside.T, lower=1, overwrite_b=1)
            below.append(beside)
        start = end
    return BlockCholesky(order, diagonal, below)
