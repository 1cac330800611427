"""Errors on the way down: activation patterns that noise leaves in doubt, and what noise does to every layer (ours).

A noisy x close to zero leaves the sign of z open, and δz = σ′(z) δx then differs by the slope, however small the noise:
one wrong sign spoils all the layers below. But Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩ = ⟨G[o], W[o′]⟩ holds for every pair of
channels, and z hardly depends on the signs of its smallest entries. So each channel o has O equations for the few
slopes that are open in it, before anything is solved.

Errors are predicted by a probe: one draw of the noise, and beside the recovered x and δx what they would have been
under it. Each layer passes the probe on by the factors that it was solved with, so that errors of the layers above
come along with all their correlations. Where a sign stays in doubt the probe flips it as often as it is likely. A layer
has so many entries that one probe is enough for their root mean square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.equations import LayerSolution
from rgap.head import read_head
from rgap.head.hypothesis import Start
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.results import GradientMismatchError
from rgap.shared_gradient import SharedGradient

DOUBT_STDS = 5.0
"""Entries further from zero than this many standard deviations have the sign they show."""

MAX_FLIPS = 50
"""Most rounds in which signs are flipped, one in every channel at a time."""


@dataclass(frozen=True)
class NoiseProbe:
    """One draw of the noise, and what it does to a layer's output.

    Attributes:
        x: Change of the output, (B, …).
        dx: Change of the gradient by it, (B, …).
        noise: Parameter name -> change of its gradient.
        generator: Of the random numbers that are drawn on the way.
    """

    x: Tensor
    dx: Tensor
    noise: Mapping[str, Tensor]
    generator: torch.Generator

    @property
    def error(self) -> float:
        """Root mean square of the change of x."""
        largest = self.x.abs().max()
        return (largest * rms(self.x / largest)).item() if largest > 0 else 0.0


@dataclass(frozen=True)
class Slopes:
    """σ′(z) with the signs that the equations prefer.

    Attributes:
        values: (B, O, H′, W′).
        flip_probability: Probability that an entry lies on the other piece all the same, (B, O, H′, W′).
        negative: The slope for z < 0.
    """

    values: Tensor
    flip_probability: Tensor
    negative: float

    @property
    def positive(self) -> Tensor:
        """Which entries lie on the upper piece, (B, O, H′, W′)."""
        return self.values != self.negative

    def draw(self, generator: torch.Generator) -> Tensor:
        """One draw of the slopes, each flipped with its probability."""
        shape, dtype = self.flip_probability.shape, self.flip_probability.dtype
        flipped = torch.rand(shape, generator=generator, dtype=dtype) < self.flip_probability
        return torch.where(flipped, 1 + self.negative - self.values, self.values)


def start_probe(chain: Chain, received: SharedGradient, start: Start, loss: str, seed: int = 1) -> NoiseProbe:
    """Reads the head once more, with a draw of the noise on the gradients.

    Args:
        chain: The prepared network.
        received: The gradients.
        start: What the head of a single image gives without that draw.
        loss: A name in `rgap.client.LOSSES`.
        seed: Of what is drawn later: the rounding of the head's δz, and signs in doubt.
    """
    generator, head, label = torch.Generator().manual_seed(seed), chain.layers[-1], int(start.labels)
    noisy = replace(received, gradients={name: g + received.noise[name] for name, g in received.gradients.items()})
    try:
        found = [h for h in read_head(loss, head, noisy, label).hypotheses if h.label == label]
    except GradientMismatchError:  # under so much noise the label may look like another one
        found = []
    scale = 1 + start.rounding * torch.randn((), generator=generator, dtype=start.x.dtype)
    x, dx = start.x, start.dx
    if found:
        nearest = min(found, key=lambda h: (h.x - start.x).norm().item())
        x, dx = nearest.x[None], head.adjoint(nearest.dz[None, :, None, None]).flatten(1)
    return NoiseProbe(x / scale - start.x, dx * scale - start.dx, received.noise, generator)


def propagate(
    layer: Layer, probe: NoiseProbe, solution: LayerSolution, x: Tensor, dx: Tensor, z: Tensor, dz: Tensor,
    slopes: Slopes | None,
) -> NoiseProbe:  # fmt: skip
    """Takes a probe through one layer.

    Args:
        layer: The layer.
        probe: Its change of the layer's output.
        solution: What was recovered as the layer's input.
        x: The layer's output, (B, O, H′, W′).
        dx: Gradient of the loss by it.
        z: Pre-activation, as recovered from x.
        dz: Gradient of the loss by z.
        slopes: σ′(z) where signs were decided; None where σ has no kink.

    Returns:
        The probe of the layer's input.
    """
    changed, _ = layer.activation.invert(x + probe.x.reshape(x.shape))
    if slopes is not None:
        slope = slopes.draw(probe.generator)
    else:  # what lies on a flat part is known to
        slope = layer.activation.derivative(z if layer.activation.clips else changed)
    dz_change = slope * (dx + probe.dx.reshape(x.shape)) - dz
    rest = torch.zeros_like(layer.weight)
    if not layer.is_fixed:
        shares = [layer.weight_gradient(*one) for one in zip(solution.x, dz_change, strict=True)]
        rest = layer.gradient(probe.noise) - sum(shares)
    return NoiseProbe(solution.sensitivity(rest, changed - z), layer.adjoint(dz_change), probe.noise, probe.generator)


def decide_activation_pattern(
    layer: Layer, G: Tensor, x: Tensor, dx: Tensor, spread: float, std: float
) -> Slopes | None:
    """Decides the signs of the entries of x that are closer to zero than its error, by likelihood.

    Args:
        layer: The layer.
        G: Gradient of the loss by its weight.
        x: Its output, (B, O, H′, W′), recovered with errors.
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
    channels_first = [t.transpose(0, 1).flatten(1) for t in (x, values, dx, z - layer.pre_bias())]
    x, values, dx, inputs = channels_first  # (O, B·H′·W′) each
    distance = (x.abs() / spread if spread > 0 else torch.full_like(x, torch.inf)).flatten()
    (open_,) = torch.nonzero(distance < DOUBT_STDS, as_tuple=True)
    values, flip_probability = values.flatten(), torch.zeros_like(distance)
    if len(open_):
        rest, inputs = _whitened(layer, G, inputs, values.reshape(x.shape) * dx, spread, std)
        prior = torch.special.log_ndtr(distance[open_]) - torch.special.log_ndtr(-distance[open_])
        flipped, odds = _flip_signs(rest, inputs, open_, values[open_], slope, dx.flatten()[open_], prior)
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


def _flip_signs(
    rest: Tensor, inputs: Tensor, open_: Tensor, values: Tensor, slope: float, dx: Tensor, prior: Tensor
) -> tuple[Tensor, Tensor]:
    """Flips signs, in every channel the likeliest at a time, until no flip gains: (slopes, log odds against a flip)."""
    channels, pixels = open_ // inputs.shape[1], open_ % inputs.shape[1]
    columns = inputs[:, pixels]  # (O, k)
    size = columns.square().sum(0)
    rest, first = rest.clone(), values
    for _ in range(MAX_FLIPS):
        step = (1 + slope - 2 * values) * dx
        odds = 0.5 * step**2 * size - step * (rest[:, channels] * columns).sum(0)
        odds = odds + torch.where(values == first, prior, -prior)
        least = rest.new_zeros(rest.shape[1]).scatter_reduce(0, channels, odds, "amin")
        (flip,) = torch.nonzero((odds < 0) & (odds == least[channels]), as_tuple=True)
        if not len(flip):
            break
        rest.index_add_(1, channels[flip], -step[flip] * columns[:, flip])
        values = values.index_copy(0, flip, 1 + slope - values[flip])
    return values, odds
