"""W x = b where W has full column rank: by a sparse factorisation that is kept between attacks, or by iterations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse.linalg as sla
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.equations.blocks import weight_matrix
from rgap.equations.limits import DEFAULT_LIMITS
from rgap.linalg import conjugate_gradients
from rgap.network.layer import Layer

FULL_RANK_RTOL = 1e-4
"""How well a random vector must come back through a system for that to count as of full column rank."""

MIN_RATIO = 1e-7
"""Smallest σ_min / σ_max at which W still counts as of full column rank where WᵀW is factored."""

MIN_RATIO_SQUARE = 1e-11
"""The same where W itself is."""


@dataclass(frozen=True)
class SparseFactor:
    """LU factors of WᵀW, or of W itself where it is square.

    Attributes:
        W: The rows that are used, sparse.
        lu: Its factors, None where they do not exist.
        condition: σ_max / σ_min of W, a lower bound, close.
        full_rank: Whether W is of full column rank.
        known: Mask of the outputs whose rows are used, (O, H′, W′), None for all.
    """

    W: Any
    lu: Any
    condition: float
    full_rank: bool
    known: Tensor | None = None

    def solve(self, z: Tensor) -> tuple[Tensor, float, int]:
        """Least-squares solution with refinement for z (O, H′, W′): x (C·H·W,), ‖W x − z‖ / ‖z‖, refinement steps."""
        right, last, steps = self._rows(z), np.inf, 0
        x = self._normal_solve(right)
        while steps < 5:
            r = right - self.W @ x
            size = np.linalg.norm(self.W.T @ r)
            if not size < 0.5 * last:
                break
            last = size
            x = x + self._normal_solve(r)
            steps += 1
        size = np.linalg.norm(right)
        residual = float(np.linalg.norm(right - self.W @ x) / size) if size > 0 else 0.0
        return torch.from_numpy(x), residual, steps

    def sensitivity(self, z: Tensor) -> Tensor:
        """The solution without refinement: enough for the effect of an error."""
        return torch.from_numpy(self._normal_solve(self._rows(z)))

    def _rows(self, z: Tensor) -> NDArray:
        return (z.flatten() if self.known is None else z[self.known]).numpy()

    def _normal_solve(self, b: NDArray) -> NDArray:
        return self.lu.solve(b) if self.W.shape[0] == self.W.shape[1] else self.lu.solve(self.W.T @ b)


@dataclass
class ConjugateGradients:
    """Solves W x = z, or [W; K] x = [z; vec(G)] of one image, by conjugate gradients; no matrix is held.

    Each kind of equations costs a convolution, whatever the size of the image; the condition number of the system
    decides how many iterations are needed, and grows as the equations become scarce.

    Attributes:
        layer: The layer, without groups.
        known: Mask of the outputs whose rows of W are used, (O, H′, W′), None for all.
        dz: δz, (O, H′, W′), where K belongs to the system; scaled, and G with it, so that its rows are as large as W's.
        condition: Of the system, as the last solve saw it.
    """

    layer: Layer
    known: Tensor | None = None
    dz: Tensor | None = None
    condition: float = float("nan")

    @cached_property
    def missing(self) -> int:
        """Estimate of the unknowns that the system does not determine, 0 for full column rank.

        A random vector is sent through it and solved for: what does not come back lies in the null space.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.layer.input_shape, generator=generator, dtype=torch.float64)
        G = None if self.dz is None else self.layer.weight_gradient(x, self.dz)
        found = self.solve(self.layer.apply(x), G, tolerance=1e-10, truth=x)[0]
        share = ((found - x.flatten()).norm() / x.norm()).item() ** 2
        return max(1, round(share * self.layer.unknowns)) if share > FULL_RANK_RTOL**2 else 0

    @property
    def full_rank(self) -> bool:
        """Whether the system has full column rank."""
        return self.missing == 0

    def solve(
        self,
        z: Tensor,
        G: Tensor | None = None,
        tolerance: float = 1e-12,
        max_iterations: int = 20_000,
        truth: Tensor | None = None,
    ) -> tuple[Tensor, float, int]:
        """Least-squares solution of minimum norm: x (C·H·W,), ‖residual‖ / ‖right-hand side‖, iterations.

        Args:
            z: (O, H′, W′).
            G: Gradient by the weight, shaped as it, where K belongs to the system.
            tolerance: Largest norm of the normal equations' residual at the end, relative to the start.
            max_iterations: Most iterations.
            truth: Ends the iterations as soon as x is this close to it, relative `FULL_RANK_RTOL`.
        """

        def done(x: Tensor) -> bool:
            return truth is not None and bool((x - truth).norm() < FULL_RANK_RTOL * truth.norm())

        right, limits = [self._used(z)], {"tolerance": tolerance, "max_iterations": max_iterations}
        right += [] if self.dz is None else [G]
        found = conjugate_gradients(self._apply, self._adjoint, right, done=done, **limits)
        self.condition = found.condition
        return found.x.flatten(), found.residual, found.iterations

    def sensitivity(self, z: Tensor, G: Tensor | None = None) -> Tensor:
        """The solution to a few digits: enough for the effect of an error."""
        return self.solve(z, G, tolerance=1e-3)[0]

    def _apply(self, x: Tensor) -> list[Tensor]:
        z = self._used(self.layer.apply(x))
        return [z] if self.dz is None else [z, self.layer.weight_gradient(x, self.dz)]

    def _adjoint(self, rest: list[Tensor]) -> Tensor:
        x = self.layer.adjoint(rest[0])
        if self.dz is not None:  # K takes δz to the pixels as Wᵀ does, with G in the place of the weight
            x = x + replace(self.layer, weight=rest[1], cache={}).adjoint(self.dz)
        return x

    def _used(self, z: Tensor) -> Tensor:
        """z, with 0 where a row is not used."""
        return z if self.known is None else z.where(self.known, 0.0)


