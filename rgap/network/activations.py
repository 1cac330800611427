"""Elementwise activations: σ, its inverse and its derivative side by side, and where an inexact x determines z.

The derivative is a function of the pre-activation z; its value at a kink is torch's. A value x = σ(z) that is known up
to an error determines z only where σ is one-to-one: where x > 0 for a ReLU, and for a sigmoid where x is farther from 0
and 1 than its error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

BOUND_ERROR_FACTOR = 30.0  # times the largest excess beyond a bound up to which values inside may lie on the bound
MIN_OUT_OF_BOUNDS = 10  # number of values beyond a bound from which on their excess measures the error of x
MIN_BOUND_DISTANCE = 1e-300  # distance from a bound at 0 from which an inverse is evaluated: its logarithm is finite
LARGEST_BELOW_ONE = 1 - 2.0**-53  # the largest float64 below 1


@dataclass(frozen=True)
class Activation:
    """An elementwise map that is one-to-one between its bounds."""

    name: str  # for reports
    forward: Callable[[Tensor], Tensor]  # z -> σ(z), any shape
    inverse: Callable[[Tensor], Tensor]  # x -> σ⁻¹(x), any shape; finite for every x, also at and beyond the bounds
    derivative: Callable[[Tensor], Tensor]  # z -> σ′(z), any shape
    homogeneous: bool = False  # whether σ(a z) = a σ(z) for every a > 0. Bias-free networks of such maps have twin data
    # a of a LeakyReLU (1 for the identity), a tensor where channels differ, None for other maps
    negative_slope: float | Tensor | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)  # infimum and supremum of σ; a value there does not determine z
    # whether σ equals a bound on a whole half-line, with σ′ = 0; otherwise it only approaches its bounds
    clips: bool = False
    parts: tuple[Activation, ...] = ()  # of a composition, in the order in which they are applied

    @property
    def one_to_one(self) -> bool:
        """Whether σ is one-to-one on all of ℝ."""
        return not self.clips and all(part.one_to_one for part in self.parts)

    @cached_property
    def has_kink(self) -> bool:
        """Whether σ is a LeakyReLU of two different slopes."""
        slope = self.negative_slope
        return slope is not None and bool((torch.as_tensor(slope) != 1).any())

    def invert(self, x: Tensor, accuracy: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Computes z = σ⁻¹(x) where an inexact x determines it.

        A value beyond a bound is wrong by at least its excess. Given enough such values, everything within the errors
        that they show counts as lying on the bound; the cut is put into the widest gap (by ratio) of the distances.
        Where too few values exceed a bound, the error is taken to be `accuracy` times the largest entry.

        z is finite everywhere and comes with the mask of the entries at which it is known, None where that is every
        entry. Elsewhere σ′(z) = 0 if σ clips, else z is the one nearest to the bound that x could determine.
        """
        if self.parts:
            known = None
            for part in reversed(self.parts):
                x, determined = part.invert(x, accuracy)
                known = determined if known is None or determined is None else known & determined
            return x, known
        low, high = self.bounds
        if low == -math.inf and high == math.inf:
            return self.inverse(x), None
        margin = _margin(torch.minimum(x - low, high - x), accuracy * x.abs().max().item())
        known = (x > low + margin) & (x < high - margin)
        if known.all():
            return self.inverse(x), None
        if self.clips:  # any z on the flat part
            return x.where(known, low - 1.0 if low > -math.inf else high + 1.0), known
        return self.inverse(x.clamp(low + margin, high - margin)), known


def _margin(inside: Tensor, error: float) -> float:
    """Distance from a bound within which values of an expected error cannot be distinguished from it.

    `inside` has the distance of each value from the nearer bound, negative beyond it.
    """
    beyond = max(-inside.min().item(), 0.0)
    if (inside < 0).sum() < MIN_OUT_OF_BOUNDS:
        return max(beyond, error)
    return widest_gap(inside, beyond, BOUND_ERROR_FACTOR * beyond).item()


