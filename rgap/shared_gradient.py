"""The gradient as the attack receives it: checked, in float64, with its precision and the noise of every entry.

The values show how they were rounded: every entry is a number of its float format, int8 leaves a grid, and pruning
leaves exact zeros among entries that are far from zero (ours).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from rgap.arguments import check_tensor
from rgap.gradient_names import gradients_by_name
from rgap.isolation import for_autograd
from rgap.linalg import largest_entry, norm, rms
from rgap.network.layer import Chain
from rgap.results import GradientMismatchError

FORMATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

FLOAT64_FLOOR = 1e-13
"""Smallest relative error that a chain of layers passes on, from float64 arithmetic."""

MAX_TOLERANCE = 0.3
"""Largest gradient residual that rounding explains; a gradient with a larger relative rounding has underflowed."""

UNDERFLOW_STD = 1e-30
"""Rounding next to zero below which zeros are true zeros, not underflow: all formats but float16."""

MAX_SQUARABLE = 1e100
"""Largest entry of a gradient, and one over the smallest, with which the equations are set up."""

ARITHMETIC_ERROR = 0.6
"""Error of the client's own arithmetic, in units of the rounding of a gradient's root mean square."""

ARITHMETIC_ROUNDINGS = 100.0
"""Roundings of float32 by which a gradient may miss that of the true image, by the arithmetic of deep networks."""

INT8_LEVELS = 127
"""Steps of int8 on either side of zero."""

MIN_GRID_ENTRIES = 10
"""Entries strictly inside a grid that prove it: by chance only one in 500 lies so close to a grid point."""

ENTRIES_AT_ONCE = 16_384
"""Entries of a gradient that are tested together."""

PRUNING_GAP = 10.0
"""Smallest remaining magnitude, relative to the one expected among so many entries, above which zeros are pruned."""


@dataclass(frozen=True)
class SharedGradient:
    """The gradients as the attack uses them, and how precise they are.

    Attributes:
        gradients: Parameter name -> gradient, float64.
        precision: Relative error of their entries: the rounding of their format, or the noise if larger.
        rcond: Relative cutoff of singular values.
        absent: Names of gradients of which nothing is known: not shared, as those of frozen parameters, or lost to
            rounding. `gradients` has zeros there, which stand for no value.
        rounding: Relative error of the head's δz from the client's own arithmetic, if larger.
        notes: Sentences on what limits the precision.
        noise_std: Parameter name -> standard deviation of the noise that the gradients declare for its entries.
        white_noise: Standard deviation of further noise on every entry, as given.
        has_zeros: Whether gradients of this network may have single zeros of their own, as behind ReLU.
        unit: Power of two by which the gradients were multiplied, where squares of their entries would not be numbers;
            that of white_noise and noise_std, too.
        coarse: Whether the client computed in the format that the values show, not only rounded to it.
        draws: Standard normal numbers by parameter name, where the network keeps them.
    """

    gradients: dict[str, Tensor]
    precision: float
    rcond: float
    absent: tuple[str, ...] = ()
    rounding: float = 0.0
    notes: tuple[str, ...] = ()
    noise_std: Mapping[str, float] = field(default_factory=dict)
    white_noise: float = 0.0
    has_zeros: bool = True
    coarse: bool = False
    unit: float = 1.0
    draws: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def tolerance(self) -> float:
        """Gradient residual up to which a candidate counts as consistent."""
        return min(max(1e-8, 1e4 * self.precision, 10 * self.rounding), MAX_TOLERANCE)

    @property
    def arithmetic(self) -> float:
        """Gradient residual that the client's and our own arithmetic explain, whatever coarser format was shared."""
        single = torch.finfo(torch.float32).eps
        return 1e-8 if self.precision < single else ARITHMETIC_ROUNDINGS * single

    @property
    def is_half(self) -> bool:
        """Whether the values are those of a format of 16 bits, and nothing else is known of their errors."""
        known = self.white_noise or any(self.noise_std.values())
        return not known and self.precision >= torch.finfo(torch.float16).eps

    @property
    def client_rounding(self) -> float:
        """Relative error of the head's δz in units of `rounding`, which supposes that the format was computed in."""
        return torch.finfo(torch.float32).eps / self.precision if self.is_half and not self.coarse else 1.0

    @property
    def usable(self) -> dict[str, Tensor]:
        """The gradients that are not absent, by parameter name."""
        return {name: g for name, g in self.gradients.items() if name not in self.absent}

    @cached_property
    def entry_std(self) -> dict[str, Tensor]:
        """Standard deviation of every entry's error, by parameter name; computed on first use."""
        stds = {name: math.hypot(self.white_noise, self.noise_std.get(name, 0.0)) for name in self.gradients}
        return entry_noise(self.gradients, stds, has_zeros=self.has_zeros, coarse=self.coarse)

    @cached_property
    def noise(self) -> dict[str, Tensor]:
        """One Gaussian draw of the errors, always the same."""
        draws = self.draws() if self.draws else standard_normal({name: g.shape for name, g in self.gradients.items()})
        return {name: draws[name].to(std.dtype).mul_(std) for name, std in self.entry_std.items()}

    def with_rounding(self, rounding: float) -> SharedGradient:
        """The same gradients with another `rounding`, which has no part in the errors of their entries."""
        other = replace(self, rounding=rounding)
        vars(other).update((name, vars(self)[name]) for name in ("entry_std", "noise") if name in vars(self))
        return other


