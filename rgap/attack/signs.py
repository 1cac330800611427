"""Signs next to zero: which piece of a LeakyReLU an uncertain pre-activation lies on, from the layer's own gradient.

A noisy x that is close to zero leaves the sign of z open, and δz = σ′(z) δx then differs by the slope, however small
the noise: one wrong sign spoils all the layers below. But ⟨G[o], W[o′]⟩ = ⟨δz[o], z[o′] − b[o′]⟩ holds for every pair
of channels, and z hardly depends on the sign of its smallest entries. So each channel o has O equations for the few
slopes that are open in it, before anything is solved. An image that was recovered with errors may, in turn, have such a
unit on the other piece: its gradient is then not the one that was shared, until it is moved by less than its error
(both ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.network.layer import Layer

REACH = 5.0
"""Entries further from zero than this many standard deviations have the sign they show."""

STEPS = 50
"""Most signs that are turned in one channel."""

ROUNDS = 6
"""Most linearised moves of an image; signs of units next to zero need one or two."""


@dataclass(frozen=True)
class Slopes:
    """σ′(z) with the signs that the equations prefer.

    Attributes:
        values: (O, H′, W′).
        doubt: Probability that an entry lies on the other piece all the same, (O, H′, W′).
        negative: The slope for z < 0.
    """

    values: Tensor
    doubt: Tensor
    negative: float

    @property
    def positive(self) -> Tensor:
        """Which entries lie on the upper piece, (O, H′, W′)."""
        return self.values != self.negative

    def draw(self, generator: torch.Generator) -> Tensor:
        """Slopes as they may be as well, given the doubt."""
        turned = torch.rand(self.doubt.shape, generator=generator, dtype=self.doubt.dtype) < self.doubt
        return torch.where(turned, 1 + self.negative - self.values, self.values)


def decide_activation_pattern(
    layer: Layer, G: Tensor, x: Tensor, dx: Tensor, spread: float, std: float
) -> Slopes | None:
    """Decides the signs of the entries of x that are closer to zero than its error.

    Args:
        layer: The layer.
        G: Gradient of the loss by its weight.
        x: Its output, (O, H′, W′), recovered with errors.
        dx: Gradient of the loss by x.
        spread: Standard deviation of the errors of x.
        std: Standard deviation of the noise on G's entries.

    Returns:
        The slopes, or None where the layer's activation has no two slopes or the identities do not apply.
    """
    slope = layer.activation.negative_slope
    plain = layer.groups == 1 and layer.after is None and layer.shift is None and not layer.is_fixed
    if not plain or not isinstance(slope, float) or slope == 1.0:
        return None
    unit = G.abs().max()
    if unit == 0:
        return None
    G, dx, std = G / unit, dx / unit, std / unit.item()  # squares of the smallest gradients underflow
    z = layer.activation.inverse(x)
    values = layer.activation.derivative(z)
    distance = (x.abs() / spread if spread > 0 else torch.full_like(x, torch.inf)).flatten()
    (open_,) = torch.nonzero(distance < REACH, as_tuple=True)
    doubt = torch.zeros_like(x).flatten()
    if len(open_):
        rest, inputs = _whitened(layer, G, z, values * dx, spread, std)
        prior = torch.special.log_ndtr(distance[open_]) - torch.special.log_ndtr(-distance[open_])
        turned, odds = _turn(rest, inputs, open_, values.flatten()[open_], slope, dx.flatten()[open_], prior)
        values = values.flatten().index_copy(0, open_, turned).reshape(x.shape)
        doubt[open_] = torch.sigmoid(-odds)
    return Slopes(values, doubt.reshape(x.shape), slope)


def _whitened(layer: Layer, G: Tensor, z: Tensor, dz: Tensor, spread: float, std: float) -> tuple[Tensor, Tensor]:
    """⟨G[o], W[o′]⟩ − ⟨δz[o], z[o′] − b[o′]⟩ and z[o′] − b[o′], with o′ turned so that the noise is white of size 1."""
    W, inputs, dz = layer.weight.flatten(1), (z - layer.pre_bias()).flatten(1), dz.flatten(1)
    S = std**2 * W @ W.T
    floor = spread**2 * dz.square().sum(1).mean() + 1e-12 * S.diagonal().mean() + torch.finfo(S.dtype).tiny
    S.diagonal().add_(floor)
    size = S.diagonal().mean().sqrt()
    lower = torch.linalg.cholesky(S / size / size) * size
    rest = G.flatten(1) @ W.T - dz @ inputs.T
    return (torch.linalg.solve_triangular(lower, v, upper=False) for v in (rest.T, inputs))


def _turn(
    rest: Tensor, inputs: Tensor, open_: Tensor, values: Tensor, slope: float, dx: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns signs, in every channel the one that gains most at a time, until none gains: (slopes, log odds of each)."""
    channels, pixels = open_ // inputs.shape[1], open_ % inputs.shape[1]
    seen = inputs[:, pixels]  # (O, k)
    size = seen.square().sum(0)
    rest, first = rest.clone(), values
    for _ in range(STEPS):
        step = (1 + slope - 2 * values) * dx
        odds = 0.5 * step**2 * size - step * (rest[:, channels] * seen).sum(0)
        odds = odds + torch.where(values == first, prior, -prior)
        least = rest.new_zeros(rest.shape[1]).scatter_reduce(0, channels, odds, "amin")
        (turn,) = torch.nonzero((odds < 0) & (odds == least[channels]), as_tuple=True)
        if not len(turn):
            break
        rest.index_add_(1, channels[turn], -step[turn] * seen[:, turn])
        values = values.index_copy(0, turn, 1 + slope - values[turn])
    return values, odds


def project_to_pattern(layers: Sequence[Layer], image: Tensor, positive: Mapping[str, Tensor], most: int) -> Tensor:
    """Moves an image as little as it takes for its units to lie on the pieces that were decided.

    Args:
        layers: From the first on.
        image: (1, C, H, W), recovered with errors.
        positive: Layer name -> which of its pre-activations are positive; layers that are not named are free.
        most: Disagreeing units beyond which they are no matter of single signs; each costs a backward pass.

    Returns:
        The image; as it was where too many units disagree.
    """
    layers, first = list(layers), image
    while layers and layers[-1].name not in positive:
        layers.pop()
    if not layers:
        return image
    signs = torch.cat([positive[layer.name].flatten() for layer in layers if layer.name in positive])
    for _ in range(ROUNDS):
        x = image.clone().requires_grad_()
        with torch.enable_grad():
            outputs = _outputs(layers, x, positive)
        wrong = torch.nonzero((outputs > 0) != signs).flatten()
        if not len(wrong):
            return image
        if len(wrong) > most:
            return first
        rows = [torch.autograd.grad(outputs[i], x, retain_graph=True)[0].flatten() for i in wrong]
        J = torch.stack(rows)
        step = torch.linalg.lstsq(J @ J.T, -(1 + 1e-3) * outputs[wrong].detach()[:, None], driver="gelsd").solution
        image = image + (J.T @ step).reshape(image.shape)
    return image


def _outputs(layers: Sequence[Layer], x: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
    """Pre-activations of the layers that are wanted, one after the other, of one image."""
    found = []
    for layer in layers:
        z = layer.apply(x.reshape(1, *layer.input_shape)) + layer.pre_bias()
        if layer.name in wanted:
            found.append(z.flatten())
        x = layer.activation.forward(z)
    return torch.cat(found)
