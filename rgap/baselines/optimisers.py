"""The two optimisers, L-BFGS and Adam on signs, and the record of their steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from rgap.artifact.progress import progress

LBFGS_LOSS_SCALE = 1e6  # multiple of the objective: torch drops curvature pairs below a bound
Objective = Callable[[Tensor], tuple[Tensor, float]]  # variables -> the objective, and the gradient residual there


@dataclass(frozen=True)
class Snapshot:
    """The images at one step.

    Attributes:
        restart: Number of the restart, from 0.
        step: Number of the step, from 1.
        seconds: Wall time since the attack began.
        images: (B, C, H, W), float64.
    """

    restart: int
    step: int
    seconds: float
    images: Tensor


@dataclass
class Record:
    """Grows while an attack runs: one row per step, and images at steps that grow by about a quarter."""

    begin: float = field(default_factory=time.perf_counter)
    rows: list[tuple] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    restart: int = 0
    due: int = 0

    def next_restart(self) -> None:
        """Begins the next restart, whose steps count from 1 again."""
        self.restart, self.due = self.restart + 1, 1

    def note(self, step: int, loss: float, residual: float, images: Tensor | None, last: bool = False) -> None:
        """Notes a step, and keeps its images, if there are any, where a snapshot is due."""
        seconds = time.perf_counter() - self.begin
        self.rows.append((self.restart, step, loss, residual, seconds))
        if images is not None and (step >= self.due or last):
            kept = images.detach().to("cpu", torch.float64, copy=True)
            self.snapshots.append(Snapshot(self.restart, step, seconds, kept))
            self.due = max(step + 1, math.ceil(1.25 * step))

    def frame(self) -> pd.DataFrame:
        """The rows as a table."""
        return pd.DataFrame(self.rows, columns=["restart", "step", "loss", "gradient_residual", "seconds"])


@dataclass(frozen=True)
class Descended:
    """Where a descent ended: the iterate with the smallest objective, that objective, the step of divergence if any."""

    best: Tensor
    loss: float
    diverged: int | None = None


def lbfgs(
    objective: Objective, start: Tensor, steps: int, record: Record, title: str,
    diverged: Callable[[Tensor], bool] = lambda _: False, images: Callable[[Tensor], Tensor] | None = lambda x: x,
) -> Descended:  # fmt: skip
    """L-BFGS with 100 corrections; one step is one evaluation of the objective, and there are at most `steps`.

    The descent stops at the first iterate whose objective is not finite or for which `diverged` holds. Snapshots are
    taken of `images(variables)`, none if that is None; `title` names the progress bar.
    """
    x = start.detach().clone().requires_grad_()
    # One iteration a call, so that every evaluation is seen; the corrections are kept between calls.
    optimiser = torch.optim.LBFGS([x], max_iter=1, history_size=100, tolerance_grad=0, tolerance_change=0)
    best, lowest, seen = x.detach().clone(), math.inf, (math.inf, math.inf)

    def closure() -> Tensor:
        nonlocal seen
        value, residual = objective(x)
        seen = value.item(), residual
        (x.grad,) = torch.autograd.grad(LBFGS_LOSS_SCALE * value, x)
        return LBFGS_LOSS_SCALE * value.detach()

    for step in progress(range(1, steps + 1), title, leave=False):
        at = x.detach().clone()
        optimiser.step(closure)
        loss, residual = seen
        broken = not math.isfinite(loss) or diverged(at)
        last = broken or step == steps or x.equal(at)
        shown = images(at) if images is not None and (last or step >= record.due) else None
        record.note(step, loss, residual, shown, last)
        if broken:
            return Descended(best, lowest, step)
        if loss < lowest:
            best, lowest = at, loss
        if last:
            break
    return Descended(best, lowest)


def signed_adam(
    objective: Objective, start: Tensor, steps: int, record: Record, box: tuple[float, float], rate: float, title: str
) -> Descended:
    """Adam on the sign of the gradient, its first step length, `rate`, divided by ten after 3/8, 5/8, 7/8 of the steps.

    The variables are clamped to `box`, (smallest, largest), after each step.
    """
    x = start.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=rate)
    cuts = [max(1, steps * part // 8) for part in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, cuts, gamma=0.1)
    best, lowest = x.detach().clone(), math.inf
    for step in progress(range(1, steps + 1), title, leave=False):
        value, residual = objective(x)
        loss, at = value.item(), x.detach().clone()
        record.note(step, loss, residual, at, last=step == steps or not math.isfinite(loss))
        if not math.isfinite(loss):
            return Descended(best, lowest, step)
        if loss < lowest:
            best, lowest = at, loss
        (slope,) = torch.autograd.grad(value, x)
        x.grad = slope.sign()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(*box)
    return Descended(best, lowest)
