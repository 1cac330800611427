"""A Gram matrix of which a large part falls apart into equal small blocks: factored by them and a Schur complement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import scipy.linalg
import torch
from torch import Tensor


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
