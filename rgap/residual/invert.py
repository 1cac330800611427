"""What lies below a walk as one nonlinear least squares in the image: Levenberg–Marquardt with conjugate gradients.

Residuals are what the walk knows: values of pre-activations where their ReLU is on, max(z, 0) where it is off, and the
gradient equations K(δz) x = vec(G) of the layers that read the tensor at which it ended, linear in that tensor (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rgap.linalg import rms
from rgap.network.nodes import Graph
from rgap.residual.bits import Known
from rgap.residual.walk import Walk

START_STD = 1e-3  # noise around the middle of the pixel range at which the iterations start, in its widths
START_DAMPING = 1e-2  # first damping, relative to the mean eigenvalue of JᵀJ

DAMPING_DOWN, DAMPING_UP = 0.2, 5.0

MIN_GAIN_RATIO = 1e-3  # gain over predicted gain from which a step is taken
GOOD_GAIN_RATIO = 0.5  # gain over predicted gain from which the damping is reduced
EXTENDING_GAIN_RATIO = 0.9  # the same from which a longer step is tried
SLOW_GAIN = 0.999  # sum of squares relative to the last from which on nothing is gained any more
SETTLED_CHANGE = 1e-5  # relative size of the last step below which a refused one ends the iterations
MAX_REFUSED = 8  # steps refused in a row that end them
MAX_STEPS = 60  # steps taken or refused
MAX_PRODUCTS = 30  # conjugate gradient iterations in a step
PRODUCTS_TOLERANCE = 1e-2  # relative residual of the normal equations at which they end
MAX_CONVERGED_MISFIT = 1e-3  # relative misfit up to which the iterations have converged; the gradient decides the rest


@dataclass(frozen=True)
class Linearised:
    """The residuals of a candidate, and their Jacobian by functions."""

    residuals: list[Tensor]
    push: Callable[[Tensor], list[Tensor]]
    pull: Callable[[list[Tensor]], Tensor]

    @cached_property
    def size(self) -> float:
        """Sum of the residuals' squares."""
        return sum(r.square().sum().item() for r in self.residuals)


@dataclass(frozen=True)
class Below:
    """Everything that is known of the part of a network below a walk."""

    graph: Graph
    single: Graph  # the same in float32
    names: list[str]  # of its nodes
    targets: dict[str, Known]  # tensors of which something is known
    source: str  # the tensor at which the walk ended
    equations: dict[str, tuple[Tensor, Tensor]]  # layers that read it -> δz and G, divided by the norm of G

    def known_numbers(self) -> int:
        """Entries that are known, and independent gradient equations by the size of M, at most."""
        entries = sum(int(known.everywhere.sum()) for known in self.targets.values())
        return entries + sum(min(G.numel(), self.graph.nodes[n].layer.unknowns) for n, (_, G) in self.equations.items())

    def linearise(self, image: Tensor) -> Linearised:
        """Residuals in float64, the Jacobian in float32; below a bound nothing is missed."""
        values = self.graph.forward({self.graph.image: image}, self.names)
        slopes = {
            n: s if s is None or not s.is_floating_point() else s.float() for n, s in self.graph.slopes(values).items()
        }
        missed = {n: values[n] - known.value for n, known in self.targets.items()}
        active = {n: known.everywhere | (missed[n] > 0) for n, known in self.targets.items()}
        weights = {n: 1 / known.value.norm().item() for n, known in self.targets.items()}
        residuals = [weights[n] * missed[n] * active[n] for n in self.targets]
        for n, (dz, G) in self.equations.items():
            residuals.append(self.graph.nodes[n].layer.weight_gradient(values[self.source], dz) - G)
        layers = [(self.single.nodes[n].layer, dz.float()) for n, (dz, _) in self.equations.items()]

        def push(change: Tensor) -> list[Tensor]:
            moved = self.single.push(slopes, change.float(), self.names)
            found = [weights[n] * moved[n] * active[n] for n in self.targets]
            return found + [layer.weight_gradient(moved[self.source], dz) for layer, dz in layers]

        def pull(rest: list[Tensor]) -> Tensor:
            seeds = {n: weights[n] * r.float() * active[n] for n, r in zip(self.targets, rest, strict=False)}
            for (layer, dz), r in zip(layers, rest[len(self.targets) :], strict=True):
                part = replace(layer, weight=r.float(), cache={}).adjoint(dz)
                seeds[self.source] = seeds.get(self.source, 0) + part
            return self.single.pull(slopes, seeds, self.names)[self.graph.image]

        return Linearised(residuals, push, pull)


