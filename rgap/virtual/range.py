"""Virtual constraints of a batch: σ⁻¹ of every image's input lies in the range of the layer before.

x_b = σ(W′ x′_b + b′) with more outputs than inputs: with `left` the complement of the range of W′,
`left`ᵀ (σ⁻¹(x_b) − b′) = 0 for each image, linear once the signs of x are known (for smooth activations, near the
solution). The rows join the layer's own system, whose null space the images share: they determine the solution within
it, and where there is none they reduce the error, since they are exact whatever the gradient's precision (both ours;
the paper counts such constraints).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgap.equations.complement import RangeComplement, complement
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.equations.systems import ReducedSystem
from rgap.linalg import LeastSquares, Operator, gram_matrix, least_squares, rms
from rgap.network.layer import Layer
from rgap.virtual.certificate import MAX_CERTIFIED_RESIDUAL, VirtualSolution
from rgap.virtual.closure import ERROR_AMPLIFICATION

MAX_STEPS = 30  # limit on the solves, each with the signs of the previous solution
MAX_STALLED_STEPS = 4  # solves without a decrease in the number of changed signs after which the iteration ends

CONVERGED_CHANGE = 1e-9
"""Change, in signs or in a step's relative length, up to which the linearisation is that of the solution."""

UNDECIDED_SIGN_STDS = 3.0
"""Size of an entry, in units of the range constraints' noise, up to which its sign is undetermined."""


def range_factor(before: Layer) -> RangeComplement | None:
    """The range constraints of a layer, or None where it has none or they do not fit in memory."""
    if before.groups > 1 or math.prod(before.output_shape) <= before.unknowns:
        return None
    return complement(before)


def close_by_range(
    before: Layer,
    factor: RangeComplement,
    system: ReducedSystem,
    x: Tensor,
    *,
    deficit: int,
    precision: float,
    rcond: float,
) -> VirtualSolution:
    """Solves a layer's system together with the range constraints of the layer before.

    Args:
        before: The layer before; its activation stands between.
        factor: From `range_factor(before)`.
        system: The deficient or badly conditioned system, of a layer without groups.
        x: Its own solution, (B, C, H, W), whose signs are the first.
        deficit: Dimension of the system's null space.
        precision: Relative error of the gradient.
        rcond: Relative cutoff of singular values.

    Returns:
        A `VirtualSolution` with x (B, n).
    """
    left, x = factor.basis, x.flatten(1)
    bias = (before.pre_bias() + x.new_zeros(before.output_shape)).flatten()
    rest = system.b - system.A.apply(system.project(x - system.x0)[:, None])[:, 0]
    own = max(rms(rest).item(), ERROR_AMPLIFICATION * precision * system.size / system.b.numel() ** 0.5)
    noise = ERROR_AMPLIFICATION * own * system.b.numel() ** 0.5 / system.size
    changes, kept, first = [], False, x
    for _ in range(MAX_STEPS):
        z = before.activation.inverse(x)
        if not torch.isfinite(z).all():  # outside the range of σ, where there is no inverse to linearise
            return VirtualSolution(first, False, left.shape[1] * len(x), len(changes), math.inf, math.inf)
        unit = noise * rms(z).item()
        slope = before.activation.derivative(z)
        dense = _solve(system, left, z - bias, slope, x, (own, unit), rcond)
        moved = system.x0 + system.spread(dense.y[:, None])[:, :, 0]
        changes.append(_change(before, x, moved, slope, UNDECIDED_SIGN_STDS * unit))
        kept = changes[-1] <= CONVERGED_CHANGE
        x = moved
        earlier, latest = changes[:-MAX_STALLED_STEPS], changes[-MAX_STALLED_STEPS:]
        if kept or (earlier and min(latest) >= min(earlier)):
            break
    z = before.activation.inverse(x)
    residual, equations = rms((z - bias) @ left).item(), left.shape[1] * len(x)
    fits = residual <= MAX_CERTIFIED_RESIDUAL * unit and equations - deficit >= CERTIFICATE_SURPLUS
    certified = kept and fits and dense.null is None
    return VirtualSolution(x, certified, equations, len(changes), residual / rms(z).item(), dense.condition)


def _solve(
    system: ReducedSystem, left: Tensor, z: Tensor, slope: Tensor, x: Tensor, units: tuple[float, float], rcond: float
) -> LeastSquares:
    """The system's rows and the range constraints, linearised at x, each in units of its noise."""
    own, unit = units
    rows, right = [], []
    for image in range(len(x)):
        columns, R = system.seen_by(image, left.T / slope[image])
        rows.append((columns, R / unit))
        right.append(left.T @ ((x[image] - system.x0[image]) / slope[image] - z[image]) / unit)
    count = system.b.numel()

    def gram() -> Tensor:
        gram = system.A.gram / own**2
        for columns, R in rows:
            gram[columns, columns] += gram_matrix(R)
        return gram

    def apply(y: Tensor) -> Tensor:
        return torch.cat([system.A.apply(y) / own, *(R @ y[columns] for columns, R in rows)])

    def adjoint(r: Tensor) -> Tensor:
        y = system.A.adjoint(r[:count] / own)
        for (columns, R), part in zip(rows, r[count:].split(left.shape[1]), strict=True):
            y[columns] += R.T @ part
        return y

    b = torch.cat([system.b / own, *right])
    A, damping = Operator(system.A.columns, gram, apply, adjoint), system.damping / own
    return least_squares(A, b, min(rcond, 1e-5), damping, gram_only=True)


def _change(before: Layer, x: Tensor, moved: Tensor, slope: Tensor, undecided: float) -> float:
    """The change by one step: the number of signs, or for smooth activations the step's relative length.

    Signs of entries below `undecided`, before and after, do not count; their effect shows in the residual of the range
    constraints.
    """
    if before.activation.homogeneous:
        decided = torch.maximum(x.abs(), moved.abs()) > undecided
        return float(((before.activation.derivative(before.activation.inverse(moved)) != slope) & decided).sum())
    return ((moved - x).norm() / x.norm()).item()
