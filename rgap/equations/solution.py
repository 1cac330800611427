"""What solving one layer yields, and the limits that choose the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.equations.systems import ReducedSystem
from rgap.results import LayerReport


@dataclass(frozen=True)
class SolverLimits:
    """Sizes and ratios that decide which way a layer is solved; counts are of unknowns of one group of channels.

    Some limits have another value for the images of a batch, whose dense system costs more an unknown and is worth more
    memory, for no iterations stand behind it; and how precise their gradient is, is not taken into account.

    Attributes:
        dense_unknowns: Unknowns that the gradients may leave open before W alone is preferred to a dense system.
        dense_unknowns_batch: The same, over all images of a batch.
        iterative_unknowns: Open unknowns from which conjugate gradients on both kinds of equations are tried before a
            dense system; one image only.
        max_dense_unknowns: Open unknowns up to which a dense system is solved at all (6000: 0.3 GB).
        max_dense_unknowns_batch: The same, over all images of a batch (12,000: 1.2 GB).
        max_factor_unknowns: Unknowns up to which W is factored sparsely; beyond, conjugate gradients need less time
            and memory.
        well_conditioned: Condition number of W up to which its own solution is always taken where gradients leave many
            unknowns open.
        well_conditioned_batch: The same for a batch, whatever the gradient's precision.
        trusted_ratio: Directions that the gradients see with less than this share of their largest singular value are
            shared with the weight equations.
        weak_ratio: Directions that W sees with less than this share of its largest singular value are left to the
            gradients, where W goes first; batches only.
        weights_first_ratio: W goes first where it leaves less than this share of what the gradients leave open: it is
            the quicker way, and passes on more error; batches only.
        max_null_entries: Entries of the largest null basis of a fixed layer that is made (20 million: 160 MB).
        max_pinv_side: Rows and columns of W up to which its dense pseudo-inverse is made (8000: 0.5 GB).
    """

    dense_unknowns: int = 1600
    dense_unknowns_batch: int = 800
    iterative_unknowns: int = 2000
    max_dense_unknowns: int = 6000
    max_dense_unknowns_batch: int = 12_000
    max_factor_unknowns: int = 40_000
    well_conditioned: float = 1e3
    well_conditioned_batch: float = 300.0
    trusted_ratio: float = 0.02
    weak_ratio: float = 0.03
    weights_first_ratio: float = 1 / 3
    max_null_entries: int = 20_000_000
    max_pinv_side: int = 8000


DEFAULT_LIMITS = SolverLimits()
"""The limits of every attack; tests pass their own."""


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


def merged(name: str, parts: Sequence[LayerSolution], seconds: float) -> LayerSolution:
    """The solution of a layer from those of its groups of channels.

    Args:
        name: The layer's name.
        parts: One for each group.
        seconds: That the whole layer took.
    """

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        changes = zip(parts, dG.chunk(len(parts)), z_change.chunk(len(parts), 1), strict=True)
        return torch.cat([part.sensitivity(*change) for part, *change in changes], 1)

    return LayerSolution(
        torch.cat([part.x for part in parts], 1),
        merged_report(name, [part.report for part in parts], seconds),
        sensitivity if len(parts) > 1 else parts[0].sensitivity,
        *(sum((getattr(part, field) for part in parts), ()) for field in ("nulls", "weak")),
        max((part.noise_std for part in parts if part.noise_std is not None), default=None),
        sum((part.systems for part in parts), ()),
    )


def merged_report(name: str, reports: list[LayerReport], seconds: float) -> LayerReport:
    """One report for the groups of a layer: counts add up, the worst value of the rest stands for all.

    Args:
        name: The layer's name.
        reports: One for each group.
        seconds: That the whole layer took.
    """

    def over(field: str, combine):
        values = [getattr(r, field) for r in reports]
        return None if any(v is None for v in values) else combine(values)

    counts = {f: over(f, sum) for f in ("unknowns", "rank_weights", "rank_gradients", "rank", "deficit")}
    worst = {f: over(f, max) for f in ("iterations", "condition", "sigma_below_cut", "residual")}
    return LayerReport(name, **counts, **worst, sigma_above_cut=over("sigma_above_cut", min), seconds=seconds)
