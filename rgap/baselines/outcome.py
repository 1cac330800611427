"""The result of an optimiser: its images, its course, and a verdict by the rules of the closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from rgap.baselines.matching import GradientObjective
from rgap.baselines.optimisers import Record, Snapshot
from rgap.linalg import rms
from rgap.results import Candidate, Reconstruction

MAX_PIXEL_SLACK = 0.1  # distance outside the pixel range that the precision excuses, in widths of it
MATCHED_ROUNDINGS = 100  # gradient residual, over the precision, up to which a gradient is reproduced
MAX_ROUNDING = 1e-6  # relative error of a gradient up to which it counts as rounding, not as noise
SAME_IMAGE_RMSE = 0.01  # root-mean-square difference, in pixel ranges, up to which two results are one


@dataclass(frozen=True, repr=False)
class Optimised(Reconstruction):
    """A reconstruction with the course of its optimisation.

    The candidates are the restarts, best first by gradient residual. The verdicts are those of the closed form under
    stricter conditions, because an optimiser knows neither null spaces nor the sensitivity of its image to errors in
    the gradient: "exact" needs a residual of at most a hundred roundings, and where the gradient is noisier than
    rounding, so that other images match it as well, the verdict is "ambiguous".

    Attributes:
        history: One row per step: restart, step, loss (what was minimised), gradient_residual, seconds (wall time
            since the attack began).
        snapshots: The images along the way, at steps that grow by about a quarter.
    """

    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    snapshots: tuple[Snapshot, ...] = ()


def candidate(problem: GradientObjective, images: Tensor, labels: Tensor) -> Candidate:
    """The images with their gradient residual."""
    residual = problem.distances(images.to(problem.sizes), labels).residual
    images = images.detach().to("cpu", torch.float64)
    margin = problem.pixels.width * min(problem.received.tolerance, MAX_PIXEL_SLACK)
    inside = problem.pixels.contains(images, margin)
    return Candidate(images, labels.cpu(), residual if math.isfinite(residual) else math.inf, inside)


def outcome(
    problem: GradientObjective, candidates: Sequence[Candidate], record: Record, notes: Sequence[str] = ()
) -> Optimised:
    """Ranks the candidates by their gradient residual and gives the verdict; the truth has no part in it."""
    ranked = sorted(candidates, key=lambda c: c.gradient_residual)
    best, notes = ranked[0], list(notes)
    precision, rounding = problem.received.precision, torch.finfo(problem.sizes.dtype).eps
    noisy = precision > MAX_ROUNDING
    reached = problem.received.tolerance if noisy else MATCHED_ROUNDINGS * max(precision, rounding)
    consistent = [c for c in ranked if c.gradient_residual <= reached and c.in_pixel_range]
    if best.open_layers:
        verdict = "rank-deficient"
    elif best.gradient_residual > reached:
        verdict = "inconsistent"
        notes.append(
            f"no restart reproduces the gradient: the best residual is {best.gradient_residual:.2g}, and an optimiser "
            f"must reach {reached:.2g} at this precision"
        )
    elif noisy:
        verdict = "ambiguous"
        notes.append(
            "the gradient is reproduced up to its noise, as other images do; an optimiser cannot tell them apart"
        )
    elif any(rms(c.images - consistent[0].images) > SAME_IMAGE_RMSE * problem.pixels.width for c in consistent[1:]):
        verdict = "ambiguous"
        notes.append(f"{len(consistent)} restarts inside the pixel range have this gradient, and they differ")
    else:
        verdict = "exact"
    return Optimised(
        best.images, best.labels, verdict, tuple(ranked), best.layers, tuple(notes),
        history=record.frame(), snapshots=tuple(record.snapshots),
    )  # fmt: skip
