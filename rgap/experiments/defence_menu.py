"""The defences of `rgap.client` by name, each with strengths to choose from: for sliders and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rgap import client

Gradients = Sequence[Tensor] | Mapping[str, Tensor]

CLIP_NORM = 1.0
"""Norm to which `clip_and_noise` clips here."""

DEFENCES: dict[str, tuple[Callable[[Gradients, float | str], Gradients], tuple[float | str, ...]]] = {
    "gaussian_noise": (
        lambda gradients, std: client.gaussian_noise(gradients, std),
        (0, 1e-10, 1e-9, 3e-9, 1e-8, 3e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    ),
    "clip_and_noise": (
        lambda gradients, multiplier: client.clip_and_noise(gradients, CLIP_NORM, multiplier),
        (0, 1e-10, 1e-9, 3e-9, 1e-8, 3e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    ),
    "prune": (client.prune, (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)),
    "quantise": (client.quantise, ("float32", "float16", "bfloat16", "int8")),
}
"""Name of a function in `rgap.client` -> it as a function of gradients and strength, and strengths to choose from.

The first strength leaves the gradient as it is. Strengths are the standard deviation, the noise multiplier at the
clipping norm `CLIP_NORM`, the share of entries that go, and the format.
"""


def defended(gradients: Gradients, defence: str, strength: float | str) -> Gradients:
    """The gradient as it is shared under a defence.

    Args:
        gradients: One tensor for each parameter, or a mapping from name.
        defence: A name in `DEFENCES`.
        strength: What the defence takes; the first of its strengths there leaves the gradient as it is.

    Raises:
        ValueError: If the defence is unknown or the strength out of range.
    """
    none = strengths_of(defence)[0]
    return gradients if strength == none else DEFENCES[defence][0](gradients, strength)


def strengths_of(defence: str) -> tuple[float | str, ...]:
    """Strengths to choose from, the first of which leaves the gradient as it is.

    Args:
        defence: A name in `DEFENCES`.

    Raises:
        ValueError: If the defence is unknown.
    """
    if defence not in DEFENCES:
        raise ValueError(f"defence is {defence!r}; it must be one of {', '.join(DEFENCES)}")
    return DEFENCES[defence][1]


def noise_of(defence: str, strength: float | str) -> float | None:
    """The standard deviation of the noise that an attacker who knows the defence expects on every entry; None without.

    Args:
        defence: A name in `DEFENCES`.
        strength: As for `defended`.
    """
    return float(strength) if defence == "gaussian_noise" and strength else None
