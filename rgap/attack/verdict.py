"""The verdict on candidates: the first of rank-deficient, inconsistent, ambiguous and exact that holds.

A factor on the whole gradient leaves an image's brightness open: then "exact" becomes "ambiguous", and notes say why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from rgap.attack.candidates import Weighed
from rgap.results import VERDICTS, Candidate, PixelRange, Reconstruction, certified_psnr_db, noise_limit, with_accuracy

MAX_OPEN_SIZE = 100.0  # size of pixels below an open layer, in widths of their range, from which they show nothing
TWIN_RESIDUAL_RATIO = 1.01  # ratio of residuals up to which candidates that miss the gradient are twins
MAX_BRIGHTNESS_ERROR = 0.02  # relative error of an image's brightness above which it counts as open
WHOLE_FACTOR_ERROR = 1e-3  # relative distance from a whole number up to which a factor is named as one
MAX_HEAD_MISFIT = 30.0  # misfit of the head, in standard deviations, that no model of the loss leaves on a right image


def judge(
    weighed: Sequence[Weighed], notes: Sequence[str], pixels: PixelRange, device: torch.device | str | None = None
) -> Reconstruction:
    """Ranks the candidates, in any order, of a batch a single one, and gives the verdict; notes are those so far."""
    if weighed[0].start.batch_size > 1:
        return _judge_batch(weighed[0], notes, pixels, device)

    def order(candidate: Candidate) -> tuple:  # outside the range, the smaller of two twins is the likelier
        swamped = (candidate.predicted_error or 0.0) > pixels.width  # in the range only by so large an error
        inside = candidate.in_pixel_range and not swamped
        size = 0.0 if inside else candidate.images.abs().max().item()
        return not candidate.consistent, size, candidate.gradient_residual

    candidates = sorted(_twins_together(weighed), key=order)
    best = candidates[0]
    consistent = [c for c in candidates if c.consistent]
    if unknown := [f"{r.saturated} at {r.name!r}" for r in best.layers if r.saturated]:
        why = "outputs that do not determine their pre-activation (zeros of a ReLU, saturation)"
        notes = [*notes, f"{why}: {', '.join(unknown)}"]
    misfit = min(one.start.misfit for one in weighed)
    verdict, why = with_brightness(best, *_verdict(best, consistent, pixels), misfit)
    doubts = [] if consistent or best.open_layers else [one.doubt for one in weighed if one.doubt][:1]
    limit = TWIN_RESIDUAL_RATIO * best.gradient_residual
    alike = [c for c in candidates if c is best or c.gradient_residual <= limit < math.inf]
    kept = tuple(_on_device(_shown(c, pixels), device) for c in consistent or alike)
    notes = (*notes, *_deficits(best), *doubts, *why, *about_brightness([best]))
    judged = Reconstruction(kept[0].images, kept[0].labels, verdict, kept, best.layers, notes)
    return with_accuracy(replace(judged, gradient_scale=factor_of([best])), pixels)


def _shown(candidate: Candidate, pixels: PixelRange) -> Candidate:
    """The candidate; what is amplified from an open layer is no picture, and a uniform image stands for it."""
    if not candidate.open_layers or (candidate.images - pixels.middle).abs().max() <= MAX_OPEN_SIZE * pixels.width:
        return candidate
    return replace(candidate, images=torch.full_like(candidate.images, pixels.middle))


def _twins_together(weighed: Sequence[Weighed]) -> list[Candidate]:
    """The candidates; twins have the same gradient, so that where one is consistent, all are.

    Their own gradients differ by rounding and by the noise's error of the scale, which decides nothing between them.
    """
    agreed = [one.start.twins for one in weighed if one.joint.consistent]
    return [
        replace(one.joint, residual_allowed=max(one.joint.residual_allowed, one.joint.gradient_residual))
        if any(one.start.twins is twins for twins in agreed)
        else one.joint
        for one in weighed
    ]


def _judge_batch(weighed: Weighed, notes: Sequence[str], pixels: PixelRange, device) -> Reconstruction:
    """The verdict of every image, and the worst of them, or that of the batch where images are missing."""
    start, whole = weighed.start, weighed.joint
    size, found = start.batch_size, len(whole.images)
    best = [one[0] for one in weighed.each]
    judged = [
        with_brightness(one[0], *_verdict(one[0], one if one[0].consistent else (), pixels)) for one in weighed.each
    ]
    verdicts = [verdict for verdict, _ in judged]
    if weighed.unconfirmed:
        verdicts = ["rank-deficient"] * found
    notes = [*notes, *_deficits(whole, len(start.reports))]
    if start.ranks[0] < size or (found < size and start.ranks[1] < size):
        top = "rank-deficient"
    else:
        top = "inconsistent" if found < size else min(verdicts, key=VERDICTS.index)
    if found and not whole.consistent and not whole.open_layers and top != "rank-deficient":
        top = "inconsistent"
        miss, allowed = whole.gradient_residual, whole.residual_allowed
        notes.append(f"the recovered images miss the gradient by {miss:.2g}; {allowed:.2g} is allowed")
    if found and whole.predicted_error is not None and certified_psnr_db(whole, pixels) is None and whole.consistent:
        notes.append(noise_limit(whole.predicted_error, pixels))
    if start.layer == 0 or "inconsistent" not in verdicts:
        notes += _twins_chosen(weighed.each, verdicts)
    if outside := sum(not one.in_pixel_range for one in best):
        notes.append(f"{outside} of {found} images leave the pixel range by more than their predicted error")
    notes += about_brightness(best)
    whole, each = _on_device(whole, device), [tuple(_on_device(c, device) for c in one) for one in weighed.each]
    per_image = tuple(zip(verdicts, each, strict=True))
    result = Reconstruction(whole.images, whole.labels, top, (whole,), whole.layers, tuple(notes), per_image)
    return with_accuracy(replace(result, gradient_scale=factor_of(best)), pixels)


def _verdict(best: Candidate, consistent: Sequence[Candidate], pixels: PixelRange) -> tuple[str, list[str]]:
    """The first verdict that holds, and why; above a predicted error of `MAX_CERTIFIED_ERROR` nothing is certified."""
    inside = [c for c in consistent if c.in_pixel_range]
    if best.open_layers:
        return "rank-deficient", []
    if not consistent:
        why = f"no hypothesis reproduces the gradient: the best misses it by {best.gradient_residual:.2g}"
        return "inconsistent", [f"{why}; {best.residual_allowed:.2g} is allowed at this precision"]
    if all(certified_psnr_db(c, pixels) is None for c in inside or [best]):
        return "inconsistent", [noise_limit(best.predicted_error, pixels)]
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
        why = "equal images, or another batch size"
        notes.append(f"the gradient shares of {odd} of {count} images are not those of one image each: {why}")
    return notes


def _on_device(candidate: Candidate, device: torch.device | str | None) -> Candidate:
    if device is None:
        return candidate
    return replace(candidate, images=candidate.images.to(device), labels=candidate.labels.to(device))


def with_brightness(best: Candidate, verdict: str, why: list[str], misfit: float = 0.0) -> tuple[str, list[str]]:
    """A verdict and its reasons, corrected for an open brightness and a last layer that no loss explains."""
    if verdict in ("exact", "ambiguous") and misfit > MAX_HEAD_MISFIT:
        return "inconsistent", [
            f"no loss explains the last layer's gradient: its equations miss by {misfit:.2g} errors"
        ]
    return "ambiguous" if is_open(best) and verdict == "exact" else verdict, why


def is_open(candidate: Candidate) -> bool:
    """Whether a candidate's brightness is not determined well enough to be certified."""
    return candidate.brightness_error > MAX_BRIGHTNESS_ERROR


