"""Candidates and the verdict on them: what a recovery must reproduce, given how precise its gradient is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from rgap.attack.descent import ROUNDING, Descent
from rgap.attack.propagation import NoiseProbe
from rgap.attack.signs import project_to_pattern
from rgap.client import gradients_of
from rgap.head.hypothesis import Hypothesis
from rgap.network.layer import Chain
from rgap.results import Candidate, Reconstruction
from rgap.shared_gradient import SharedGradient

EXPLAINED = 5.0
"""Times the predicted error up to which a miss is put down to noise."""

MOST = 0.5
"""Residual from which a gradient is not reproduced, however large the noise is."""

ALIKE = 1.01
"""Ratio of residuals up to which candidates that miss the gradient are twins: neither is less inconsistent."""

FLIPPED = 30
"""Units that may lie on another piece than was decided when an image goes forward again; noise turns more."""

LEAST = 1e-140
"""Norm above which squares cannot underflow."""

DROWNED = 0.1
"""Predicted error, as a share of the pixel range, from which noise has drowned the image: nothing is certified."""


def make_candidate(
    chain: Chain,
    received: SharedGradient,
    stds: Mapping[str, Tensor],
    hypothesis: Hypothesis,
    descent: Descent,
    loss: str,
    pixel_range: tuple[float, float],
) -> Candidate:
    """Weighs a descent by the gradient that its image has, and by what the noise should make of both.

    Args:
        chain: The prepared network.
        received: The gradients.
        stds: Parameter name -> standard deviation of every entry's error.
        hypothesis: Where the descent started.
        descent: Down to the image.
        loss: A name in `rgap.client.LOSSES`.
        pixel_range: Smallest and largest value of a pixel.
    """
    name = chain.layers[0].name
    image = descent.layer_inputs[name].reshape(1, *chain.image_shape)
    label = torch.tensor([hypothesis.label])
    found = _Weighed(math.inf, received.tolerance)
    if torch.isfinite(image).all():
        weigh = partial(_weigh, chain, received, stds, label, loss, descent.probe)
        found = weigh(image)
        if found.residual > found.allowed and (moved := _with_decided_signs(chain, descent, image)) is not None:
            image, found = min((image, found), (moved, weigh(moved)), key=lambda pair: pair[1].residual)
    error, reports = None, descent.reports
    if found.excess is not None:
        error = found.excess * descent.probe.error
        reports = tuple(replace(r, predicted_error=found.excess * r.predicted_error) for r in reports)
    width = pixel_range[1] - pixel_range[0]
    width = width if math.isfinite(width) else 1.0
    slack = max(width * min(received.tolerance, DROWNED), min(EXPLAINED * (error or 0.0), width / 2))
    beyond = max((pixel_range[0] - image).max().item(), (image - pixel_range[1]).max().item())
    inputs = {**descent.layer_inputs, name: image.reshape(descent.layer_inputs[name].shape)}
    return Candidate(
        image, label, found.residual, beyond <= slack, inputs, reports, descent.open_layers,
        descent.beliefs, found.allowed, error,
    )  # fmt: skip


@dataclass(frozen=True)
class _Weighed:
    """How an image's gradient compares with the shared one: the miss, what is allowed, times more noise than known."""

    residual: float
    allowed: float
    excess: float | None = None


def _weigh(
    chain: Chain,
    received: SharedGradient,
    stds: Mapping[str, Tensor],
    label: Tensor,
    loss: str,
    probe: NoiseProbe | None,
    image: Tensor,
) -> _Weighed:
    """Computes the image's gradient, and that of the image as the noise may have made it."""

    def gradients(x: Tensor) -> dict[str, Tensor]:
        return gradients_of(chain.model, chain.parameters, x, label, loss)

    mine = gradients(image)
    has_gradient = {name: g for name, g in received.gradients.items() if name not in received.underflowed}
    misses = {name: _relative(mine[name], g, has_gradient) for name, g in has_gradient.items()}
    residual = max(misses.values())
    if probe is None:
        return _Weighed(residual, received.tolerance)
    noisy = gradients(image + probe.x.reshape(image.shape))
    expected = {name: _relative(noisy[name] + stds[name], mine[name], has_gradient) for name in has_gradient}
    allowed = max(received.tolerance, min(EXPLAINED * max(expected.values()), MOST))
    # What is missed by more than the noise that was known of says that there was more of it.
    excess = max(1.0, median(miss / max(expected[name], 1e-300) for name, miss in misses.items()))
    return _Weighed(residual, allowed, excess)


