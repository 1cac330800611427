"""Activation patterns: signs that errors leave in doubt on the way down, and in images that were recovered (ours).

A noisy x close to zero leaves the sign of z open, and δz = σ′(z) δx then differs by the slope, however small the noise:
one wrong sign among ten thousand spoils all the layers below. But Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩ = ⟨G[o], W[o′]⟩ holds
for every pair of channels, and z hardly depends on the signs of its smallest entries. So each channel o has O equations
for its few open slopes before anything is solved: decided by likelihood where a probe predicts the error of x (one
image), else by whether a flip lowers the residual (batches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.linalg import largest_entry
from rgap.network.layer import Chain, Layer

DOUBT_STDS = 5.0  # entries further from zero than this many standard deviations have the sign they show
MAX_FLIPS = 50  # most rounds in which signs are flipped, one in every channel at a time
FLIP_GAIN = 0.7  # residual of a channel's identities after a flip, over that before, below which the flip is right
MAX_PATTERN_FLIPS = 400  # units of an image of a batch that may disagree with the recovered signs
MAX_PROJECTIONS = 6  # most linearised moves of an image; signs of units next to zero need one or two


@dataclass(frozen=True)
class Slopes:
    """σ′(z) with the signs that the equations prefer."""

    values: Tensor  # (B, O, H′, W′)
    flip_probability: Tensor  # probability that an entry lies on the other piece all the same, (B, O, H′, W′)
    negative: float  # the slope for z < 0

    @property
    def positive(self) -> Tensor:
        """The part of the steps for which an entry lies on the upper piece, (B, O, H′, W′)."""
        return (self.values - self.negative) / (1 - self.negative)

    def draw(self, generator: torch.Generator) -> Tensor:
        """One draw of the slopes, each flipped with its probability."""
        if not self.flip_probability.any():
            return self.values
        shape, dtype = self.flip_probability.shape, self.flip_probability.dtype
        flipped = torch.rand(shape, generator=generator, dtype=dtype) < self.flip_probability
        return torch.where(flipped, 1 + self.negative - self.values, self.values)


def decide_activation_pattern(
    layer: Layer, G: Tensor, x: Tensor, dx: Tensor, spread: float, std: float,
    shares: Sequence[float] = (0.0, 1.0), reach: Tensor | None = None,
) -> Slopes | None:  # fmt: skip
    """Decides the signs of the entries of x that are closer to zero than its error, by likelihood.

    x (B, O, H′, W′) is the layer's output, with errors of standard deviation `spread`; dx is the gradient by it; G has
    noise of standard deviation `std`. Of a mean of gradients an entry may be positive for a part of them: `shares`, in
    ascending order, are the parts that are possible. None where the activation has no two
    slopes or the identities do not apply. Within its `reach` an entry may have crossed zero meanwhile.
    """
    slope = layer.activation.negative_slope
    plain = layer.groups == 1 and layer.after is None and layer.shift is None and not layer.is_fixed
    unit = largest_entry(G)
    if not plain or not isinstance(slope, float) or slope == 1.0 or unit == 0:
        return None
    z = layer.activation.inverse(x)
    values = layer.activation.derivative(z)
    away = x.abs() if reach is None else (x.abs() - reach.reshape(x.shape)).clamp(min=0)
    distance = away / spread if spread > 0 else torch.full_like(x, torch.inf)
    if not (distance < DOUBT_STDS).any():
        return Slopes(values, torch.zeros_like(distance), slope)
    channels_first = [t.transpose(0, 1).flatten(1) for t in (x, values, dx, z - layer.pre_bias(), distance)]
    x, values, dx, inputs, distance = channels_first  # (O, B·H′·W′) each
    values, distance = values.flatten(), distance.flatten()
    (open_,) = torch.nonzero(distance < DOUBT_STDS, as_tuple=True)
    flip_probability = torch.zeros_like(distance)
    dx, std = dx / unit, std / unit  # squares of the smallest gradients underflow
    rest, inputs = _whitened(layer, G / unit, inputs, values.reshape(x.shape) * dx, spread, std)
    prior = torch.special.log_ndtr(distance[open_]) - torch.special.log_ndtr(-distance[open_])
    levels = torch.lerp(values.new_tensor(slope), values.new_tensor(1.0), values.new_tensor(shares))
    flipped, odds = _choose_slopes(rest, inputs, open_, values[open_], levels, dx.flatten()[open_], prior)
    values = values.index_copy(0, open_, flipped)
    flip_probability[open_] = torch.sigmoid(-odds)
    images_first = (len(x), len(z), *z.shape[2:])
    return Slopes(*(t.reshape(images_first).transpose(0, 1) for t in (values, flip_probability)), slope)


def _whitened(layer: Layer, G: Tensor, inputs: Tensor, dz: Tensor, spread: float, std: float) -> tuple[Tensor, Tensor]:
    """⟨G[o], W[o′]⟩ − ⟨δz[o], z[o′] − b[o′]⟩ and z[o′] − b[o′], o′ transformed so that the noise is white of size 1."""
    W = layer.weight.flatten(1)
    S = std**2 * W @ W.T
    floor = spread**2 * dz.square().sum(1).mean() + 1e-12 * S.diagonal().mean() + torch.finfo(S.dtype).tiny
    S.diagonal().add_(floor)
    size = S.diagonal().mean().sqrt()
    lower = torch.linalg.cholesky(S / size / size) * size
    rest = G.flatten(1) @ W.T - dz @ inputs.T
    return (torch.linalg.solve_triangular(lower, v, upper=False) for v in (rest.T, inputs))


def _choose_slopes(
    rest: Tensor, inputs: Tensor, open_: Tensor, values: Tensor, levels: Tensor, dx: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Makes the likeliest change of every channel until none gains: (slopes, log odds against a further change)."""
    channels, pixels = open_ // inputs.shape[1], open_ % inputs.shape[1]
    columns = inputs[:, pixels]  # (O, k)
    size = columns.square().sum(0)
    rest, costs = rest.clone(), prior * (levels[:, None] - values).abs() / (levels[-1] - levels[0]).abs()
    paid = torch.zeros_like(prior)
    for _ in range(MAX_FLIPS):
        steps = (levels[:, None] - values) * dx
        odds = 0.5 * steps**2 * size - steps * (rest[:, channels] * columns).sum(0) + costs - paid
        odds, level = odds.masked_fill(levels[:, None] == values, torch.inf).min(0)
        least = rest.new_zeros(rest.shape[1]).scatter_reduce(0, channels, odds, "amin")
        (flip,) = torch.nonzero((odds < 0) & (odds == least[channels]), as_tuple=True)
        if not len(flip):
            break
        level = level[flip]
        rest.index_add_(1, channels[flip], -steps[level, flip] * columns[:, flip])
        values, paid = values.index_copy(0, flip, levels[level]), paid.index_copy(0, flip, costs[level, flip])
    return values, odds


