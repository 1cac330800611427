"""Logistic loss: label, margin and input from the last layer's gradient, by Lambert W."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import lambertw
from torch import Tensor

from rgap.head.hypothesis import HeadGradient, HeadReading, Hypothesis, reading, reading_with_bias

MU_AT_MINIMUM = 1.0 + float(lambertw(math.exp(-1.0)).real)  # 1.278…, where c(μ) = −μ / (1 + e^μ) is smallest
C_MINIMUM = 1.0 - MU_AT_MINIMUM  # the smallest c, −0.2784645…; no sample's gradient has a smaller one


def read_logistic(head: HeadGradient) -> HeadReading:
    """Every (label, μ) with which a logistic loss log(1 + e^{−μ}), μ = y f(x), explains the last layer's gradient.

    Without a bias c = ⟨G, W⟩ = −μ / (1 + e^μ) is inverted by Lambert W: one root for c ≥ 0, two for c < 0 (Zhu &
    Blaschko 2021 find one of them by gradient descent), for either label. With a bias δz is the bias's gradient, and
    label and μ follow from it.
    """
    if head.bias is not None:
        return _with_bias(head, head.bias.item())
    G, c = head.G, (head.G * head.W).sum().item()
    roots, notes = margins(c)
    found = []
    for mu in roots:
        for label in (0, 1):
            dz = torch.tensor([(1 - 2 * label) / (1.0 + math.exp(mu))], dtype=G.dtype) if mu < 700 else G.new_zeros(1)
            if dz.item() != 0.0:
                miss = abs(-mu / (1.0 + math.exp(mu)) / c - 1) if notes else 0.0
                found.append(Hypothesis(label, 1 / dz.item(), dz, G[0] / dz, miss))
    misfits = {k: min((h.residual for h in found if h.label == k), default=math.inf) for k in (0, 1)}
    return reading(head, found, misfits, notes)


def margins(c: float) -> tuple[list[float], list[str]]:
    """The margins μ with −μ / (1 + e^μ) = c, and a note where c is below the smallest value that a sample can have.

    μ = −c − W_k(c e^{−c}); the branch k = −1 exists for c < 0. Close to the minimum of c, where rounding makes
    Lambert W complex or NaN, and below it, μ is that of the minimum.
    """
    if c >= 0:
        return [_root(c, 0)], []
    if c < C_MINIMUM + 1e-12:
        if c >= C_MINIMUM - 1e-6:
            return [MU_AT_MINIMUM], []
        return [MU_AT_MINIMUM], [
            f"⟨G, W⟩ of the last layer is {c:.4g}, below {C_MINIMUM:.4g}, the smallest of any single sample: the "
            "gradient was altered or belongs to a batch; the nearest possible margin was used"
        ]
    return [_root(c, 0), _root(c, -1)], []


def _root(c: float, branch: int) -> float:
    """One branch, refined by Newton's method: close to the minimum Lambert W has only half the digits."""
    if branch == -1 and c > -np.finfo(float).tiny:  # Lambert W of so small a number is NaN
        return math.inf
    mu = float(-c - np.real(lambertw(c * math.exp(-c) if c < 700 else 0.0, branch)))
    if abs(mu - MU_AT_MINIMUM) < 1e-2:  # c is a parabola there
        share = 1 / (1 + math.exp(MU_AT_MINIMUM))
        curvature = share * (1 - share) * (2 - MU_AT_MINIMUM * (1 - 2 * share))
        side = 1 if branch == -1 else -1
        mu = MU_AT_MINIMUM + side * math.sqrt(2 * max(c - C_MINIMUM, 0.0) / curvature)
    for _ in range(3):
        share = 1 / (1 + math.exp(min(mu, 600.0)))
        slope = share * (mu * (1 - share) - 1)
        if slope != 0 and abs(mu) < 600:
            mu -= (-mu * share - c) / slope
    return mu


def _with_bias(head: HeadGradient, bias_gradient: float) -> HeadReading:
    size, notes = abs(bias_gradient), []
    if not 0.0 < size < 1.0:
        notes = [
            f"the last bias's gradient is {bias_gradient:.4g}, outside (−1, 1): no single sample has it; the nearest "
            "possible value was used"
        ]
        size = min(max(size, 1e-12), 1.0 - 1e-12)
    label = int(bias_gradient < 0)
    return reading_with_bias(head, head.G.new_tensor([(1 - 2 * label) * size]), _output_gradient, notes, label=label)


def _output_gradient(z: Tensor, label: int) -> Tensor:
    """∂ℓ/∂z at the output z, (1,)."""
    y = 2 * label - 1
    return -y / (1.0 + (y * z).clamp(max=700.0).exp())
