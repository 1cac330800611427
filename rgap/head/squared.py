"""Squared error: label, scale and input from the last layer's gradient, all in closed form.

δz = (2 / C) (z − t) with the target t, one-hot, or y = ±1 for one output. Without a bias G = u vᵀ, x = s v, z = s a
with a = W v and δz = u / s, so that s² a − s t = (C / 2) u: polynomials in the one unknown s. (Ours.)

A regression's target t is real-valued, and C further unknowns join the C equations. With the bias's gradient, x, z and
t follow nevertheless; without it every s has its own t, and only the direction of x is known.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rgap.head.hypothesis import (
    REAL_TARGET,
    HeadGradient,
    HeadReading,
    Hypothesis,
    bias_error,
    least_squares_input,
    rank_one,
    reading,
    reading_with_bias,
    relative,
)

MAX_TARGETS_SHOWN = 4  # entries of a real-valued target that a note shows
SUPPOSED_CLASS = "one output and no bias's gradient: the target was taken for a class, -1 or 1; labels= gives another"
MAX_LABELS_TRIED = 3  # labels solved for, those with the smallest bounds on the residual, and hypotheses kept


def read_squared(head: HeadGradient) -> HeadReading:
    """Every (label, scale) with which a squared error, C ≥ 1, explains the last layer's gradient.

    With a bias δz is the bias's gradient, and the target is z − (C / 2) δz.
    """
    if head.bias is not None:
        return _with_bias(head)
    if len(head.G) == 1:
        return _one_output(head)
    factors, known = rank_one(head.G), head.known
    a = head.W @ factors.v
    bounds = _bounds(a, factors.u)
    looked_at = {*bounds.argsort()[:MAX_LABELS_TRIED].tolist(), *([] if known is None else [known])}
    found, residuals = [], dict(enumerate(bounds.tolist()))
    for label in sorted(looked_at):
        scales = _scales(a, factors.u, label)
        found += [Hypothesis(label, s, factors.u / s, s * factors.v, residual) for s, residual in scales]
        residuals[label] = min((residual for _, residual in scales), default=math.inf)
    found = [h for h in found if known in (None, h.label)]
    allowed = max(min(head.tolerance, 0.03), 3 * min(h.residual for h in found))
    found = sorted((h for h in found if h.residual <= allowed), key=lambda h: h.residual)
    return reading(head, found[:MAX_LABELS_TRIED], residuals, [])


def read_real_target(head: HeadGradient) -> HeadReading:
    """A real-valued target, one for each sign of s without a bias; its length is then open, and the t nearest to 0.

    An activation between the layer and the loss is undone: δz = σ′(z) ∘ (2 / C) (σ(z) − t).
    """
    layer, half, starts = head.layer, len(head.G) / 2, []
    if head.bias is not None:
        starts = [(2 / head.bias.abs().sum().item(), head.bias, least_squares_input(head.G, head.bias))]
    else:
        factors = rank_one(head.G)
        length = math.sqrt(half * (factors.u.norm() / (head.W @ factors.v).norm().clamp(min=1e-300)).item())
        starts = [(s, factors.u / s, s * factors.v) for s in (length, -length)]
    found, error = [], bias_error(head) if head.bias is not None else math.inf
    for s, dz, x in starts:
        z = (head.W @ x + (0.0 if layer.bias is None else layer.bias)).reshape(layer.output_shape)
        f, slope = (move(z).flatten() for move in (layer.activation.forward, layer.activation.derivative))
        target = f - half * torch.where(slope == 0, 0.0, dz / slope)
        found.append(Hypothesis(REAL_TARGET, s, dz, x, length_error=error, target=target))
    shown = ", ".join(f"{t:.4g}" for t in found[0].target[:MAX_TARGETS_SHOWN].tolist())
    more = ", …" if len(head.G) > MAX_TARGETS_SHOWN else ""
    why = "no label explains the last layer's gradient as that of one sample; a real-valued target does"
    known = f": ({shown}{more}), if the gradient's scale is the book's" if head.bias is not None else ""
    return HeadReading(tuple(found), {REAL_TARGET: 0.0}, (why + known,))


def _bounds(a: Tensor, u: Tensor) -> Tensor:
    """For each label a lower bound of the relative residual, (C,): with p for s² the equations are linear in (p, s).

    The label's own row is then satisfied by s alone; p is the least-squares slope of (C / 2) u over a in the others.
    """
    others = 1 - torch.eye(len(a), dtype=a.dtype)
    unit = a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)
    A = others * a / unit
    slope = (A @ u / A.square().sum(1).clamp(min=torch.finfo(a.dtype).tiny)).clamp(min=0.0)
    return (slope[:, None] * A - others * u).norm(dim=1) / u.norm()


def _scales(a: Tensor, u: Tensor, label: int) -> list[tuple[float, float]]:
    """(s, relative residual) at the minima over s of ‖s² a − s t − (C / 2) u‖, a polynomial of degree four."""
    half, a_y, u_y = len(a) / 2, a[label].item(), u[label].item()
    aa, au = (a @ a).item(), (a @ u).item()
    # in units of `unit` the roots are neither huge nor tiny
    unit = min(half * u.norm().item() + 1.0, (half * u.norm().item() / aa**0.5) ** 0.5 if aa > 0 else math.inf)
    unit = max(unit, abs(a_y) / aa if aa > 0 else 0.0)
    slope = np.array([4 * aa * unit**3, -6 * a_y * unit**2, 2 * (1 - 2 * half * au) * unit, 2 * half * u_y])
    roots = np.roots(slope / np.abs(slope).max())
    scales = [unit * root.real for root in roots if abs(root.imag) <= 1e-6 * abs(root.real) and root.real != 0]
    target, found = torch.eye(len(a), dtype=a.dtype)[label], []
    for s in scales:
        for _ in range(3):  # Gauss–Newton on the equations themselves
            rest, slopes = s * s * a - s * target - half * u, 2 * s * a - target
            if (curvature := (slopes @ slopes).item()) > 0:
                s = s - (slopes @ rest).item() / curvature or s
        found.append((s, relative((s * a - target) / half, u / s)))
    return found


def _one_output(head: HeadGradient) -> HeadReading:
    """μ² − μ − c / 2 = 0 for μ = y f(x) and c = ⟨G, W⟩: two roots, μ and 1 − μ, for either label.

    Both roots of one label are twins when 0 < μ < 1. Otherwise μ and, with the *other* label, 1 − μ are: then not even
    the label follows from the gradient of a bias-free homogeneous network.
    """
    G, c = head.G, (head.G * head.W).sum().item()
    notes = [] if head.known is not None else [SUPPOSED_CLASS]
    if altered := c < -0.5 - 1e-6:
        notes = [
            f"⟨G, W⟩ of the last layer is {c:.4g}, below -0.5, the smallest of any single sample: the gradient was "
            "altered or belongs to a batch, or to a real-valued target; the nearest possible output was used"
        ]
    root = math.sqrt(max(1 + 2 * c, 0.0))
    far = (1 + root) / 2
    near = -c / (2 * far)  # (1 − root) / 2 without cancellation
    found = []
    for mu, gap in ((near, -far), (far, -near)) if root > 1e-12 else ((0.5, -0.5),):  # gap = μ − 1
        for label in (0, 1):
            dz = 2 * (2 * label - 1) * gap
            if abs(dz) > 1e-300:
                miss = abs(2 * mu * gap - c) / max(abs(c), 1e-300) if altered else 0.0
                found.append(Hypothesis(label, 1 / dz, G.new_tensor([dz]), G[0] / dz, miss))
    misfits = {k: min(h.residual for h in found if h.label == k) for k in (0, 1)}
    return reading(head, found, misfits, notes)


def _with_bias(head: HeadGradient) -> HeadReading:
    dz = head.bias
    targets = torch.eye(len(dz), dtype=dz.dtype) if len(dz) > 1 else dz.new_tensor([[-1.0], [1.0]])
    return reading_with_bias(head, dz, lambda z, label: (z - targets[label]) / (len(dz) / 2), [])
