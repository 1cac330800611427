"""How large the errors of a shared gradient's entries are: formats, grids, pruning, declared noise (ours)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FORMATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

ARITHMETIC = 0.6
"""Error of the client's own arithmetic, in roundings of a gradient's root mean square."""

SINGLE = torch.finfo(torch.float32).eps

LEVELS = 127
"""Steps of int8 on either side of zero."""

ON_GRID = 10
"""Entries between the ends of a grid that prove it: by chance one in 500 lies so close to it."""

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
    formats = {name: _format(g) for name, g in gradients.items()}
    finest = max((d for d in formats.values() if d is not None), key=FORMATS.index, default=torch.float64)
    found = {}
    for name, g in gradients.items():
        std = _grid(g) if grid else _rounding(g, formats[name] or finest)
        if pruned and (g == 0).any() and g.any():
            std = std + torch.where(g == 0, g[g != 0].abs().min() / 3**0.5, 0.0)
        found[name] = (std.square() + (noise_std or 0.0) ** 2 + (known or {}).get(name, 0.0) ** 2).sqrt()
    return found


def _format(g: Tensor) -> torch.dtype | None:
    """The coarsest format that holds every entry; None where all are 0 or powers of two, which every format holds.

    Such is the gradient of a confident softmax by its logits: ones, and zeros that have underflowed.
    """
    if ((torch.frexp(g).mantissa.abs() == 0.5) | (g == 0)).all():
        return None
    return next(f for f in FORMATS if torch.equal(g.to(f).to(g.dtype), g))


def _rounding(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a format, and of arithmetic in it."""
    if not g.any():
        return torch.zeros_like(g)
    info = torch.finfo(dtype)
    arithmetic = ARITHMETIC * min(info.eps, SINGLE) * _rms(g)  # coarser formats are computed in float32, then rounded
    return info.eps * (0.7 * g.abs() + info.smallest_normal) / 12**0.5 + arithmetic


def _grid(g: Tensor) -> Tensor:
    """Uniform rounding by a step of a 127th of the largest entry, which itself is exact."""
    return torch.where(g.abs() < g.abs().max(), g.abs().max() / LEVELS / 12**0.5, 0.0)


def _on_grid(g: Tensor) -> bool:
    """Whether the entries are integers times a 127th of the largest, enough of them neither 0 nor that one.

    A confident softmax has a gradient of ones and next to nothing else: it lies on any grid.
    """
    if not g.any():
        return False
    whole = g.flatten() / g.abs().max() * LEVELS
    level = whole.round().abs()
    between = int(((level > 0) & (level < LEVELS)).sum())
    return between >= ON_GRID and bool((whole - whole.round()).abs().max() < 1e-3)


def _is_pruned(g: Tensor) -> bool:
    """Whether there are exact zeros, and nothing between them and what they would lie among."""
    left = g[g != 0].abs()
    return 0 < len(left) < g.numel() and bool(left.min() * len(left) > GAP * _rms(left))


def _rms(g: Tensor) -> Tensor:
    largest = g.abs().max()  # squares of the smallest gradients underflow
    return largest * (g / largest).square().mean().sqrt()
