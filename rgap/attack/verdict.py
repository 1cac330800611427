"""Candidates and the verdict on them: what a recovery must reproduce, given how precise its gradient is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from rgap.attack.bootstrap import NOISE_RESIDUAL_FACTOR, ExpectedResidual, residual_under_noise
from rgap.attack.descent import Closer, Descent
from rgap.attack.pattern import batch_on_pattern, project_to_pattern
from rgap.client import gradients_of
from rgap.head.hypothesis import Start, Twin
from rgap.network.layer import Chain
from rgap.results import VERDICTS, Candidate, PixelRange, Reconstruction
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient, relative_residuals

MAX_ALLOWED_RESIDUAL = 0.5
"""Residual from which a gradient is not reproduced, however large the noise is."""

TWIN_RESIDUAL_RATIO = 1.01
"""Ratio of residuals up to which candidates that miss the gradient are twins: neither is less inconsistent."""

MAX_PATTERN_FLIPS = 30
"""Units of an image that may lie on another piece than was decided when it goes forward again; noise flips more."""

MAX_CERTIFIED_ERROR = 0.1
"""Predicted error, as a share of the pixel range, from which noise has drowned an image: nothing is certified."""

MAX_CERTIFIED_ERROR_BATCH = 2e-3
"""The same for an image of a batch."""


@dataclass(frozen=True)
class Weighed:
    """A start that was followed down, weighed.

    Attributes:
        start: The start.
        joint: The candidate of all images together.
        each: For each image of a batch its candidates, one for each of its twins, those in the pixel range first.
        unconfirmed: Whether the scales of a batch go by its size alone, and the gradient's rank does not confirm that.
    """

    start: Start
    joint: Candidate
    each: tuple[tuple[Candidate, ...], ...] = ()
    unconfirmed: bool = False


def weigh(
    chain: Chain,
    received: SharedGradient,
    start: Start,
    descent: Descent,
    loss: str,
    pixels: PixelRange,
    close: Closer | None = None,
) -> Weighed:
    """Compares the gradient that the images of a descent have with the shared one, and with what noise makes of both.

    Args:
        chain: The prepared network.
        received: The gradients.
        start: Where the descent started.
        descent: Down to the images.
        loss: A name in `rgap.client.LOSSES`.
        pixels: The values that a pixel may have.
        close: As in the descent, for a batch on which noise is tried out.
    """
    if start.batch_size > 1:
        return _weigh_batch(chain, received, start, descent, loss, pixels, close)
    name = chain.layers[0].name
    image = descent.layer_inputs[name].reshape(1, *chain.image_shape)
    match = _Match(math.inf, received.tolerance)
    if torch.isfinite(image).all():
        match = _match(chain, received, start.labels, loss, descent, image)
        moved = _on_decided_pattern(chain, descent, image) if match.residual > match.allowed else None
        if moved is not None:
            other = _match(chain, received, start.labels, loss, descent, moved)
            image, match = min((image, match), (moved, other), key=lambda pair: pair[1].residual)
    error, reports = None, descent.reports
    if match.excess is not None:
        error = match.excess * descent.probe.error
        reports = tuple(replace(r, predicted_error=match.excess * r.predicted_error) for r in reports)
    slack = max(_slack(received, pixels), min(NOISE_RESIDUAL_FACTOR * (error or 0.0), pixels.width / 2))
    inputs = {**descent.layer_inputs, name: image.reshape(descent.layer_inputs[name].shape)}
    inside = pixels.contains(image, slack)
    return Weighed(start, Candidate(
        image, start.labels, match.residual, inside, inputs, reports, descent.open_layers,
        descent.beliefs, match.allowed, error,
    ))  # fmt: skip


def _slack(received: SharedGradient, pixels: PixelRange) -> float:
    """How far outside the range a pixel may lie by the gradient's precision."""
    return pixels.width * min(received.tolerance, MAX_CERTIFIED_ERROR)


@dataclass(frozen=True)
class _Match:
    """How an image's gradient compares with the shared one.

    Attributes:
        residual: By how much it misses.
        allowed: By how much it may.
        excess: How many times more noise there was than was known of, at least 1; None without a probe.
    """

    residual: float
    allowed: float
    excess: float | None = None


def _match(
    chain: Chain, received: SharedGradient, labels: Tensor, loss: str, descent: Descent, image: Tensor
) -> _Match:
    """Compares the gradients of the image, and of the image as the noise may have made it."""
    mine = gradients_of(chain.model, chain.parameters, image, labels, loss)
    misses = relative_residuals(mine, received.usable)
    if descent.probe is None:
        return _Match(max(misses.values()), received.tolerance)
    noisy = gradients_of(chain.model, chain.parameters, image + descent.probe.x.reshape(image.shape), labels, loss)
    noisy = {name: noisy[name].cpu() + received.entry_std[name] for name in misses}
    expected = relative_residuals(noisy, {name: mine[name].cpu() for name in misses})
    allowed = min(NOISE_RESIDUAL_FACTOR * max(expected.values()), MAX_ALLOWED_RESIDUAL)
    # What is missed by more than the noise that was known of shows that there was more of it.
    excess = max(1.0, median(miss / max(expected[name], 1e-300) for name, miss in misses.items()))
    return _Match(max(misses.values()), max(received.tolerance, allowed), excess)


