"""The gradient behind a model update: one local step of SGD is the gradient times the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rgap.client.gradients import named_tensors
from rgap.results import GradientMismatchError

State = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]
"""A module, its state dict, or its parameters in their order."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of the names of batch normalisation's buffers, which no gradient moves."""


class UpdateGradients(dict[str | int, Tensor]):
    """Gradients read off an update, with the precision to which it determines them.

    A mapping from parameter name (or place, for lists) to a float64 gradient, as `rgap.reconstruct` takes it.

    Attributes:
        noise_std: Name or place -> standard deviation of an entry, by the rounding of the weights that were subtracted.
    """

    def __init__(self, gradients: Mapping[str | int, Tensor], noise_std: Mapping[str | int, float]):
        """Keeps both."""
        super().__init__(gradients)
        self.noise_std = dict(noise_std)


def gradients_from_update(
    before: State,
    after: State,
    learning_rate: float,
    *,
    steps: int = 1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> UpdateGradients:
    """The gradient of the one SGD step that leads from one state of a model to another: (before − after) / rate.

    Two states alone do not tell one SGD step from several, from momentum, or from another optimiser; no image has the
    gradient of such an update, and `rgap.reconstruct` calls it inconsistent. The gradient is not exact: weights are
    rounded to their format, which leaves an error of about 1e-8 of the weight over the rate in float32. The result
    carries it as `noise_std`, from which `rgap.reconstruct` takes its cutoffs and tolerances; parameters that moved by
    less than their rounding are set aside by name.

    Args:
        before: The model that was sent out, its state, or its parameters in their order. Give the network itself (not
            `after`) to `rgap.reconstruct`.
        after: The model that came back, in one of these forms.
        learning_rate: Of the client's step.
        steps: Local steps; 1.
        momentum: Of the optimiser; 0.
        weight_decay: Of `torch.optim.SGD`, whose λ w is taken off the gradient again.

    Returns:
        The gradients, float64, by parameter name, or by place where lists were given. Buffers of batch normalisation
        and whatever is not floating-point are left out.

    Raises:
        GradientMismatchError: If names, number, or shapes differ, a value is not finite, or nothing has changed.
        ValueError: If the rate is not positive, there are several steps, or momentum.
    """
    _check_step(learning_rate, steps, momentum, weight_decay)
    old, new = _parameters(before, "before"), _parameters(after, "after")
    for model in (before, after):  # a state does not tell other buffers from parameters; a module does
        if isinstance(model, nn.Module):
            buffers = dict(model.named_buffers())
            old, new = ({k: t for k, t in side.items() if k not in buffers} for side in (old, new))
    if old.keys() != new.keys():
        missing, extra = [k for k in old if k not in new], [k for k in new if k not in old]
        raise GradientMismatchError(f"the two states differ in names: missing after {missing}, unknown before {extra}")
    gradients, noise = {}, {}
    for name, w in old.items():
        v = new[name]
        if w.shape != v.shape:
            raise GradientMismatchError(f"parameter {name!r} has shape {tuple(w.shape)} before, {tuple(v.shape)} after")
        if not (torch.isfinite(w).all() and torch.isfinite(v).all()):
            raise GradientMismatchError(f"parameter {name!r} holds NaN or infinity; no gradient follows from it")
        w64, v64 = (t.detach().to("cpu", torch.float64) for t in (w, v))
        gradients[name] = (w64 - v64) / learning_rate - weight_decay * w64
        noise[name] = _rounding_std(v, w) / learning_rate
    if all(torch.equal(old[name].to(new[name]), new[name]) for name in old):
        raise GradientMismatchError(
            "before and after are equal: no step was made, or every change is below the rounding of the weights"
        )
    return UpdateGradients(gradients, noise)


def _check_step(learning_rate, steps, momentum, weight_decay) -> None:
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate}; it must be positive and finite")
    if steps != 1:
        raise ValueError(f"steps is {steps}; only one local step leaves the gradient of a batch in the update")
    if momentum != 0:
        raise ValueError(f"momentum is {momentum}; it mixes in gradients of earlier steps, which are not known here")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}; it must be at least 0 and finite")


def _parameters(state: State, which: str) -> dict[str | int, Tensor]:
    """Name or place -> floating-point parameter."""
    if isinstance(state, nn.Module):
        return dict(state.named_parameters())
    named = named_tensors(state, f"{which} (a module, its state dict or its parameters)")
    kept = {n: t for n, t in named.items() if t.is_floating_point() and str(n).split(".")[-1] not in STATISTICS}
    if not kept:
        raise GradientMismatchError(f"{which} holds no floating-point parameter")
    return kept


def _rounding_std(*weights: Tensor) -> float:
    """Root mean square of the rounding errors of a parameter's entries, each uniform within its last place.

    Of two states the one that is rounded more counts.
    """
    squares = 0.0
    for w in weights:
        exponent = torch.frexp(w.detach().to("cpu", torch.float64))[1].double() - 1
        last_place = torch.finfo(w.dtype).eps * torch.where(w.cpu() == 0, 0.0, torch.exp2(exponent))
        squares = max(squares, (last_place.square() / 12).mean().item() if w.numel() else 0.0)
    return squares**0.5
