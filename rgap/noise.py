"""How large the errors of a shared gradient's entries are: formats, grids, pruning, declared noise (ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

FORMATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

ARITHMETIC = 0.6
"""Error of the client's own arithmetic, in roundings of a gradient's root mean square."""

SINGLE = torch.finfo(torch.float32).eps

LEVELS = 127
"""Steps of int8 on either side of zero."""

FIRST = 4096
"""Entries that are looked at first."""

GAP = 10.0
"""Smallest magnitude, in units of the one expected of so many entries, from which zeros are taken for pruned ones."""


def entry_noise(
    gradients: Mapping[str, Tensor], noise_std: float | None = None, known: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """Standard deviation of the error of every entry, as far as the values themselves betray it.

    A float format by the coarsest rounding that leaves every entry as it is; int8 by its grid; pruning by exact zeros
    among entries that are none: what is gone was smaller than what was left.

    Args:
        gradients: Parameter name -> gradient, float64.
        noise_std: Standard deviation of noise known to be on every entry.
        known: Parameter name -> the same for one gradient.

    Returns:
        Parameter name -> standard deviations, shaped as the gradient.
    """
    pruned = any(_is_pruned(g) for g in gradients.values())
    grid = any(_on_grid(g) for g in gradients.values())
    found = {}
    for name, g in gradients.items():
        std = _grid(g) if grid else _rounding(g)
        if pruned and (g == 0).any() and g.any():
            std = std + torch.where(g == 0, g[g != 0].abs().min() / 3**0.5, 0.0)
        beside = math.hypot(noise_std or 0.0, (known or {}).get(name, 0.0))
        found[name] = (std.square() + beside**2).sqrt() if beside else std
    return found


def _rounding(g: Tensor) -> Tensor:
    """Of the coarsest format that holds every entry, and of arithmetic in it."""
    if not g.any():
        return torch.zeros_like(g)
    info = next(torch.finfo(f) for f in FORMATS if fits(g, f))
    arithmetic = ARITHMETIC * min(info.eps, SINGLE) * rms(g)  # coarser formats are computed in float32, then rounded
    step = info.eps / 12**0.5
    return g.abs().mul_(0.7 * step).add_(step * info.smallest_normal + arithmetic)


def fits(g: Tensor, dtype: torch.dtype) -> bool:
    """Whether every entry is a number of that format; the first few decide mostly, at a fraction of the cost."""
    if g.dtype == dtype:
        return True
    first = g.flatten()[:FIRST]
    return torch.equal(first.to(dtype).to(g.dtype), first) and torch.equal(g.to(dtype).to(g.dtype), g)


def _grid(g: Tensor) -> Tensor:
    """Uniform rounding by a step of a 127th of the largest entry, which itself is exact."""
    return torch.where(g.abs() < g.abs().max(), g.abs().max() / LEVELS / 12**0.5, 0.0)


def _on_grid(g: Tensor) -> bool:
    """Whether the entries are integers times a 127th of the largest."""
    if g.numel() < 100 or not g.any():
        return False
    largest = g.abs().max()

    def whole(part: Tensor) -> bool:
        steps = part / largest * LEVELS
        return bool((steps - steps.round()).abs().max() < 1e-3)

    return whole(g.flatten()[:FIRST]) and whole(g)


def _is_pruned(g: Tensor) -> bool:
    """Whether there are exact zeros, and nothing between them and what they would lie among."""
    if torch.count_nonzero(g) == g.numel():
        return False
    left = g[g != 0].abs()
    return 0 < len(left) < g.numel() and bool(left.min() * len(left) > GAP * rms(left))


def rms(g: Tensor) -> Tensor:
    """Root mean square."""
    size = g.norm()
    if 1e-140 < size < 1e140:
        return size / g.numel() ** 0.5
    largest = g.abs().max()  # squares of the smallest gradients underflow
    return largest if largest == 0 else largest * (g / largest).square().mean().sqrt()
