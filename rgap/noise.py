"""How large the errors of a shared gradient's entries are: formats, grids, pruning, declared noise (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rgap.linalg import rms

FORMATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

ARITHMETIC = 0.6
"""Error of the client's own arithmetic, in roundings of a gradient's root mean square."""

SINGLE = torch.finfo(torch.float32).eps

LEVELS = 127
"""Steps of int8 on either side of zero."""

ON_GRID = 10
"""Entries between the ends of a grid that prove it: by chance one in 500 lies so close to it."""

FIRST = 4096
"""Entries that are looked at first."""

GAP = 10.0
"""Smallest magnitude, in units of the one expected of so many entries, from which zeros are taken for pruned ones."""


def entry_noise(
    gradients: Mapping[str, Tensor],
    noise_std: float | None = None,
    known: Mapping[str, float] | None = None,
    *,
    has_zeros: bool = True,
) -> dict[str, Tensor]:
    """Standard deviation of the error of every entry, as far as the values themselves betray it.

    A float format by the coarsest rounding that leaves every entry as it is; int8 by its grid; pruning by exact zeros
    among entries that are none: what is gone was smaller than what was left.

    Args:
        gradients: Parameter name -> gradient, float64.
        noise_std: Standard deviation of noise known to be on every entry.
        known: Parameter name -> the same for one gradient.
        has_zeros: Whether the network's gradients may have single zeros of their own, as behind ReLU. Where they may
            not, one zero proves that the gradient was pruned, however little is gone.

    Returns:
        Parameter name -> standard deviations, shaped as the gradient.
    """
    grid = any(_on_grid(g) for g in gradients.values())
    proof = _has_single_zeros if not (has_zeros or grid) else _is_pruned
    pruned = any(proof(g) for g in gradients.values())
    formats = {name: _format(g) for name, g in gradients.items()}
    finest = max((d for d in formats.values() if d is not None), key=FORMATS.index, default=torch.float64)
    found = {}
    for name, g in gradients.items():
        std = _grid(g) if grid else _rounding(g, formats[name] or finest)
        if pruned and (g == 0).any() and g.any():
            std = std + torch.where(g == 0, g[g != 0].abs().min() / 3**0.5, 0.0)
        beside = math.hypot(noise_std or 0.0, (known or {}).get(name, 0.0))
        found[name] = (std.square() + beside**2).sqrt() if beside else std
    return found


def _format(g: Tensor) -> torch.dtype | None:
    """The coarsest format that holds every entry; None where all are 0 or powers of two, which every format holds.

    Such is the gradient of a confident softmax by its logits: ones, and zeros that have underflowed.
    """
    if _everywhere(lambda part: bool(((torch.frexp(part).mantissa.abs() == 0.5) | (part == 0)).all()), g):
        return None
    return next(f for f in FORMATS if fits(g, f))


def _rounding(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a format, and of arithmetic in it."""
    if not g.any():
        return torch.zeros_like(g)
    info = torch.finfo(dtype)
    arithmetic = ARITHMETIC * min(info.eps, SINGLE) * rms(g)  # coarser formats are computed in float32, then rounded
    step = info.eps / 12**0.5
    return g.abs().mul_(0.7 * step).add_(step * info.smallest_normal + arithmetic)


def fits(g: Tensor, dtype: torch.dtype) -> bool:
    """Whether every entry is a number of that format."""
    return g.dtype == dtype or _everywhere(lambda part: torch.equal(part.to(dtype).to(part.dtype), part), g)


def _everywhere(holds: Callable[[Tensor], bool], g: Tensor) -> bool:
    """Whether something holds of all entries; the first few decide mostly, at a fraction of the cost."""
    return holds(g.flatten()[:FIRST]) and holds(g)


def _grid(g: Tensor) -> Tensor:
    """Uniform rounding by a step of a 127th of the largest entry, which itself is exact."""
    return torch.where(g.abs() < g.abs().max(), g.abs().max() / LEVELS / 12**0.5, 0.0)


def _on_grid(g: Tensor) -> bool:
    """Whether the entries are integers times a 127th of the largest, enough of them neither 0 nor that one.

    A confident softmax has a gradient of ones and next to nothing else: it lies on any grid.
    """
    if not g.any():
        return False
    largest = g.abs().max()

    def whole(part: Tensor) -> bool:
        steps = part / largest * LEVELS
        return bool((steps - steps.round()).abs().max() < 1e-3)

    if not _everywhere(whole, g):
        return False
    level = (g / largest * LEVELS).round().abs()
    return int(((level > 0) & (level < LEVELS)).sum()) >= ON_GRID


def _is_pruned(g: Tensor) -> bool:
    """Whether there are exact zeros, and nothing between them and what they would lie among."""
    if torch.count_nonzero(g) == g.numel():
        return False
    left = g[g != 0].abs()
    return 0 < len(left) < g.numel() and bool(left.min() * len(left) > GAP * rms(left))


def _has_single_zeros(g: Tensor) -> bool:
    """Whether a weight's gradient has zeros beside those of a silent output (a row) or a black input (a column)."""
    if g.ndim < 2 or torch.count_nonzero(g) == g.numel():
        return False
    zero = g.flatten(1) == 0
    return bool((zero & ~zero.all(0) & ~zero.all(1, keepdim=True)).any())
