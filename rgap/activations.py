"""Elementwise activations: σ with its inverse and its derivative, side by side.

The derivative is a function of the pre-activation z. Only maps that are one-to-one on all of ℝ are listed: the
recursion computes z = σ⁻¹(x) from what a layer's successor received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """An invertible elementwise map.

    Attributes:
        name: For reports.
        forward: z -> σ(z), any shape.
        inverse: x -> σ⁻¹(x), any shape.
        derivative: z -> σ′(z), any shape.
        homogeneous: Whether σ(a z) = a σ(z) for every a > 0. Bias-free networks of such maps have twin data.
        negative_slope: a of a LeakyReLU (1 for the identity), None for smooth maps.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    homogeneous: bool = False
    negative_slope: float | None = None


IDENTITY = Activation("identity", lambda z: z, lambda x: x, torch.ones_like, homogeneous=True, negative_slope=1.0)


def leaky_relu(slope: float) -> Activation:
    """LeakyReLU: z for z > 0, slope·z otherwise; the derivative at 0 is the slope, as in torch.

    Raises:
        ValueError: If the slope is not positive: then the map is not one-to-one.
    """
    if not slope > 0:
        raise ValueError(f"LeakyReLU with slope {slope} is not one-to-one; its slope must be positive")
    return Activation(
        f"leaky_relu({slope:g})",
        lambda z: torch.where(z > 0, z, slope * z),
        lambda x: torch.where(x > 0, x, x / slope),
        lambda z: torch.where(z > 0, torch.ones_like(z), slope),
        homogeneous=True,
        negative_slope=slope,
    )


def from_module(module: nn.Module) -> Activation | None:
    """The activation that a module computes, or None where it is not an invertible elementwise map known here."""
    if isinstance(module, nn.Identity):
        return IDENTITY
    if isinstance(module, nn.LeakyReLU) and module.negative_slope > 0:
        return leaky_relu(module.negative_slope)
    return None
