"""Activation patterns without a predicted error: of a batch on the way down, and of images that were recovered (ours).

A unit of a LeakyReLU whose value is smaller than its error may have the wrong slope. Its value hardly matters, its δz
does: a single one of ten thousand makes a shared gradient miss by per cents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rgap.network.layer import Chain, Layer

FLIP_GAIN = 0.7
"""Residual of a channel's identities after a flip, relative to that before, below which the flip is right."""

MAX_PATTERN_FLIPS = 400
"""Units of an image of a batch that may disagree with the signs that were recovered."""

MAX_PROJECTIONS = 6
"""Most linearised moves of an image; signs of units next to zero need one or two."""


def settle_signs(layer: Layer, G: Tensor, x: Tensor, dx: Tensor, *, doubt: float) -> Tensor:
    """Flips units next to zero where the layer's identities call for it.

    ⟨G[o], W[o′]⟩ = Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩, and a flipped unit adds its known share to a row of it. Unlike
    `decide_activation_pattern` this needs no error of x and no noise of G, which a batch has no probe for.

    Args:
        layer: The layer that these are the outputs of.
        G: Gradient of the mean loss by its weight, shaped as it.
        x: σ(z) of every image, (B, O, H′, W′).
        dx: Gradient of the mean loss by x, (B, O, H′, W′).
        doubt: Entries below this share of the root mean square are next to zero.

    Returns:
        x with the flipped units barely on the other side of zero.
    """
    slope = layer.activation.negative_slope
    if slope is None or bool((torch.as_tensor(slope) == 1).all()):
        return x
    z = layer.activation.inverse(x)
    now = layer.activation.derivative(z)
    flips = (1 + slope - 2 * now) * dx
    doubtful = x.abs() < doubt * x.square().mean().sqrt()
    inputs, size = z - layer.pre_bias(), len(G) // layer.groups
    x = x.clone()
    for channel in torch.nonzero(doubtful.flatten(2).any(2).any(0)).flatten().tolist():
        group = slice(channel // size * size, (channel // size + 1) * size)
        others = inputs[:, group]
        rest = layer.weight[group].flatten(1) @ G[channel].flatten()
        rest = rest - torch.einsum("bhw,bohw->o", now[:, channel] * dx[:, channel], others)
        image, row, column = torch.nonzero(doubtful[:, channel], as_tuple=True)
        shares = flips[image, channel, row, column, None] * others[image, :, row, column]
        for _ in range(len(shares)):
            after = (rest - shares).norm(dim=1)
            best = int(after.argmin())
            if not after[best] < FLIP_GAIN * rest.norm():
                break
            rest = rest - shares[best]
            shares[best] = -shares[best]
            x[image[best], channel, row[best], column[best]] *= -1e-3
    return x


def project_to_pattern(
    layers: Sequence[Layer], images: Tensor, positive: Mapping[str, Tensor], max_flips: int
) -> Tensor:
    """Moves images as little as it takes for their units to have the signs that were decided.

    An image that was recovered with errors may have a unit on the other piece when it goes forward again. Its gradient
    is then not the one that was shared, until the image is moved by less than its error.

    Args:
        layers: From the first on.
        images: (B, C, H, W), recovered with errors.
        positive: Layer name -> which of its pre-activations are positive, (B, …); layers that are not named are free.
        max_flips: Disagreeing units beyond which they are no matter of single signs; each costs a backward pass.

    Returns:
        The images; one as it was where too many of its units disagree.
    """
    layers = list(layers)
    while layers and layers[-1].name not in positive:
        layers.pop()
    if not layers or not len(images):
        return images
    named = [layer.name for layer in layers if layer.name in positive]
    signs = torch.cat([positive[name].flatten(1) for name in named], 1)
    return torch.cat([_project(layers, named, *one, max_flips) for one in zip(images.split(1), signs, strict=True)])


def batch_on_pattern(chain: Chain, images: Tensor, positive: Mapping[str, Tensor]) -> Tensor:
    """`project_to_pattern` for the images of a batch; as they were where an activation is not piecewise linear."""
    layers = chain.layers[:-1]
    if any(layer.activation.negative_slope is None for layer in layers):
        return images
    return project_to_pattern(layers, images, positive, MAX_PATTERN_FLIPS)


def _project(layers: list[Layer], named: list[str], image: Tensor, signs: Tensor, max_flips: int) -> Tensor:
    """One image, by linearised moves."""
    first = image
    for _ in range(MAX_PROJECTIONS):
        x = image.clone().requires_grad_()
        with torch.enable_grad():
            outputs = _outputs(layers, x, named)
        wrong = torch.nonzero((outputs > 0) != signs).flatten()
        if not len(wrong):
            return image
        if len(wrong) > max_flips:
            return first
        rows = [torch.autograd.grad(outputs[i], x, retain_graph=True)[0].flatten() for i in wrong]
        J = torch.stack(rows)
        step = torch.linalg.lstsq(J @ J.T, -(1 + 1e-3) * outputs[wrong].detach()[:, None], driver="gelsd").solution
        image = image + (J.T @ step).reshape(image.shape)
    return image


def _outputs(layers: Sequence[Layer], x: Tensor, named: Sequence[str]) -> Tensor:
    """Pre-activations of the layers that are named, one after the other, of one image."""
    found = []
    for layer in layers:
        z = layer.apply(x.reshape(1, *layer.input_shape)) + layer.pre_bias()
        if layer.name in named:
            found.append(z.flatten())
        x = layer.activation.forward(z)
    return torch.cat(found)
