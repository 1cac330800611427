"""How precise a gradient's values are, by the values themselves (ours).

Every entry is a number of its float format, int8 leaves a grid, and pruning leaves exact zeros among entries that are
far from zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rgap.linalg import largest_entry, norm, rms

FORMATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

UNDERFLOW_STD = 1e-30  # rounding next to zero below which zeros are true zeros, not underflow: all formats but float16
ARITHMETIC_ERROR = 0.6  # error of the client's own arithmetic, over the rounding of a gradient's root mean square
INT8_LEVELS = 127  # steps of int8 on either side of zero
MIN_GRID_ENTRIES = 10  # entries strictly inside a grid that prove it: by chance one in 500 lies as close to a point
ENTRIES_AT_ONCE, FIRST_ENTRIES = 16_384, 64  # entries of a gradient that are tested together, and those tested first
PRUNING_GAP = 10.0  # smallest magnitude left, over the one expected of so many entries, above which zeros are pruned


def entry_noise(
    gradients: Mapping[str, Tensor], noise_std: Mapping[str, float] | None = None, *,
    has_zeros: bool = True, coarse: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Standard deviation of the error of every entry, as far as the values themselves show it, by parameter name.

    The coarsest rounding that leaves every entry unchanged is the float format; int8 shows by its grid, and pruning by
    exact zeros among larger entries: what was removed was smaller than what was left. `noise_std` is known noise on
    top. Without `has_zeros` (single zeros of the network's own, as behind ReLU), one zero proves pruning.
    A client that computes in a `coarse` format makes larger errors than one that rounds its result.
    """
    grid = any(_on_grid(g) for g in gradients.values())
    shows_pruning = _has_single_zeros if not (has_zeros or grid) else _has_pruning_gap
    pruned = any(shows_pruning(g) for g in gradients.values())
    formats = {name: _format(g) for name, g in gradients.items()}
    finest = max((d for d in formats.values() if d is not None), key=FORMATS.index, default=torch.float64)
    found = {}
    for name, g in gradients.items():
        std = _grid_error(g) if grid else _rounding_error(g, formats[name] or finest, coarse)
        if pruned and (g == 0).any() and g.any():
            std = std + torch.where(g == 0, g[g != 0].abs().min() / 3**0.5, 0.0)
        further = (noise_std or {}).get(name, 0.0)
        found[name] = (std.square() + further**2).sqrt() if further else std
    return found


def formats(named: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The coarsest format that holds every entry, float64 where none does: a cast to float64 adds no precision.

    One format for all where there is one: by itself, a gradient of few digits from float16 fits other formats as well.
    """
    fitting = {name: _fitting(g) for name, g in named.items()}
    common = [d for d in FORMATS[:-1] if all(d in each for each in fitting.values())]
    return {name: (common or fitting[name] or [g.dtype])[0] for name, g in named.items()}


def quantum(dtype: torch.dtype) -> float:
    """Standard deviation of an entry's rounding next to zero, by the format's smallest number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 12**0.5


def relative_std(std: float, g: Tensor) -> float:
    """Noise of that standard deviation on every entry, relative to the gradient's norm."""
    size = norm(g)
    if size == 0.0:
        return math.inf if std > UNDERFLOW_STD else 0.0
    return std * g.numel() ** 0.5 / size


def _format(g: Tensor) -> torch.dtype | None:
    """The coarsest format that holds every entry; None where all are 0 or powers of two, which every format holds.

    Such is the gradient of a confident softmax by its logits: ones, and zeros that have underflowed.
    """
    if _everywhere(lambda part: bool(((torch.frexp(part).mantissa.abs() == 0.5) | (part == 0)).all()), g):
        return None
    return (_fitting(g) or FORMATS[-1:])[0]


def _fitting(g: Tensor) -> list[torch.dtype]:
    """The formats coarser than float64 that hold every entry; float32 holds what the others do."""
    *coarser, single, _ = FORMATS
    return [*(d for d in coarser if _fits(g, d)), single] if _fits(g, single) else []


def _fits(g: Tensor, dtype: torch.dtype) -> bool:
    """Whether every entry is a number of that format."""
    return g.dtype == dtype or _everywhere(lambda part: torch.equal(part.to(dtype).to(part.dtype), part), g)


def _everywhere(holds: Callable[[Tensor], bool], g: Tensor) -> bool:
    """Whether something holds of all entries; the first few mostly decide, and parts stay in the cache."""
    first, rest = g.flatten().tensor_split([FIRST_ENTRIES])
    return not len(first) or (holds(first) and (not len(rest) or all(map(holds, rest.split(ENTRIES_AT_ONCE)))))


def _rounding_error(g: Tensor, dtype: torch.dtype, coarse: bool) -> Tensor:
    """Error of a format's rounding and of the arithmetic, which is that of float32 unless it is as coarse."""
    info, size = torch.finfo(dtype), norm(g) / max(g.numel(), 1) ** 0.5
    if size == 0:
        return torch.zeros_like(g)
    arithmetic = ARITHMETIC_ERROR * (info.eps if coarse else min(info.eps, torch.finfo(torch.float32).eps)) * size
    step = info.eps / 12**0.5
    return g.abs().mul_(0.7 * step).add_(step * info.smallest_normal + arithmetic)


def _grid_error(g: Tensor) -> Tensor:
    """Error of uniform rounding in steps of a 127th of the largest entry, which itself is exact."""
    largest = largest_entry(g)
    return (g.abs() < largest).to(g.dtype) * (largest / INT8_LEVELS / 12**0.5)


def _on_grid(g: Tensor) -> bool:
    """Whether the entries are integers times a 127th of the largest, enough of them neither 0 nor that one.

    A confident softmax has a gradient of ones and next to nothing else: it lies on any grid.
    """
    largest = largest_entry(g)
    if largest == 0:
        return False

    def whole(part: Tensor) -> bool:
        steps = part / largest * INT8_LEVELS
        return bool((steps - steps.round()).abs().max() < 1e-3)

    if not _everywhere(whole, g):
        return False
    level = (g / largest * INT8_LEVELS).round().abs()
    return int(((level > 0) & (level < INT8_LEVELS)).sum()) >= MIN_GRID_ENTRIES


def _has_no_zeros(g: Tensor) -> bool:
    return _everywhere(lambda part: int(torch.count_nonzero(part)) == part.numel(), g)


def _has_pruning_gap(g: Tensor) -> bool:
    """Whether there are exact zeros and, above them, a gap in the magnitudes that so many entries would have filled."""
    if _has_no_zeros(g):
        return False
    left = g[g != 0].abs()
    return len(left) > 0 and bool(left.min() * len(left) > PRUNING_GAP * rms(left))


def _has_single_zeros(g: Tensor) -> bool:
    """Whether a weight's gradient has zeros beside those of a silent output (a row) or a black input (a column)."""
    if g.ndim < 2 or _has_no_zeros(g):
        return False
    zero = g.flatten(1) == 0
    return bool((zero & ~zero.all(0) & ~zero.all(1, keepdim=True)).any())
