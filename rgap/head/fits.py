"""A last layer's equations in the length of its input, the loss's factor and the smoothing of its labels (ours).

Every equation is weighed by its expected error, so that a misfit is a number of standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rgap.head.hypothesis import HeadGradient, RankOne, entry_stds, least_squares_input

MAX_MISFIT = 10.0  # misfit, in standard deviations known to a factor, up to which the head's equations are explained
FIT_ROUNDS = 2  # fits in a row, each with the weights that follow from the one before
MAX_EVALUATIONS = 100  # limit on the evaluations of a fit; from the slope of log δz about ten are usual
MAX_LOG_STEP = 8.0  # largest change of log s and log κ in a fit
ARITHMETIC_SHARE = 0.35  # error of δz from the client's sums, exponentials and subtraction, over its precision
MAX_RESIDUAL = 1e150  # largest residual in standard deviations that is told from larger ones
FLOAT64_ERROR = 1e-15  # relative error of the equations' own arithmetic
MAX_SMOOTHING = 0.35  # smoothing above which a fit is none
EXCLUDED_MISFIT = 3.0  # misfit relative to another model's from which a model is excluded
Free = tuple[bool, bool, bool]  # which of (log s, log κ, ε) are unknown


@dataclass(frozen=True)
class HeadEquations:
    """The equations u = κ s ∂ℓ/∂z(s a + b) for one label, of two outputs or more; s is fixed at 1 with a bias."""

    label: int
    squared: bool  # squared error; else softmax cross-entropy
    u: NDArray  # (C,)
    a: NDArray  # of the outputs s a + b, (C,)
    b: NDArray
    noise: NDArray  # standard deviation of u, (C,)
    output_noise: NDArray  # standard deviation of a, (C,)
    precision: float

    @property
    def hot(self) -> NDArray:
        """The one-hot label, (C,)."""
        return (np.arange(len(self.u)) == self.label).astype(float)

    def loss(self, log_length: float, smoothing: float) -> tuple[NDArray, NDArray, NDArray]:
        """∂ℓ/∂z, its derivative by log s, and the standard deviation that arithmetic and noise give it, (C,) each."""
        C, hot, za = len(self.u), self.hot, math.exp(log_length) * self.a
        z = za + self.b
        z_error = np.hypot(math.exp(log_length) * self.output_noise, self.precision * np.abs(z).max())
        if self.squared:
            own = np.abs(z) + hot
            return 2 / C * (z - hot), 2 / C * za, 2 / C * (ARITHMETIC_SHARE * self.precision * own + z_error)
        logp = z - z.max()
        logp = logp - math.log(np.exp(logp).sum())
        p = np.exp(logp)
        rest = np.where(hot > 0, -(p * (1 - hot)).sum(), p)  # p − onehot without cancellation
        own = np.where(hot > 0, 1.0, p * (1 - logp)) + smoothing / C
        error = ARITHMETIC_SHARE * self.precision * own + p * (1 - p) * z_error
        return rest + smoothing * (hot - 1 / C), p * (za - p @ za), error

    def at(self, theta: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Residuals, their derivatives by (log s, log κ, ε), (C, 3), and their standard deviations."""
        dz, slope, error = self.loss(theta[0], theta[2])
        size = math.exp(min(theta[0] + theta[1], 700.0))
        slopes = [dz + slope, dz, np.zeros_like(dz) if self.squared else self.hot - 1 / len(dz)]
        return size * dz - self.u, size * np.stack(slopes, 1), np.hypot(size * error, self.noise) + 1e-300

    def log_factor(self, log_length: float, smoothing: float = 0.0) -> float:
        """The κ of least squares at that length, −inf where it is not positive."""
        dz = self.loss(log_length, smoothing)[0]
        size = (dz @ self.u) / max(dz @ dz, 1e-300)
        return math.log(size) - log_length if size > 0 else -math.inf

    def length_starts(self) -> list[float]:
        """Logarithms of lengths from which to fit: by the differences of the rows, which no factor changes."""
        if self.squared:
            p, q = np.linalg.lstsq(np.stack([self.a, -self.hot], 1), self.u, rcond=None)[0]  # κ s², κ s
            return [math.log(p / q)] if p * q > 0 else []
        kept = (self.hot == 0) & (self.u > 3 * self.noise)
        if kept.sum() < 2 or not np.ptp(self.a[kept]) > 0:
            return []
        slope = np.polyfit(self.a[kept], np.log(self.u[kept]) - self.b[kept], 1)[0]
        return [math.log(slope)] if slope > 0 else []


