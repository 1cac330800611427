"""Defences: what a client may do to its gradient before sharing it.

Each takes a list or a mapping of gradients and returns the same kind with the same dtypes, None for None (a frozen
parameter); the arguments are not changed. All raise `GradientMismatchError` unless the gradients are finite
floating-point tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rgap.arguments import MAX_SQUARED_NUMBER, check_choice, check_count, check_number, check_seed
from rgap.artifact import from_extra
from rgap.client.gradients import named_tensors
from rgap.results import GradientMismatchError
from rgap.shared_gradient.rounding import INT8_LEVELS

Gradients = TypeVar("Gradients", Sequence[Tensor], Mapping[str, Tensor])

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # the floating-point formats of `quantise`


def gaussian_noise(gradients: Gradients, std: float, seed: int = 0) -> Gradients:
    """Adds independent N(0, std²) to every entry.

    Args:
        gradients: One tensor for each parameter, or a mapping from name.
        std: Standard deviation, in the gradient's own units.
        seed: Seed of the noise, which is the same for every dtype.

    Raises:
        ValueError: If `std` is negative or not finite, or the noise overflows a gradient's dtype.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> gradients = [torch.tensor([3.0, -4.0])]
        >>> noisy = client.gaussian_noise(gradients, std=1e-3, seed=0)
        >>> 0 < (noisy[0] - gradients[0]).abs().max().item() < 0.01
        True
    """
    return _each(gradients, _noise(check_number("std", std), seed))


def clip_and_noise(gradients: Gradients, clip_norm: float, noise_multiplier: float, seed: int = 0) -> Gradients:
    """Scales all gradients together to a norm of at most `clip_norm`, then adds noise: a step of DP-SGD.

    The noise is N(0, (noise_multiplier · clip_norm)²) on every entry (Abadi et al. 2016, for the gradient of a single
    sample; for a batch it protects the batch as a whole). `epsilon` computes the guarantee.

    Args:
        gradients: One tensor for each parameter, or a mapping from name.
        clip_norm: Largest 2-norm, over all tensors, that is left unscaled.
        noise_multiplier: Standard deviation of the noise in units of `clip_norm`.
        seed: Seed of the noise.

    Raises:
        ValueError: If `clip_norm` is not positive or `noise_multiplier` is negative, one of them is not finite, or the
            noise overflows a gradient's dtype.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> gradients = [torch.tensor([3.0, -4.0])]
        >>> (clipped,) = client.clip_and_noise(gradients, clip_norm=1.0, noise_multiplier=0.0)
        >>> [round(x, 2) for x in clipped.tolist()]
        [0.6, -0.8]
    """
    clip_norm = check_number("clip_norm", clip_norm, open_low=True)
    noise_multiplier = check_number("noise_multiplier", noise_multiplier)
    add_noise = _noise(noise_multiplier * clip_norm, seed)
    norms = [g.detach().double().norm().item() for g in _checked(gradients).values() if g is not None]
    scale = min(1.0, clip_norm / max(math.hypot(*norms), math.ulp(0.0)))
    return _each(gradients, lambda g: add_noise(scale * g))


def prune(gradients: Gradients, share: float) -> Gradients:
    """Sets the smallest entries of each tensor to zero, as gradient compression does.

    Args:
        gradients: One tensor for each parameter, or a mapping from name.
        share: Share of each tensor's entries to set to zero, in [0, 1), their number rounded down; of equal magnitudes
            the first are set to zero.

    Raises:
        ValueError: If `share` is out of range.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> gradients = [torch.tensor([3.0, -4.0])]
        >>> client.prune(gradients, share=0.5)[0].tolist()
        [0.0, -4.0]
    """
    share = check_number("share", share, high=1)

    def without_smallest(g: Tensor) -> Tensor:
        flat = g.flatten().clone()
        flat[flat.abs().argsort(stable=True)[: math.floor(share * flat.numel())]] = 0.0
        return flat.reshape(g.shape)

    return _each(gradients, without_smallest)


def quantise(gradients: Gradients, dtype: str) -> Gradients:
    """Rounds every entry to a coarser format; the result keeps the dtypes of the gradients.

    Args:
        gradients: One tensor for each parameter, or a mapping from name.
        dtype: "float16", "bfloat16", or "int8": integers from −127 to 127 times one scale for each tensor, its largest
            magnitude over 127.

    Raises:
        ValueError: If `dtype` is another, or an entry overflows the format.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> gradients = [torch.tensor([3.0, -4.0])]
        >>> [round(x, 2) for x in client.quantise(gradients, "int8")[0].tolist()]
        [2.99, -4.0]
    """
    if check_choice("dtype", dtype, (*FORMATS, "int8")) == "int8":
        return _each(gradients, _on_grid)
    return _each(gradients, lambda g: _to(g, FORMATS[dtype]).double())


def epsilon(noise_multiplier: float, sample_rate: float = 1.0, steps: int = 1, delta: float = 1e-5) -> float:
    """The ε of the (ε, δ)-differential privacy of `clip_and_noise`, by the accountant of dp-accounting.

    An upper bound, by Rényi accounting of the Gaussian mechanism on Poisson-sampled batches, for data sets that differ
    by one record.

    Args:
        noise_multiplier: As in `clip_and_noise`.
        sample_rate: Probability with which a record takes part in a step; 1 where every step sees it.
        steps: Gradients shared.
        delta: δ.

    Returns:
        ε; infinity without noise.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from rgap.client import epsilon
        >>> epsilon(2.0, steps=10) > epsilon(2.0) > epsilon(4.0)
        True
    """
    noise_multiplier = check_number("noise_multiplier", noise_multiplier, high=MAX_SQUARED_NUMBER)
    sample_rate = check_number("sample_rate", sample_rate, high=1, open_low=True, closed=True)
    steps, delta = check_count("steps", steps), check_number("delta", delta, high=1, open_low=True)
    if noise_multiplier == 0:
        return math.inf
    accounting = from_extra("dp_accounting")  # takes seconds to import
    event = accounting.GaussianDpEvent(noise_multiplier)
    accountant = accounting.rdp.RdpAccountant()
    accountant.compose(event if sample_rate == 1 else accounting.PoissonSampledDpEvent(sample_rate, event), steps)
    return float(accountant.get_epsilon(delta))


def _noise(std: float, seed: int) -> Callable[[Tensor], Tensor]:
    """A function that adds noise to a tensor; its calls draw from one stream of random numbers."""
    generator = torch.Generator().manual_seed(check_seed(seed))
    return lambda g: g + std * torch.randn(g.shape, generator=generator, dtype=torch.float64).to(g.device)


def _on_grid(g: Tensor) -> Tensor:
    scale = g.abs().max() / INT8_LEVELS if g.numel() else g.new_zeros(())
    return scale * (g / scale).round() if scale > 0 else torch.zeros_like(g)


def _each(gradients: Gradients, change: Callable[[Tensor], Tensor]) -> Gradients:
    """Applies a change, computed in float64, to every tensor, and keeps the list or mapping that came in."""
    changed = {
        name: None if g is None else _to(change(g.detach().double()), g.dtype, name)
        for name, g in _checked(gradients).items()
    }
    return changed if isinstance(gradients, Mapping) else list(changed.values())


def _checked(gradients: Gradients) -> dict[str | int, Tensor | None]:
    named = named_tensors(gradients, "gradients", frozen=True)
    for name, g in named.items():
        if g is None:
            continue
        if not g.is_floating_point():
            raise GradientMismatchError(f"gradient {name!r} is {g.dtype}; it must be a floating-point tensor")
        if not torch.isfinite(g).all():
            raise GradientMismatchError(f"gradient {name!r} holds NaN or infinity; no defence repairs that")
    return named


def _to(values: Tensor, dtype: torch.dtype, name: str | int | None = None) -> Tensor:
    """A cast that refuses to overflow."""
    cast = values.to(dtype)
    if not torch.isfinite(cast).all():
        where = "an entry" if name is None else f"an entry of gradient {name!r}"
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} overflows {kind}: {values.abs().max().item():.3g} is beyond its range")
    return cast
