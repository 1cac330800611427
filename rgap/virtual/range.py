"""Virtual constraints of a batch: σ⁻¹ of every image's input lies in the range of the layer before.

x_b = σ(W′ x′_b + b′) with more outputs than inputs: with `left` the complement of the range of W′,
`left`ᵀ (σ⁻¹(x_b) − b′) = 0 for each image, linear once the signs of x are known (for smooth activations, near the
solution). The rows join the layer's own system, whose null space the images share: they determine the solution within
it, and where there is none they reduce the error, since they are exact whatever the gradient's precision (both ours;
the paper counts such constraints).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rgap.equations import LayerSolution
from rgap.equations.complement import RangeComplement, complement
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.equations.systems import ReducedSystem
from rgap.linalg import LeastSquares, Operator, dense_operator, gram_matrix, least_squares, rms
from rgap.network.layer import Layer
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient
from rgap.virtual.certificate import MAX_CERTIFIED_RESIDUAL, VirtualSolution
from rgap.virtual.closure import ERROR_AMPLIFICATION

MAX_STEPS = 30  # limit on the solves, each with the signs of the previous solution
MAX_STALLED_STEPS = 4  # solves without a decrease in the number of changed signs after which the iteration ends
CONVERGED_CHANGE = 1e-9  # change, in signs or relative length, up to which the linearisation is the solution's
UNDECIDED_SIGN_STDS = 3.0  # size of an entry, in units of the range constraints' noise, up to which its sign is open


def range_factor(before: Layer) -> RangeComplement | None:
    """The range constraints of a layer, or None where it has none or they do not fit in memory."""
    if before.groups > 1 or math.prod(before.output_shape) <= before.unknowns:
        return None
    return complement(before)


def close_by_range(before: Layer, received: SharedGradient, solution: LayerSolution) -> VirtualSolution | None:
    """Solves a layer's system of a batch together with the range constraints of the layer before.

    The signs are first looked for in the null space of the layer's own system alone, in which little is open; then both
    kinds of equations are solved together, each in units of its noise. Where the solution was made like another one
    that range constraints have closed, its signs and factors are the first.

    None where the layer before, whose activation stands between, has too little to add; else x is (B, n).
    """
    solved, deficit = solution.solved[0], solution.report.deficit
    if before.is_fixed or len(solution.solved) > 1 or solved is None:
        return None
    factor = range_factor(before)
    if factor is None or len(solution.x) * factor.basis.shape[1] < deficit + CERTIFICATE_SURPLUS:
        return None
    (system, own), x, precision = solved, solution.x.flatten(1), max(received.precision, FLOAT64_FLOOR)
    rest = system.b - system.A.apply(system.project((x - system.x0)[:, :, None]))[:, 0]
    root = system.b.numel() ** 0.5
    noise = ERROR_AMPLIFICATION * max(rms(rest).item() * root / system.size, ERROR_AMPLIFICATION * precision)
    rows, rcond = _BatchRows(before, factor.basis, system, noise), min(received.rcond, 1e-5)
    like = None if solution.like is None else solution.like.closed
    first, near, steps = x, None, 0
    if like is not None:
        x, (others, found) = like.x, like.solved
        near = system.neighbour(others.system, found)
        rows.start_from(others)
    elif own.null is not None:
        x, _, changes = _settle(rows, x, lambda: _within(rows, own, rcond))
        x, steps = x if _inside(before, x) else first, len(changes)
    weight = system.size / (ERROR_AMPLIFICATION * root)  # noise of the layer's own equations over that of z / rms(z)
    x, found, changes = _settle(rows, x, lambda: _together(rows, weight / rows.size, rcond, near))
    steps, equations = steps + len(changes), factor.basis.shape[1] * len(x)
    if found is None or not _inside(before, x):
        return VirtualSolution(first, False, equations, steps, math.inf, math.inf)
    z = before.activation.inverse(x)
    residual = rms((z - rows.bias) @ rows.left).item()
    fits = residual <= MAX_CERTIFIED_RESIDUAL * noise * rows.size and equations - deficit >= CERTIFICATE_SURPLUS
    certified = changes[-1] <= CONVERGED_CHANGE and fits and found.null is None
    return VirtualSolution(
        x, certified, equations, steps, residual / rms(z).item(), found.condition, solved=(rows, found)
    )


def _inside(before: Layer, x: Tensor) -> bool:
    """Whether x is in the range of σ: outside there is no inverse to linearise."""
    return bool(torch.isfinite(before.activation.inverse(x)).all())


class _BatchRows:
    """The range constraints of every image, rows[b] y = right[b], linearised where `move` was last."""

    def __init__(self, before: Layer, left: Tensor, system: ReducedSystem, noise: float):
        self.before, self.left, self.system, self.noise = before, left, system, noise
        self.bias = (before.pre_bias() + left.new_zeros(before.output_shape)).flatten()
        self.gain = torch.zeros_like(system.x0)  # derivative of σ⁻¹
        self.rows: list[tuple[slice, Tensor | float]] = [(slice(None), 0.0)] * len(system.x0)

    def start_from(self, others: _BatchRows) -> None:
        """Takes over the rows of another system where it has the same unknowns."""
        if others.system.basis is self.system.basis:
            self.gain, self.rows = others.gain, list(others.rows)

    def move(self, x: Tensor) -> bool:
        """Linearises at x (B, n), at the cost of the slopes that change; False outside the range of σ."""
        if not _inside(self.before, x):
            return False
        z = self.before.activation.inverse(x)
        gain, self.size = 1 / self.before.activation.derivative(z), rms(z).item()
        for image, (new, old) in enumerate(zip(gain, self.gain, strict=True)):
            known = self.rows[image][1]
            if 2 * (new != old).sum() > len(new):  # anew, which accumulates no rounding
                old, known = torch.zeros_like(old), 0.0
            entries = (new != old).nonzero()[:, 0]
            columns, further = self.system.seen_by(image, (self.left * (new - old)[:, None])[entries].T, entries)
            self.rows[image] = columns, known + further
        self.right = ((x - self.system.x0) * gain - (z - self.bias)) @ self.left
        self.x, self.gain = x, gain
        return True

    def change(self, moved: Tensor) -> float:
        """The change by one step: the number of signs, or for smooth activations the step's relative length.

        Signs of entries that the noise leaves undetermined, before and after, do not count; their effect shows in the
        residual of the range constraints.
        """
        activation = self.before.activation
        if not activation.homogeneous:
            return ((moved - self.x).norm() / self.x.norm()).item()
        decided = torch.maximum(self.x.abs(), moved.abs()) > UNDECIDED_SIGN_STDS * self.noise * self.size
        return float(((1 / activation.derivative(activation.inverse(moved)) != self.gain) & decided).sum())


def _settle(
    rows: _BatchRows, x: Tensor, solve: Callable[[], LeastSquares]
) -> tuple[Tensor, LeastSquares | None, list[float]]:
    """Solves with the signs of the solution before until they are kept, or no longer settle; every step's change."""
    changes, found = [], None
    while len(changes) < MAX_STEPS and rows.move(x):
        found = solve()
        x = rows.system.x0 + rows.system.spread(found.y[:, None])[:, :, 0]
        changes.append(rows.change(x))
        earlier, latest = changes[:-MAX_STALLED_STEPS], changes[-MAX_STALLED_STEPS:]
        if changes[-1] <= CONVERGED_CHANGE or (earlier and min(latest) >= min(earlier)):
            break
    return x, found, changes


