"""Local steps of a network with kinks: which units are positive at which step, and their mean slopes (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rgap.attack.update import UpdateTask
from rgap.client import gradients_of

REACH_FACTOR = 1.5  # multiple of what a unit moves in the simulation up to which it may have moved


MAX_SETTLED_UNITS = 12  # units about which two patterns may disagree for each of them to be decided by a simulation


@dataclass(frozen=True)
class KinkedSteps:
    """Simulated steps, and for every call of LeakyReLU in a forward pass what its outputs (k, B, …) do."""

    mean: Mapping[str, Tensor]  # Ḡ
    positive: list[Tensor]  # 1 where a unit is positive at a step, else 0
    reach: list[Tensor]  # how far a unit may move from the middle of its path, (B, …)


def simulated_steps(task: UpdateTask, image: Tensor, label: Tensor, shares: Sequence[Tensor]) -> list[KinkedSteps]:
    """The client's steps with an image, and once more on a pattern of which the `shares` of the steps are known.

    Of a unit that flips the steps are positive at which it is largest.
    """
    with _KinkSlopes() as slopes:
        mean = task.simulate(image, label)
    calls = len(slopes.outputs) // task.training.steps
    paths = [torch.stack(slopes.outputs[i::calls]) for i in range(calls)]
    reach = [REACH_FACTOR * (path.amax(0) - path.amin(0)) / 2 for path in paths]
    found = [KinkedSteps(mean, [(path > 0).to(path.dtype) for path in paths], reach)]
    if paths and [path[0].numel() for path in paths] == [share.numel() for share in shares]:
        weights = torch.tensor(task.training.shares, dtype=torch.float64)
        positive = [_largest(path, weights, share) for path, share in zip(paths, shares, strict=True)]
        found.append(_on_pattern(task, image, label, KinkedSteps(mean, positive, reach)))
    return found


def _on_pattern(task: UpdateTask, image: Tensor, label: Tensor, steps: KinkedSteps) -> KinkedSteps:
    """The client's steps where units are positive as they are in others."""
    with _KinkSlopes([one[step] for step in range(task.training.steps) for one in steps.positive]):
        return replace(steps, mean=task.simulate(image, label))


def settled_steps(
    task: UpdateTask, image: Tensor, label: Tensor, first: KinkedSteps, second: KinkedSteps
) -> KinkedSteps:
    """Steps on the first pattern with those units as in the second that bring the simulation closer, one by one."""
    pairs = list(zip(first.positive, second.positive, strict=True))
    units = [(i, unit) for i, (a, b) in enumerate(pairs) for unit in (a != b).any(0).nonzero().tolist()]
    for i, unit in units if len(units) <= MAX_SETTLED_UNITS else []:
        positive, at = list(first.positive), (slice(None), *unit)
        positive[i] = positive[i].clone()
        positive[i][at] = second.positive[i][at]
        trial = _on_pattern(task, image, label, replace(first, positive=positive))
        if task.miss(trial.mean) < task.miss(first.mean):
            first = trial
    return first


def _largest(path: Tensor, weights: Tensor, share: Tensor) -> Tensor:
    """1 at the steps at which a unit is largest, up to its share of the weights; path (k, B, …)."""
    order = path.argsort(0, descending=True)
    each = weights[order]
    chosen = each.cumsum(0) - each / 2 < share.reshape(path.shape[1:])
    return torch.zeros_like(path).scatter(0, order, chosen.to(path.dtype))


def mean_gradient(
    task: UpdateTask, parameters: Mapping[str, Tensor], image: Tensor, label: Tensor, positive: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The gradient at other parameters, with the units' mean slopes over steps at which they are `positive`."""
    weights = torch.tensor(task.training.shares, dtype=torch.float64)
    with _KinkSlopes([torch.tensordot(weights, one, 1) for one in positive]):
        return gradients_of(task.network.model, parameters, image, label, task.loss)


class _KinkSlopes(TorchFunctionMode):
    """Records the outputs of every LeakyReLU; given `shares`, it gives one call after the other a pattern.

    With share 1 or 0 a unit has the upper or lower piece; in between its value stays, and its slope is the mean.
    """

    def __init__(self, shares: Sequence[Tensor] = ()):
        super().__init__()
        self.outputs, self.shares = [], iter(shares)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs the function, a LeakyReLU with the slopes given."""
        y = func(*args, **(kwargs or {}))
        if func is not F.leaky_relu:
            return y
        self.outputs.append(y.detach())
        share = next(self.shares, None)
        if share is None:
            return y
        slope = args[1] if len(args) > 1 else (kwargs or {}).get("negative_slope", 0.01)
        mean = torch.lerp(torch.full_like(share, slope), torch.ones_like(share), share)
        factor = mean / torch.where(y > 0, 1.0, slope)
        flips = (share > 0) & (share < 1)
        return torch.where(flips, y + (factor - 1) * (y - y.detach()), factor * y)
