"""An update of several local steps: the drift of its weights is taken off by a fixed point (ours).

Ḡ is nearly the gradient at the mean weights W̄ of the steps, which follow from Ḡ itself: what is left, Ḡ(x) − g(W̄, x),
is of second order in the drift. x ← R(Ḡ − [Ḡ(x) − g(W̄(x), x)]), with the attack R at W̄, takes that off as well. R
descends a chain, or walks through a residual network from a blind layer; the rest of the drift is declared as noise.

Units of a LeakyReLU that flip have mean slopes, one of finitely many. R reads them like signs, layer by layer from the
top; the gradient at W̄ has them backwards, so that a flip that an approximate image does not predict cancels. The steps
are simulated on the pattern that R has read and on the image's own; a step is taken where the simulation comes closer.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from rgap.attack.candidates import Attack
from rgap.attack.descent import Descent
from rgap.attack.reconstruct import follow, read, reconstruct
from rgap.attack.update import FoundImages, KinkedSteps, UpdateTask, mean_gradient, settled_steps, simulated_steps
from rgap.client import UpdateGradients
from rgap.linalg import rms
from rgap.network.chain import Chain, prepare
from rgap.residual import prepare_residual
from rgap.results import GradientMismatchError, Reconstruction
from rgap.shared_gradient import receive

MAX_ITERATIONS = 40  # most steps of the fixed point
MAX_FIRST_MISS = 1e-2  # miss of the simulated update up to which no further first noise is tried
MIN_NOISE_RATIO = 1e-12  # smallest declared noise, relative to the root mean square of Ḡ
MIN_GAIN = 0.7  # miss relative to the last from which a step is no gain
CONTRACTED_MISS = 1e-3  # miss of the simulated update above which the fixed point has not contracted
MAX_PIXEL_SIZE = 100.0  # pixels, in widths of the range, from which the fixed point has diverged
DESCENT_NOISE = 1e-2  # largest declared noise of a descent: it leaves units in doubt before anything is simulated
DESCENT_NOISE_SHARES = (0.3, 1.0, 0.1)  # shares of the simulation's miss that later descents declare, in turn
WALK_NOISES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # declared noise of the first walk, relative to the root mean square of Ḡ
WALK_NOISE_SHARES = (0.3,)  # share of the simulation's miss that later walks declare as noise
LAST_WALK_SLACK = 10.0  # miss of a walk without declared noise, relative to the last, up to which it counts
ANDERSON_DEPTH = 6  # earlier steps from which the next one is extrapolated
MAX_LAST_STEPS = 4  # attacks at the weights that were sent out that end the iterations, on the image's own pattern


def by_fixed_point(task: UpdateTask) -> FoundImages:
    """The image whose gradient at the mean weights is Ḡ less its own drift, and the same of the weights sent out."""
    iterates = _Descents(task).run()
    best = iterates[-1]
    beliefs = {task.network.layers[0].name: torch.stack([one.image[0] for one in iterates]).flatten(1)}
    notes, image = [f"{len(iterates)} iterations of the fixed point"], best.image
    if best.miss <= CONTRACTED_MISS:
        options = {"labels": best.label, "pixel_range": (task.pixels.low, task.pixels.high), "gradient_scale": 1.0}
        found, least, drift = None, math.inf, {}
        for _ in range(MAX_LAST_STEPS):
            drift = task.drift(image, best.label)
            gradient = UpdateGradients({n: g - drift[n] for n, g in task.update.items()}, task.update.noise_std)
            result = reconstruct(task.network, gradient, None, task.loss, virtual_constraints=False, **options)
            new = min(result.candidates, key=lambda one: (one.images - best.image).norm().item())  # not its twin
            miss = task.miss(task.simulate(new.images, new.labels))
            if found is not None and not miss < MIN_GAIN * least:
                break
            found, least, image = new, miss, new.images
        share = max(drift[n].norm().item() / max(g.norm().item(), 1e-300) for n, g in task.update.items())
        notes[0] += f"; the weights' drift makes {share:.2g} of the update"
        return FoundImages(image, (found.labels,), found.predicted_error, found.layers, tuple(notes), beliefs)
    if best.found.open_layers:
        notes.append("the drift leaves layers of the chain short of full rank")
    missed = f": the simulated update misses by {best.miss:.2g}" if math.isfinite(best.miss) else ""
    kinks = sorted({layer.activation.name for layer in task.network.layers if layer.activation.has_kink})
    why = f"; units of {', '.join(kinks)} flip between the steps" if kinks else ""
    notes.append(f"the fixed point does not contract{missed}{why}")
    return FoundImages(best.image, (best.label,), None, best.found.reports, tuple(notes), beliefs)


def by_walks(task: UpdateTask) -> FoundImages:
    """The same for a residual network; only a last walk, with no noise but rounding, may be certified."""
    loop = _Walks(task)
    walks = loop.run()
    last = loop.read(None, walks[-1], *walks[-1].steps)
    certain = last.miss <= LAST_WALK_SLACK * walks[-1].miss
    walks += [last] if certain else []
    best, found = walks[-1], walks[-1].found
    notes = [f"{len(walks)} walks through the network at the mean weights of the steps"]
    if best.miss > CONTRACTED_MISS:
        notes += [f"the fixed point does not contract: the simulated update misses by {best.miss:.2g}", *found.notes]
    beliefs = {found.layers[-1].name: torch.stack([one.image[0] for one in walks]).flatten(1)}
    error = found.candidates[0].predicted_error if certain else None
    return FoundImages(best.image, (best.label,), error, found.layers, tuple(notes), beliefs)


@dataclass(frozen=True)
class _Iterate:
    """An image (1, C, H, W), what found it, and the client's steps simulated with it, the closest first."""

    image: Tensor
    label: Tensor
    found: Descent | Reconstruction
    steps: tuple[KinkedSteps, ...] = ()
    miss: float = math.inf  # how far the closest mean gradient is from Ḡ, relative, over all parameters


