"""The drift of a chain's weights during local steps, taken off an update by a fixed point (ours)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from scipy.linalg import LinAlgWarning
from scipy.optimize import NoConvergence, anderson
from torch import Tensor

from rgap.attack.candidates import Attack
from rgap.attack.reconstruct import follow, read, reconstruct
from rgap.attack.update import FoundImages, UpdateTask
from rgap.client import UpdateGradients
from rgap.linalg import rms
from rgap.results import GradientMismatchError
from rgap.shared_gradient import receive

MAX_ITERATIONS = 40
"""Most evaluations of the fixed point."""

ANDERSON_DEPTH = 5
"""Earlier iterates from which the next one is extrapolated."""

DRIFT_NOISE_RATIO = 1e-3
"""Noise that the iterations are told of, relative to the update's root mean square: what is left of the drift."""

MAX_STALLED_ITERATIONS = 6
"""Iterations without a smaller change after which the fixed point does not contract."""

FIXED_POINT_TOLERANCE = 1e-12
"""Change of an image's pixels, relative to its largest, at which the fixed point has been reached."""

CONTRACTED_CHANGE = 1e-3
"""Change of the pixels by an iteration, in widths of their range, above which the fixed point has not contracted."""

MAX_DRIFT_SHARE = 0.5
"""Share of the update that an iterate's drift may make; a larger one is no small correction of a gradient."""

MAX_PIXEL_SIZE = 100.0
"""Pixels, in widths of the range, from which the fixed point has diverged."""


def by_fixed_point(task: UpdateTask) -> FoundImages:
    """The image whose gradient is Ḡ less its own drift: x ← R(Ḡ − drift(x)) with the attack R, accelerated."""
    loop = _FixedPoint(task)
    x = loop.read({name: torch.zeros_like(g) for name, g in task.update.items()})
    loop.keep(x, math.inf)
    try:
        # Anderson's method: line searches would ask for further attacks, and the change never is exactly 0
        options = {"iter": MAX_ITERATIONS, "alpha": 1.0, "M": ANDERSON_DEPTH, "line_search": None, "f_tol": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LinAlgWarning)  # of differences that have become rounding
            anderson(loop.change, x.flatten().numpy(), callback=loop.watch, **options)
    except (NoConvergence, _StopIterating, GradientMismatchError, np.linalg.LinAlgError):
        pass
    share = f"; the weights' drift makes {loop.share:.2g} of the update" if loop.share else ""
    notes = [f"{len(loop.iterates)} iterations of the fixed point{share}"]
    iterates = {task.network.layers[0].name: torch.stack(loop.iterates).flatten(1)}
    if loop.least > CONTRACTED_CHANGE * task.pixels.width:
        kinks = sorted({layer.activation.name for layer in task.network.layers if layer.activation.has_kink})
        why = f"; units of {', '.join(kinks)} flip between the steps" if kinks else ""
        if loop.is_open:
            notes.append("the drift leaves layers of the chain short of full rank")
        moved = "" if loop.least == math.inf else f": an iteration still moves the pixels by {loop.least:.2g}"
        notes.append(f"the fixed point does not contract{moved}{why}")
        return FoundImages(loop.best, (loop.label,), None, loop.reports, tuple(notes), iterates)
    drift = task.drift(loop.best, loop.label)
    gradient = UpdateGradients({n: g - drift[n] for n, g in task.update.items()}, task.update.noise_std)
    options = {"labels": loop.label, "pixel_range": (task.pixels.low, task.pixels.high), "gradient_scale": 1.0}
    result = reconstruct(task.network, gradient, None, task.loss, virtual_constraints=False, **options)
    best = min(result.candidates, key=lambda one: (one.images - loop.best).norm().item())  # not its twin
    return FoundImages(best.images, (best.labels,), best.predicted_error, best.layers, tuple(notes), iterates)


class _StopIterating(Exception):  # noqa: N818  not an error
    """The fixed point is reached, or is not approached any more."""


class _FixedPoint:
    """The iterates of x ← R(Ḡ − drift(x))."""

    def __init__(self, task: UpdateTask):
        """Starts at the update itself, which is a gradient but for the drift."""
        self.task, self.label = task, task.labels
        self.best, self.least, self.since, self.iterates = torch.empty(0), math.inf, 0, []
        self.share, self.reports, self.is_open = 0.0, (), False

    def read(self, drift: Mapping[str, Tensor]) -> Tensor:
        """The image (1, C, H, W) that the attack finds behind Ḡ − drift, without a judgement."""
        task = self.task
        gradient = UpdateGradients({n: g - drift[n] for n, g in task.update.items()}, task.update.noise_std)
        noise_std = DRIFT_NOISE_RATIO * rms(torch.cat([g.flatten() for g in gradient.values()])).item()
        received = receive(task.network, gradient, noise_std=noise_std)
        attack = Attack(task.network, received, task.loss, pixels=task.pixels)
        attack, starts, _ = read(attack, 1, self.label, task.seed)
        descents, _ = follow(attack, starts)
        best = min(descents, key=lambda descent: descent.mismatch)
        self.label, self.reports, self.is_open = best.start.labels, best.reports, bool(best.open_layers)
        return attack.images(best)

    def change(self, x: np.ndarray) -> np.ndarray:
        """R(Ḡ − drift(x)) − x."""
        image = torch.from_numpy(x).reshape(1, *self.task.network.image_shape)
        if self.is_open or not torch.isfinite(image).all():
            raise _StopIterating
        if image.abs().max() > MAX_PIXEL_SIZE * self.task.pixels.width:
            raise _StopIterating
        drift, update = self.task.drift(image, self.label), self.task.update
        self.share = max(drift[n].norm().item() / max(g.norm().item(), 1e-300) for n, g in update.items())
        if self.share > MAX_DRIFT_SHARE:
            raise _StopIterating
        return (self.read(drift) - image).flatten().numpy()

    def watch(self, x: np.ndarray, change: np.ndarray) -> None:
        """Keeps the best iterate, and ends where it is exact or has not become better for long."""
        size = float(np.abs(change).max())
        self.keep(torch.from_numpy(x.copy()).reshape(1, *self.task.network.image_shape), size)
        if size <= FIXED_POINT_TOLERANCE * np.abs(x).max() or self.since >= MAX_STALLED_ITERATIONS:
            raise _StopIterating

    def keep(self, image: Tensor, change: float) -> None:
        """Remembers an iterate and by how much it would still move."""
        self.iterates.append(image[0])
        self.since += 1
        if change < self.least or not self.best.numel():
            self.best, self.least, self.since = image, change, 0
