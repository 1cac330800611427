"""A chain's update of several local steps: the drift of its weights is taken off by a fixed point (ours).

Ḡ is nearly the gradient at the mean weights W̄ of the steps, which follow from Ḡ itself: what is left, Ḡ(x) − g(W̄, x),
is of second order in the drift. x ← R(Ḡ − [Ḡ(x) − g(W̄(x), x)]), with the attack R at W̄, takes that off as well.

Units of a LeakyReLU that flip have mean slopes, one of finitely many. R reads them like signs, layer by layer from the
top; the gradient at W̄ has them backwards, so that a flip that an approximate image does not predict cancels. The steps
are simulated on the pattern that R has read and on the image's own; a step is taken where the simulation comes closer.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from rgap.attack.arguments import checked_network
from rgap.attack.candidates import Attack
from rgap.attack.descent import Descent
from rgap.attack.reconstruct import follow, read, reconstruct
from rgap.attack.slopes import KinkedSteps, mean_gradient, settled_steps, simulated_steps
from rgap.attack.update import FoundImages, UpdateTask
from rgap.client import UpdateGradients, gradients_of
from rgap.linalg import rms
from rgap.network.chain import prepare
from rgap.results import GradientMismatchError, Reconstruction
from rgap.shared_gradient import receive

MAX_ITERATIONS = 40  # most steps of the fixed point
WALK_NOISE_RATIOS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)  # noise of which the first walk through a residual network is told
MAX_WALK_MISS = 1e-2  # miss of the simulated update below which that walk has found the image
LAST_WALK_SLACK = 10.0  # miss of a walk that is told of no noise, relative to the last, up to which it counts
WALK_NOISE_SHARE = 0.3  # share of the simulation's miss of which later walks are told

FIRST_NOISE_RATIO = 1e-2
"""Noise, relative to the update's root mean square, that leaves units in doubt before anything is simulated."""

MIN_NOISE_RATIO = 1e-12  # the same where the simulation agrees
NOISE_SHARES = (0.3, 1.0, 0.1)  # shares of the simulation's miss that are tried as noise later, one after the other
ANDERSON_DEPTH = 6  # earlier steps from which the next one is extrapolated
MIN_GAIN = 0.7  # miss relative to the last from which a step is no gain
CONTRACTED_MISS = 1e-3  # miss of the simulated update above which the fixed point has not contracted
MAX_LAST_STEPS = 4  # attacks at the weights that were sent out that end the iterations, on the image's own pattern
MAX_PIXEL_SIZE = 100.0  # pixels, in widths of the range, from which the fixed point has diverged


def by_fixed_point(task: UpdateTask) -> FoundImages:
    """The image whose gradient at the mean weights is Ḡ less its own drift, and the same of the weights sent out."""
    loop = _FixedPoint(task)
    iterates = loop.run()
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
            miss = _miss(task, task.simulate(new.images, new.labels))
            if found is not None and not miss < MIN_GAIN * least:
                break
            found, least, image = new, miss, new.images
        share = max(drift[n].norm().item() / max(g.norm().item(), 1e-300) for n, g in task.update.items())
        notes[0] += f"; the weights' drift makes {share:.2g} of the update"
        return FoundImages(image, (found.labels,), found.predicted_error, found.layers, tuple(notes), beliefs)
    if best.descent.open_layers:
        notes.append("the drift leaves layers of the chain short of full rank")
    missed = f": the simulated update misses by {best.miss:.2g}" if math.isfinite(best.miss) else ""
    kinks = sorted({layer.activation.name for layer in task.network.layers if layer.activation.has_kink})
    why = f"; units of {', '.join(kinks)} flip between the steps" if kinks else ""
    notes.append(f"the fixed point does not contract{missed}{why}")
    return FoundImages(best.image, (best.label,), None, best.descent.reports, tuple(notes), beliefs)