def _with_decided_signs(chain: Chain, descent: Descent, image: Tensor) -> Tensor | None:
    """The image with its units on the pieces that the descent has decided on, None where its error does not allow that.

    A unit whose pre-activation is smaller than its error may lie on the other piece when the image goes forward again;
    one in ten thousand makes the gradient miss by a per cent, and says nothing against the image.
    """
    if descent.probe is None or descent.open_layers:
        return None
    moved = project_to_pattern(chain.layers[:-1], image, descent.positive, FLIPPED)
    by = (moved - image).square().mean().sqrt().item()
    size = image.square().mean().sqrt().item()
    return moved if 0 < by <= EXPLAINED * max(descent.probe.error, ROUNDING * size) else None


def _relative(mine: Tensor, shared: Tensor, gradients: Mapping[str, Tensor]) -> float:
    """‖g′ − g‖ / ‖g‖, for a gradient that vanishes relative to the largest of all."""
    size = shared.norm().item()
    if size > LEAST:
        return (mine.cpu() - shared).norm().item() / size
    unit = shared.abs().max() if shared.any() else max(g.abs().max() for g in gradients.values())
    difference = ((mine.cpu() - shared) / unit).norm()  # in this unit squares cannot underflow
    return (difference / (shared / unit).norm().clamp(min=1.0)).item()


def judge(candidates: list[Candidate], notes: list[str], pixel_range: tuple[float, float], device) -> Reconstruction:
    """Ranks the candidates and gives the verdict.

    Args:
        candidates: In any order.
        notes: What was said so far.
        pixel_range: Smallest and largest value of a pixel.
        device: Where images and labels go, None for the CPU.
    """

    def order(candidate: Candidate) -> tuple:  # outside the range, the smaller of two twins is the likelier
        size = 0.0 if candidate.in_pixel_range else candidate.images.abs().max().item()
        return not candidate.consistent, size, candidate.gradient_residual

    candidates = sorted(candidates, key=order)
    best = candidates[0]
    consistent = [c for c in candidates if c.consistent]
    short = [f"{r.name!r} by {r.deficit}" for r in best.layers if r.deficit]
    if silent := [f"{r.saturated} at {r.name!r}" for r in best.layers if r.saturated]:
        why = "outputs that do not tell their pre-activation (zeros of a ReLU, saturation)"
        notes = [*notes, f"{why}: {', '.join(silent)}"]
    if short and not best.open_layers:
        notes = [*notes, f"layers short of full rank, closed by virtual constraints: {', '.join(short)}"]
    verdict, reasons = _verdict(best, consistent, short, pixel_range)
    alike = [c for c in candidates if c is best or c.gradient_residual <= ALIKE * best.gradient_residual < math.inf]
    kept = tuple(consistent or alike)
    if device is not None:
        kept = tuple(replace(c, images=c.images.to(device), labels=c.labels.to(device)) for c in kept)
    return Reconstruction(kept[0].images, kept[0].labels, verdict, kept, best.layers, (*notes, *reasons))


def _verdict(
    best: Candidate, consistent: list[Candidate], short: list[str], pixel_range: tuple[float, float]
) -> tuple[str, list[str]]:
    """The first verdict that holds, and why."""
    inside = [c for c in consistent if c.in_pixel_range]
    width = pixel_range[1] - pixel_range[0]
    if best.open_layers:
        why = f"layers short of full rank: {', '.join(short)}; what they leave open was not determined"
        return "rank-deficient", [why]
    if not consistent:
        why = f"no hypothesis reproduces the gradient: the best misses it by {best.gradient_residual:.2g}"
        return "inconsistent", [f"{why}; {best.residual_allowed:.2g} is allowed at this precision"]
    if (best.predicted_error or 0.0) > DROWNED * (width if math.isfinite(width) else 1.0):
        why = f"the gradient's noise drowns the image: its predicted error is {best.predicted_error:.2g}"
        return "inconsistent", [why]
    if len(inside) > 1:
        return "ambiguous", [f"{len(inside)} hypotheses inside the pixel range have this very gradient (twin data)"]
    if len(inside) == 1 and len(consistent) > 1:
        return "exact", [f"the pixel range chose between {len(consistent)} hypotheses with this gradient"]
    if not inside:
        why = "no consistent hypothesis lies inside the pixel range; the best by gradient was taken"
        return "ambiguous" if len(consistent) > 1 else "exact", [why]
    return "exact", []
