"""Newton's method on the range of the layer before, whose equations are linear on each piece of a homogeneous σ.

Each step solves leftᵀ (σ⁻¹(x + N t) − b) = 0 on the piece where the last one has ended: the generalised Newton method
for absolute value equations (Mangasarian 2009), here by least squares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from rgap.virtual.inference import DeficientLayer
from rgap.virtual.linearisation import inverse, slope

MAX_OPEN_SHARE = 0.75  # unknowns, over the range's equations, up to which these alone are tried
MAX_NOISE = 1e-4  # relative noise of the data beyond which beliefs weigh the doubtful signs
MAX_STEPS = 20  # steps after which another way is tried; it is as soon as a step changes no fewer signs than the last


def settled_on_range(problem: DeficientLayer) -> list[NDArray]:
    """The coefficients t after each step, the last on the piece of σ where the step began; empty where none settles.

    Ill-conditioned directions, which the deficient layer knows, are left as they are. All is in float32, enough for the
    way to the signs.
    """
    previous, t, x, found = problem.previous, np.zeros(problem.N.shape[1]), problem.x, []
    open_ = len(t) - problem.known.size
    if not problem.activation.homogeneous or previous.null.shape[1] or problem.noise > MAX_NOISE:
        return []
    if open_ > MAX_OPEN_SHARE * previous.left.shape[1]:
        return []
    slopes, moved = slope(problem.activation, x), len(x)
    while len(found) < MAX_STEPS:
        A = problem.rough_rows.at(1 / slopes)[:, :open_]
        z = inverse(problem.activation, x) - previous.bias
        size = np.abs(z).max() or 1.0
        factor, failed = linalg.lapack.spotrf(A.T @ A, lower=1, clean=0)
        if failed or not np.isfinite(size):
            break
        rest = (z / size).astype(np.float32) @ previous.rough_left
        step = linalg.lapack.spotrs(factor, A.T @ rest, lower=1)[0]
        t[:open_], x = t[:open_] - size * step, x - size * (problem.rough[:, :open_] @ step)
        found.append(t.copy())
        last, slopes = slopes, slope(problem.activation, x)
        before, moved = moved, np.count_nonzero(slopes != last)
        if not moved:
            return found
        if moved >= before:
            break
    return []
