"""Softmax cross-entropy: label, scale and input from the last layer's gradient.

Without a bias G = u vᵀ, x = s v and δz = u / s. Of the label's row only the sign and of the others the logarithm is
used: δz_j = p_j gives log u_j − log s = s a_j − log Σ exp(s a) with a = W v, one equation a row, in the one unknown s.
For C ≥ 3 classes the differences of rows are linear in s; for C = 2 there is one equation, that of the logistic loss,
with two roots or one, for either label. (Ours.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgap.head.hypothesis import HeadReading, Hypothesis, least_squares_input, rank_one, reading, relabelled, relative
from rgap.network.layer import Layer

SIGNS = 0.1
"""Share of u with the wrong sign up to which a label is looked at."""

LARGEST = 700.0
"""Largest log s: of gradients smaller than e^−700 nothing is left."""

LOG_SCALES = torch.cat([torch.linspace(0, 40, 401), torch.linspace(40, LARGEST, 661)[1:]]).double()
"""Where the label's own equation is searched for roots in log s; 1 / s is 1 − p of the label, at most 1."""

TOO_FAR = 10.0
"""Misfit in standard deviations up to which a second root counts."""


@dataclass(frozen=True)
class LabelEquations:
    """One label's equations: u with the label's entry first negative, and logits s a + b."""

    label: int
    u: Tensor
    a: Tensor
    b: Tensor
    noise: float
    precision: float

    @property
    def others(self) -> Tensor:
        """Which classes are not the label's, (C,)."""
        return torch.arange(len(self.u)) != self.label

    def dz(self, logits: Tensor) -> Tensor:
        """∂ℓ/∂z: the label's entry as minus the sum of the others, which keeps its digits where p is close to 1."""
        p = logits.softmax(-1)
        p[self.label] = -p[self.others].sum()
        return p


def read_softmax(
    layer: Layer, G: Tensor, bias_gradient: Tensor | None, precision: float, tolerance: float, known: int | None
) -> HeadReading:
    """Every (label, scale) with which softmax cross-entropy explains the last layer's gradient.

    With a bias δz is the bias's gradient; its one negative entry is the label's.

    Args:
        layer: The last layer, with C ≥ 2 outputs.
        G: Gradient of its weight, (C, n).
        bias_gradient: Gradient of its bias, (C,), or None without bias.
        precision: Relative error of the gradients' entries.
        tolerance: Residual up to which the head's equations count as fulfilled.
        known: The label where it was given.
    """
    if bias_gradient is not None and bias_gradient.any():
        return _with_bias(layer, G, bias_gradient, precision, tolerance, known)
    notes = [] if bias_gradient is None else ["the last bias's gradient is zero, and its weight's is not: altered"]
    factors = rank_one(G)
    misfits = sign_misfits(factors.u)
    looked_at = {int(k) for k in misfits.argsort()[:3] if misfits[k] <= max(SIGNS, misfits.min())}
    b = G.new_zeros(len(G)) if layer.bias is None else layer.bias
    solved = []
    for label in sorted(looked_at | ({known} - {None})):
        sign = -1.0 if factors.u[label] > 0 else 1.0
        if factors.u[label] == 0:
            sign = 1.0 if factors.u.sum() >= 0 else -1.0
        v = sign * factors.v
        a = layer.weight.reshape(G.shape) @ v
        rows = LabelEquations(label, sign * factors.u, a, b, factors.noise, max(precision, 1e-15))
        solved += [(chi, _hypothesis(rows, q, sign, v)) for chi, q in log_scales(rows)]
    residuals = {k: max(m, 2 * factors.u[k].abs().item() * (m > 0)) for k, m in enumerate(misfits.tolist())}
    for label in {h.label for _, h in solved}:
        residuals[label] = min(h.residual for _, h in solved if h.label == label)
    allowed = max(TOO_FAR, 3 * min(chi for chi, h in solved if known in (None, h.label)))
    found = [h for chi, h in solved if chi <= allowed]
    return reading(found, residuals, known, max(tolerance, 10 * max(h.rounding for h in found)), notes)


def sign_misfits(u: Tensor) -> Tensor:
    """For each label the share of u whose sign contradicts it: δz is negative at the label and nowhere else, (C,).

    u is known up to its sign, which is turned so that the label's entry is negative.
    """
    positive, negative = u.clamp(min=0).square(), u.clamp(max=0).square()
    wrong = torch.where(u > 0, positive.sum() - positive, negative.sum() - negative)
    wrong = torch.where(u == 0, torch.minimum(positive.sum(), negative.sum()), wrong)
    return (wrong / u.square().sum()).sqrt()


def log_scales(rows: LabelEquations) -> list[tuple[float, float]]:
    """(misfit in standard deviations, log s) of every local solution: Gauss–Newton from each start, never uphill."""
    ends = []
    for q in _starts(rows):
        residuals, slopes = _equations(rows, q)
        cost = residuals @ residuals
        for _ in range(40):
            step = float(np.clip(slopes @ residuals / max(slopes @ slopes, 1e-300), -1.0, 1.0))
            trial = float(np.clip(q - step, -1.0, LARGEST))
            there, steeper = _equations(rows, trial)
            while there @ there >= cost and abs(step) > 1e-15:
                step /= 4
                trial = float(np.clip(q - step, -1.0, LARGEST))
                there, steeper = _equations(rows, trial)
            if there @ there >= cost:
                break
            q, residuals, slopes, cost = trial, there, steeper, there @ there
        ends.append((float(np.sqrt(cost / len(residuals))), q))
    distinct: list[tuple[float, float]] = []
    for chi, q in sorted(ends):
        if all(abs(q - other) > 1e-7 for _, other in distinct):
            distinct.append((chi, q))
    return distinct


