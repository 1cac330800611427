"""What the solution of one layer's equations yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rgap.equations.systems import ReducedSystem
from rgap.linalg import LeastSquares
from rgap.results import LayerReport


@dataclass(frozen=True)
class LayerSolution:
    """The input of a layer for every image, and what is left open."""

    x: Tensor  # the inputs, (B, C, H, W); of all solutions the one of minimum norm
    report: LayerReport  # the layer's report; counts are over all images
    # how x changes, to first order, with G and z: shaped as the weight and (B, O, H′, W′) -> (B, C, H, W)
    sensitivity: Callable[[Tensor, Tensor], Tensor]
    # for each group of channels the reduced system and its solution, None where W or the gradients alone were enough
    solved: tuple[tuple[ReducedSystem, LeastSquares] | None, ...] = (None,)
    # standard deviation of noise on G's entries, from the residual of surplus equations where the gradient alone
    # determines x; None elsewhere
    noise_std: float | None = None
    # what makes the null basis of a fixed layer, None where it is empty or would be too large
    fixed_null: Callable[[], Tensor] | None = None
    like: LayerSolution | None = None  # the solution of almost the same equations whose factors have served
    closed: Any = None  # of a batch, the VirtualSolution that has closed it

    @cached_property
    def null_basis(self) -> Tensor | None:
        """Orthonormal basis of the directions left open, (B·C·H·W, deficit); None where nothing is."""
        basis = self._basis("null") if self.fixed_null is None else self.fixed_null()
        return basis if basis.shape[1] else None

    @cached_property
    def weak_basis(self) -> Tensor:
        """Where something is open for a single image: directions determined, but badly, (B·C·H·W, w)."""
        return self._basis("ill_conditioned")

    @property
    def weak_gain(self) -> Tensor:
        """Their error, in units of the pre-activation's, (w,)."""
        gains = (1 / group[1].ill_conditioned_sigmas for group in self.solved if group is not None)
        return torch.cat([self.x.new_zeros(0), *gains])

    def _basis(self, kind: str) -> Tensor:
        """Directions of one kind of all groups, each on its own channels."""
        nothing = self.x.new_zeros(len(self.x), self.x[0].numel() // len(self.solved), 0)
        found = [None if group is None else getattr(group[1], kind) for group in self.solved]
        bases = [nothing if y is None else group[0].spread(y) for group, y in zip(self.solved, found, strict=True)]
        if len(bases) == 1:
            return bases[0].flatten(0, 1)
        return torch.cat([torch.block_diag(*image) for image in zip(*bases, strict=True)])
