"""A last layer with an activation between it and the loss: label, scale and input from its gradient (ours).

The loss sees f = σ(z), z = W x + b, so that δz = σ′(z) ∘ ∂ℓ/∂f(σ(z)). With a bias δz, x and z are known, and f is
tested against each label. Without one G = u vᵀ, x = s v and z = s a with a = W v: every row of
u = s σ′(s a) ∘ ∂ℓ/∂f(σ(s a)) is an equation in the one unknown s, of either sign, whose solutions are searched for on a
grid and refined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.head.hypothesis import (
    HeadGradient,
    HeadReading,
    Hypothesis,
    RankOne,
    bias_error,
    entry_stds,
    rank_one,
    reading,
    reading_with_bias,
    relative,
)

MAX_LABELS_TRIED = 20  # labels whose equations are looked at, those with the largest rows
MAX_STARTS = 16  # points of the grid from which solutions are refined, those that come closest
MAX_TOLERATED_MISFIT = 10.0  # misfit that a residual at the tolerance stands for
SLOPE_STEP = 1e-6  # step in log |s| of the differences that give the equations' slopes
LOG_SCALES = torch.linspace(-20, 40, 3001, dtype=torch.float64)  # grid of log |s|
MAX_MISFIT_RATIO = 0.03  # residual up to which solutions are kept beside the best, however imprecise the gradient
NEWTON_STEPS = 30  # limit on the steps from a point of the grid to a solution
DISTINCT_LOG_SCALE = 1e-6  # difference of log |s| from which two solutions are two


def output_loss_gradient(
    loss: str, f: Tensor, label: int, smoothing: float = 0.0, target: Tensor | None = None
) -> Tensor:
    """∂ℓ/∂f at outputs f (..., C), for cross-entropy with smoothed labels, for squared error also with a target."""
    if target is not None:
        return (f - target) * (2 / f.shape[-1])
    if loss == "logistic":
        return (1 - 2 * label) * torch.sigmoid((1 - 2 * label) * f)
    hot = torch.zeros_like(f)
    hot[..., label if f.shape[-1] > 1 else 0] = 1.0
    if loss == "mse":
        target = hot if f.shape[-1] > 1 else hot * (2 * label - 1)
        return (f - target) * (2 / f.shape[-1])
    p = f.softmax(-1)
    others = p * (1 - hot)
    smoothed = smoothing * (hot - 1 / f.shape[-1])
    return others - hot * others.sum(-1, keepdim=True) + smoothed  # without cancellation where p is close to 1


def read_activated(loss: str, head: HeadGradient, *, given: bool = True, smoothing: float = 0.0) -> HeadReading:
    """Every (label, scale) with which a loss on σ(z) explains the last layer's gradient.

    Unless the factor κ of the gradient is `given`, as 1, it is estimated where 1 does not explain the equations. Of a
    single output, or two, without a bias it leaves the length of x open.
    """
    read = _with_bias if head.bias is not None else _without_bias
    found = read(loss, head, smoothing, free=False)
    open_ = head.bias is None and not given and len(head.G) <= 2
    if open_:
        return replace(found, hypotheses=tuple(_of_open_length(loss, head, h, smoothing) for h in found.hypotheses))
    if not given and min(h.residual for h in found.hypotheses) > head.tolerance:
        scaled = read(loss, head, smoothing, free=True)
        if min(h.residual for h in scaled.hypotheses) <= head.tolerance:
            return scaled
    return found


def _of_open_length(loss: str, head: HeadGradient, h: Hypothesis, smoothing: float) -> Hypothesis:
    """A hypothesis whose length any factor may change, with a factor that explains it where 1 does not."""
    if h.residual <= head.tolerance:
        return replace(h, length_error=math.inf)
    b = 0.0 if head.layer.bias is None else head.layer.bias
    own = z_gradient(loss, head, head.W @ h.x + b, h.label, smoothing)
    factor = (own @ h.dz / (own @ own).clamp(min=1e-300)).item()
    if factor <= 0:
        return h
    residual = relative(factor * own, h.dz)
    numbers = {"residual": residual, "misfit": _misfit(head, residual), "length_error": math.inf}
    return replace(h, gradient_scale=factor, **numbers)


def _with_bias(loss: str, head: HeadGradient, smoothing: float, *, free: bool) -> HeadReading:
    """With a bias δz is its gradient, and x and z follow whatever the factor."""
    dz, factors = head.bias, {}

    def gradient(z: Tensor, label: int) -> Tensor:
        own = z_gradient(loss, head, z, label, smoothing)
        if not free:
            return own
        factors[label] = max((own @ dz / (own @ own).clamp(min=1e-300)).item(), 0.0)
        return factors[label] * own

    best = None
    if free and len(dz) == 1:  # any factor fits one equation: that nearest to 1
        x = head.G[0] / dz
        z = head.W @ x + head.layer.bias
        possible = [k for k in head.labels if relative(gradient(z, k), dz) <= head.tolerance]
        best = min(possible, key=lambda k: abs(math.log(factors[k])), default=None)
    found = reading_with_bias(head, dz, gradient, [], label=best)
    error = bias_error(head)
    numbers = ({"length_error": error, "misfit": _misfit(head, h.residual)} for h in found.hypotheses)
    kept = (
        replace(h, gradient_scale=factors.get(h.label, 1.0) or 1.0, **n)
        for h, n in zip(found.hypotheses, numbers, strict=True)
    )
    return replace(found, hypotheses=tuple(kept))


def _misfit(head: HeadGradient, residual: float) -> float:
    """The residual in standard deviations, such that the largest tolerated is that of a verdict."""
    return MAX_TOLERATED_MISFIT * residual / head.tolerance


def _without_bias(loss: str, head: HeadGradient, smoothing: float, *, free: bool) -> HeadReading:
    factors = rank_one(head.G)
    equations = _ActivatedEquations(loss, head, head.W @ factors.v, factors.u, smoothing, free)
    largest = head.labels
    if len(largest) > 2:
        largest = factors.u.abs().argsort(descending=True)[:MAX_LABELS_TRIED].tolist()
    starts = [start for k in {*largest, *([] if head.known is None else [head.known])} for start in equations.starts(k)]
    misfits = dict.fromkeys(head.labels, math.inf)
    for residual, label, *_ in starts:
        misfits[label] = min(misfits[label], residual)
    tried = sorted(start for start in starts if head.known in (None, start[1]))[:MAX_STARTS]
    found: list[Hypothesis] = []
    for _, label, sign, start in tried:
        q, residual = equations.refined(label, sign, start)
        s = sign * math.exp(q)
        misfits[label] = min(misfits[label], residual)
        same = (h for h in found if h.label == label and h.scale * s > 0)
        if all(abs(math.log(h.scale / s)) > DISTINCT_LOG_SCALE for h in same):
            factor = equations.factor(equations.own(label, sign, head.G.new_tensor(q))).item()
            numbers = {"gradient_scale": factor, "length_error": equations.length_error(label, sign, q, factors)}
            numbers |= {"misfit": _misfit(head, residual), "target": head.target}
            found.append(Hypothesis(label, s, factors.u / s, s * factors.v, residual, **numbers))
    least = min(h.residual for h in found)
    allowed = max(min(head.tolerance, MAX_MISFIT_RATIO), 3 * least) if least < MAX_MISFIT_RATIO else least
    return reading(head, sorted((h for h in found if h.residual <= allowed), key=lambda h: h.residual), misfits, [])


def z_gradient(loss: str, head: HeadGradient, z: Tensor, label: int, smoothing: float = 0.0) -> Tensor:
    """∂ℓ/∂z at z (..., C)."""
    layer, shaped = head.layer, z.reshape(*z.shape[:-1], *head.layer.output_shape)
    f, slope = (move(shaped).reshape(z.shape) for move in (layer.activation.forward, layer.activation.derivative))
    return slope * output_loss_gradient(loss, f, label, smoothing, head.target)


@dataclass(frozen=True)
class _ActivatedEquations:
    """The equations κ s ∂ℓ/∂z(s a + b) = u, (C,), in s = ± e^q, and in κ, which is 1 unless it is free."""

    loss: str
    head: HeadGradient
    a: Tensor
    u: Tensor
    smoothing: float
    free: bool

    def own(self, label: int, sign: float, q: Tensor) -> Tensor:
        """S ∂ℓ/∂z(s a + b), (..., C)."""
        s = sign * q.exp()[..., None]
        b = 0.0 if self.head.layer.bias is None else self.head.layer.bias
        return s * z_gradient(self.loss, self.head, s * self.a + b, label, self.smoothing)

    def factor(self, own: Tensor) -> Tensor:
        """The κ of least squares, 0 where it would be negative."""
        if not self.free:
            return torch.ones_like(own[..., 0])
        return (own @ self.u / own.square().sum(-1).clamp(min=1e-300)).clamp(min=0.0)

    def rest(self, label: int, sign: float, q: Tensor) -> Tensor:
        """What the equations are missed by, relative to u, (..., C)."""
        own = self.own(label, sign, q)
        return (self.factor(own)[..., None] * own - self.u) / self.u.norm()

    def length_error(self, label: int, sign: float, q: float, factors: RankOne) -> float:
        """Standard deviation of log s where κ is unknown too."""
        if len(self.u) <= 2:
            return 0.0
        near = [self.own(label, sign, self.a.new_tensor(q + step)) for step in (-SLOPE_STEP, 0.0, SLOPE_STEP)]
        J = torch.stack([(near[2] - near[0]) / (2 * SLOPE_STEP), near[1]], 1) / self.u.norm()
        stds, v = entry_stds(self.head, factors), factors.v
        noise = (stds.square() @ v.square()).sqrt().norm() / v.square().sum() / self.u.norm()
        return ((noise + self.head.precision) * torch.linalg.pinv(J)[0].norm()).item()

    def starts(self, label: int) -> list[tuple[float, int, float, float]]:
        """(expected residual, label, sign, q) near solutions: where a chord of the grid is closest to 0."""
        found = []
        for sign in (1.0, -1.0):
            rest = self.rest(label, sign, LOG_SCALES).nan_to_num(1e150, 1e150, -1e150)
            chords = rest.diff(dim=0)
            share = -(rest[:-1] * chords).sum(1) / chords.square().sum(1).clamp(min=1e-300)
            near = (rest[:-1] + share.clamp(0, 1)[:, None] * chords).norm(dim=1)
            near = torch.cat([near.new_tensor([math.inf]), near, near.new_tensor([math.inf])])
            for i in ((near[1:-1] < near[:-2]) & (near[1:-1] <= near[2:])).nonzero()[:, 0].tolist():
                q = LOG_SCALES[i] + share[i].clamp(0, 1) * (LOG_SCALES[i + 1] - LOG_SCALES[i])
                found.append((near[i + 1].item(), label, sign, q.item()))
        return found

    def refined(self, label: int, sign: float, start: float) -> tuple[float, float]:
        """(q, relative residual) by damped Gauss–Newton in q."""
        q = self.a.new_tensor(start)
        rest = self.rest(label, sign, q)
        for _ in range(NEWTON_STEPS):
            slopes = (self.rest(label, sign, q + SLOPE_STEP) - self.rest(label, sign, q - SLOPE_STEP)) / (
                2 * SLOPE_STEP
            )
            step = (slopes @ rest / (slopes @ slopes).clamp(min=1e-300)).clamp(-1, 1)
            while not (there := self.rest(label, sign, q - step)) @ there < rest @ rest and abs(step) > 1e-16:
                step = step / 4
            if not there @ there < rest @ rest:
                break
            q, rest = q - step, there
        return q.item(), rest.norm().item()