def by_walks(task: UpdateTask) -> FoundImages:
    """The same fixed point for a residual network: R enters it at a blind layer, told of what is left of the drift."""
    start = {name: p.to("cpu", torch.float64) for name, p in task.parameters.items()}
    network = checked_network(_at_mean_weights(task, start), task.network.image_shape)
    options = {"labels": task.labels, "pixel_range": (task.pixels.low, task.pixels.high), "seed": task.seed}

    def walked(ratio: float | None, drift: Mapping[str, Tensor]) -> tuple[float, Reconstruction, dict[str, Tensor]]:
        """How far the update simulated with the image misses, the image, and the drift that it has."""
        gradients = {name: g - drift.get(name, 0.0) for name, g in task.update.items()}
        size = rms(torch.cat([g.flatten() for g in task.update.values()])).item()
        noise, gradients = ratio and ratio * size, UpdateGradients(gradients, task.update.noise_std)
        found = reconstruct(network, gradients, None, task.loss, noise_std=noise, gradient_scale=1.0, **options)
        diverged = not found.images.abs().max().item() <= MAX_PIXEL_SIZE * task.pixels.width
        if diverged or (
            found.labels.min().item() < 0 and not found.labels.is_floating_point()
        ):  # or no label is decided
            return math.inf, found, {}
        mean = task.simulate(found.images, found.labels)
        at = task.training.mean_weights(start, mean)
        mine = gradients_of(network.model, at, found.images, found.labels, task.loss)
        return _miss(task, mean), found, {name: g - mine[name] for name, g in mean.items()}

    walks = []
    for ratio in WALK_NOISE_RATIOS:
        walks = [min([*walks, walked(ratio, {})], key=lambda one: one[0])]
        if walks[0][0] <= MAX_WALK_MISS:
            break
    while len(walks) < MAX_ITERATIONS and walks[-1][2]:
        new = walked(max(WALK_NOISE_SHARE * walks[-1][0], MIN_NOISE_RATIO), walks[-1][2])
        if not new[0] < MIN_GAIN * walks[-1][0]:
            break
        walks.append(new)
    last = walked(None, walks[-1][2])  # told of nothing but the weights' rounding: what it predicts may be certified
    certain = last[0] <= LAST_WALK_SLACK * walks[-1][0]
    walks += [last] if certain else []
    miss, found, _ = walks[-1]
    notes = [f"{len(walks)} walks through the network at the mean weights of the steps"]
    if miss > CONTRACTED_MISS:
        notes += [f"the fixed point does not contract: the simulated update misses by {miss:.2g}", *found.notes]
    iterates = {found.layers[-1].name: torch.stack([one.images[0] for _, one, _ in walks]).flatten(1)}
    error = found.candidates[0].predicted_error if certain else None
    return FoundImages(found.images, (found.labels,), error, found.layers, tuple(notes), iterates)


def _at_mean_weights(task: UpdateTask, start: Mapping[str, Tensor]) -> nn.Module:
    """The network, float64, at the mean weights of the steps."""
    model = copy.deepcopy(task.network.model).to("cpu", torch.float64)
    model.load_state_dict(task.training.mean_weights(start, task.update), strict=False)
    return model


def _miss(task: UpdateTask, mean: Mapping[str, Tensor]) -> float:
    """How far a mean gradient is from Ḡ: the root of the parameters' squared relative misses."""
    pairs = [(mean[name] - g, g) for name, g in task.update.items()]
    return math.hypot(*(rest.norm().item() / max(g.norm().item(), 1e-300) for rest, g in pairs))


@dataclass(frozen=True)
class _Iterate:
    """An image (1, C, H, W), the descent that found it, and the client's steps simulated with it, the closest first."""

    image: Tensor
    descent: Descent
    steps: tuple[KinkedSteps, ...] = ()
    miss: float = math.inf  # how far the closest mean gradient is from Ḡ, relative, over all parameters

    @property
    def label(self) -> Tensor:
        return self.descent.start.labels


