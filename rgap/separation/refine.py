"""The inputs of a separated head, once more: all together, from all the gradients of the fully connected layers.

The fixed point finds one input after the other and each scale by itself. Together they are B·B numbers, the coordinates
of B inputs in the row space of the first gradient, and the fully connected gradients are smooth functions of these: a
few Gauss–Newton steps take off what the separate steps have left (ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.client import loss_value
from rgap.network.layer import Layer

STEPS = 60
"""Most Gauss–Newton steps; two or three are usual from separated inputs."""

LITTLE = 1e-3
"""Relative gain of a step at which no more are made."""

STIFF = 1e2
"""Damping, in units of the Jacobian's largest column, at which no step is tried any more."""

ENOUGH = 1e-13
"""Relative length of a step at which no more are made."""

SOFT = 1e-6
"""Least damping."""

LARGEST = 24
"""Most images for which this is done: the Jacobian has B² columns."""


@dataclass(frozen=True)
class FittedInputs:
    """What the fully connected layers have said of each image.

    Attributes:
        x: Inputs of the first fully connected layer, (B, n), with their true scale.
        dx: Gradient of the mean loss by them, (B, n).
        residual: Largest over the fully connected gradients of ‖g′ − g‖ / ‖g‖ within the span of the inputs.
    """

    x: Tensor
    dx: Tensor
    residual: float


def refine_head(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], x: Tensor, labels: Tensor, loss: str
) -> FittedInputs:
    """Fits the inputs of the first fully connected layer to all gradients of these layers.

    Args:
        layers: The fully connected layers, in order; the last gives the outputs.
        gradients: Parameter name -> gradient of the mean loss, float64.
        x: Inputs as found, (B, n), linearly independent, with their scales.
        labels: (B,), int64.
        loss: A loss of `rgap.client`.

    Returns:
        The `FittedInputs`; x stays in the span of what was given.
    """
    Q, R = torch.linalg.qr(x.T)
    W = layers[0].weight.flatten(1) @ Q
    target = _shared(layers, gradients, Q)
    units = [g.norm().clamp(min=torch.finfo(g.dtype).tiny) for g in target]

    def misses(T: Tensor) -> list[Tensor]:
        mine, _ = _gradients(layers, W, T, labels, loss)
        return [((a - b) / unit).flatten() for a, b, unit in zip(mine, target, units, strict=True)]

    T, damping = R.T, 0.0
    miss = torch.cat(misses(T))
    for _ in range(STEPS if len(x) <= LARGEST else 0):
        J = torch.func.jacrev(lambda t: torch.cat(misses(t)))(T).flatten(1)
        T, after, damping, length = _step(misses, T, J, miss, damping)
        gained, miss = miss.norm() - after.norm(), after
        if length < ENOUGH * T.norm() or gained < LITTLE * miss.norm():
            break
    _, dz = _gradients(layers, W, T, labels, loss)
    return FittedInputs(T @ Q.T, dz @ layers[0].weight.flatten(1), max(part.norm().item() for part in misses(T)))


def _step(misses, T: Tensor, J: Tensor, miss: Tensor, damping: float) -> tuple[Tensor, Tensor, float, Tensor]:
    """One step that lowers the misses, damped as far as it takes (Levenberg and Marquardt); none where none does."""
    unit = J.norm(dim=0).max()
    identity = unit * torch.eye(J.shape[1], dtype=J.dtype)
    while damping < STIFF:
        A = torch.cat([J, damping * identity]) if damping else J
        right = torch.cat([-miss, miss.new_zeros(len(A) - len(miss))])
        step = torch.linalg.lstsq(A, right[:, None], driver="gelsd").solution.reshape(T.shape)
        after = torch.cat(misses(T + step))
        if after.norm() < miss.norm():
            return T + step, after, damping / 10 if damping > SOFT else 0.0, step.norm()
        damping = max(10 * damping, SOFT)
    return T, miss, damping, miss.new_zeros(())


def _shared(layers: Sequence[Layer], gradients: Mapping[str, Tensor], Q: Tensor) -> list[Tensor]:
    """The shared gradients in the order of `_gradients`, the first in coordinates of the span."""
    found = []
    for number, layer in enumerate(layers):
        G = gradients[layer.weight_name].flatten(1)
        found.append(G if number else G @ Q)
        if layer.bias_name is not None:
            found.append(gradients[layer.bias_name])
    return found


def _gradients(layers: Sequence[Layer], W: Tensor, T: Tensor, labels: Tensor, loss: str) -> tuple[list[Tensor], Tensor]:
    """The fully connected gradients for inputs with coordinates T (B, B), and ∂ℓ/∂z of the first layer (B, h)."""
    received, slopes, x = [], [], T
    for number, layer in enumerate(layers):
        received.append(x)
        z = x @ (layer.weight.flatten(1) if number else W).T
        z = (z if layer.bias is None else z + layer.bias).reshape(len(x), *layer.output_shape)
        slopes.append(layer.activation.derivative(z).flatten(1))
        x = layer.activation.forward(z).flatten(1)
    dz = torch.func.grad(lambda f: loss_value(loss, f, labels))(x)
    found = []
    for number in reversed(range(len(layers))):
        if layers[number].bias_name is not None:
            found.append(dz.sum(0))
        found.append(dz.T @ received[number])
        if number:
            dz = slopes[number - 1] * (dz @ layers[number].weight.flatten(1))
    return found[::-1], dz
