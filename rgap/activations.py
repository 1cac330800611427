"""Elementwise activations: σ with its inverse and its derivative, side by side.

The derivative is a function of the pre-activation z. The recursion computes z = σ⁻¹(x) from what a layer's successor
received, wherever σ tells it: ReLU tells z only where x > 0, a sigmoid only as far from 0 and 1 as x is accurate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-300
"""Smallest distance from a bound at 0 that an inverse is taken at: its logarithm is finite."""

BELOW_ONE = 1 - 2.0**-53
"""The float64 before 1."""

MARGIN = 3.0
"""Values this many times as far inside a bound as others lie beyond it are told apart from the bound."""


@dataclass(frozen=True)
class Activation:
    """An elementwise map that is one-to-one between its bounds.

    Attributes:
        name: For reports.
        forward: z -> σ(z), any shape.
        inverse: x -> σ⁻¹(x), any shape; finite for every x, also at and beyond the bounds.
        derivative: z -> σ′(z), any shape.
        homogeneous: Whether σ(a z) = a σ(z) for every a > 0. Bias-free networks of such maps have twin data.
        negative_slope: a of a LeakyReLU (1 for the identity), a tensor where channels differ, None for other maps.
        bounds: Smallest and largest value of σ, at which it does not tell z.
        clips: Whether σ takes the bounds on whole half-lines, where σ′ = 0; otherwise it only comes near them.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    homogeneous: bool = False
    negative_slope: float | Tensor | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    clips: bool = False

    @property
    def one_to_one(self) -> bool:
        """Whether σ is one-to-one on all of ℝ."""
        return not self.clips

    def invert(self, x: Tensor, accuracy: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Inverts σ where x tells z = σ⁻¹(x).

        A value beyond a bound can only be an error, so that the largest of these says how close to a bound a value must
        be to be taken for it.

        Args:
            x: What σ gave, up to errors.
            accuracy: Size of these errors, relative to the largest entry, as far as it is known beforehand.

        Returns:
            z, finite everywhere, and a mask of the entries at which it is known, None where that is all. At the others
            σ′(z) is 0 if σ clips, else z is the nearest value that x could tell.
        """
        low, high = self.bounds
        if low == -math.inf and high == math.inf:
            return self.inverse(x), None
        largest = x.abs().max().item()
        beyond = max(low - x.min().item(), x.max().item() - high, 0.0)
        margin = max(MARGIN * beyond, accuracy * largest)
        known = (x > low + margin) & (x < high - margin)
        if known.all():
            return self.inverse(x), None
        if self.clips:  # some z on a flat part
            return x.where(known, low - 1.0 if low > -math.inf else high + 1.0), known
        return self.inverse(x.clamp(low + margin, high - margin)), known


@dataclass(frozen=True)
class Composition(Activation):
    """Several maps, one after the other.

    Attributes:
        parts: In the order in which they are applied.
    """

    parts: tuple[Activation, ...] = ()

    @property
    def one_to_one(self) -> bool:
        """Whether every part is one-to-one on all of ℝ."""
        return all(part.one_to_one for part in self.parts)

    def invert(self, x: Tensor, accuracy: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Inverts part by part; z is known where every part tells it. See `Activation.invert`."""
        known = None
        for part in reversed(self.parts):
            x, told = part.invert(x, accuracy)
            known = told if known is None or told is None else known & told
        return x, known


IDENTITY = Activation("identity", lambda z: z, lambda x: x, torch.ones_like, homogeneous=True, negative_slope=1.0)


def compose(first: Activation, then: Activation) -> Activation:
    """One map after the other: z -> then(first(z))."""
    if first is IDENTITY or then is IDENTITY:
        return then if first is IDENTITY else first
    return Composition(
        f"{first.name}, {then.name}",
        lambda z: then.forward(first.forward(z)),
        lambda x: first.inverse(then.inverse(x)),
        lambda z: then.derivative(first.forward(z)) * first.derivative(z),
        homogeneous=first.homogeneous and then.homogeneous,
        parts=(first, then),
    )


def affine(scale: Tensor, shift: Tensor) -> Activation:
    """Entry by entry z -> scale·z + shift; the scale has no zero."""
    return Activation(
        "affine",
        lambda z: scale * z + shift,
        lambda x: (x - shift) / scale,
        lambda z: scale.expand_as(z),
        homogeneous=not shift.any(),
    )


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