def standard_normal(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Standard normal numbers by name, always the same; in float32, which takes a fifth of the time."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}


def receive(
    chain: Chain,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    rcond: float | None = None,
    noise_std: float | None = None,
    *,
    any_scale: bool = False,
) -> SharedGradient:
    """Checks the gradients against the network and finds which are there, and how precise they are.

    What a client does not share (the gradient of a frozen parameter) may be None in a list, absent from a mapping or
    from a list of all others, or zeros: none of them says anything. `rcond` is the relative cutoff of singular values,
    None to match it to the precision, `noise_std` the standard deviation of noise known to be on every entry. Raises a
    GradientMismatchError if the gradients' number, names, shapes or dtypes do not fit the parameters, they are not
    finite, or all zero.
    """
    has_zeros = not all(layer.activation.one_to_one for layer in chain.layers)
    received = receive_gradients(
        chain.parameters, gradients, rcond, noise_std, has_zeros=has_zeros, model=chain.model, any_scale=any_scale
    )
    head = chain.layers[-1]
    if not head.gradient(received.gradients).any():
        raise GradientMismatchError(
            f"the last layer's gradient {head.weight_name!r} is zero or not shared; nothing can be recovered"
        )
    shapes = {name: p.shape for name, p in chain.parameters.items()}
    return replace(received, draws=lambda: head.cached("draws", lambda: standard_normal(shapes)))


def receive_gradients(
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    rcond: float | None = None,
    noise_std: float | None = None,
    *,
    has_zeros: bool = True,
    model: nn.Module | None = None,
    any_scale: bool = False,
) -> SharedGradient:
    """The same for the named parameters of any network, whatever its last layer.

    Gradients of `any_scale` are brought to one in which squares of their entries neither overflow nor vanish, others
    where they overflow. By the `model` lists of the trained parameters alone, or of all parameters and buffers, are
    told apart.
    """
    found, keys = gradients_by_name(parameters, gradients, model)
    unshared = [name for name, g in found.items() if g is None]
    named = {
        name: torch.zeros_like(parameters[name])
        if g is None
        else check_tensor(f"gradient of {name!r}", g, GradientMismatchError)
        for name, g in found.items()
    }
    largest = {}
    for (name, g), parameter in zip(named.items(), parameters.values(), strict=True):
        if not g.is_floating_point():
            raise GradientMismatchError(f"gradient of {name!r} is {g.dtype}; it must be a floating-point tensor")
        if g.shape != parameter.shape:
            have, need = tuple(g.shape), tuple(parameter.shape)
            raise GradientMismatchError(f"gradient of {name!r} has shape {have}; it must be {need}")
        largest[name] = largest_entry(g)
        if not math.isfinite(largest[name]):
            raise GradientMismatchError(f"gradient of {name!r} holds NaN or infinity; nothing can be recovered from it")
    if not any(largest.values()):
        raise GradientMismatchError("every gradient is zero; nothing can be recovered from them")
    values = {name: for_autograd(g).to("cpu", torch.float64) for name, g in named.items()}
    formats = _formats({name: g for name, g in named.items() if largest[name]})
    coarsest = max(_quantum(dtype) for dtype in formats.values())
    errors = {
        name: _relative_std(_quantum(formats[name]) if name in formats else coarsest, g) for name, g in values.items()
    }
    given = getattr(gradients, "noise_std", {})  # of gradients that were computed from an update
    update = {name: given.get(keys.get(name), 0.0) for name in values} if given else {}
    for name, std in update.items():
        lost = std and not largest[name]
        errors[name] = max(errors[name], math.inf if lost else _relative_std(std, values[name]))
    lost = [name for name, error in errors.items() if error > MAX_TOLERANCE and name not in unshared]
    zeros = [name for name, g in values.items() if name not in formats and name not in lost and g.numel()]
    absent = tuple(name for name in values if name in lost or name in zeros)
    usable = [name for name in formats if name not in absent]
    precision = max((max(torch.finfo(formats[name]).eps, errors[name]) for name in usable), default=MAX_TOLERANCE)
    if noise_std:
        precision = max(precision, *(_relative_std(noise_std, values[name]) for name in formats))
    default = 1e-5 if precision < 1e-10 else min(1e-4 * (precision / 1.2e-7) ** 0.5, 0.1)
    notes = _notes(lost, zeros, precision, bool(update))
    cutoff = default if rcond is None else rcond
    if (unit := _unit([size for size in largest.values() if size], any_scale)) != 1:
        values = {name: unit * g for name, g in values.items()}
        update = {name: unit * std for name, std in update.items()}
        notes += (f"multiplied by {unit:.1e}, a power of two, since squares of the entries are no numbers",)
    white = unit * (noise_std or 0.0)
    return SharedGradient(values, precision, cutoff, absent, 0.0, notes, update, white, has_zeros, unit=unit)


def _unit(sizes: Sequence[float], any_scale: bool) -> float:
    """1, or where squares overflow (with `any_scale` also: vanish) the power of two for a largest entry near 1."""
    if (1 / MAX_SQUARABLE if any_scale else 0.0) < max(sizes) < MAX_SQUARABLE:
        return 1.0
    unit = 2.0 ** max(min(-math.frexp(max(sizes))[1], 1000), -1000)
    return unit if unit * min(sizes) > sys.float_info.min else 1.0


def entry_noise(
    gradients: Mapping[str, Tensor],
    noise_std: Mapping[str, float] | None = None,
    *,
    has_zeros: bool = True,
    coarse: bool = False,
) -> dict[str, Tensor]:
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


def _notes(lost: list[str], zeros: list[str], precision: float, update: bool) -> tuple[str, ...]:
    notes = []
    if lost:
        cause = "the rounding of the weights" if update else "underflow"
        notes = [f"lost to {cause} and not used: the gradient of {', '.join(map(repr, lost))}"]
    if zeros:
        notes.append(f"not shared, or zero, and not used: the gradient of {', '.join(map(repr, zeros))}")
    if update:
        notes.append(f"the gradient comes from an update of rounded weights; its relative precision is {precision:.1g}")
    return tuple(notes)


def _formats(named: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The coarsest format that holds every entry, float64 where none does: a cast to float64 adds no precision.

    One format for all where there is one: by itself, a gradient of few digits from float16 fits other formats as well.
    """
    fitting = {name: [d for d in FORMATS[:-1] if _fits(g, d)] for name, g in named.items()}
    common = [d for d in FORMATS[:-1] if all(d in each for each in fitting.values())]
    return {name: (common or fitting[name] or [g.dtype])[0] for name, g in named.items()}


def _quantum(dtype: torch.dtype) -> float:
    """Standard deviation of an entry's rounding next to zero, by the format's smallest number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 12**0.5


def _relative_std(std: float, g: Tensor) -> float:
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
    return next(f for f in FORMATS if _fits(g, f))


def _fits(g: Tensor, dtype: torch.dtype) -> bool:
    """Whether every entry is a number of that format."""
    return g.dtype == dtype or _everywhere(lambda part: torch.equal(part.to(dtype).to(part.dtype), part), g)


def _everywhere(holds: Callable[[Tensor], bool], g: Tensor) -> bool:
    """Whether something holds of all entries; parts stay in the cache, and the first mostly decides."""
    return all(holds(part) for part in g.flatten().split(ENTRIES_AT_ONCE))


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
