"""Layers too large for a dense system: weight and gradient constraints together by conjugate gradients (ours).

Both kinds of rows cost a convolution each, whatever the size of the image, and no matrix is held. The condition number
of [W; K] decides how many iterations are needed; it grows as the equations become scarce.
"""

from __future__ import annotations

from torch import Tensor

from rgap.equations.rank_laws import rank_laws
from rgap.equations.solution import ImageSolution, determined
from rgap.equations.weights import ConjugateGradients
from rgap.linalg import rms
from rgap.network.layer import Layer
from rgap.results import LayerReport

ROUGH = {"tolerance": 1e-3, "most": 300}
"""How far a system is solved that leaves something open."""


def solve_jointly(
    layer: Layer, G: Tensor, dz: Tensor, z: Tensor, known: Tensor | None, at_least_open: int, max_dense: int
) -> ImageSolution | None:
    """Both kinds of constraints together by conjugate gradients; None where a dense system says more.

    Where the rank law leaves something open, and no dense system can hold it, the iterations stop early: what they
    find is the solution of minimum norm, roughly, and the report has the law's rank. Without a law the rank is that by
    which a random vector comes back.
    """
    law = _rank_law(layer)
    short = 0 if law is None else layer.unknowns - law
    if short and at_least_open <= max_dense:
        return None
    scale = (rms(z) / rms(G)).item() if G.any() and len(z) else 0.0
    solver = ConjugateGradients(layer, known, scale * dz)
    x, residual, iterations = solver.solve(z, scale * G, **(ROUGH if short else {}))
    condition = solver.condition
    missing = short or solver.missing
    if missing and at_least_open <= max_dense:
        return None
    rank = layer.unknowns - missing
    report = LayerReport(
        layer.name, layer.unknowns, rank=rank, deficit=missing, condition=condition, residual=residual,
        iterations=iterations,
    )  # fmt: skip

    def sensitivity(dG: Tensor, change: Tensor) -> Tensor:
        return solver.sensitivity(rows_known(change, known), scale * dG)

    return determined(x, layer, report, sensitivity)


def _rank_law(layer: Layer) -> int | None:
    """Generic rank of [W; K], an upper bound; None where there is no law."""
    if layer.before is not None or layer.after is not None:
        return None
    left, right, top, bottom = layer.padding
    image, kernel = layer.input_shape[1:], tuple(layer.weight.shape[2:])
    padding = ((top, bottom), (left, right))
    channels, outputs = layer.input_shape[0], layer.output_shape[0]
    return rank_laws(channels, outputs, kernel, layer.stride, padding, layer.dilation, image=image).both


def rows_known(z: Tensor, known: Tensor | None) -> Tensor:
    """The entries of z that are known."""
    return z.flatten() if known is None else z.flatten()[known]