class _FixedPoint:
    """x ← R(Ḡ − [Ḡ(x) − g(W̄(x), x)])."""

    def __init__(self, task: UpdateTask):
        """Takes the network to the mean weights."""
        self.task = task
        self.start = {name: p.to("cpu", torch.float64) for name, p in task.parameters.items()}
        self.chain = prepare(_at_mean_weights(task, self.start), task.network.image_shape)
        self.kinked = [layer.name for layer in self.chain.layers if layer.activation.has_kink]

    def run(self) -> list[_Iterate]:
        """The iterates; the last misses least."""
        iterates, history = [self.read(FIRST_NOISE_RATIO)], deque(maxlen=ANDERSON_DEPTH)
        while len(iterates) < MAX_ITERATIONS and not iterates[-1].descent.open_layers:
            last = iterates[-1]
            trials = [(share, steps) for share in NOISE_SHARES for steps in last.steps]
            for share, steps in trials:
                noise = min(max(share * last.miss, MIN_NOISE_RATIO), FIRST_NOISE_RATIO)
                new = self.read(noise, last, steps)
                history.append((last.image, new.image))
                new = min(new, self.accelerated(new, history), key=lambda one: one.miss)
                if new.miss < MIN_GAIN * last.miss:
                    iterates.append(new)
                    break
            else:
                break
        return iterates

    def read(self, noise: float, last: _Iterate | None = None, steps: KinkedSteps | None = None) -> _Iterate:
        """What the attack at the mean weights finds behind Ḡ less the drift of the steps, told of noise."""
        task, gradients, reach = self.task, dict(self.task.update), {}
        if steps is not None:
            at = task.training.mean_weights(self.start, steps.mean)
            mine = mean_gradient(task, at, last.image, last.label, steps.positive)
            gradients = {name: g - (steps.mean[name] - mine[name]) for name, g in gradients.items()}
            reach = dict(zip(self.kinked, steps.reach, strict=False))
        gradients = UpdateGradients(gradients, task.update.noise_std)
        noise_std = noise * rms(torch.cat([g.flatten() for g in gradients.values()])).item()
        try:
            received = receive(self.chain, gradients, noise_std=noise_std)
            received = replace(received, positive_shares=task.training.positive_shares, reach=reach)
            attack = Attack(self.chain, received, task.loss, pixels=task.pixels)
            attack, starts, _ = read(attack, 1, task.labels if last is None else last.label, task.seed)
            descents, _ = follow(attack, starts)
        except (GradientMismatchError, np.linalg.LinAlgError):
            if last is None:
                raise
            return replace(last, miss=math.inf)
        found = [self.simulated(_Iterate(attack.images(descent), descent)) for descent in descents]
        return min(found, key=lambda one: one.miss)

    def accelerated(self, one: _Iterate, history: Sequence[tuple[Tensor, Tensor]]) -> _Iterate:
        """The iterate moved as Anderson's method says from images before and after earlier steps."""
        before, after = (torch.stack([pair[i].flatten() for pair in history], 1) for i in range(2))
        change = after - before
        if one.miss == math.inf or change.shape[1] < 2:
            return one
        steps = torch.linalg.lstsq(change.diff(dim=1), change[:, -1:], driver="gelsd").solution
        image = after[:, -1:] - after.diff(dim=1) @ steps
        return self.simulated(replace(one, image=image.reshape(one.image.shape), steps=(), miss=math.inf))

    def simulated(self, one: _Iterate) -> _Iterate:
        """The iterate with the client's steps: on the image's own pattern, and on the one that the descent has read."""
        largest = one.image.abs().max().item()
        if not largest <= MAX_PIXEL_SIZE * self.task.pixels.width:
            return one
        read_shares = [one.descent.positive[name] for name in self.kinked]
        steps = simulated_steps(self.task, one.image, one.label, read_shares)
        steps.sort(key=lambda each: _miss(self.task, each.mean))
        if len(steps) > 1:
            settled = settled_steps(self.task, one.image, one.label, *steps, partial(_miss, self.task))
            steps = [settled, *steps] if settled is not steps[0] else steps
        return replace(one, steps=tuple(steps), miss=_miss(self.task, steps[0].mean))
