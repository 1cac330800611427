"""What a factor on the whole gradient leaves of a verdict: whether an image's brightness is known, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rgap.results import Candidate

MAX_BRIGHTNESS_ERROR = 0.02  # relative error of an image's brightness above which it counts as open
WHOLE_FACTOR_ERROR = 1e-3  # relative distance from a whole number up to which a factor is named as one
MAX_HEAD_MISFIT = 30.0  # misfit of the head, in standard deviations, that no model of the loss leaves on a right image


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
            "pattern holds, and gradient_scale=1.0 asserts a loss by the book"
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
