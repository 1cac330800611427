"""What an optimiser returns: its images, its course, and a verdict by the rules of the closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from rgap.attack.verdict import MAX_CERTIFIED_ERROR
from rgap.baselines.matching import GradientObjective
from rgap.baselines.optimisers import Record, Snapshot
from rgap.results import Candidate, Reconstruction

MATCHED_ROUNDINGS = 100
"""Gradient residual, in units of the precision, up to which an optimiser has reproduced a gradient."""

MAX_ROUNDING = 1e-6
"""Relative error of a gradient up to which it counts as rounding, not as noise."""

SAME_IMAGE_RMSE = 0.01
"""Root-mean-square difference, in widths of the pixel range, up to which two results are the same image."""


@dataclass(frozen=True)
class Optimised(Reconstruction):
    """A reconstruction with the course that led to it.

    The candidates are the restarts, best first by gradient residual. The verdicts are those of the closed form under
    stricter conditions, because an optimiser knows neither a null space nor how sensitive its image is to errors of the
    gradient: "exact" needs a residual of at most a hundred roundings, and a gradient noisier than rounding, which other
    images match as well, makes it "ambiguous".

    Attributes:
        history: One row a step: restart, step, loss (what was minimised), gradient_residual, seconds (wall time since
            the attack began).
        snapshots: The images along the way, at steps about a quarter apart.
    """

    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    snapshots: tuple[Snapshot, ...] = ()


def candidate(problem: GradientObjective, images: Tensor, labels: Tensor) -> Candidate:
    """The images with their gradient residual."""
    residual = problem.distances(images.to(problem.device, problem.dtype), labels).residual
    images = images.detach().to("cpu", torch.float64)
    inside = problem.pixels.contains(
        images, problem.pixels.width * min(problem.received.tolerance, MAX_CERTIFIED_ERROR)
    )
    return Candidate(images, labels.cpu(), residual if math.isfinite(residual) else math.inf, inside)


def outcome(
    problem: GradientObjective, candidates: Sequence[Candidate], record: Record, notes: Sequence[str] = ()
) -> Optimised:
    """Ranks the candidates by their gradient residual and gives the verdict; the truth has no part in it."""
    ranked = sorted(candidates, key=lambda c: c.gradient_residual)
    best, notes = ranked[0], list(notes)
    received = problem.received
    noisy = received.precision > MAX_ROUNDING
    reached = (
        received.tolerance if noisy else MATCHED_ROUNDINGS * max(received.precision, torch.finfo(problem.dtype).eps)
    )
    consistent = [c for c in ranked if c.gradient_residual <= reached and c.in_pixel_range]
    if best.open_layers:
        verdict = "rank-deficient"
    elif best.gradient_residual > reached:
        verdict = "inconsistent"
        notes.append(
            f"no restart reproduces the gradient: the best misses it by {best.gradient_residual:.2g}; {reached:.2g} "
            "is asked of an optimiser at this precision"
        )
    elif noisy:
        verdict = "ambiguous"
        notes.append("the gradient is reproduced up to its noise, as it is by other images; an optimiser cannot tell")
    elif _different(consistent, problem.pixels.width):
        verdict = "ambiguous"
        notes.append(f"{len(consistent)} restarts inside the pixel range have this gradient, and they differ")
    else:
        verdict = "exact"
    return Optimised(
        best.images, best.labels, verdict, tuple(ranked), best.layers, tuple(notes),
        history=record.frame(), snapshots=tuple(record.snapshots),
    )  # fmt: skip


def _different(candidates: Sequence[Candidate], width: float) -> bool:
    """Whether any of them is another image than the first."""
    if not candidates:
        return False
    first = candidates[0].images
    return any((c.images - first).square().mean().sqrt().item() > SAME_IMAGE_RMSE * width for c in candidates[1:])
