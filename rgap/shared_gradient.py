"""The shared gradients as the attack uses them: checked, in float64, with their precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgap.network.layer import Chain
from rgap.noise import fits
from rgap.results import GradientMismatchError

LOST = 0.3
"""Relative rounding from which a gradient in a format that underflows early says nothing."""

NEGLIGIBLE = 1e-30
"""Rounding next to zero that is no underflow: in formats other than float16 a gradient of zeros is one of zeros."""


@dataclass(frozen=True)
class SharedGradient:
    """The gradients as the attack uses them, and how far they can be trusted.

    Attributes:
        gradients: Parameter name -> gradient, float64.
        precision: Relative error of their entries: the rounding of their format, or the noise where that is larger.
        rcond: Relative cutoff of singular values.
        underflowed: Names of gradients that underflowed: what they would have said is unknown, not zero.
        rounding: Relative error of the head's δz by the client's own arithmetic, where that is larger.
        notes: Sentences on what limits them.
        known: Parameter name -> standard deviation of an entry's error, where the gradients came with one.
    """

    gradients: dict[str, Tensor]
    precision: float
    rcond: float
    underflowed: tuple[str, ...] = ()
    rounding: float = 0.0
    notes: tuple[str, ...] = ()
    known: Mapping[str, float] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        """Gradient residual up to which a candidate counts as consistent."""
        return min(max(1e-8, 1e4 * self.precision, 10 * self.rounding), 0.3)


def receive(
    chain: Chain,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    rcond: float | None = None,
    noise_std: float | None = None,
) -> SharedGradient:
    """Checks the gradients against the network and finds how precise they are.

    Args:
        chain: The prepared network.
        gradients: One tensor for each parameter, in their order, or a mapping from name.
        rcond: Relative cutoff of singular values; None matches it to the precision.
        noise_std: Standard deviation of noise known to be on every entry.

    Returns:
        The `SharedGradient`.

    Raises:
        GradientMismatchError: If their number, names, shapes or dtypes do not fit, they are not finite, or all zero.
    """
    received = receive_gradients(chain.parameters, gradients, rcond, noise_std)
    head = chain.layers[-1]
    if not received.gradients[head.weight_name].any():
        raise GradientMismatchError(f"the last layer's gradient {head.weight_name!r} is zero; nothing can be recovered")
    return received


def receive_gradients(
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    rcond: float | None = None,
    noise_std: float | None = None,
) -> SharedGradient:
    """The same for the named parameters of any network, whatever its last layer."""
    named = _by_name(list(parameters), gradients)
    for (name, g), parameter in zip(named.items(), parameters.values(), strict=True):
        if not isinstance(g, Tensor) or not g.is_floating_point():
            kind = g.dtype if isinstance(g, Tensor) else type(g).__name__
            raise GradientMismatchError(f"gradient of {name!r} is {kind}; it must be a floating-point tensor")
        if g.shape != parameter.shape:
            have, need = tuple(g.shape), tuple(parameter.shape)
            raise GradientMismatchError(f"gradient of {name!r} has shape {have}; it must be {need}")
        if not all(torch.isfinite(end) for end in torch.aminmax(g)):  # a NaN is both
            raise GradientMismatchError(f"gradient of {name!r} holds NaN or infinity; nothing can be recovered from it")
    if not any(g.any() for g in named.values()):
        raise GradientMismatchError("every gradient is zero; nothing can be recovered from them")
    values = {name: g.detach().to("cpu", torch.float64) for name, g in named.items()}
    formats = _formats({name: g for name, g in named.items() if g.any()})
    quantum = max(_quantum(dtype) for dtype in formats.values())
    steps = {
        name: _relative_std(quantum if name not in formats else _quantum(formats[name]), g)
        for name, g in values.items()
    }
    given = getattr(gradients, "noise_std", {})  # of gradients that were read off an update
    known = {name: given.get(name, given.get(place, 0.0)) for place, name in enumerate(values)} if given else {}
    for name, std in known.items():
        steps[name] = max(steps[name], math.inf if std and not values[name].any() else _relative_std(std, values[name]))
    lost = tuple(name for name, step in steps.items() if step > LOST)
    has_gradient = [name for name in formats if name not in lost]
    precision = max(
        [torch.finfo(formats[name]).eps for name in has_gradient] + [steps[name] for name in has_gradient], default=LOST
    )
    if noise_std:
        precision = max(precision, *(_relative_std(noise_std, values[name]) for name in formats))
    default = 1e-5 if precision < 1e-10 else min(1e-4 * (precision / 1.2e-7) ** 0.5, 0.1)
    notes = _notes(lost, precision, bool(known))
    return SharedGradient(values, precision, default if rcond is None else rcond, lost, notes=notes, known=known)


def _notes(lost: tuple[str, ...], precision: float, update: bool) -> tuple[str, ...]:
    notes = []
    if lost:
        cause = "the rounding of the weights" if update else "underflow"
        notes = [f"lost to {cause}, and not used: the gradient of {', '.join(map(repr, lost))}"]
    if update:
        notes.append(
            f"the gradient was read off an update of rounded weights; its entries are known to {precision:.1g}"
        )
    return tuple(notes)


def _by_name(names: list[str], gradients) -> dict[str, Tensor]:
    if not isinstance(gradients, Iterable):
        raise GradientMismatchError(f"gradients are a {type(gradients).__name__}; give a list or a mapping of tensors")
    if isinstance(gradients, Mapping) and not all(isinstance(key, int) for key in gradients):
        missing, extra = [n for n in names if n not in gradients], [n for n in gradients if n not in names]
        if missing or extra:
            raise GradientMismatchError(f"gradients do not fit the parameters: missing {missing}, unknown {extra}")
        return {name: gradients[name] for name in names}
    tensors = list(gradients.values()) if isinstance(gradients, Mapping) else list(gradients)
    if len(tensors) != len(names):
        raise GradientMismatchError(
            f"{len(tensors)} gradients for {len(names)} parameters; give one for each, in the "
            "order of model.parameters()"
        )
    return dict(zip(names, tensors, strict=True))


def _formats(named: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The coarsest format that holds every entry: a cast to float64 adds no precision.

    One for all where there is one: alone, a gradient of few digits that float16 left fits others as well.
    """
    formats = (torch.bfloat16, torch.float16, torch.float32)
    fitting = {name: [d for d in formats if fits(g, d)] for name, g in named.items()}
    common = [d for d in formats if all(d in each for each in fitting.values())]
    return {name: (common or fitting[name] or [g.dtype])[0] for name, g in named.items()}


def _quantum(dtype: torch.dtype) -> float:
    """Standard deviation of an entry's rounding next to zero, by the format's smallest number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 12**0.5


def _relative_std(std: float, g: Tensor) -> float:
    """Noise of that standard deviation on every entry, relative to the gradient's norm."""
    size = g.abs().max().item()
    if size == 0.0:
        return math.inf if std > NEGLIGIBLE else 0.0
    norm = g.norm().item()
    norm = norm if 1e-140 < norm < 1e140 else size * (g / size).norm().item()  # the squares of the smallest underflow
    return std * g.numel() ** 0.5 / norm
