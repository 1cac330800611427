"""The best linear fits to σ⁻¹ and σ′ under uncertainty: statistical linearisation, entry by entry.

For x ~ N(m, v) a tangent is wrong where σ has a kink within a few standard deviations of m. The least-squares fit is
right on average and has residuals of known variance: σ⁻¹(x) = alpha + beta x + ε, σ′(σ⁻¹(x)) = pi + rho (x − m) + η.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from rgap.network.activations import Activation, leaky_relu

QUADRATURE_NODES = 15  # nodes of the Gauss–Hermite rule for smooth activations


@dataclass(frozen=True)
class Fit:
    """Coefficients of both fits, variances of their residuals ε and η, and the covariance of these; arrays (n,)."""

    alpha: NDArray
    beta: NDArray
    var_eps: NDArray
    pi: NDArray
    rho: NDArray
    var_eta: NDArray
    cov: NDArray


def fit(activation: Activation, m: NDArray, v: NDArray) -> Fit:
    """The fits for x ~ N(m, v), (n,) each: in closed form for LeakyReLU, by quadrature for smooth activations."""
    if activation.negative_slope is not None:
        return _leaky_relu(np.asarray(activation.negative_slope), m, v)
    return _smooth(activation, m, v)


def flattened(activation: Activation, shape: tuple[int, ...]) -> Activation:
    """The same map on vectors (n,) and columns (n, k) of the entries of a shape to which its parameters broadcast."""
    if isinstance(activation.negative_slope, float):
        return activation
    if activation.negative_slope is not None:
        return leaky_relu(activation.negative_slope.expand(shape).flatten())

    def on_columns(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: f(x.movedim(0, -1).reshape(*x.shape[1:], *shape)).reshape(*x.shape[1:], len(x)).movedim(-1, 0)

    names = ("forward", "inverse", "derivative")
    return replace(activation, **{name: on_columns(getattr(activation, name)) for name in names})


def inverse(activation: Activation, x: NDArray) -> NDArray:
    """σ⁻¹ on an array."""
    return activation.inverse(torch.from_numpy(x)).numpy()


def slope(activation: Activation, x: NDArray) -> NDArray:
    """σ′ at σ⁻¹(x) on an array."""
    return activation.derivative(activation.inverse(torch.from_numpy(x))).numpy()


def _leaky_relu(a: float, m: NDArray, v: NDArray) -> Fit:
    """From the moments of max(x, 0) and of the step 1[x > 0], in which both functions are linear, and in x."""
    sd = np.sqrt(v) + 1e-300
    u = np.clip(m / sd, -40, 40)  # beyond, exactly on one piece
    phi, cdf, tail = np.exp(-u * u / 2) / np.sqrt(2 * np.pi), ndtr(u), ndtr(-u)
    mean, square = m * cdf + sd * phi, (m * m + v) * cdf + m * sd * phi  # of max(x, 0) and of its square
    c, step = 1 / a - 1, 1 - a
    beta = 1 / a - c * cdf
    return Fit(
        alpha=m / a - c * mean - beta * m, beta=beta, var_eps=c * c * np.maximum(square - mean**2 - v * cdf**2, 0),
        pi=a + step * cdf, rho=step * phi / sd, var_eta=step * step * np.maximum(cdf * tail - phi**2, 0),
        cov=-c * step * (mean * tail - cdf * sd * phi),
    )  # fmt: skip


def _smooth(activation: Activation, m: NDArray, v: NDArray) -> Fit:
    nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
    weights = weights / weights.sum()
    sd = np.maximum(np.sqrt(v), 1e-6)  # below, the differences between nodes are lost in rounding
    x = m[:, None] + sd[:, None] * nodes
    f, h = inverse(activation, x), slope(activation, x)
    mean_f, mean_h, cov_f, cov_h = f @ weights, h @ weights, f @ (weights * nodes), h @ (weights * nodes)
    f, h = f - mean_f[:, None] - cov_f[:, None] * nodes, h - mean_h[:, None] - cov_h[:, None] * nodes
    beta = cov_f / sd
    return Fit(mean_f - beta * m, beta, f**2 @ weights, mean_h, cov_h / sd, h**2 @ weights, (f * h) @ weights)
