"""A Gram matrix of which a large part falls apart into equal small blocks: factored by them and a Schur complement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.linalg.matrices import gram_matrix


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
        apart, rest = self._split(v)
        first = (self.block @ apart).reshape(-1, v.shape[1]) + self.border @ rest
        return self._join(first, self.rest @ rest + self.border.T @ apart.reshape_as(first))

    def eliminated(self, damping: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """L of R = L Lᵀ, (L⁻¹ ⊗ I) B, and the Schur complement of AᵀA + diag(damping²); None where R fails.

        The damping is zero where unknowns stand apart.
        """
        lower, failed = torch.linalg.cholesky_ex(self.block)
        if failed:
            return None
        half = torch.linalg.solve_triangular(lower, self.border.reshape(len(lower), -1), upper=False)
        half = half.reshape_as(self.border)
        schur = self.rest - gram_matrix(half)
        schur.diagonal().add_(self._split(damping[:, None])[1][:, 0].square())
        return lower, half, schur

    def factored(self, damping: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The inverse of AᵀA + diag(damping²), zero where unknowns stand apart; None unless positive definite."""
        if (found := self.eliminated(damping)) is None:
            return None
        lower, half, schur = found
        factor, failed = torch.linalg.cholesky_ex(schur)
        if failed:
            return None

        def invert(v: Tensor) -> Tensor:
            apart, rest = self._split(v)
            apart = torch.linalg.solve_triangular(lower, apart, upper=False)
            rest = torch.cholesky_solve(rest - half.T @ apart.reshape(-1, v.shape[1]), factor)
            apart = apart - (half @ rest).view_as(apart)
            return self._join(torch.linalg.solve_triangular(lower.T, apart, upper=True).reshape(-1, v.shape[1]), rest)

        return invert

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """Where each unknown stands among those apart and the rest after them, and the way back."""
        unknowns = torch.arange(len(self.border) + len(self.rest)).view(len(self.block), -1)
        rest, apart = unknowns.tensor_split([len(self.rest) // len(unknowns)], 1)
        order = torch.cat([apart.flatten(), rest.flatten()])
        return order, order.argsort()

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """What stands apart, (c, q·p), and the rest, (c·(k − q), p)."""
        v = v.index_select(0, self.order[0])
        return v[: len(self.border)].reshape(len(self.block), -1), v[len(self.border) :]

    def _join(self, apart: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([apart, rest]).index_select(0, self.order[1])
