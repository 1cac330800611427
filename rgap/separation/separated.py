"""The images of a batch that were told apart, and what is to say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rgap.equations.rank_laws import SPARE_UNITS
from rgap.network.layer import Layer
from rgap.results import LayerReport
from rgap.separation.subspaces import Span

MAX_SIZE_DEVIATION = 0.05  # distance of a batch size, as the images' shares tell it, from a whole number


@dataclass(frozen=True)
class Separation:
    """The inputs of the first layer that were found, each verified on its own.

    `residuals` are the sines of the angles between (hidden vector, dz) and the spaces in which they must lie; for an
    input that follows from its dz, the first is that of all such inputs together.
    """

    inputs: Tensor  # (F, n), float64: of unit length without bias, else with their true length
    dz: Tensor  # ∂ℓ/∂z_1 of these inputs, (F, h): Σ dz_bᵀ x_b is their part of G_1
    residuals: Tensor  # (F, 2)
    first: Span
    second: Span
    starts: int  # random ones
    steps: int  # of the fixed point, over all starts
    errors: Tensor  # root mean square errors that the tests may have overlooked, (F,); of those peeled off, predicted
    peeled: int = 0  # inputs found by peeling, the first ones
    factor: float | None = None  # of the loss, on which they agree: 1/B for the mean of B images


def told_by_shares(apart: Separation, scale: float) -> int:
    """The batch size of which the images' shares tell, if the gradient is `scale` times that of the mean loss, or 0."""
    size = 0.0 if apart.factor is None else scale / apart.factor
    return round(size) if abs(size - round(size)) <= MAX_SIZE_DEVIATION else 0


def what_was_found(layers: Sequence[Layer], apart: Separation, size: int, scale: float = 1.0) -> list[str]:
    """Notes on how many images the separation has found, and why not more."""
    count, rank = len(apart.inputs), apart.first.rank
    notes = [f"{count} of {size} images found, in {apart.starts} random starts and {apart.steps} steps"]
    if apart.peeled:
        notes.append(f"{apart.peeled} of them peeled off, by units that one image alone switches on or leaves out")
    if apart.factor is not None:
        told = f"the images' shares are those of a mean over {scale / apart.factor:.4g} images"
        factor = size * apart.factor / scale
        other = "" if abs(factor - 1) <= MAX_SIZE_DEVIATION / size else f", or of {factor:.4g} times one over {size}"
        notes.append(told + other)
    if apart.second.rank < rank:
        width = layers[1].output_shape[0]
        why = "images with the same activation pattern in it share a row, or one is lost in rounding"
        why = f"it has only {width} rows" if apart.second.rank == width else why
        notes.append(
            f"the gradient of {layers[1].name!r} has rank {apart.second.rank}, below {rank} of the layer before: {why}"
        )
    units, needed = layers[0].output_shape[0], rank + apart.second.rank + SPARE_UNITS
    if needed > units:
        notes.append(
            f"layer {layers[0].name!r} has {units} units, too few for a batch of this size: "
            f"the ranks {rank} and {apart.second.rank} need {needed}"
        )
    if count < rank:
        notes.append(f"{rank - count} of the {rank} images that the gradient holds were not found")
    return notes


def why_nothing_below(apart: Separation, size: int) -> list[str]:
    """Notes on convolutions below that were not solved."""
    notes, rank = [], apart.first.rank
    if len(apart.inputs) < size:
        notes.append(
            "the convolutions' gradients are sums over all images; with some of these missing nothing below the "
            "fully connected layers was determined"
        )
    if rank < size:
        notes.append(f"if the batch has {rank} images, give batch_size={rank} or None")
    return notes


def separation_reports(
    layers: Sequence[Layer], apart: Separation, size: int, seconds: float
) -> tuple[LayerReport, ...]:
    """Reports of the two layers that were separated, the later one first."""
    worst = apart.residuals.amax(0) if len(apart.residuals) else apart.residuals.new_ones(2)
    rows = []
    for layer, span, miss in zip(layers[:2], (apart.first, apart.second), worst.flip(0), strict=True):
        singular_values = {"sigma_above_cut": span.above_cut, "sigma_below_cut": span.below_cut}
        ranks = {"rank_gradients": span.rank, "rank": span.rank, "deficit": size - span.rank}
        outcome = {"iterations": apart.steps, "condition": 1 / span.above_cut, "residual": miss.item()}
        rows.append(LayerReport(layer.name, size, **ranks, **outcome, **singular_values, seconds=seconds))
    return tuple(reversed(rows))