def widest_gap(values: Tensor, low: float, high: float) -> Tensor:
    """The middle of the widest gap (by ratio) that values leave between two positive limits, geometric."""
    near = values[(values > low) & (values < high)]
    edges = torch.cat([values.new_tensor([low]), near.sort().values, values.new_tensor([high])])
    gap = int((edges[1:] / edges[:-1]).argmax())
    return (edges[gap] * edges[gap + 1]).sqrt()


IDENTITY = Activation("identity", lambda z: z, lambda x: x, torch.ones_like, homogeneous=True, negative_slope=1.0)


def compose(first: Activation, then: Activation) -> Activation:
    """The composition z -> then(first(z))."""
    if first is IDENTITY or then is IDENTITY:
        return then if first is IDENTITY else first
    return Activation(
        f"{first.name}, {then.name}",
        lambda z: then.forward(first.forward(z)),
        lambda x: first.inverse(then.inverse(x)),
        lambda z: then.derivative(first.forward(z)) * first.derivative(z),
        homogeneous=first.homogeneous and then.homogeneous,
        parts=(first, then),
    )


def affine(scale: Tensor, shift: Tensor) -> Activation:
    """The map z -> scale·z + shift, entry by entry; no entry of the scale is zero."""
    return Activation(
        "affine",
        lambda z: scale * z + shift,
        lambda x: (x - shift) / scale,
        lambda z: scale.expand_as(z),
        homogeneous=not shift.any(),
    )


def leaky_relu(slope: float | Tensor) -> Activation:
    """LeakyReLU: z for z > 0, slope·z otherwise. The derivative at 0 is the slope, as in torch.

    The slope is a number, or a tensor that broadcasts to z, e.g. (O, 1, 1) for one slope per channel (PReLU). A
    ValueError is raised where it is not positive, which would make the map not one-to-one.
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

    torch computes the derivative of CELU with alpha rounded to float32, and so does this one.
    """
    if not alpha > 0:
        raise ValueError(f"{name} with alpha {alpha} is not one-to-one; its alpha must be positive")
    slope_rate = rate if rate == 1 else 1 / torch.tensor(alpha, dtype=torch.float32).item()
    return Activation(
        name,
        lambda z: scale * torch.where(z > 0, z, alpha * torch.expm1(rate * z.clamp(max=0))),
        lambda x: torch.where(x > 0, x / scale, torch.log1p((x / (scale * alpha)).clamp(-LARGEST_BELOW_ONE, 0)) / rate),
        lambda z: (
            scale * torch.where(z > 0, torch.ones_like(z), alpha * slope_rate * torch.exp(slope_rate * z.clamp(max=0)))
        ),
        bounds=(-scale * alpha, math.inf),
    )


def softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """log(1 + e^{beta z}) / beta, and z itself where beta z exceeds the threshold."""
    if not beta > 0:
        raise ValueError(f"Softplus with beta {beta} is not increasing; its beta must be positive")

    def inverse(x: Tensor) -> Tensor:
        y = (beta * x).clamp(min=MIN_BOUND_DISTANCE)
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
    lambda x: torch.atanh(x.clamp(-LARGEST_BELOW_ONE, LARGEST_BELOW_ONE)),
    lambda z: 1 / torch.cosh(z.clamp(-350, 350)) ** 2,  # 1 − tanh² would lose every digit where it saturates
    bounds=(-1.0, 1.0),
)

SIGMOID = Activation(
    "sigmoid",
    torch.sigmoid,
    lambda x: torch.logit(x.clamp(MIN_BOUND_DISTANCE, LARGEST_BELOW_ONE)),
    lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    bounds=(0.0, 1.0),
)

SOFTSIGN = Activation(
    "softsign",
    F.softsign,
    lambda x: x.clamp(-LARGEST_BELOW_ONE, LARGEST_BELOW_ONE) / (1 - x.abs().clamp(max=LARGEST_BELOW_ONE)),
    lambda z: (1 + z.abs()) ** -2,
    bounds=(-1.0, 1.0),
)

LOG_SIGMOID = Activation(
    "log_sigmoid",
    F.logsigmoid,
    lambda x: x.clamp(max=-MIN_BOUND_DISTANCE) - torch.log(-torch.expm1(x.clamp(max=-MIN_BOUND_DISTANCE))),
    lambda z: torch.sigmoid(-z),
    bounds=(-math.inf, 0.0),
)