def _on_decided_pattern(chain: Chain, descent: Descent, image: Tensor) -> Tensor | None:
    """The image with its units on the pieces that the descent has decided on, None where its error does not allow that.

    A unit whose pre-activation is smaller than its error may lie on the other piece when the image goes forward again;
    one in ten thousand makes the gradient miss by a per cent, and is no evidence against the image.
    """
    if descent.probe is None or descent.open_layers:
        return None
    moved = project_to_pattern(chain.layers[:-1], image, descent.positive, MAX_PATTERN_FLIPS)
    by = (moved - image).square().mean().sqrt().item()
    size = image.square().mean().sqrt().item()
    return moved if 0 < by <= NOISE_RESIDUAL_FACTOR * max(descent.probe.error, FLOAT64_FLOOR * size) else None


def _weigh_batch(
    chain: Chain, received: SharedGradient, start: Start, descent: Descent, loss: str, pixels: PixelRange,
    close: Closer | None,
) -> Weighed:  # fmt: skip
    """Weighs the images of a batch, each in the best of its twins."""
    name, slack = chain.layers[0].name, _slack(received, pixels)
    images = descent.layer_inputs[name].reshape(len(start.x), *chain.image_shape)
    if start.layer and torch.isfinite(images).all():
        images = batch_on_pattern(chain, images, descent.positive)
    inputs = {**descent.layer_inputs, name: images.reshape(descent.layer_inputs[name].shape)}

    def candidate(b: int, twin: Twin) -> Candidate:
        own, image = {key: twin.factor * x[b : b + 1] for key, x in inputs.items()}, twin.factor * images[b : b + 1]
        inside, residual = pixels.contains(image, slack), math.nan if twin.residual is None else twin.residual
        return Candidate(
            image, torch.tensor([twin.label]), residual, inside, own, descent.reports, descent.open_layers,
            residual_allowed=received.tolerance,
        )  # fmt: skip

    each = [sorted((candidate(b, twin) for twin in twins), key=_preference) for b, twins in enumerate(start.twins)]
    best = [found[0] for found in each]
    joint = torch.cat([images[:0], *(one.images for one in best)])
    labels = torch.cat([start.labels[:0], *(one.labels for one in best)])
    residual, expected = math.inf if len(joint) else 1.0, ExpectedResidual(received.tolerance)
    if len(joint) and torch.isfinite(joint).all():
        mine = gradients_of(chain.model, chain.parameters, joint, labels, loss)
        share = len(joint) / start.batch_size  # images that were not found add nothing
        residual = max(relative_residuals({key: share * g for key, g in mine.items()}, received.usable).values())
        expected = residual_under_noise(chain, received, start, descent, images, residual, loss, close)
    numbers = {"residual_allowed": expected.residual, "predicted_error": expected.error}
    whole = Candidate(
        joint, labels, residual, all(one.in_pixel_range for one in best),
        {key: torch.cat([x[:0], *(one.layer_inputs[key] for one in best)]) for key, x in inputs.items()},
        descent.reports, descent.open_layers, **numbers,
    )  # fmt: skip
    if start.layer:  # what the images share of the gradients of the layers below cannot be told apart
        each = [[replace(one, gradient_residual=residual, **numbers) for one in found] for found in each]
    unconfirmed = start.ranks[0] < start.batch_size and chain.homogeneous and chain.layers[-1].output_shape[0] == 1
    return Weighed(start, whole, tuple(map(tuple, each)), unconfirmed)


def _preference(candidate: Candidate) -> tuple[bool, float]:
    """Of the twins of one image, those inside the pixel range come first, then the darker ones."""
    return not candidate.in_pixel_range, candidate.images.abs().max().item()