def _starts(rows: LabelEquations) -> list[float]:
    """Where to start in log s: the slope of log u over a, and the roots of the label's own equation.

    That equation is log(1 − p) = −log s; where it has no root it comes closest.
    """
    starts = []
    kept = rows.others & (rows.u > 3 * rows.noise)
    logs, a = rows.u[kept].log() - rows.b[kept], rows.a[kept]
    weights = 1 / (rows.precision + rows.noise / rows.u[kept]).square()
    if kept.sum() > 1 and (a - a[0]).any():
        mean = (weights @ a) / weights.sum()
        slope = (weights * (a - mean)) @ logs / ((weights * (a - mean)) @ (a - mean))
        if 0 < slope < math.inf:
            starts.append(min(max(math.log(slope), 0.0), LARGEST))
    logits = LOG_SCALES.exp()[:, None] * rows.a + rows.b
    margin = logits[:, rows.label] - logits[:, rows.others].logsumexp(1)
    level = torch.nn.functional.logsigmoid(-margin) + LOG_SCALES
    crossing = ((level[:-1] <= 0) != (level[1:] <= 0)) & level[:-1].isfinite() & level[1:].isfinite()
    for i in crossing.nonzero()[:, 0].tolist():
        low, high = level[i].item(), level[i + 1].item()
        starts.append((LOG_SCALES[i] + (LOG_SCALES[i + 1] - LOG_SCALES[i]) * low / (low - high)).item())
    if not crossing.any():  # two roots in one cell, or none
        top = level.nan_to_num(-math.inf).argmax().item()
        starts += LOG_SCALES[max(top - 1, 0) : top + 2 : 2].tolist()
    return starts


def _equations(rows: LabelEquations, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Residuals at log s = q in standard deviations, and their derivatives by q, a row each.

    Rows that stand out of the noise as logarithms, where the equations are nearly linear in s and each row has its own
    relative precision; the others as they are. Softmax in the client's arithmetic has a relative error of log p times
    its precision, and the label's entry p − 1 loses the digits that 1 − p lacks. Of two classes both rows say the same:
    the label's is left out.
    """
    s, y, u, others = math.exp(q), rows.label, rows.u.numpy(), rows.others.numpy()
    za = s * rows.a.numpy()
    logits = za + rows.b.numpy()
    logp = _log_softmax(logits)
    p, rest = np.exp(logp), _log_softmax(logits[others])
    moved = za - p @ za  # d log p / dq
    out = u > 3 * rows.noise
    size = np.where(out, u, 1.0)
    residuals = np.where(out, logp - np.log(size) + q, p * s - u)
    slopes = np.where(out, moved + 1, p * s * (moved + 1))
    error = np.where(out, rows.precision * (1 - logp) + rows.noise / size, rows.noise + rows.precision)
    label = max(abs(u[y]), 1e-300)
    missing = np.logaddexp.reduce(logp[others])  # log(1 − p) of the label
    residuals[y] = missing + q - math.log(label)
    slopes[y] = 1 - p[y] * (za[y] - np.exp(rest) @ za[others])
    error[y] = rows.precision * (1 - logp[y] + s * p[y]) + rows.noise / label if len(u) > 2 else math.inf
    return np.nan_to_num(residuals / error, nan=1e30, posinf=1e30, neginf=-1e30), np.nan_to_num(slopes / error)


def _log_softmax(logits: np.ndarray) -> np.ndarray:  # scipy's takes twenty times as long on so few
    logits = logits - logits.max()
    return logits - math.log(np.exp(logits).sum())


def _hypothesis(rows: LabelEquations, q: float, sign: float, v: Tensor) -> Hypothesis:
    s = math.exp(q)
    dz = rows.u / s
    logits = s * rows.a + rows.b
    rounding = rows.precision * min(s, 1e300)
    return Hypothesis(rows.label, sign * s, dz, s * v, relative(rows.dz(logits), dz), rounding)


def _with_bias(
    layer: Layer, G: Tensor, dz: Tensor, precision: float, tolerance: float, known: int | None
) -> HeadReading:
    x = least_squares_input(G, dz)
    logits = layer.weight.reshape(G.shape) @ x + layer.bias
    zeros = torch.zeros_like(dz)
    residuals = {k: relative(LabelEquations(k, dz, zeros, zeros, 0, 0).dz(logits), dz) for k in range(len(dz))}
    label = min(residuals, key=residuals.__getitem__)
    rounding = precision * 2 / dz.abs().sum().item()
    notes = []
    if int((dz < 0).sum()) != 1 or dz.abs().max() > 1 + precision:
        notes = [
            f"the last bias's gradient has {int((dz < 0).sum())} negative entries and reaches {dz.abs().max():.3g}; a "
            "single sample's has one and does not exceed 1: it was altered or belongs to a batch"
        ]
    scale = 2 / dz.abs().sum().item()
    found = relabelled([Hypothesis(label, scale, dz, x, residuals[label], rounding)], known, residuals.get(known, 0.0))
    return reading(found, residuals, known, max(tolerance, 10 * rounding), notes)