@dataclass(frozen=True)
class HeadFit:
    """A solution of a head's equations, and how well it explains them."""

    theta: NDArray  # (log s, log κ, ε)
    std: NDArray  # of these; 0 where fixed, infinite with more unknowns than equations
    misfit: float  # in standard deviations of the equations
    residual: float  # relative

    def error_beside(self, larger: HeadFit) -> float:
        """Standard deviation of log s where a larger model's unknown is free, and what that model moves it by."""
        return math.hypot(larger.std[0], larger.theta[0] - self.theta[0])


def fit_rows(rows: HeadEquations, start: Sequence[float], free: Free, *, solved: bool = False) -> HeadFit:
    """Levenberg–Marquardt in the free ones of (log s, log κ, ε), with the weights of the solution before.

    Where the start is `solved` it is kept, with its misfit and errors.
    """
    from scipy.optimize import least_squares  # slow to import, and few networks need a fit

    theta, mask = np.array(start, dtype=float), np.array(free)
    surplus = len(rows.u) - (not rows.squared) - int(mask.sum())  # ∂ℓ/∂z of softmax cross-entropy adds up to 0
    rounds = 0 if solved or not mask.any() or len(rows.u) < mask.sum() else FIT_ROUNDS
    for _ in range(rounds):
        error = rows.at(theta)[2]

        def full(part: NDArray, base: NDArray = theta) -> NDArray:
            moved = base.copy()
            moved[mask] = np.clip(part, base[mask] - MAX_LOG_STEP, base[mask] + MAX_LOG_STEP)
            return moved

        found = least_squares(
            lambda part, weigh=error: _finite(rows.at(full(part))[0] / weigh),
            theta[mask],
            lambda part, weigh=error: _finite(rows.at(full(part))[1][:, mask] / weigh[:, None]),
            method="lm", x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=MAX_EVALUATIONS,
        )  # fmt: skip
        theta = full(found.x)
    residual, slopes, error = rows.at(theta)
    J, misfit = _finite(slopes[:, mask] / error[:, None]), np.linalg.norm(_finite(residual / error))
    misfit, std = float(misfit) / max(surplus, 1) ** 0.5, np.zeros(3)
    if mask.any():
        sizes = np.linalg.norm(J, axis=0) + 1e-300
        _, S, Vt = np.linalg.svd(J / sizes, full_matrices=False)
        with np.errstate(over="ignore"):  # an unknown that no equation sees
            spread = np.linalg.norm(Vt.T / np.maximum(S, 1 / MAX_RESIDUAL), axis=1) / sizes
            std[mask] = spread * max(misfit, 1.0) if surplus >= 0 else math.inf
    if not 0 <= theta[2] <= MAX_SMOOTHING:
        misfit = math.inf
    return HeadFit(theta, std, misfit, float(np.linalg.norm(residual) / np.linalg.norm(rows.u)))


def _finite(values: NDArray) -> NDArray:
    """Without NaN, and small enough that squares do not overflow."""
    return np.clip(np.nan_to_num(values), -MAX_RESIDUAL, MAX_RESIDUAL)


def rows_of(loss: str, head: HeadGradient, factors: RankOne, label: int, sign: float) -> HeadEquations:
    """The equations of one label, in the bias's gradient or in u, whose sign is chosen."""
    stds, b = entry_stds(head, factors), head.layer.bias
    b = np.zeros(len(head.G)) if b is None else b.numpy()
    if head.bias is not None:
        u, v, noise = head.bias, least_squares_input(head.G, head.bias), head.bias_std
    else:
        u, v = sign * factors.u, sign * factors.v
        noise = (stds.square() @ v.square()).sqrt() / v.square().sum()
    spread = (u.square() @ stds.square()).sqrt() / u.square().sum()
    output_noise = (head.W.square() @ spread.square()).sqrt()
    precision = max(head.precision, FLOAT64_ERROR)
    rows = (u, head.W @ v, b, noise, output_noise)
    return HeadEquations(label, loss == "mse", *(np.asarray(t) for t in rows), precision)
