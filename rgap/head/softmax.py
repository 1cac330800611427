"""Softmax cross-entropy: label, scale and input from the last layer's gradient.

Without a bias G = u vᵀ, x = s v and δz = u / s. The label's row has the only negative δz; in the others δz_j = p_j
gives log u_j − log s = s a_j − log Σ exp(s a) with a = W v, one equation per row, in the one unknown s. For C ≥ 3
classes the differences of rows are linear in s; for C = 2 there is one equation, that of the logistic loss, with two
roots or one, for either label. (Ours.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rgap.head.hypothesis import HeadGradient, HeadReading, Hypothesis, rank_one, reading, reading_with_bias, relative

MAX_LABELS_TRIED = 3  # labels whose equations are solved, those with the smallest share of wrong signs
MAX_WRONG_SIGN_SHARE = 0.1  # share of u with the wrong sign up to which a label is tried
MAX_LOG_SCALE = 700.0  # largest log s: gradients smaller than e^−700 underflow

LOG_SCALES = torch.cat([torch.linspace(0, 40, 401), torch.linspace(40, MAX_LOG_SCALE, 661)[1:]]).double()
"""Grid of log s on which the label's own equation is searched for roots; 1 / s is 1 − p of the label, at most 1."""

MAX_MISFIT_STDS = 10.0  # misfit in standard deviations up to which a second root counts


@dataclass(frozen=True)
class LabelEquations:
    """The equations log u_j − log s = log softmax(s a + b)_j in the one unknown s, for one label."""

    label: int  # u is negative there
    u: Tensor  # ∂ℓ/∂z times s, with Σ |u| = 2, (C,)
    a: Tensor  # of the logits s a + b, (C,)
    b: Tensor
    noise: float  # standard deviation of u's entries
    precision: float  # relative error of u's entries

    @property
    def others(self) -> Tensor:
        """Mask of all classes but the label, (C,)."""
        return torch.arange(len(self.u)) != self.label


def read_softmax(head: HeadGradient) -> HeadReading:
    """Every (label, scale) with which softmax cross-entropy, C ≥ 2, explains the last layer's gradient.

    With a bias δz is the bias's gradient; its one negative entry is the label's.
    """
    if head.bias is not None:
        return _with_bias(head, head.bias)
    factors, known = rank_one(head.G), head.known
    misfits = sign_misfits(factors.u)
    likely = misfits.argsort()[:MAX_LABELS_TRIED]
    looked_at = {int(k) for k in likely if misfits[k] <= max(MAX_WRONG_SIGN_SHARE, misfits.min())}
    b = head.G.new_zeros(len(head.G)) if head.layer.bias is None else head.layer.bias
    solved = []
    for label in sorted(looked_at | ({known} - {None})):
        sign = -1.0 if factors.u[label] > 0 or (factors.u[label] == 0 and factors.u.sum() < 0) else 1.0
        v = sign * factors.v
        rows = LabelEquations(label, sign * factors.u, head.W @ v, b, factors.noise, max(head.precision, 1e-15))
        solved += [(chi, _hypothesis(rows, q, sign, v)) for chi, q in log_scales(rows)]
    residuals = {k: max(m, 2 * factors.u[k].abs().item() * (m > 0)) for k, m in enumerate(misfits.tolist())}
    residuals |= {k: min(h.residual for _, h in solved if h.label == k) for k in {h.label for _, h in solved}}
    allowed = max(MAX_MISFIT_STDS, 3 * min(chi for chi, h in solved if known in (None, h.label)))
    found = [h for chi, h in solved if chi <= allowed]
    return reading(head, found, residuals, [], max(h.rounding for h in found))


def sign_misfits(u: Tensor) -> Tensor:
    """For each label the share of u whose sign contradicts it, (C,): δz is negative at the label and nowhere else.

    The sign of u is free, and chosen so that the label's entry is negative.
    """
    positive, negative = u.clamp(min=0).square(), u.clamp(max=0).square()
    wrong = torch.where(u > 0, positive.sum() - positive, negative.sum() - negative)
    wrong = torch.where(u == 0, torch.minimum(positive.sum(), negative.sum()), wrong)
    return (wrong / u.square().sum()).sqrt()


