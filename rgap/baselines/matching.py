"""The distance between the gradient of trial images and the shared one, differentiable by the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.client import check_loss, loss_value
from rgap.network.layer import Chain
from rgap.results import PixelRange
from rgap.shared_gradient import SharedGradient, receive_gradients

DIVERGED_WIDTHS = 10.0
"""Widths of the pixel range from its middle; an iterate beyond has diverged."""


@dataclass(frozen=True)
class Distances:
    """How far one set of gradients is from another.

    Attributes:
        squared: ‖g′ − g‖² / ‖g‖² over all tensors together.
        cosine: 1 − ⟨g′, g⟩ / (‖g′‖ ‖g‖) over all tensors together.
        residual: Largest over the tensors of ‖g′ − g‖ / ‖g‖; a number, not differentiated.
    """

    squared: Tensor
    cosine: Tensor
    residual: float


@dataclass(frozen=True, eq=False)
class GradientObjective:
    """The shared gradient as a function of trial images, in the optimiser's precision and on its device.

    Attributes:
        model: The network, in eval or training mode as it was given.
        parameters: Parameter name -> value.
        buffers: Buffer name -> value.
        targets: The shared gradient, in the order of the parameters.
        sizes: ‖g‖² of each of its tensors.
        loss: Name of the loss.
        shape: (B, C, H, W) of the images.
        pixels: The values that a pixel may have.
        received: The gradients in float64, and their precision.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    targets: tuple[Tensor, ...]
    sizes: Tensor
    loss: str
    shape: tuple[int, int, int, int]
    pixels: PixelRange
    received: SharedGradient

    @property
    def dtype(self) -> torch.dtype:
        """Of the images."""
        return self.sizes.dtype

    @property
    def device(self) -> torch.device:
        """Of the images."""
        return self.sizes.device

    def distances(self, images: Tensor, labels: Tensor) -> Distances:
        """Compares the gradient of trial images, (B, C, H, W) of this object's dtype, with the shared one."""
        outputs = torch.func.functional_call(self.model, {**self.buffers, **self.parameters}, images)
        value = loss_value(self.loss, outputs, labels)
        mine = torch.autograd.grad(value, list(self.parameters.values()), create_graph=True, materialize_grads=True)
        squares = torch.stack([(a - g).square().sum() for a, g in zip(mine, self.targets, strict=True)])
        dot = sum((a * g).sum() for a, g in zip(mine, self.targets, strict=True))
        length = sum(a.square().sum() for a in mine)
        total = self.sizes.sum()
        residual = (squares.detach() / torch.where(self.sizes > 0, self.sizes, self.sizes.max())).max().sqrt().item()
        return Distances(squares.sum() / total, 1 - dot / (length * total).sqrt().clamp(min=1e-30), residual)

    def random_images(self, generator: torch.Generator) -> Tensor:
        """Noise, uniform over the pixel range (the unit interval where that is infinite)."""
        noise = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return (self.low + self.pixels.width * noise).to(self.device, self.dtype)

    @property
    def low(self) -> float:
        """Smallest value of a pixel; 0 where the pixel range is infinite."""
        return self.pixels.low if math.isfinite(self.pixels.high - self.pixels.low) else 0.0

    def diverged(self, images: Tensor) -> bool:
        """Whether images lie so far outside the pixel range that no descent returns."""
        width = self.pixels.width
        return not bool((images - (self.low + width / 2)).abs().max() <= DIVERGED_WIDTHS * width)


def gradient_objective(
    model: nn.Module | Chain,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    image_shape: tuple[int, int, int] | None,
    loss: str,
    batch_size: int,
    pixel_range: tuple[float, float],
    noise_std: float | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> GradientObjective:
    """Checks the arguments of a method and makes them an objective.

    Raises:
        GradientMismatchError: If the gradients do not belong to the network.
        ValueError: If another argument is out of range.
    """
    check_loss(loss)
    if isinstance(model, Chain):
        model, image_shape = model.model, image_shape or model.image_shape
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; give an nn.Module or a Chain from rgap.prepare")
    if image_shape is None:
        raise ValueError("image_shape is missing; give (channels, height, width), or a Chain from rgap.prepare")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; an optimiser must know it, give at least 1")
    if len(tuple(pixel_range)) != 2 or not pixel_range[0] < pixel_range[1]:
        raise ValueError(f"pixel_range is {pixel_range}; give (smallest, largest)")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; the optimisers work in torch.float32 or torch.float64")
    named = dict(model.named_parameters())
    received = receive_gradients(named, gradients, noise_std=noise_std)
    target = {"device": device, "dtype": dtype}
    values = {name: p.detach().to(**target).requires_grad_() for name, p in named.items()}
    shared = tuple(g.to(**target) for g in received.gradients.values())
    # Copies, because a network in training mode writes to its buffers.
    buffers = {
        n: b.to(device, dtype if b.is_floating_point() else b.dtype, copy=True) for n, b in model.named_buffers()
    }
    sizes = torch.stack([g.square().sum() for g in shared])
    shape = (batch_size, *image_shape)
    return GradientObjective(model, values, buffers, shared, sizes, loss, shape, PixelRange(*pixel_range), received)