class _FixedPoint:
    """x ← R(Ḡ − [Ḡ(x) − g(W̄(x), x)]), with `read` as R."""

    first_noises: tuple[float, ...]  # declared noise of the first R, relative to the root mean square of Ḡ, in turn
    noise_shares: tuple[float, ...]  # shares of the simulation's miss that are tried as noise later

    def __init__(self, task: UpdateTask):
        """Takes the network to the mean weights."""
        self.task, self.start = task, task.weights()
        model = copy.deepcopy(task.network.model).to("cpu", torch.float64)
        model.load_state_dict(task.training.mean_weights(self.start, task.update), strict=False)
        prepared = prepare if isinstance(task.network, Chain) else prepare_residual
        self.network = prepared(model, task.network.image_shape)

    def run(self) -> list[_Iterate]:
        """The iterates; the last misses least."""
        iterates: list[_Iterate] = []
        for noise in self.first_noises:
            iterates = [min([*iterates, self.read(noise)], key=lambda one: one.miss)]
            if iterates[0].miss <= MAX_FIRST_MISS:
                break
        while len(iterates) < MAX_ITERATIONS and (new := self._closer(iterates[-1])):
            iterates.append(new)
        return iterates

    def _closer(self, last: _Iterate) -> _Iterate | None:
        for share, steps in product(self.noise_shares, last.steps):
            new = self.read(max(share * last.miss, MIN_NOISE_RATIO), last, steps)
            if new.miss < MIN_GAIN * last.miss:
                return new
        return None

    def less_drift(self, last: _Iterate | None, steps: KinkedSteps | None) -> UpdateGradients:
        """Ḡ less the drift of simulated steps."""
        task, gradients = self.task, dict(self.task.update)
        if steps is not None:
            at = task.training.mean_weights(self.start, steps.mean)
            mine = mean_gradient(task, at, last.image, last.label, steps.positive)
            gradients = {name: g - (steps.mean[name] - mine[name]) for name, g in gradients.items()}
        return UpdateGradients(gradients, task.update.noise_std)

    def diverged(self, image: Tensor) -> bool:
        """Whether pixels are far outside their range, or no numbers."""
        return not image.abs().max().item() <= MAX_PIXEL_SIZE * self.task.pixels.width


