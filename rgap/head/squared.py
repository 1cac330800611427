"""Squared error: label, scale and input from the last layer's gradient, all in closed form.

δz = (2 / C) (z − t) with the target t, one-hot, or y = ±1 for one output. Without a bias G = u vᵀ, x = s v, z = s a
with a = W v and δz = u / s, so that s² a − s t = (C / 2) u: polynomials in the one unknown s. (Ours.)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rgap.head.hypothesis import HeadReading, Hypothesis, least_squares_input, rank_one, reading, relabelled, relative
from rgap.network.layer import Layer

CANDIDATES = 3
"""Labels looked at in the end: the best by a bound on the residual."""


def read_squared(
    layer: Layer, G: Tensor, bias_gradient: Tensor | None, precision: float, tolerance: float, known: int | None
) -> HeadReading:
    """Every (label, scale) with which a squared error explains the last layer's gradient.

    With a bias δz is the bias's gradient, and the target is z − (C / 2) δz.

    Args:
        layer: The last layer, with C ≥ 1 outputs.
        G: Gradient of its weight, (C, n).
        bias_gradient: Gradient of its bias, (C,), or None without bias.
        precision: Relative error of the gradients' entries; not used.
        tolerance: Residual up to which the head's equations count as fulfilled.
        known: The label where it was given.
    """
    if bias_gradient is not None:
        return _with_bias(layer, G, bias_gradient, tolerance, known)
    if len(G) == 1:
        return _one_output(layer, G, tolerance, known)
    factors = rank_one(G)
    a = layer.weight.reshape(G.shape) @ factors.v
    bounds = _bounds(a, factors.u)
    looked_at = {*bounds.argsort()[:CANDIDATES].tolist(), *([] if known is None else [known])}
    found = [
        Hypothesis(label, s, factors.u / s, s * factors.v, residual)
        for label in sorted(looked_at)
        for s, residual in _scales(a, factors.u, label)
    ]
    residuals = dict(enumerate(bounds.tolist()))
    for label in looked_at:
        residuals[label] = min((h.residual for h in found if h.label == label), default=math.inf)
    best = min(h.residual for h in found if known in (None, h.label))
    found = [h for h in found if h.residual <= max(min(tolerance, 0.03), 3 * best) and known in (None, h.label)]
    found = sorted(found, key=lambda h: h.residual)[:CANDIDATES]
    return reading(found, residuals, known, tolerance, [])


def _bounds(a: Tensor, u: Tensor) -> Tensor:
    """For each label a lower bound of the relative residual, (C,): with p for s² the equations are linear in (p, s).

    The label's own row is then free, and p the least-squares slope of (C / 2) u over a in the others.
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
    target = torch.zeros_like(a)
    target[label] = 1.0
    found = []
    for s in scales:
        for _ in range(3):  # the minimum of the residual, polished on the equations themselves
            rest, slopes = s * s * a - s * target - half * u, 2 * s * a - target
            if (curvature := (slopes @ slopes).item()) > 0:
                s = s - (slopes @ rest).item() / curvature or s
        found.append((s, relative((s * a - target) / half, u / s)))
    return found


def _one_output(layer: Layer, G: Tensor, tolerance: float, known: int | None) -> HeadReading:
    """μ² − μ − c / 2 = 0 for μ = y f(x) and c = ⟨G, W⟩: two roots, μ and 1 − μ, for either label.

    Both roots of one label are twins when 0 < μ < 1. Otherwise μ and, with the *other* label, 1 − μ are: then not even
    the label follows from the gradient of a bias-free homogeneous network.
    """
    c = (G * layer.weight.reshape(G.shape)).sum().item()
    notes = []
    if c < -0.5 - 1e-6:
        notes = [
            f"⟨G, W⟩ of the last layer is {c:.4g}, below -0.5, the smallest of any single sample: the gradient was "
            "altered or belongs to a batch; the nearest possible output was used"
        ]
    root = math.sqrt(max(1 + 2 * c, 0.0))
    far = (1 + root) / 2
    near = -c / (2 * far)  # (1 − root) / 2 without cancellation
    found = []
    for mu, gap in ((near, -far), (far, -near)) if root > 1e-12 else ((0.5, -0.5),):  # gap = μ − 1
        for label in (0, 1):
            dz = 2 * (2 * label - 1) * gap
            if abs(dz) > 1e-300:
                miss = abs(2 * mu * gap - c) / max(abs(c), 1e-300) if notes else 0.0
                found.append(Hypothesis(label, 1 / dz, G.new_tensor([dz]), G[0] / dz, miss))
    misfits = {k: min(h.residual for h in found if h.label == k) for k in (0, 1)}
    return reading(found, misfits, known, tolerance, notes)


def _with_bias(layer: Layer, G: Tensor, bias_gradient: Tensor, tolerance: float, known: int | None) -> HeadReading:
    notes = []
    dz = bias_gradient
    if not dz.any():
        notes = ["the last bias's gradient is zero, and its weight's is not: it was altered, or lost to rounding"]
        dz = 1e-12 * rank_one(G).u
    x = least_squares_input(G, dz)
    z, half = layer.weight.reshape(G.shape) @ x + layer.bias, len(dz) / 2
    targets = torch.eye(len(dz), dtype=G.dtype) if len(dz) > 1 else G.new_tensor([[-1.0], [1.0]])
    residuals = {k: relative((z - t) / half, dz) for k, t in enumerate(targets)}
    label = min(residuals, key=residuals.__getitem__)
    scale = 2 / dz.abs().sum().item()
    found = relabelled([Hypothesis(label, scale, dz, x, residuals[label])], known, residuals.get(known, 0.0))
    return reading(found, residuals, known, tolerance, notes)