def _within(rows: _BatchRows, own: LeastSquares, rcond: float) -> LeastSquares:
    """The range constraints alone, by a step in the null space of the system's own solution.

    Where that is known to single precision only, the system's own equations correct the step.
    """
    system = rows.system
    y = system.project((rows.x - system.x0)[:, :, None])
    A = torch.cat([R @ own.null[columns] for columns, R in rows.rows])
    right = [b - R @ y[columns, 0] for (columns, R), b in zip(rows.rows, rows.right, strict=True)]
    found = least_squares(dense_operator(A), torch.cat(right), rcond)
    y = y + own.null @ found.y[:, None]
    rest = system.A.adjoint(system.b[:, None] - system.A.apply(y)) - system.damping.square()[:, None] * y
    return replace(found, y=(y + (own.rough or own.invert)(rest))[:, 0])


def _together(rows: _BatchRows, weight: float, rcond: float, near: LeastSquares | None) -> LeastSquares:
    """The system's rows and the range constraints, these times a weight."""
    system, count = rows.system, rows.system.b.numel()
    parts = [(columns, weight * R) for columns, R in rows.rows]

    def gram(dtype: torch.dtype) -> Tensor:
        gram = (system.A.gram if dtype == torch.float64 else system.A.rough_gram).clone()
        for columns, R in parts:
            gram[columns, columns] += gram_matrix(R.to(dtype))
        return gram

    def apply(y: Tensor) -> Tensor:
        return torch.cat([system.A.apply(y), *(R @ y[columns] for columns, R in parts)])

    def adjoint(r: Tensor) -> Tensor:
        y = system.A.adjoint(r[:count])
        for (columns, R), part in zip(parts, r[count:].split(rows.left.shape[1]), strict=True):
            y[columns] += R.T @ part
        return y

    b = torch.cat([system.b, weight * rows.right.flatten()])
    A = Operator(system.A.columns, gram, apply, adjoint)
    return least_squares(A, b, rcond, system.damping, gram_only=True, near=near)
