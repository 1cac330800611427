"""Signs of units next to zero: one that the errors have turned misleads δz, and shows in the layer's identities.

A unit of a LeakyReLU whose value is smaller than its error may have the wrong slope. Its value hardly matters, its δz
does: a single one of ten thousand makes a shared gradient miss by per cents. `rgap.attack.signs` does the same for
single images. Both functions here are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from rgap.attack.signs import project_to_pattern
from rgap.network.layer import Chain, Layer

GAIN = 0.7
"""Residual of a channel's identities after a turn, relative to that before, below which the turn is right."""

MOST = 400
"""Units of an image that may disagree with the signs that were recovered."""


def settle_signs(layer: Layer, G: Tensor, x: Tensor, dx: Tensor, *, doubt: float) -> Tensor:
    """Turns units next to zero where the layer's identities say so.

    ⟨G[o], W[o′]⟩ = Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩, and a turned unit adds its known share to a row of it.

    Args:
        layer: The layer that these are the outputs of.
        G: Gradient of the mean loss by its weight, shaped as it.
        x: σ(z) of every image, (B, O, H′, W′).
        dx: Gradient of the mean loss by x, (B, O, H′, W′).
        doubt: Entries below this share of the root-mean-square are next to zero.

    Returns:
        x with the turned units barely on the other side of zero.
    """
    slope = layer.activation.negative_slope
    if slope is None or bool((torch.as_tensor(slope) == 1).all()):
        return x
    z = layer.activation.inverse(x)
    now = layer.activation.derivative(z)
    turned = (1 + slope - 2 * now) * dx
    doubtful = x.abs() < doubt * x.square().mean().sqrt()
    known, size = z - layer.pre_bias(), len(G) // layer.groups
    x = x.clone()
    for channel in torch.nonzero(doubtful.flatten(2).any(2).any(0)).flatten().tolist():
        group = slice(channel // size * size, (channel // size + 1) * size)
        other = known[:, group]
        rest = layer.weight[group].flatten(1) @ G[channel].flatten()
        rest = rest - torch.einsum("bhw,bohw->o", now[:, channel] * dx[:, channel], other)
        image, row, column = torch.nonzero(doubtful[:, channel], as_tuple=True)
        shares = turned[image, channel, row, column, None] * other[image, :, row, column]
        for _ in range(len(shares)):
            after = (rest - shares).norm(dim=1)
            best = int(after.argmin())
            if not after[best] < GAIN * rest.norm():
                break
            rest = rest - shares[best]
            shares[best] = -shares[best]
            x[image[best], channel, row[best], column[best]] *= -1e-3
    return x


def agree(chain: Chain, images: Tensor, inputs: Mapping[str, Tensor], below: int) -> Tensor:
    """Moves images by less than their error, so that their units have the signs that were recovered.

    Those of the fully connected layers are what the recovered features give.

    Args:
        chain: The prepared network.
        images: (B, C, H, W), recovered.
        inputs: Layer name -> recovered input of it, (B, …).
        below: Index of the first layer that is fully connected.

    Returns:
        The images; as they were where the network has other activations than LeakyReLU, or too many units disagree.
    """
    layers = chain.layers[:-1]
    if any(layer.activation.negative_slope is None for layer in layers):
        return images
    moved = []
    for b, image in enumerate(images.split(1)):
        positive = {before.name: inputs[layer.name][b] > 0 for before, layer in pairwise(layers[: below + 1])}
        x = inputs[layers[below].name][b].reshape(1, *layers[below].input_shape)
        for layer in layers[below:]:
            z = layer.apply(x) + layer.pre_bias()
            positive[layer.name] = z > 0
            x = layer.activation.forward(z)
        moved.append(project_to_pattern(layers, image, positive, MOST))
    return torch.cat(moved)