def judge(
    weighed: Sequence[Weighed], notes: Sequence[str], pixels: PixelRange, device: torch.device | str | None = None
) -> Reconstruction:
    """Ranks the candidates and gives the verdict.

    Args:
        weighed: In any order; of a batch a single one.
        notes: What was noted so far.
        pixels: The values that a pixel may have.
        device: Where images and labels go, None for the CPU.
    """
    if weighed[0].start.batch_size > 1:
        return _judge_batch(weighed[0], notes, pixels, device)

    def order(candidate: Candidate) -> tuple:  # outside the range, the smaller of two twins is the likelier
        size = 0.0 if candidate.in_pixel_range else candidate.images.abs().max().item()
        return not candidate.consistent, size, candidate.gradient_residual

    candidates = sorted((one.joint for one in weighed), key=order)
    best = candidates[0]
    consistent = [c for c in candidates if c.consistent]
    if unknown := [f"{r.saturated} at {r.name!r}" for r in best.layers if r.saturated]:
        why = "outputs that do not tell their pre-activation (zeros of a ReLU, saturation)"
        notes = [*notes, f"{why}: {', '.join(unknown)}"]
    verdict, why = _verdict(best, consistent, MAX_CERTIFIED_ERROR * pixels.width)
    limit = TWIN_RESIDUAL_RATIO * best.gradient_residual
    alike = [c for c in candidates if c is best or c.gradient_residual <= limit < math.inf]
    kept = tuple(_on_device(c, device) for c in consistent or alike)
    notes = (*notes, *_deficits(best), *why)
    return Reconstruction(kept[0].images, kept[0].labels, verdict, kept, best.layers, notes)


def _judge_batch(weighed: Weighed, notes: Sequence[str], pixels: PixelRange, device) -> Reconstruction:
    """The verdict of every image, and the worst of them, or that of the batch where images are missing."""
    start, whole = weighed.start, weighed.joint
    limit, size, found = MAX_CERTIFIED_ERROR_BATCH * pixels.width, start.batch_size, len(whole.images)
    verdicts = [_verdict(one[0], one if one[0].consistent else (), limit)[0] for one in weighed.each]
    if weighed.unconfirmed:
        verdicts = ["rank-deficient"] * found
    if start.ranks[0] < size or (found < size and start.ranks[1] < size):
        top = "rank-deficient"
    else:
        top = "inconsistent" if found < size else min(verdicts, key=VERDICTS.index)
    notes = [*notes, *_deficits(whole, len(start.reports))]
    if found and not whole.consistent and not whole.open_layers and top != "rank-deficient":
        top = "inconsistent"
        miss, allowed = whole.gradient_residual, whole.residual_allowed
        notes.append(f"what was found misses the gradient by {miss:.2g}; {allowed:.2g} is allowed")
    if whole.predicted_error is not None:
        error = whole.predicted_error
        notes.append(f"the gradient's noise explains an error of {error:.2g} of the images, tried out on them")
    if start.layer == 0 or "inconsistent" not in verdicts:
        notes += _twins_chosen(weighed.each, verdicts)
    whole = _on_device(whole, device)
    per_image = [
        (verdict, tuple(_on_device(c, device) for c in each))
        for verdict, each in zip(verdicts, weighed.each, strict=True)
    ]
    return Reconstruction(whole.images, whole.labels, top, (whole,), whole.layers, tuple(notes), tuple(per_image))


def _verdict(best: Candidate, consistent: Sequence[Candidate], max_error: float) -> tuple[str, list[str]]:
    """The first verdict that holds, and why.

    Args:
        best: The candidate that comes first.
        consistent: Those that reproduce the gradient, `best` among them, or none.
        max_error: Predicted error from which nothing is certified.
    """
    inside = [c for c in consistent if c.in_pixel_range]
    if best.open_layers:
        return "rank-deficient", []
    if not consistent:
        why = f"no hypothesis reproduces the gradient: the best misses it by {best.gradient_residual:.2g}"
        return "inconsistent", [f"{why}; {best.residual_allowed:.2g} is allowed at this precision"]
    if (best.predicted_error or 0.0) > max_error:
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


def _deficits(best: Candidate, solved_from: int = 0) -> list[str]:
    """A note on the layers short of full rank among those that were solved, and whether anything has closed them."""
    short = ", ".join(f"{r.name!r} by {r.deficit}" for r in best.layers[solved_from:] if r.deficit)
    if best.open_layers:
        return [f"layers short of full rank: {short}; what they leave open was not determined"]
    return [f"layers short of full rank, closed by virtual constraints: {short}"] if short else []


def _twins_chosen(each: Sequence[Sequence[Candidate]], verdicts: Sequence[str]) -> list[str]:
    """Notes on scales between which the pixel range chose, or did not."""
    notes, count = [], len(each)
    if chosen := sum(len(one) > 1 and sum(c.in_pixel_range for c in one) == 1 for one in each):
        notes.append(f"the pixel range chose between two scales for {chosen} of {count} images")
    if twins := verdicts.count("ambiguous"):
        notes.append(f"{twins} of {count} images have two scales between which the pixel range does not choose")
    if odd := verdicts.count("inconsistent"):
        notes.append(
            f"the shares of {odd} of {count} images are not those of one image each: equal images, or another "
            "batch size"
        )
    return notes


def _on_device(candidate: Candidate, device: torch.device | str | None) -> Candidate:
    if device is None:
        return candidate
    return replace(candidate, images=candidate.images.to(device), labels=candidate.labels.to(device))