def factor_of(candidates: Sequence[Candidate]) -> float | None:
    """The factor of the gradient, the mean over images; None where one image's brightness is open."""
    if not candidates or any(is_open(one) for one in candidates):
        return None
    return sum(one.gradient_scale for one in candidates) / len(candidates)


def about_brightness(candidates: Sequence[Candidate]) -> list[str]:
    """Notes on the brightness of the images and on the factors of their gradients, without repetitions."""
    notes = []
    if worst := max((one.brightness_error for one in candidates if is_open(one)), default=0.0):
        known = "not determined" if math.isinf(worst) or worst > 1 else f"determined to {worst:.1%} only"
        why = (
            "a gradient scaled by clipping, accumulation or class weights is that of a brighter or darker image; the "
            "pattern holds, and gradient_scale=1.0 asserts a loss by the book, which images outside of the pixel "
            "range contradict"
        )
        if any(one.labels.is_floating_point() for one in candidates):
            why = (
                "without the gradient of the last layer's bias each brightness has its own real-valued target, or "
                "factor of the loss; labels= gives the one, gradient_scale= the other"
            )
        notes = [f"brightness is {known}: {why}"]
    factors = {f"{one.gradient_scale:.3g}": one.gradient_scale for one in candidates}
    if any(factor != 1 for factor in factors.values()):
        causes = ", ".join(f"{factor:.5g} ({_cause(factor)})" for factor in sorted(factors.values()))
        notes.append(f"the shared gradient is that of the loss times {causes}")
    return notes


def _cause(factor: float) -> str:
    """What may have scaled a gradient so."""
    size = max(factor, 1 / factor)
    whole = round(size)
    if factor == 1:
        return "by the book"
    if whole > 1 and abs(size / whole - 1) < WHOLE_FACTOR_ERROR:
        return f"summed over {whole}, or scaled" if factor > 1 else f"averaged over {whole}, or clipped"
    return "scaled, or a class weight" if factor > 1 else "clipped, or a class weight"
