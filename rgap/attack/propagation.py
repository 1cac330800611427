"""Predicted errors: what the gradient's noise does to every layer's input, carried down beside the recovery (ours).

A probe is one draw of the noise. Beside the recovered x and δx it holds how these would have come out under that draw,
and each layer passes it on by the factors that it has been solved with, so that errors of the layers above ride along
with all their correlations. Where a sign next to zero is in doubt the probe turns it as often as it is likely. A layer
has so many entries that one probe is enough for their root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.attack.signs import Slopes
from rgap.equations import LayerSolution
from rgap.head.hypothesis import Hypothesis
from rgap.network.layer import Layer


@dataclass(frozen=True)
class NoiseProbe:
    """One draw of the noise, and what it makes of a layer's output.

    Attributes:
        x: Change of the output, x_{i+1}.
        dx: Change of the gradient by it.
        noise: Parameter name -> change of its gradient.
        generator: Of random numbers.
    """

    x: Tensor
    dx: Tensor
    noise: Mapping[str, Tensor]
    generator: torch.Generator

    @property
    def error(self) -> float:
        """Root mean square of the change of x."""
        largest = self.x.abs().max()
        return (largest * (self.x / largest).square().mean().sqrt()).item() if largest > 0 else 0.0


def draw_noise(stds: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Gaussian noise of the given standard deviations; drawn in float32, which costs a fifth."""
    generator = torch.Generator().manual_seed(seed)
    return {name: std * torch.randn(std.shape, generator=generator) for name, std in stds.items()}


def start_probe(
    head: Layer,
    gradients: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    start: Hypothesis,
    read: Callable[[Mapping[str, Tensor]], Sequence[Hypothesis]],
    seed: int = 1,
) -> NoiseProbe:
    """Reads the head once more with a draw of the noise on the gradients.

    Args:
        head: The last layer.
        gradients: Parameter name -> gradient.
        noise: Parameter name -> a draw of its gradient's errors, as by `draw_noise`; one serves all hypotheses.
        start: What the head says without that noise.
        read: The hypotheses that gradients allow; the one closest to `start` counts.
        seed: Of what is drawn later: the rounding of the head's δz, and signs in doubt.
    """
    generator = torch.Generator().manual_seed(seed)
    found = [h for h in read({name: g + noise[name] for name, g in gradients.items()}) if h.label == start.label]
    other = min(found, key=lambda h: (h.x - start.x).norm().item(), default=start)
    scale = 1 + start.rounding * torch.randn((), generator=generator, dtype=start.x.dtype)
    dz_change = other.dz * scale - start.dz
    return NoiseProbe(other.x / scale - start.x, head.adjoint(dz_change[:, None, None]), noise, generator)


def propagate(
    layer: Layer, probe: NoiseProbe, solution: LayerSolution, x: Tensor, dx: Tensor, z: Tensor, dz: Tensor,
    slopes: Slopes | None,
) -> NoiseProbe:  # fmt: skip
    """Takes a probe through one layer.

    Args:
        layer: The layer.
        probe: Its change of the layer's output.
        solution: What was recovered as the layer's input.
        x: The layer's output, (O, H′, W′).
        dx: Gradient of the loss by it.
        z: Pre-activation, as recovered from x.
        dz: Gradient of the loss by z.
        slopes: σ′(z) where signs were decided; None where σ has no kink, or noise would cross it unnoticed.

    Returns:
        The probe of the layer's input.
    """
    shape = layer.output_shape
    changed, _ = layer.activation.invert(x + probe.x.reshape(shape))
    if slopes is not None:
        slope = slopes.draw(probe.generator)
    else:  # what lies on a flat part is known to
        slope = layer.activation.derivative(z if layer.activation.clips else changed)
    dz_change = slope * (dx + probe.dx.reshape(shape)) - dz
    rest = torch.zeros_like(layer.weight)
    if not layer.is_fixed:
        rest = layer.gradient(probe.noise) - layer.weight_gradient(solution.x[0], dz_change)
    x_change = solution.sensitivity(rest, (changed - z)[None])[0]
    return NoiseProbe(x_change, layer.adjoint(dz_change), probe.noise, probe.generator)
