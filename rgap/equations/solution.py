"""What solving one layer yields: its input, the directions left open, and its answer to changes of what is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rgap.network.layer import Layer
from rgap.results import LayerReport


@dataclass(frozen=True)
class LayerSolution:
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


def determined(x: Tensor, layer: Layer, report: LayerReport, sensitivity: Callable) -> LayerSolution:
    """A solution that leaves nothing open.

    Args:
        x: The input, any shape of C·H·W entries.
        layer: The layer, without groups.
        report: Its report.
        sensitivity: As in `LayerSolution`, with x's own shape.
    """
    none = x.new_zeros(layer.unknowns, 0)
    shape = layer.input_shape
    return LayerSolution(
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
