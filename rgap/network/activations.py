"""Elementwise activations: σ with its inverse and its derivative, side by side.

The derivative is a function of the pre-activation z; its value at a kink is torch's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.network.elementwise import IDENTITY, Activation, Composition, affine, compose

__all__ = [
    "IDENTITY",
    "LOG_SIGMOID",
    "RELU",
    "SIGMOID",
    "SOFTSIGN",
    "TANH",
    "Activation",
    "Composition",
    "affine",
    "clipped",
    "compose",
    "exponential",
    "leaky_relu",
    "softplus",
]

TINY = 1e-300
"""Smallest distance from a bound at 0 that an inverse is taken at: its logarithm is finite."""

BELOW_ONE = 1 - 2.0**-53
"""The float64 before 1."""


def leaky_relu(slope: float | Tensor) -> Activation:
    """LeakyReLU: z for z > 0, slope·z otherwise; the derivative at 0 is the slope, as in torch.

    Args:
        slope: One number, or a tensor that broadcasts to z, e.g. (O, 1, 1) for one a channel (PReLU).

    Raises:
        ValueError: If a slope is not positive: then the map is not one-to-one.
    """
    if not torch.as_tensor(slope > 0).all():
        raise ValueError(f"LeakyReLU with slope {slope} is not one-to-one; its slope must be positive")
    return Activation(
        f"leaky_relu({slope:g})" if isinstance(slope, float | int) else "prelu",
        lambda z: torch.where(z > 0, z, slope * z),
        lambda x: torch.where(x > 0, x, x / slope),
        lambda z: torch.where(z > 0, torch.ones_like(z), slope),
        homogeneous=True,
        negative_slope=slope,
    )


def exponential(name: str, alpha: float, rate: float = 1.0, scale: float = 1.0) -> Activation:
    """scale·z for z > 0, scale·alpha·(e^{rate·z} − 1) otherwise: ELU, CELU (rate = 1/alpha) and SELU.

    torch's derivative of CELU rounds alpha to float32, and so does this one.

    Raises:
        ValueError: If alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"{name} with alpha {alpha} is not one-to-one; its alpha must be positive")
    slope_rate = rate if rate == 1 else 1 / torch.tensor(alpha, dtype=torch.float32).item()
    return Activation(
        name,
        lambda z: scale * torch.where(z > 0, z, alpha * torch.expm1(rate * z.clamp(max=0))),
        lambda x: torch.where(x > 0, x / scale, torch.log1p((x / (scale * alpha)).clamp(-BELOW_ONE, 0)) / rate),
        lambda z: (
            scale * torch.where(z > 0, torch.ones_like(z), alpha * slope_rate * torch.exp(slope_rate * z.clamp(max=0)))
        ),
        bounds=(-scale * alpha, math.inf),
    )


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """log(1 + e^{beta z}) / beta, and z itself where beta z exceeds the threshold.

    Raises:
        ValueError: If beta is not positive.
    """
    if not beta > 0:
        raise ValueError(f"Softplus with beta {beta} is not increasing; its beta must be positive")

    def inverse(x: Tensor) -> Tensor:
        y = (beta * x).clamp(min=TINY)
        return torch.where(y > threshold, x, (y + torch.log(-torch.expm1(-y))) / beta)

    return Activation(
        "softplus",
        lambda z: F.softplus(z, beta, threshold),
        inverse,
        lambda z: torch.where(beta * z > threshold, torch.ones_like(z), torch.sigmoid(beta * z)),
        bounds=(0.0, math.inf),
    )


def clipped(name: str, low: float, high: float) -> Activation:
    """The identity cut off at low and high: ReLU, ReLU6 and Hardtanh; σ′ = 0 on the bounds, as in torch."""
    return Activation(
        name,
        lambda z: z.clamp(low, high),
        lambda x: x.clamp(low, high),
        lambda z: ((z > low) & (z < high)).to(z.dtype),
        homogeneous=(low, high) == (0.0, math.inf),
        bounds=(low, high),
        clips=True,
    )


RELU = clipped("relu", 0.0, math.inf)

TANH = Activation(
    "tanh",
    torch.tanh,
    lambda x: torch.atanh(x.clamp(-BELOW_ONE, BELOW_ONE)),
    lambda z: 1 / torch.cosh(z.clamp(-350, 350)) ** 2,  # 1 − tanh² would lose every digit where it saturates
    bounds=(-1.0, 1.0),
)

SIGMOID = Activation(
    "sigmoid",
    torch.sigmoid,
    lambda x: torch.logit(x.clamp(TINY, BELOW_ONE)),
    lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    bounds=(0.0, 1.0),
)

SOFTSIGN = Activation(
    "softsign",
    F.softsign,
    lambda x: x.clamp(-BELOW_ONE, BELOW_ONE) / (1 - x.abs().clamp(max=BELOW_ONE)),
    lambda z: (1 + z.abs()) ** -2,
    bounds=(-1.0, 1.0),
)

LOG_SIGMOID = Activation(
    "log_sigmoid",
    F.logsigmoid,
    lambda x: x.clamp(max=-TINY) - torch.log(-torch.expm1(x.clamp(max=-TINY))),
    lambda z: torch.sigmoid(-z),
    bounds=(-math.inf, 0.0),
)
