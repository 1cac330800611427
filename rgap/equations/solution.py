"""What solving one layer yields, and the limits that choose the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rgap.network.layer import Layer
from rgap.results import LayerReport


@dataclass(frozen=True)
class SolverLimits:
    """Sizes and ratios that decide which way a layer is solved; counts are of unknowns of one group of channels.

    Some limits have another value for the images of a batch: their dense system is made from WᵀW at a higher cost an
    unknown, is worth more memory because no iterative solver stands behind it, and comes with gradients that are
    precise to float32 at best.

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


DEFAULT_LIMITS = SolverLimits()
"""The limits of every attack; tests pass their own."""


@dataclass(frozen=True)
class LayerSolution:
    """The input of a layer for every image, and what is left open.

    Attributes:
        x: The inputs, (B, C, H, W); of all solutions the one of minimum norm.
        report: The layer's report; counts are over all images.
        null_basis: Orthonormal basis of the directions left open, (B·C·H·W, deficit), or None where nothing is, or it
            would be too large.
        weak_basis: Where something is open: directions that are determined, but badly, (B·C·H·W, w); w = 0 for batches.
        weak_gain: How many times the pre-activation's error is their error, (w,).
        sensitivity: How x changes, to first order, with G and z: (O, C, kh, kw) and (B, O, H′, W′) -> (B, C, H, W).
        noise_std: Standard deviation of noise on G's entries, by the misfit of surplus equations where the gradient
            alone determines x; None elsewhere.
        systems: For each group of channels the reduced system that was solved, None where W or the gradients alone
            were enough.
    """

    x: Tensor
    report: LayerReport
    null_basis: Tensor | None
    weak_basis: Tensor
    weak_gain: Tensor
    sensitivity: Callable[[Tensor, Tensor], Tensor]
    noise_std: float | None = None
    systems: tuple[Any, ...] = (None,)


@dataclass(frozen=True)
class ImageSolution:
    """A layer's input and what is left open.

    Attributes:
        x: The input, (C, H, W); of all solutions the one of minimum norm.
        null_basis: Orthonormal basis of the directions left open, (C·H·W, deficit), or None where nothing is.
        weak_basis: Where something is: directions that are determined, but badly, (C·H·W, w).
        weak_gain: How many times the pre-activation's error is their error, (w,).
        report: The layer's report.
        sensitivity: How x changes, to first order, with G and z: (O, C, kh, kw) and (O, H′, W′) -> (C, H, W).
        noise_std: Standard deviation of noise on G's entries, by the misfit of surplus equations where M alone
            determines x; None elsewhere.
    """

    x: Tensor
    null_basis: Tensor | None
    weak_basis: Tensor
    weak_gain: Tensor
    report: LayerReport
    sensitivity: Callable[[Tensor, Tensor], Tensor]
    noise_std: float | None = None


def determined(x: Tensor, layer: Layer, report: LayerReport, sensitivity: Callable) -> ImageSolution:
    """A solution that leaves nothing open.

    Args:
        x: The input, any shape of C·H·W entries.
        layer: The layer, without groups.
        report: Its report.
        sensitivity: As in `ImageSolution`, with x's own shape.
    """
    none = x.new_zeros(layer.unknowns, 0)
    shape = layer.input_shape
    return ImageSolution(
        x.reshape(shape), None, none, none[0], report, lambda dG, change: sensitivity(dG, change).reshape(shape)
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
