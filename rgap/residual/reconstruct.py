"""The image behind a residual or pooling network's gradient, and a verdict that needs neither loss nor ground truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rgap.residual.cut import ResidualNetwork
from rgap.residual.descent import best_descent
from rgap.residual.invert import START_STD
from rgap.results import (
    MAX_CERTIFIED_ERROR,
    Candidate,
    PixelRange,
    Reconstruction,
    UnsupportedLayerError,
    noise_limit,
    with_accuracy,
)
from rgap.shared_gradient import receive_gradients
from rgap.tokens.replay import Replay

NOISE_RESIDUAL_FACTOR = 5.0  # times its predicted error by which an image may leave the pixel range


def reconstruct_residual(
    network: ResidualNetwork, gradients: Sequence[Tensor] | Mapping[str, Tensor], loss: str = "cross_entropy", *,
    batch_size: int | None = 1, labels: Tensor | Sequence[int] | None = None, seed: int = 0,
    pixel_range: tuple[float, float] = (0.0, 1.0), rcond: float | None = None, noise_std: float | None = None,
    device: torch.device | str | None = None, gradient_scale: float | None = None, label_smoothing: float | None = None,
) -> Reconstruction:  # fmt: skip
    """Computes an image back from the gradient of a network with branches or pooling (ours).

    A blind layer is solved from its own gradient, blocks are walked down by gradient equations, and what lies below the
    last full-rank layer is inverted as one nonlinear least squares. Nothing above the blind layer is needed: it only
    checks, where the loss is known.

    Arguments and errors are those of `rgap.reconstruct`; `seed` is of the noise that the inversion starts from. The
    result's layers are the blind layer, each tensor of the walk, and the inversion.
    """
    if batch_size != 1:
        raise UnsupportedLayerError(
            f"batch_size is {batch_size}: a convolution's own gradient gives its input for one image; for a batch it "
            "is a sum over the images; 1 is supported"
        )
    model, pixels = network.model, PixelRange(*pixel_range)
    received = receive_gradients(network.graph.parameters, gradients, rcond, noise_std, model=model, any_scale=True)
    replay = Replay(model, received, loss, label_smoothing, gradient_scale)
    noise = torch.randn(network.image_shape, generator=torch.Generator().manual_seed(seed)).double()
    found = best_descent(network, received, pixels.middle + START_STD * pixels.width * noise)
    image = torch.zeros(1, *network.image_shape, dtype=torch.float64) if found.image is None else found.image[None]
    label, about_label = _label(replay, image, labels)
    decided = label.is_floating_point() or label.item() >= 0
    scale, whole = replay.match(image, label) if decided else (1.0, math.inf)
    notes = [*received.notes, *found.notes, *about_label]
    part = math.inf if found.image is None else found.lower_residual()
    by_noise = min(NOISE_RESIDUAL_FACTOR * found.error, pixels.width / 2) if math.isfinite(found.error) else 0.0
    inside = pixels.contains(image, MAX_CERTIFIED_ERROR * pixels.width + by_noise)
    candidate = Candidate(
        image, label, min(whole, part), inside, found.inputs(image), tuple(found.reports), found.open_layers,
        residual_allowed=received.tolerance, predicted_error=found.error, gradient_scale=scale,
    )  # fmt: skip
    verdict, why = _verdict(candidate, whole, part, pixels)
    if whole <= received.tolerance and scale != 1 and gradient_scale is None and verdict == "exact":
        why = [f"the shared gradient is {scale:.4g} times the image's own, missed by {whole:.2g}"]
    image, label = image.to(device or "cpu"), label.to(device or "cpu")
    candidate = replace(candidate, images=image, labels=label)
    result = Reconstruction(
        image, label, verdict, (candidate,), candidate.layers, (*notes, *why),
        gradient_scale=scale if whole <= received.tolerance else None,
    )  # fmt: skip
    return with_accuracy(result, pixels)


def _label(replay: Replay, image: Tensor, labels) -> tuple[Tensor, list[str]]:
    """The label, −1 where the gradient does not decide it."""
    try:
        return replay.find_label(image, labels)
    except UnsupportedLayerError:
        raise
    except ValueError as error:
        if labels is not None:
            raise
        return torch.tensor([-1]), [f"the label was not decided: {error}"]


def _verdict(best: Candidate, whole: float, part: float, pixels: PixelRange) -> tuple[str, list[str]]:
    """The first verdict that holds, and why."""
    allowed = best.residual_allowed
    if best.open_layers:
        return "rank-deficient", [f"what lies below was not determined: {', '.join(map(repr, best.open_layers))}"]
    if best.predicted_error > MAX_CERTIFIED_ERROR * pixels.width:
        return "inconsistent", [noise_limit(best.predicted_error, pixels)]
    if whole <= allowed:
        return "exact", [f"the image's own gradient reproduces the whole one, missed by {whole:.2g}"]
    if part <= allowed:
        why = f"the image reproduces the gradients of the layer entered and of all below it, missed by {part:.2g}"
        other = "another loss, label or scale was used, or units within rounding of zero were on their other side"
        return "exact", [f"{why}; it misses the whole gradient by {whole:.2g}: {other}"]
    why = f"the image's own gradient misses the shared one by {min(whole, part):.2g}; {allowed:.2g} is allowed"
    return "inconsistent", [why]