def log_scales(rows: LabelEquations) -> list[tuple[float, float]]:
    """(misfit in standard deviations, log s) of every local solution: damped Gauss–Newton from each start."""
    ends = []
    for q in _starts(rows):
        residuals, slopes = _equations(rows, q)
        cost = residuals @ residuals
        for _ in range(40):
            step = float(np.clip(slopes @ residuals / max(slopes @ slopes, 1e-300), -1.0, 1.0))
            while True:
                trial = float(np.clip(q - step, -1.0, MAX_LOG_SCALE))
                there, steeper = _equations(rows, trial)
                if there @ there < cost or abs(step) <= 1e-15:
                    break
                step /= 4
            if there @ there >= cost:
                break
            q, residuals, slopes, cost = trial, there, steeper, there @ there
        ends.append((float(np.sqrt(cost / len(residuals))), q))
    distinct = []
    for chi, q in sorted(ends):
        if all(abs(q - other) > 1e-7 for _, other in distinct):
            distinct.append((chi, q))
    return distinct


def _starts(rows: LabelEquations) -> list[float]:
    """Starts in log s: the slope of log u over a, and the roots of the label's own equation log(1 − p) = −log s.

    Where that has no root, the points around its smallest residual.
    """
    starts = []
    kept = rows.others & (rows.u > 3 * rows.noise)
    logs, a = rows.u[kept].log() - rows.b[kept], rows.a[kept]
    weights = 1 / (rows.precision + rows.noise / rows.u[kept]).square()
    if kept.sum() > 1 and (a - a[0]).any():
        mean = (weights @ a) / weights.sum()
        slope = (weights * (a - mean)) @ logs / ((weights * (a - mean)) @ (a - mean))
        if 0 < slope < math.inf:
            starts.append(min(max(math.log(slope), 0.0), MAX_LOG_SCALE))
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
    """Residuals at log s = q in standard deviations, and their derivatives by q, (C,) each.

    Rows above the noise enter as logarithms, where the equations are nearly linear in s and each row has its own
    relative precision; the others enter as they are. Softmax in the client's arithmetic has a relative error of log p
    times its precision, and the label's entry p − 1 loses digits by cancellation. With two classes both rows are
    equivalent, and the label's is left out.
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


def _log_softmax(logits: np.ndarray) -> np.ndarray:  # scipy's takes twenty times as long on so few classes
    logits = logits - logits.max()
    return logits - math.log(np.exp(logits).sum())


def _hypothesis(rows: LabelEquations, q: float, sign: float, v: Tensor) -> Hypothesis:
    s = math.exp(q)
    dz = rows.u / s
    logits = s * rows.a + rows.b
    rounding = rows.precision * min(s, 1e300)
    return Hypothesis(rows.label, sign * s, dz, s * v, relative(output_gradient(logits, rows.label), dz), rounding)


def _with_bias(head: HeadGradient, dz: Tensor) -> HeadReading:
    notes, negative = [], int((dz < 0).sum())
    if negative != 1 or dz.abs().max() > 1 + head.precision:
        notes = [
            f"the last bias's gradient has {negative} negative entries and reaches {dz.abs().max():.3g}; a single "
            "sample's has one and does not exceed 1: it was altered or belongs to a batch"
        ]
    return reading_with_bias(head, dz, output_gradient, notes, rounding=head.precision * 2 / dz.abs().sum().item())


def output_gradient(logits: Tensor, label: int) -> Tensor:
    """∂ℓ/∂z, (C,), with minus the sum of the others at the label, which avoids cancellation where p is close to 1."""
    p = logits.softmax(-1)
    p[label] = -p[torch.arange(len(p)) != label].sum()
    return p