def below(walk: Walk) -> Below:
    """Gathers what is known at the end of a walk and below."""
    graph, found = walk.graph, {}

    def gather(name: str) -> None:
        for reader in graph.consumers[name]:
            known = walk.known(reader)
            if known is not None:
                found[reader] = known
            elif reader != walk.top:
                gather(reader)

    here = walk.known(walk.frontier)
    if here is not None:
        found[walk.frontier] = here
    if here is None or here.mask is not None:
        gather(walk.frontier)
    names = graph.below({walk.frontier, *found})
    sides = {name: (walk.deltas[name], walk.gradient(name)) for name in walk.readers(walk.frontier)}
    equations = {name: (dz / G.norm(), G / G.norm()) for name, (dz, G) in sides.items()}
    return Below(graph, graph.to(torch.float32), names, found, walk.frontier, equations)


@dataclass(frozen=True)
class Inverted:
    """An image (C, H, W), how far it misses what is known relative to its size, and what it took."""

    image: Tensor
    misfit: float
    steps: int
    converged: bool


def invert(problem: Below, start: Tensor) -> Inverted:
    """Levenberg–Marquardt from a start (C, H, W)."""
    image, at = start, problem.linearise(start)
    probe = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    damping = START_DAMPING * sum(r.square().sum().item() for r in at.push(probe)) / image.numel()
    moved, steps, refused = math.inf, 0, 0
    while steps < MAX_STEPS:
        steps += 1
        change, predicted = _conjugate_gradients(at, -at.pull(at.residuals), damping)
        change = change.double()
        there = problem.linearise(image + change)
        gain = (at.size - there.size) / max(predicted, 1e-300)
        if gain > MIN_GAIN_RATIO:
            while gain > EXTENDING_GAIN_RATIO:  # further than the linear model says
                farther = problem.linearise(image + 2 * change)
                if not farther.size < there.size:
                    break
                change, there = 2 * change, farther
            moved = (change.norm() / image.norm()).item()
            slow = there.size > SLOW_GAIN * at.size
            image, at, refused = image + change, there, 0
            damping *= DAMPING_DOWN if gain > GOOD_GAIN_RATIO else 1.0
            if slow:
                break
        else:
            damping, refused = damping * DAMPING_UP, refused + 1
            if refused == MAX_REFUSED or moved < SETTLED_CHANGE:
                break
    misfit = (at.size / len(at.residuals)) ** 0.5
    return Inverted(image, misfit, steps, misfit < MAX_CONVERGED_MISFIT)


def _conjugate_gradients(at: Linearised, b: Tensor, damping: float) -> tuple[Tensor, float]:
    """(JᵀJ + damping) change = b to a tolerance, and the gain that the linear model predicts."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    size = first = r.square().sum()
    for _ in range(MAX_PRODUCTS):
        if not size > PRODUCTS_TOLERANCE**2 * first:
            break
        q = at.pull(at.push(p)) + damping * p
        alpha = size / (p * q).sum()
        x, r = x + alpha * p, r - alpha * q
        size, last = r.square().sum(), size
        p = r + (size / last) * p
    # ‖r₀‖² − ‖r₀ + J x‖² = 2 bᵀx − xᵀ JᵀJ x, and JᵀJ x = b − r − damping x
    return x, ((x * b).sum() + (x * r).sum() + damping * x.square().sum()).item()


def draw_error(problem: Below, found: Inverted) -> float:
    """Root-mean-square error of the image for one draw of noise as large as what it misses of every part."""
    at, generator = problem.linearise(found.image), torch.Generator().manual_seed(0)
    draws = [rms(r) * torch.randn(r.shape, generator=generator) for r in at.residuals]
    return rms(_conjugate_gradients(at, at.pull(draws), 0.0)[0].double()).item()