def settle_signs(layer: Layer, G: Tensor, x: Tensor, dx: Tensor, *, doubt: float) -> Tensor:
    """Flips units next to zero where the layer's identities call for it.

    A flipped unit adds its known share to one row of ⟨G[o], W[o′]⟩ − Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩. Unlike
    `decide_activation_pattern` this needs neither the error of x nor the noise of G, for which a batch has no probe.
    x = σ(z) and dx are (B, O, H′, W′); entries below `doubt` times the root mean square are next to zero. The result is
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

    A unit of an image that was recovered with errors may change sign when the image goes forward again; the image's
    gradient then differs from the shared one until the image is moved, by less than its error. `positive` maps a
    layer's name to which of its pre-activations are positive, (B, …); layers not named are free. Images (B, C, H, W)
    with more than `max_flips` disagreeing units stay as they are; each unit costs a backward pass.
    """
    layers = list(layers)
    while layers and layers[-1].name not in positive:
        layers.pop()
    if not layers or not len(images):
        return images
    named = [layer.name for layer in layers if layer.name in positive]
    signs = torch.cat([positive[name].flatten(1) > 0 for name in named], 1)
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
        J = torch.stack([torch.autograd.grad(outputs[i], x, retain_graph=True)[0].flatten() for i in wrong])
        step = torch.linalg.lstsq(J @ J.T, -(1 + 1e-3) * outputs[wrong].detach()[:, None], driver="gelsd").solution
        image = image + (J.T @ step).reshape(image.shape)
    return image


def _outputs(layers: Sequence[Layer], x: Tensor, named: Sequence[str]) -> Tensor:
    """Pre-activations of the named layers, one after the other, of one image."""
    found = []
    for layer in layers:
        z = layer.apply(x.reshape(1, *layer.input_shape)) + layer.pre_bias()
        if layer.name in named:
            found.append(z.flatten())
        x = layer.activation.forward(z)
    return torch.cat(found)
