"""The distance between the gradient of trial images and the shared one, differentiable with respect to the images."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rgap.arguments import check_count, check_device, check_dtype, check_image_shape, check_model
from rgap.attack.arguments import check_options
from rgap.baselines.optimisers import Objective
from rgap.client import LocalTraining, loss_value
from rgap.network.layer import Chain
from rgap.results import PixelRange
from rgap.shared_gradient import SharedGradient, receive_gradients

DIVERGED_WIDTHS = 10.0  # widths of the pixel range from its middle, beyond which an iterate has diverged


class Distances(NamedTuple):
    """Distances of the gradient g′ of trial images from the shared one, g.

    Over all tensors together `squared` = ‖g′ − g‖² / ‖g‖² and `cosine` = 1 − ⟨g′, g⟩ / (‖g′‖ ‖g‖), both differentiable;
    `residual` is the largest ‖g′ − g‖ / ‖g‖ of a tensor, a number.
    """

    squared: Tensor
    cosine: Tensor
    residual: float


@dataclass(frozen=True, eq=False)
class GradientObjective:
    """The distance from the shared gradient as a function of trial images, in the optimiser's precision, on its device.

    The model is in the mode in which it was given; parameters and buffers are by name. `targets` is the shared gradient
    by name, without what is absent, `sizes` has ‖g‖² of each of its tensors, `shape` is (B, C, H, W) of the images, and
    `received` holds the gradients in float64 and their precision. With `training` the gradient is the weighted mean
    over the client's local steps, which `rgap.client.mean_gradients` reads off an update.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    sizes: Tensor
    loss: str
    shape: tuple[int, int, int, int]
    pixels: PixelRange
    received: SharedGradient
    training: LocalTraining | None = None

    def distances(self, images: Tensor, labels: Tensor) -> Distances:
        """Compares the gradient of trial images (B, C, H, W), in the precision of `sizes`, with the shared one."""
        mine = self._gradient(self.parameters, images, labels)
        if self.training is not None:
            mine = self._mean_gradient(mine, images, labels)
        mine, targets = [mine[name] for name in self.targets], self.targets.values()
        squares = torch.stack([(a - g).square().sum() for a, g in zip(mine, targets, strict=True)])
        dot = sum((a * g).sum() for a, g in zip(mine, targets, strict=True))
        length = sum(a.square().sum() for a in mine)
        total = self.sizes.sum()
        residual = (squares.detach() / torch.where(self.sizes > 0, self.sizes, self.sizes.max())).max().sqrt().item()
        return Distances(squares.sum() / total, 1 - dot / (length * total).sqrt().clamp(min=1e-30), residual)

    def _gradient(self, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = torch.func.functional_call(self.model, {**self.buffers, **parameters}, images)
        value, wanted = loss_value(self.loss, outputs, labels), [parameters[name] for name in self.targets]
        found = torch.autograd.grad(value, wanted, create_graph=True, materialize_grads=True)
        return dict(zip(self.targets, found, strict=True))

    def _mean_gradient(self, first: dict[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted mean of the gradients over the local steps, of which the first is known."""
        training, weights, g = self.training, dict(self.parameters), first
        velocity, mean = ({name: torch.zeros_like(w) for name, w in first.items()} for _ in range(2))
        for step, d in enumerate(training.coefficients[1]):
            g = self._gradient(weights, images, labels) if step else first
            for name in first:
                mean[name] = mean[name] + d / training.total * g[name]
                velocity[name] = training.momentum * velocity[name] + g[name] + training.weight_decay * weights[name]
                weights[name] = weights[name] - training.learning_rate * velocity[name]
        return mean

    def objective(self, labels: Tensor, distance: str, tv_weight: float = 0.0) -> Objective:
        """What an optimiser minimises over images: "squared" or "cosine" distance plus weighted total variation.

        The total variation is the mean absolute difference of neighbouring pixels in widths of the pixel range.
        """

        def value(images: Tensor) -> tuple[Tensor, float]:
            found = self.distances(images, labels)
            penalty = tv_weight / self.pixels.width * total_variation(images) if tv_weight else 0.0
            return getattr(found, distance) + penalty, found.residual

        return value

    def random_images(self, generator: torch.Generator) -> Tensor:
        """Noise, uniform over the pixel range (the unit interval where that is infinite)."""
        noise = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return (self.low + self.pixels.width * noise).to(self.sizes)

    @property
    def low(self) -> float:
        """Smallest value of a pixel; 0 where the pixel range is infinite."""
        return self.pixels.low if math.isfinite(self.pixels.high - self.pixels.low) else 0.0

    def diverged(self, images: Tensor) -> bool:
        """Whether images lie so far outside the pixel range that the descent does not recover."""
        width = self.pixels.width
        return not bool((images - (self.low + width / 2)).abs().max() <= DIVERGED_WIDTHS * width)


def gradient_objective(
    model, gradients, image_shape, loss, batch_size, pixel_range, noise_std, dtype, device, training=None
) -> GradientObjective:
    """Checks the arguments of `dlg`, refusing them by name, and builds the objective from them."""
    device = check_device(device)
    check_options(loss, None, pixel_range, noise_std=noise_std)
    if isinstance(model, Chain):
        model, image_shape = model.model, model.image_shape if image_shape is None else image_shape
    check_model(model)
    image_shape = check_image_shape(image_shape)
    batch_size = check_count("batch_size", batch_size, hint="; an optimiser must know it")
    check_dtype(dtype, (torch.float32, torch.float64))
    check_passes(model, image_shape)
    named = dict(model.named_parameters())
    received = receive_gradients(named, gradients, noise_std=noise_std, model=model)
    target = {"device": device, "dtype": dtype}
    values = {name: p.detach().to(**target).requires_grad_() for name, p in named.items()}
    shared = {name: g.to(**target) for name, g in received.usable.items()}
    # Copies, because a network in training mode writes to its buffers.
    floating = {n: dtype if b.is_floating_point() else b.dtype for n, b in model.named_buffers()}
    buffers = {n: b.to(device, floating[n], copy=True) for n, b in model.named_buffers()}
    sizes = torch.stack([g.square().sum() for g in shared.values()])
    shape = (batch_size, *image_shape)
    pixels = PixelRange(*pixel_range)
    return GradientObjective(model, values, buffers, shared, sizes, loss, shape, pixels, received, training)


def check_passes(model: nn.Module, image_shape: tuple[int, ...]) -> None:
    """Refuses an image shape that does not pass the network."""
    copied = copy.deepcopy(model).eval()  # in training mode a pass changes buffers
    some = next(copied.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            copied(torch.zeros(1, *image_shape, dtype=some.dtype, device=some.device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"image_shape {image_shape} does not fit the network: {reason}") from error


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, along both axes together."""
    return sum(images.diff(dim=axis).abs().mean() for axis in (-1, -2) if images.shape[axis] > 1)
