"""What solving one layer yields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.equations.systems import ReducedSystem
from rgap.results import LayerReport


@dataclass(frozen=True)
class LayerSolution:
    """The input of a layer for every image, and what is left open.

    Attributes:
        x: The inputs, (B, C, H, W); of all solutions the one of minimum norm.
        report: The layer's report; counts are over all images.
        sensitivity: How x changes, to first order, with G and z: shaped as the weight and (B, O, H′, W′) ->
            (B, C, H, W).
        nulls: For each group of channels what makes an orthonormal basis of the directions left open,
            (B·C·H·W / groups, deficit), None where nothing is open, or the basis would be too large.
        weak: For each group what makes the basis of its directions that are determined, but badly, and how many times
            the pre-activation's error is their error; only of a single image of which something is open.
        noise_std: Standard deviation of noise on G's entries, by the misfit of surplus equations where the gradient
            alone determines x; None elsewhere.
        systems: For each group the reduced system that was solved, None where W or the gradients alone were enough.
    """

    x: Tensor
    report: LayerReport
    sensitivity: Callable[[Tensor, Tensor], Tensor]
    nulls: tuple[Callable[[], Tensor] | None, ...] = (None,)
    weak: tuple[tuple[Callable[[], Tensor], Tensor] | None, ...] = (None,)
    noise_std: float | None = None
    systems: tuple[ReducedSystem | None, ...] = (None,)

    @cached_property
    def null_basis(self) -> Tensor | None:
        """Orthonormal basis of the directions left open, (B·C·H·W, deficit); None where nothing is."""
        basis = self._placed(self.nulls)
        return basis if basis.shape[1] else None

    @cached_property
    def weak_basis(self) -> Tensor:
        """Where something is open: directions that are determined, but badly, (B·C·H·W, w)."""
        return self._placed([None if weak is None else weak[0] for weak in self.weak])

    @property
    def weak_gain(self) -> Tensor:
        """How many times the pre-activation's error is their error, (w,)."""
        return torch.cat([self.x.new_zeros(0), *(weak[1] for weak in self.weak if weak is not None)])

    def _placed(self, groups: Sequence[Callable[[], Tensor] | None]) -> Tensor:
        """The groups' bases as one, each on its own channels."""
        count, size = len(self.x), self.x[0].numel() // len(groups)
        bases = [self.x.new_zeros(count * size, 0) if make is None else make() for make in groups]
        if len(bases) == 1:
            return bases[0]
        by_image = zip(*(basis.reshape(count, size, basis.shape[1]) for basis in bases), strict=True)
        return torch.cat([torch.block_diag(*groups) for groups in by_image])
