"""The gradient behind a model update: one local step of SGD is the gradient times the rate, several are a mixture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rgap.arguments import check_count, check_number
from rgap.client.gradients import gradients_of, named_tensors
from rgap.results import GradientMismatchError

State = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]  # a module, its state dict, or its parameters in order
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # last parts of batch norm's buffers' names


SHARE_DIGITS = 12  # decimals from which on sums of steps' shares count as equal


class UpdateGradients(dict[str | int, Tensor]):
    """Gradients read off an update, with the precision to which it determines them.

    A mapping from parameter name (or place, for lists) to a float64 gradient, as `rgap.reconstruct` takes it.

    Attributes:
        noise_std: Name or place -> standard deviation of an entry, from the rounding of the weights subtracted.
    """

    def __init__(self, gradients: Mapping[str | int, Tensor], noise_std: Mapping[str | int, float]):
        """Keeps both."""
        super().__init__(gradients)
        self.noise_std = dict(noise_std)


@dataclass(frozen=True)
class LocalTraining:
    """Local steps of `torch.optim.SGD` on the whole batch, as the server knows them.

    Attributes:
        learning_rate: Of every step.
        steps: How many.
        momentum: Of the optimiser, without dampening, and 0 at the first step.
        weight_decay: λ of the optimiser.
    """

    learning_rate: float
    steps: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuses numbers that no training has, by name."""
        check_number("learning_rate", self.learning_rate, open_low=True)
        check_count("steps", self.steps)
        check_number("momentum", self.momentum, high=1.0)
        check_number("weight_decay", self.weight_decay)

    @cached_property
    def path(self) -> np.ndarray:
        """The weights before every step and after the last, (k + 1, k + 1): factors of w_0, g_1, …, g_k.

        v ← momentum v + g_j + λ w and w ← w − rate v are linear in w_0 and the g_j, decay and momentum included.
        """
        path, v = [np.eye(1, self.steps + 1)[0]], np.zeros(self.steps + 1)
        for g in np.eye(self.steps + 1)[1:]:
            v = self.momentum * v + g + self.weight_decay * path[-1]
            path.append(path[-1] - self.learning_rate * v)
        return np.stack(path)

    @property
    def coefficients(self) -> tuple[float, tuple[float, ...]]:
        """α and d_1 … d_k of w_k = α w_0 − Σ_j d_j g_j, with g_j the gradient at the weights of step j."""
        return float(self.path[-1, 0]), tuple((-self.path[-1, 1:]).tolist())

    @property
    def shares(self) -> tuple[float, ...]:
        """d_j / Σ_j d_j: what each step's gradient contributes to the mean."""
        return tuple(d / self.total for d in self.coefficients[1])

    @property
    def positive_shares(self) -> tuple[float, ...]:
        """For which part of the shares a unit may be positive that flips once at most: their sums, ascending."""
        sums = np.cumsum(self.shares).round(SHARE_DIGITS)
        return tuple(np.unique([0.0, 1.0, *sums, *(1 - sums).round(SHARE_DIGITS)]).tolist())

    def mean_weights(self, before: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the steps of the weights at which gradients were taken, were each of these the mean gradient.

        The gradient at these weights is the mean of the steps' but for terms of second order in the drift.
        """
        kept, *moved = np.array(self.shares) @ self.path[:-1]
        return {name: kept * w + sum(moved) * mean[name] for name, w in before.items()}

    @property
    def total(self) -> float:
        """Σ_j d_j: the update in units of a gradient."""
        return sum(self.coefficients[1])

    def run(
        self, model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor, loss: str
    ) -> dict[str, Tensor]:
        """The parameters after the steps, by name and in the dtype of those given; the model is left as it is."""
        w, v = dict(parameters), {name: torch.zeros_like(p) for name, p in parameters.items()}
        for _ in range(self.steps):
            for name, g in gradients_of(model, w, images, labels, loss).items():
                v[name] = self.momentum * v[name] + g + self.weight_decay * w[name]
                w[name] = w[name] - self.learning_rate * v[name]
        return w


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

    Two states alone do not distinguish one SGD step from several, from momentum, or from another optimiser; no image
    has the gradient of such an update, and `rgap.reconstruct` calls it inconsistent; `rgap.reconstruct_update` takes
    several steps. The gradient is not exact: weights are rounded to their format, which in float32 leaves an error of
    about 1e-8 of the weight over the rate. The result carries it as `noise_std`, from which `rgap.reconstruct` takes
    its cutoffs and tolerances; parameters that moved by less than their rounding are set aside by name.

    Args:
        before: The model that was sent out, its state, or its parameters in their order. Give the network itself (not
            `after`) to `rgap.reconstruct`.
        after: The model that came back, in one of these forms.
        learning_rate: Learning rate of the client's step.
        steps: Local steps; must be 1.
        momentum: Momentum of the optimiser; must be 0.
        weight_decay: λ of `torch.optim.SGD`, whose λ w is subtracted from the gradient.

    Returns:
        The gradients, float64, by parameter name, or by place where lists were given. Buffers of batch normalisation
        and whatever is not floating-point are left out.

    Raises:
        GradientMismatchError: If names, number, or shapes differ, a value is not finite, or nothing has changed.
        ValueError: If the rate is not positive, there are several steps, or momentum.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> before, after = [torch.tensor([1.0, 2.0])], [torch.tensor([0.5, 2.5])]
        >>> client.gradients_from_update(before, after, learning_rate=0.5)[0].tolist()
        [1.0, -1.0]
    """
    training = LocalTraining(learning_rate, weight_decay=weight_decay)
    if check_count("steps", steps) != 1:
        raise ValueError(f"steps is {steps}; only one local step leaves the gradient of a batch in the update")
    if check_number("momentum", momentum) != 0:
        raise ValueError(f"momentum is {momentum}; it mixes in gradients of earlier steps, which are not known here")
    return mean_gradients(before, after, training)


def mean_gradients(before: State, after: State, training: LocalTraining) -> UpdateGradients:
    """Σ_j d_j g_j / Σ_j d_j over the local steps between two states of a model, (α w_0 − w_k) / Σ_j d_j.

    Args and errors are those of `gradients_from_update`; for one step this is the gradient itself.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> before, after = [torch.tensor([1.0, 2.0])], [torch.tensor([0.5, 2.5])]
        >>> training = client.LocalTraining(learning_rate=0.25, steps=2)
        >>> client.mean_gradients(before, after, training)[0].tolist()
        [1.0, -1.0]
    """
    old, new = _parameters(before, "before"), _parameters(after, "after")
    for model in (before, after):  # only a module distinguishes all of its buffers from its parameters
        if isinstance(model, nn.Module):
            buffers = dict(model.named_buffers())
            old, new = ({k: t for k, t in side.items() if k not in buffers} for side in (old, new))
    if old.keys() != new.keys():
        missing, extra = [k for k in old if k not in new], [k for k in new if k not in old]
        raise GradientMismatchError(f"the two states differ in names: missing after {missing}, unknown before {extra}")
    kept, total = training.coefficients[0], training.total
    gradients, noise = {}, {}
    for name, w in old.items():
        v = new[name]
        if w.shape != v.shape:
            raise GradientMismatchError(f"parameter {name!r} has shape {tuple(w.shape)} before, {tuple(v.shape)} after")
        if not (torch.isfinite(w).all() and torch.isfinite(v).all()):
            raise GradientMismatchError(
                f"parameter {name!r} holds NaN or infinity before or after; no gradient follows"
            )
        w64, v64 = (t.detach().to("cpu", torch.float64) for t in (w, v))
        gradients[name] = (w64 - v64 - (1 - kept) * w64) / total  # w − v is exact where the two are close
        noise[name] = max(_rounding_std(v), _rounding_std(w)) * training.steps**0.5 / total  # rounded at every step
    if all(torch.equal(old[name].to(new[name]), new[name]) for name in old):
        cause = "no step was made, or every change is below the rounding of the weights"
        raise GradientMismatchError(f"before and after are equal: {cause}")
    return UpdateGradients(gradients, noise)


def _parameters(state: State, which: str) -> dict[str | int, Tensor]:
    """Name or place -> floating-point parameter."""
    if isinstance(state, nn.Module):
        return dict(state.named_parameters())
    named = named_tensors(state, f"{which} (a module, its state dict or its parameters)")
    kept = {n: t for n, t in named.items() if t.is_floating_point() and str(n).split(".")[-1] not in STATISTICS}
    if not kept:
        raise GradientMismatchError(f"{which} holds no floating-point parameter")
    return kept


def _rounding_std(w: Tensor) -> float:
    """Root mean square of the rounding errors of a parameter's entries, each uniform within its last place."""
    exponent = torch.frexp(w.detach().to("cpu", torch.float64))[1].double() - 1
    last_place = torch.finfo(w.dtype).eps * torch.where(w.cpu() == 0, 0.0, torch.exp2(exponent))
    return (last_place.square() / 12).mean().item() ** 0.5 if w.numel() else 0.0