def weight_factor(
    layer: Layer, known: Tensor | None = None, max_unknowns: int = DEFAULT_LIMITS.max_factor_unknowns
) -> SparseFactor | ConjugateGradients:
    """The solver for W x = z of a layer without groups; made once, unless only some outputs (O, H′, W′) are known."""
    if layer.unknowns > max_unknowns:
        solver = ConjugateGradients(layer, known)
        return solver if known is not None else layer.cached("weight_solver", lambda: solver)
    if known is not None:
        return replace(_sparse_factor(weight_matrix(layer)[known.flatten().numpy()]), known=known)
    return layer.cached("weight_factor", lambda: _sparse_factor(weight_matrix(layer)))


def _sparse_factor(W: Any) -> SparseFactor:
    square = W.shape[0] == W.shape[1]
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    try:
        lu = sla.splu(W.tocsc()) if square else sla.splu((W.T @ W).tocsc(), **options)
    except RuntimeError:  # SuperLU met an exactly singular matrix
        return SparseFactor(W, None, math.inf, False)
    condition = _condition(W, lu)
    return SparseFactor(W, lu, condition, condition < 1 / (MIN_RATIO_SQUARE if square else MIN_RATIO))


def _condition(W: Any, lu: Any, steps: int = 12) -> float:
    """σ_max / σ_min by power iteration on WᵀW and on its inverse (a lower bound, close after a few steps)."""
    square = W.shape[0] == W.shape[1]
    vectors = np.random.default_rng(0).standard_normal((2, W.shape[1]))
    largest = smallest = 0.0
    large, small = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for _ in range(steps):
        large = W.T @ (W @ large)
        small = lu.solve(lu.solve(small, "T")) if square else lu.solve(small)
        largest, smallest = np.linalg.norm(large), np.linalg.norm(small)
        if not np.isfinite(smallest):
            return math.inf
        large, small = large / largest, small / smallest
    return float(np.sqrt(largest * smallest))
