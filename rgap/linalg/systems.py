"""A least-squares problem: its matrix, its normal equations, its solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.linalg.krylov import largest_eigenvalue
from rgap.linalg.matrices import BorderedGram, gram_matrix

ILL_CONDITIONED_RATIO = 1e-1  # σ / σ_max below which kept directions are reported where the rank is not full
DROPPED_STEPS = 4  # Lanczos steps for the largest singular value dropped: of rounding, only its size counts


@dataclass(frozen=True)
class Operator:
    """A matrix A of m rows and k columns that need not be formed."""

    columns: int  # k
    make_gram: Callable[[torch.dtype], Tensor | BorderedGram]
    apply: Callable[[Tensor], Tensor]  # Y -> A Y, (k, p) -> (m, p)
    adjoint: Callable[[Tensor], Tensor]  # R -> Aᵀ R, (m, p) -> (k, p)

    @cached_property
    def made_gram(self) -> Tensor | BorderedGram:
        """AᵀA, (k, k), in the form in which it is made."""
        return self.make_gram(torch.float64)

    @cached_property
    def gram(self) -> Tensor:
        """AᵀA, (k, k)."""
        return self.made_gram.dense() if isinstance(self.made_gram, BorderedGram) else self.made_gram

    @cached_property
    def made_rough(self) -> Tensor | BorderedGram:
        """The same in float32, in the form in which it is made."""
        made = self.__dict__.get("made_gram")
        return made.float() if isinstance(made, Tensor) else self.make_gram(torch.float32)

    @property
    def rough_gram(self) -> Tensor:
        """The same in float32."""
        return self.made_rough.dense() if isinstance(self.made_rough, BorderedGram) else self.made_rough

    def matrix(self) -> Tensor:
        """A itself, column by column."""
        return self.apply(torch.eye(self.columns, dtype=torch.float64))


def dense_operator(A: Tensor) -> Operator:
    """A matrix (m, k) as an operator."""
    return Operator(A.shape[1], lambda dtype: gram_matrix(A.to(dtype)), lambda Y: A @ Y, lambda R: A.T @ R)


@dataclass(frozen=True)
class NormalEquations:
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

    def gram(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """AᵀA + diag(damping²), for a factor to overwrite."""
        gram = self.A.made_gram if dtype == torch.float64 else self.A.made_rough
        gram = gram.dense() if isinstance(gram, BorderedGram) else gram.clone()
        gram.diagonal().add_(self.damping.square())
        return gram

    def multiply(self, v: Tensor) -> Tensor:
        """The same times v, (k, p)."""
        product = self.A.adjoint(self.A.apply(v)) if self.gram_only else self.A.made_gram @ v
        return torch.addcmul(product, self.damping.square()[:, None], v)

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

    def largest_dropped(self, null: Tensor, invert: Callable[[Tensor], Tensor] | None = None) -> float:
        """About the largest σ of a null space, damping included, relative to σ_max; `invert` refines a rough one."""

        def multiply(v: Tensor) -> Tensor:
            v = null @ v
            if invert is not None:
                v = v - invert(self.multiply(v))
            return null.T @ (self.A.adjoint(self.A.apply(v)) + self.damping.square()[:, None] * v)

        return max(largest_eigenvalue(multiply, null.shape[1], DROPPED_STEPS), 0.0) ** 0.5 / self.largest


@dataclass(frozen=True)
class LeastSquares:
    """The minimum-norm minimiser of ‖A y − b‖ and the null space of A.

    Where the rank is not full, `ill_conditioned` is a basis, orthonormal to float32, of the directions kept whose
    singular value is below ILL_CONDITIONED_RATIO of the largest.
    """

    y: Tensor  # (k,)
    null: Tensor | None  # orthonormal basis of the numerical null space, (k, k − rank), None where it is empty
    ill_conditioned: Tensor  # (k, w)
    ill_conditioned_sigmas: Tensor  # (w,)
    rank: int  # number of singular values kept
    sigma_min_kept: float  # relative to the largest; an estimate unless a decomposition was made
    sigma_max_dropped: float | None  # relative to the largest; None where none was dropped
    invert: Callable[[Tensor], Tensor]  # pseudo-inverse of AᵀA, damping included, (k, p): y = invert(Aᵀ b)
    rough: Callable[[Tensor], Tensor] | None = None  # the same by factors in float32 or a neighbour's, if so

    @property
    def condition(self) -> float:
        """Largest over smallest singular value kept; infinite where none is."""
        return 1 / self.sigma_min_kept if self.sigma_min_kept else float("inf")