class _Walks(_FixedPoint):
    first_noises, noise_shares = WALK_NOISES, WALK_NOISE_SHARES

    def read(self, noise: float | None, last: _Iterate | None = None, steps: KinkedSteps | None = None) -> _Iterate:
        """What a walk with that declared noise finds behind Ḡ less the drift of the steps, and its own steps."""
        task = self.task
        found = reconstruct(
            self.network, self.less_drift(last, steps), None, task.loss, noise_std=noise and noise * _size(task.update),
            gradient_scale=1.0, labels=task.labels, pixel_range=(task.pixels.low, task.pixels.high), seed=task.seed,
        )  # fmt: skip
        undecided = not found.labels.is_floating_point() and found.labels.min().item() < 0
        one = _Iterate(found.images, found.labels, found)
        if undecided or self.diverged(found.images):
            return one
        mean = task.simulate(found.images, found.labels)
        return replace(one, steps=(KinkedSteps(mean, [], []),), miss=task.miss(mean))


class _Descents(_FixedPoint):
    first_noises, noise_shares = (DESCENT_NOISE,), DESCENT_NOISE_SHARES

    def __init__(self, task: UpdateTask):
        """Also keeps images before and after earlier steps."""
        super().__init__(task)
        self.kinked = [layer.name for layer in self.network.layers if layer.activation.has_kink]
        self.history: deque[tuple[Tensor, Tensor]] = deque(maxlen=ANDERSON_DEPTH)

    def _closer(self, last: _Iterate) -> _Iterate | None:
        return None if last.found.open_layers else super()._closer(last)

    def read(self, noise: float, last: _Iterate | None = None, steps: KinkedSteps | None = None) -> _Iterate:
        """What a descent with that declared noise finds behind Ḡ less the drift of the steps, or extrapolated."""
        task, gradients = self.task, self.less_drift(last, steps)
        reach = {} if steps is None else dict(zip(self.kinked, steps.reach, strict=False))
        try:
            received = receive(self.network, gradients, noise_std=min(noise, DESCENT_NOISE) * _size(gradients))
            received = replace(received, positive_shares=task.training.positive_shares, reach=reach)
            attack = Attack(self.network, received, task.loss, pixels=task.pixels)
            attack, starts, _ = read(attack, 1, task.labels if last is None else last.label, task.seed)
            descents, _ = follow(attack, starts)
        except (GradientMismatchError, np.linalg.LinAlgError):
            if last is None:
                raise
            found = [replace(last, miss=math.inf)]
        else:
            images = [(attack.images(one), one) for one in descents]
            found = [self.simulated(_Iterate(image, one.start.labels, one)) for image, one in images]
        new = min(found, key=lambda one: one.miss)
        if last is None:
            return new
        self.history.append((last.image, new.image))
        return min(new, self.accelerated(new), key=lambda one: one.miss)

    def accelerated(self, one: _Iterate) -> _Iterate:
        """The iterate moved as Anderson's method says from images before and after earlier steps."""
        before, after = (torch.stack([pair[i].flatten() for pair in self.history], 1) for i in range(2))
        change = after - before
        if one.miss == math.inf or change.shape[1] < 2:
            return one
        steps = torch.linalg.lstsq(change.diff(dim=1), change[:, -1:], driver="gelsd").solution
        image = after[:, -1:] - after.diff(dim=1) @ steps
        return self.simulated(replace(one, image=image.reshape(one.image.shape), steps=(), miss=math.inf))

    def simulated(self, one: _Iterate) -> _Iterate:
        """The iterate with the client's steps: on the image's own pattern, and on the one that the descent has read."""
        if self.diverged(one.image):
            return one
        read_shares = [one.found.positive[name] for name in self.kinked]
        steps = simulated_steps(self.task, one.image, one.label, read_shares)
        steps.sort(key=lambda each: self.task.miss(each.mean))
        if len(steps) > 1:
            settled = settled_steps(self.task, one.image, one.label, *steps)
            steps = [settled, *steps] if settled is not steps[0] else steps
        return replace(one, steps=tuple(steps), miss=self.task.miss(steps[0].mean))


def _size(gradients: UpdateGradients) -> float:
    """Root mean square of all entries."""
    return rms(torch.cat([g.flatten() for g in gradients.values()])).item()
