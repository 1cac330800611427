"""Singular decompositions, Gram matrices, orthonormal bases and norms.

A Gram matrix of which a large part falls apart into equal small blocks is factored by them and a Schur complement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import scipy.linalg
import torch
from torch import Tensor

from rgap.isolation import accelerator

WIDE_RATIO = 8  # columns over rows from which a Gram matrix is made without use of its symmetry
MIN_ON_ACCELERATOR = 256  # unknowns from which a system is worth the way to an accelerator and back
SKETCH_SIZE = 24  # columns of a random sketch at first, beyond the rank that is expected
SKETCH_SURPLUS = 12  # columns that it must have beyond the singular values that count
WELL_CONDITIONED = 0.03  # least pivot ratio of a Gram matrix whose columns come out orthonormal at once


def accelerator_for(unknowns: int) -> torch.device | None:
    """Where a system of so many unknowns is solved, None for here."""
    return accelerator.get() if unknowns >= MIN_ON_ACCELERATOR else None


def svd(A: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Singular decomposition A = U diag(S) Vh, by a second LAPACK driver where MKL's fast one does not converge."""
    try:
        return torch.linalg.svd(A, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        factors = scipy.linalg.svd(A.numpy(), full_matrices=full_matrices, lapack_driver="gesvd")
        return tuple(torch.from_numpy(f) for f in factors)


def leading_svd(A: Tensor, cut: float, rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of A with every singular value above cut · σ_max, and some below: of low rank in a few products.

    A random sketch (Halko, Martinsson & Tropp 2011, with a power iteration) has room for an expected `rank` and is
    enlarged until it holds them all; the largest value below the cut may come out some per cent too small. The whole
    decomposition where that is cheaper.
    """
    generator, size = torch.Generator().manual_seed(0), rank + SKETCH_SIZE
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
    if (device := accelerator_for(A.shape[1])) is not None:
        there = A.to(device)
        return (there.T @ there).to(A.device)
    if WIDE_RATIO * len(A) < A.shape[1]:  # mirroring would cost more than it saves
        return A.T @ A
    syrk = scipy.linalg.blas.dsyrk if A.dtype == torch.float64 else scipy.linalg.blas.ssyrk
    upper = torch.from_numpy(syrk(1.0, A.T.numpy())).triu()
    return upper + upper.triu(1).T


def orthonormal(A: Tensor, times: int = 2) -> Tensor:
    """Orthonormal columns with the span of A's, by Cholesky factors of Gram matrices; QR where A is ill-conditioned.

    A second time makes good what an A that is not `WELL_CONDITIONED` has lost.
    """
    for _ in range(times if A.shape[1] else 0):
        factor, failed = torch.linalg.cholesky_ex(gram_matrix(A))
        if failed:
            return torch.linalg.qr(A)[0]
        A = torch.linalg.solve_triangular(factor.T, A, upper=True, left=False)
        low, high = torch.aminmax(factor.diagonal())
        if low > WELL_CONDITIONED * high:
            break
    return A


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


@dataclass(frozen=True)
class BorderedGram:
    """AᵀA of unknowns (c, k) of which, for every c, the last q stand apart: [[D, Bᵀ], [B, R ⊗ I]]."""

    block: Tensor  # R, (c, c)
    border: Tensor  # B, (c·q, c·(k − q))
    rest: Tensor  # D, (c·(k − q), c·(k − q))

    def dense(self) -> Tensor:
        """AᵀA itself."""
        c = len(self.block)
        r, q = len(self.rest) // c, len(self.border) // c
        result, border = self.block.new_empty(c, r + q, c, r + q), self.border.reshape(c, q, c, r)
        result[:, :r, :, :r], result[:, r:, :, :r] = self.rest.reshape(c, r, c, r), border
        result[:, :r, :, r:] = border.permute(2, 3, 0, 1)
        result[:, r:, :, r:] = torch.kron(self.block, torch.eye(q, dtype=border.dtype)).reshape(c, q, c, q)
        return result.reshape(c * (r + q), -1)

    def __matmul__(self, v: Tensor) -> Tensor:
        """AᵀA v, (c·k, p)."""
        apart, rest = self.split(v)
        first = self.block @ apart + (self.border @ rest).view_as(apart)
        return self.join(first, self.rest @ rest + self.border.T @ apart.reshape(-1, v.shape[1]))

    def eliminated(self, damping: Tensor) -> Eliminated | None:
        """What is left of AᵀA + diag(damping²) without the unknowns apart, where it is zero; None where R fails."""
        lower, failed = torch.linalg.cholesky_ex(self.block)
        if failed:
            return None
        half = torch.linalg.solve_triangular(lower, self.border.reshape(len(lower), -1), upper=False)
        half, schur = half.reshape_as(self.border), self.rest.clone()
        if half.numel():
            (syrk,) = scipy.linalg.get_blas_funcs(("syrk",), (half.numpy(),))
            syrk(-1.0, half.T.numpy(), beta=1.0, c=schur.numpy().T, overwrite_c=1)
        schur.diagonal().add_(self.split(damping[:, None])[1][:, 0].square())
        return Eliminated(self, lower, half, schur)

    def factored(self, damping: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The inverse of AᵀA + diag(damping²), zero where unknowns stand apart; None unless positive definite."""
        if (found := self.eliminated(damping)) is None:
            return None
        factor, failed = torch.linalg.cholesky_ex(found.schur)
        return None if failed else found.inverse(lambda rest: torch.cholesky_solve(rest, factor))

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Where each unknown stands among those apart and the rest after them, and the way back."""
        unknowns = torch.arange(len(self.border) + len(self.rest)).view(len(self.block), -1)
        rest, apart = unknowns.tensor_split([len(self.rest) // len(unknowns)], 1)
        order = torch.cat([apart.flatten(), rest.flatten()])
        return order, order.argsort()

    def split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """What stands apart, (c, q·p), and the rest, (c·(k − q), p)."""
        v = v.index_select(0, self.order[0])
        return v[: len(self.border)].reshape(len(self.block), -1), v[len(self.border) :]

    def join(self, apart: Tensor, rest: Tensor) -> Tensor:
        """The vectors (c·k, p) of which `split` makes these parts."""
        apart = apart.reshape(-1, rest.shape[1])
        return torch.cat([apart, rest]).index_select(0, self.order[1])


@dataclass(frozen=True)
class Eliminated:
    """A bordered Gram matrix without the unknowns that stand apart."""

    gram: BorderedGram
    lower: Tensor  # L of R = L Lᵀ
    half: Tensor  # (L⁻¹ ⊗ I) B
    schur: Tensor  # of the rest, lower triangle

    def extend(self, rest: Tensor) -> Tensor:
        """Vectors of the rest, (c·(k − q), p), with what they make of the unknowns apart: (c·k, p)."""
        apart = (self.half @ rest).reshape(len(self.lower), -1)
        return self.gram.join(-torch.linalg.solve_triangular(self.lower.T, apart, upper=True), rest)

    def inverse(self, solve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The whole matrix's, (c·k, p), from the Schur complement's."""

        def invert(v: Tensor) -> Tensor:
            apart, rest = self.gram.split(v)
            apart = torch.linalg.solve_triangular(self.lower, apart, upper=False)
            rest = solve(rest - self.half.T @ apart.reshape(-1, v.shape[1]))
            apart = apart - (self.half @ rest).view_as(apart)
            return self.gram.join(torch.linalg.solve_triangular(self.lower.T, apart, upper=True), rest)

        return invert

    def single(self, unit: float) -> Eliminated:
        """The factors of the matrix divided by unit², in float32."""
        return replace(self, lower=(self.lower / unit).float(), half=(self.half / unit).float())
