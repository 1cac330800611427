"""Elementwise maps as the recursion needs them: z = σ⁻¹(x) wherever x, which is known up to errors, tells it.

ReLU tells z only where x > 0, a sigmoid only as far from 0 and 1 as x is accurate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 30.0
"""Values this many times as far inside a bound as the farthest lies beyond it are no errors."""

SEVERAL = 10
"""Values beyond a bound from which they tell the size of errors."""


@dataclass(frozen=True)
class Activation:
    """An elementwise map that is one-to-one between its bounds.

    Attributes:
        name: For reports.
        forward: z -> σ(z), any shape.
        inverse: x -> σ⁻¹(x), any shape; finite for every x, also at and beyond the bounds.
        derivative: z -> σ′(z), any shape.
        homogeneous: Whether σ(a z) = a σ(z) for every a > 0. Bias-free networks of such maps have twin data.
        negative_slope: a of a LeakyReLU (1 for the identity), a tensor where channels differ, None for other maps.
        bounds: Smallest and largest value of σ, at which it does not tell z.
        clips: Whether σ takes the bounds on whole half-lines, where σ′ = 0; otherwise it only comes near them.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    homogeneous: bool = False
    negative_slope: float | Tensor | None = None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    clips: bool = False

    @property
    def one_to_one(self) -> bool:
        """Whether σ is one-to-one on all of ℝ."""
        return not self.clips

    def invert(self, x: Tensor, accuracy: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Inverts σ where x tells z = σ⁻¹(x).

        A value beyond a bound can only be an error. Where there are several, the largest says how close to a bound a
        value must be to be taken for it: up to the widest gap that the values leave there.

        Args:
            x: What σ gave, up to errors.
            accuracy: Size of these errors, relative to the largest entry, for where few values are beyond a bound.

        Returns:
            z, finite everywhere, and a mask of the entries at which it is known, None where that is all. At the others
            σ′(z) is 0 if σ clips, else z is the nearest value that x could tell.
        """
        low, high = self.bounds
        if low == -math.inf and high == math.inf:
            return self.inverse(x), None
        margin = _margin(torch.minimum(x - low, high - x), accuracy * x.abs().max().item())
        known = (x > low + margin) & (x < high - margin)
        if known.all():
            return self.inverse(x), None
        if self.clips:  # some z on a flat part
            return x.where(known, low - 1.0 if low > -math.inf else high + 1.0), known
        return self.inverse(x.clamp(low + margin, high - margin)), known


def _margin(inside: Tensor, error: float) -> float:
    """How far inside the bounds a value must lie to be told apart from them.

    Args:
        inside: Distance of each value from the next bound, negative beyond it.
        error: Of the values, as far as it is known beforehand.
    """
    beyond = max(-inside.min().item(), 0.0)
    if (inside < 0).sum() < SEVERAL:
        return max(beyond, error)
    near = inside[(inside > beyond) & (inside < MARGIN * beyond)]
    edges = torch.cat([inside.new_tensor([beyond]), near.sort().values, inside.new_tensor([MARGIN * beyond])])
    gap = int((edges[1:] / edges[:-1]).argmax())
    return (edges[gap] * edges[gap + 1]).sqrt().item()


@dataclass(frozen=True)
class Composition(Activation):
    """Several maps, one after the other.

    Attributes:
        parts: In the order in which they are applied.
    """

    parts: tuple[Activation, ...] = ()

    @property
    def one_to_one(self) -> bool:
        """Whether every part is one-to-one on all of ℝ."""
        return all(part.one_to_one for part in self.parts)

    def invert(self, x: Tensor, accuracy: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Inverts part by part; z is known where every part tells it. See `Activation.invert`."""
        known = None
        for part in reversed(self.parts):
            x, told = part.invert(x, accuracy)
            known = told if known is None or told is None else known & told
        return x, known


IDENTITY = Activation("identity", lambda z: z, lambda x: x, torch.ones_like, homogeneous=True, negative_slope=1.0)


def compose(first: Activation, then: Activation) -> Activation:
    """One map after the other: z -> then(first(z))."""
    if first is IDENTITY or then is IDENTITY:
        return then if first is IDENTITY else first
    return Composition(
        f"{first.name}, {then.name}",
        lambda z: then.forward(first.forward(z)),
        lambda x: first.inverse(then.inverse(x)),
        lambda z: then.derivative(first.forward(z)) * first.derivative(z),
        homogeneous=first.homogeneous and then.homogeneous,
        parts=(first, then),
    )


def affine(scale: Tensor, shift: Tensor) -> Activation:
    """Entry by entry z -> scale·z + shift; the scale has no zero."""
    return Activation(
        "affine",
        lambda z: scale * z + shift,
        lambda x: (x - shift) / scale,
        lambda z: scale.expand_as(z),
        homogeneous=not shift.any(),
    )
