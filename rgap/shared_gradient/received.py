"""The gradient as the attack receives it: checked, in float64, with its precision and the noise of every entry."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from rgap.arguments import check_tensor
from rgap.isolation import for_autograd
from rgap.linalg import largest_entry
from rgap.network.layer import Chain
from rgap.results import GradientMismatchError
from rgap.shared_gradient.names import gradients_by_name
from rgap.shared_gradient.rounding import entry_noise, formats, quantum, relative_std

FLOAT64_FLOOR = 1e-13  # smallest relative error that a chain of layers passes on, from float64 arithmetic
MAX_TOLERANCE = 0.3  # largest gradient residual that rounding explains; a gradient rounded by more has underflowed
MAX_SQUARABLE = 1e100  # largest entry of a gradient, and one over the smallest, with which the equations are set up
ARITHMETIC_ROUNDINGS = 100.0  # roundings of float32 by which the arithmetic of deep networks may miss the gradient


@dataclass(frozen=True)
class SharedGradient:
    """The gradients as the attack uses them, and how precise they are."""

    gradients: dict[str, Tensor]  # parameter name -> gradient, float64
    precision: float  # relative error of their entries: the rounding of their format, or the noise if larger
    rcond: float  # relative cutoff of singular values
    # names of gradients of which nothing is known: not shared, as those of frozen parameters, or lost to rounding.
    # `gradients` has zeros there, which stand for no value
    absent: tuple[str, ...] = ()
    rounding: float = 0.0  # relative error of the head's δz from the client's own arithmetic, if larger
    notes: tuple[str, ...] = ()  # sentences on what limits the precision
    # parameter name -> standard deviation of the noise that the gradients declare for its entries
    noise_std: Mapping[str, float] = field(default_factory=dict)
    white_noise: float = 0.0  # standard deviation of further noise on every entry, as given
    has_zeros: bool = True  # whether gradients of this network may have single zeros of their own, as behind ReLU
    coarse: bool = False  # whether the client computed in the format that the values show, not only rounded to it
    # power of two by which the gradients were multiplied, where squares of their entries would not be numbers; that of
    # white_noise and noise_std, too
    unit: float = 1.0
    # standard normal numbers by parameter name, where the network keeps them
    draws: Callable[[], dict[str, Tensor]] | None = field(default=None, repr=False)
    # shares of the gradient for which a unit may have been positive, ascending; more of them of a mean over local steps
    positive_shares: tuple[float, ...] = (0.0, 1.0)
    # layer name -> how far its outputs may have moved meanwhile, (1, O, H′, W′)
    reach: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

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
    chain: Chain, gradients: Sequence[Tensor] | Mapping[str, Tensor], rcond: float | None = None,
    noise_std: float | None = None, *, any_scale: bool = False,
) -> SharedGradient:  # fmt: skip
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
    parameters: Mapping[str, Tensor], gradients: Sequence[Tensor] | Mapping[str, Tensor], rcond: float | None = None,
    noise_std: float | None = None, *, has_zeros: bool = True, model: nn.Module | None = None, any_scale: bool = False,
) -> SharedGradient:  # fmt: skip
    """The same for the named parameters of any network, whatever its last layer.

    Gradients of `any_scale` are brought to one in which squares of their entries neither overflow nor vanish, others
    where they overflow. By the `model` lists of the trained parameters alone, or of all parameters and buffers, are
    told apart.
    """
    found, keys = gradients_by_name(parameters, gradients, model)
    named = _checked(parameters, found)
    largest = {name: largest_entry(g) for name, g in named.items()}
    for name, size in largest.items():
        if not math.isfinite(size):
            raise GradientMismatchError(f"gradient of {name!r} holds NaN or infinity; nothing can be recovered from it")
    if not any(largest.values()):
        raise GradientMismatchError("every gradient is zero; nothing can be recovered from them")
    values = {name: for_autograd(g).to("cpu", torch.float64) for name, g in named.items()}
    shown = formats({name: g for name, g in named.items() if largest[name]})
    coarsest = max(map(quantum, shown.values()))
    errors = {name: relative_std(quantum(shown[name]) if name in shown else coarsest, g) for name, g in values.items()}
    given = getattr(gradients, "noise_std", {})  # of gradients that were computed from an update
    update = {name: given.get(keys.get(name), 0.0) for name in values} if given else {}
    for name, std in update.items():
        lost = std and not largest[name]
        errors[name] = max(errors[name], math.inf if lost else relative_std(std, values[name]))
    lost = [name for name, error in errors.items() if error > MAX_TOLERANCE and found[name] is not None]
    zeros = [name for name, g in values.items() if name not in shown and name not in lost and g.numel()]
    absent = tuple(name for name in values if name in lost or name in zeros)
    usable = [name for name in shown if name not in absent]
    precision = max((max(torch.finfo(shown[name]).eps, errors[name]) for name in usable), default=MAX_TOLERANCE)
    if noise_std:
        precision = max(precision, *(relative_std(noise_std, values[name]) for name in shown))
    if rcond is None:
        rcond = 1e-5 if precision < 1e-10 else min(1e-4 * (precision / 1.2e-7) ** 0.5, 0.1)
    notes = _notes(lost, zeros, precision, bool(update))
    if (unit := _unit([size for size in largest.values() if size], any_scale)) != 1:
        values = {name: unit * g for name, g in values.items()}
        update = {name: unit * std for name, std in update.items()}
        notes += (f"multiplied by {unit:.1e}, a power of two, since squares of the entries are no numbers",)
    white = unit * (noise_std or 0.0)
    return SharedGradient(values, precision, rcond, absent, 0.0, notes, update, white, has_zeros, unit=unit)


def _checked(parameters: Mapping[str, Tensor], found: Mapping[str, object]) -> dict[str, Tensor]:
    """The gradients as tensors of the parameters' shapes, zeros for those that were not shared."""
    named = {}
    for name, parameter in parameters.items():
        if found[name] is None:
            named[name] = torch.zeros_like(parameter)
            continue
        named[name] = g = check_tensor(f"gradient of {name!r}", found[name], GradientMismatchError)
        if not g.is_floating_point():
            raise GradientMismatchError(f"gradient of {name!r} is {g.dtype}; it must be a floating-point tensor")
        if g.shape != parameter.shape:
            have, need = tuple(g.shape), tuple(parameter.shape)
            raise GradientMismatchError(f"gradient of {name!r} has shape {have}; it must be {need}")
    return named


def _unit(sizes: Sequence[float], any_scale: bool) -> float:
    """1, or where squares overflow (with `any_scale` also: vanish) the power of two for a largest entry near 1."""
    if (1 / MAX_SQUARABLE if any_scale else 0.0) < max(sizes) < MAX_SQUARABLE:
        return 1.0
    unit = 2.0 ** max(min(-math.frexp(max(sizes))[1], 1000), -1000)
    return unit if unit * min(sizes) > sys.float_info.min else 1.0


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
