"""Virtual constraints, solved: the layer before a rank-deficient one supplies the missing equations.

A deficient layer determines x up to the t in x = x_mn + N t. The layer before requires that σ⁻¹(x) lies in the range of
its W, and that its own gradient is K(δz′) x′ with δz′ = σ′(z′) ∘ δx. For LeakyReLU both are linear in t once the signs
of x are known, and exact where these are right. The paper counts such equations; here they are solved (ours).

The signs are not guessed one by one. Where the range of W has equations enough, Newton's method mostly settles on them
(`newton`). Else every entry of x has a Gaussian belief N(m, v), under which σ⁻¹ and σ′ are replaced by their best
linear fits (`linearisation`). The fits' residuals are noise of known covariance, and one step of generalised least
squares gives the next belief, its variance scaled by the step's own χ² where that exceeds 1. As v falls the step
becomes the linear system on one piece of σ, which is solved at the end, alone, and certified (`certificate`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.equations import LayerSolution
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.network.layer import Layer
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient
from rgap.virtual.certificate import VirtualSolution, certify
from rgap.virtual.inference import DeficientLayer, assemble, update
from rgap.virtual.linearisation import fit, flattened
from rgap.virtual.newton import MAX_OPEN_SHARE, settled_on_range
from rgap.virtual.previous import previous_factors, smooth_image_rows

ERROR_AMPLIFICATION = 5.0  # rough error of a pre-activation, over the gradient's, through the layers above and σ⁻¹
MAX_STEPS = 40  # limit on the steps of one attempt
PRIOR_WIDENING = 30.0  # standard deviation of the first belief on weak directions, in units of the layer's own for them
SETTLED_SHARE = 0.01  # standard deviation, over a belief's noise, from which a layer needs no belief
WIDE_SPREAD = 0.01  # standard deviation of a belief, over the spread of x, down to which its rows are made in float32
SHARP_SPREAD = 1e-3  # the same from which hardly a sign is wrong, so that a certificate is tried
MAX_HOPELESS_UNKNOWNS = 300  # unknowns up to which a system that is short of equations is approached within a second
MAX_APPROACHED_UNKNOWNS = 1200  # the same of other systems, some ten seconds; no larger one has been closed


def close_by_previous(
    before: Layer, received: SharedGradient, solution: LayerSolution, z: Tensor, dx: Tensor, *, full: bool = True
) -> VirtualSolution | None:
    """Determines a deficient layer's input of one image within its null space, by the layer before it.

    z is the deficient layer's pre-activation, dx the gradient by its input in any shape. Unless `full`, no system is
    approached that is short of equations, for a rough picture, or takes minutes. None where there is no null basis, or
    the layer before has groups, no weight or an activation without inverse, is too large, is itself rank-deficient, or
    has nothing to add.
    """
    if solution.null_basis is None or not before.activation.one_to_one:
        return None
    further = max(before.unknowns - math.prod(before.output_shape), 0)
    if not full and solution.null_basis.shape[1] + further > MAX_APPROACHED_UNKNOWNS:
        return None
    factors = previous_factors(before)
    is_shared = not set(before.weight_names) & set(received.absent)
    if factors is None or not (is_shared or factors.left.size):
        return None
    noise = ERROR_AMPLIFICATION * max(received.precision, FLOAT64_FLOOR)
    middle = before.activation.forward(torch.zeros(before.output_shape, dtype=torch.float64))
    x, null = solution.x.flatten(), solution.null_basis
    problem = DeficientLayer(
        x=(x + null @ (null.T @ (middle.flatten() - x))).numpy(),
        N=torch.cat([solution.null_basis, solution.weak_basis], 1).numpy(),
        known=(noise * z.square().mean().sqrt() * solution.weak_gain).numpy(),
        activation=flattened(before.activation, before.output_shape),
        previous=factors,
        G=before.gradient(received.gradients).numpy() if is_shared else None,
        dx=dx.reshape(before.output_shape).numpy(),
        noise=noise,
    )
    try:
        return solve_virtual(problem, reads_image=before.input_shape[0] in (1, 3), full=full)
    except np.linalg.LinAlgError:  # a wrong hypothesis, whose pre-activations overflow
        return None


def solve_virtual(problem: DeficientLayer, *, reads_image: bool = False, full: bool = True) -> VirtualSolution | None:
    """Recovers a rank-deficient layer's input from its affine solution set and the layer before it.

    Where the layer before reads the image, `smooth_image_rows` are a start for systems with little surplus. Raises
    LinAlgError if a belief is so far off that the equations overflow. Unless `full`, None for a large system that is
    short of equations.
    """
    if steps := settled_on_range(problem):
        beliefs, image = [problem.x + problem.N @ t for t in steps], np.zeros(problem.previous.layer.unknowns)
        solution = certify(problem, steps[-1], image, _channels(problem), beliefs)
        if solution.certified:
            return solution
    beliefs = []
    for channels, rows in _plan(problem, reads_image):
        independent = 0 if problem.G is None else channels.size * (problem.G[0].size - problem.homogeneous)
        room = problem.previous.left.shape[1] + independent
        hopeless = room + problem.known.size - problem.unknowns < CERTIFICATE_SURPLUS
        if hopeless and not full and problem.unknowns > MAX_HOPELESS_UNKNOWNS:
            return None
        for t, image in _attempt(problem, channels, rows, hopeless, beliefs):
            solution = certify(problem, t, image, _channels(problem), beliefs)
            if solution.certified:
                return solution
        if hopeless:
            break
    return solution


def _plan(problem: DeficientLayer, reads_image: bool) -> list[tuple[NDArray, tuple | None]]:
    """Attempts by cost: with the range of W alone where that suffices, then with the gradient, first from a prior."""
    supplied = problem.previous.spare
    channels, deficit = _channels(problem), problem.N.shape[1] - problem.known.size
    plan = [(channels[:0], None)] if deficit <= MAX_OPEN_SHARE * supplied else []
    gradients = 0 if problem.G is None else problem.G.size
    tight = deficit + problem.previous.null.shape[1] > 0.7 * (problem.previous.left.shape[1] + gradients)
    if reads_image and tight:
        plan.append((channels, smooth_image_rows(problem.previous)))
    return [*plan, (channels, None)]


def _channels(problem: DeficientLayer, most: int = 4000) -> NDArray:
    """Output channels whose gradient is used: all, or in large layers enough for three equations per unknown."""
    if problem.G is None:
        return np.arange(0)
    outputs, taps = problem.G.shape[0], problem.G[0].size
    enough = outputs if outputs * taps <= 1000 else max(1, min(outputs, -(-3 * problem.unknowns // taps), most // taps))
    return np.linspace(0, outputs - 1, enough).round().astype(int)


def _attempt(
    problem: DeficientLayer, channels: NDArray, prior, hopeless: bool, beliefs: list
) -> Iterator[tuple[NDArray, NDArray]]:
    """Steps until the belief is as narrow as the noise, or stalls; the prior takes part in the first steps.

    Yields the belief's mean and the image before it: the last, and before it the first that is sharp enough for a
    certificate. Ill-conditioned directions that the layer itself knows better than that take no part.
    """
    rms, noise = problem.spread, max(problem.noise, 1e-7)  # a lower one collapses the belief too soon
    whole = problem
    if whole.known.size and whole.known.max() < SETTLED_SHARE * noise * rms:
        problem = replace(whole, N=whole.N[:, : -whole.known.size], known=whole.known[:0])
    previous, N, rough = problem.previous, problem.N, problem.rough
    m, t, y = problem.x, np.zeros(N.shape[1]), np.zeros(previous.null.shape[1])
    open_ = t.size - problem.known.size
    at_first = np.concatenate([np.full(open_, rms), np.minimum(PRIOR_WIDENING * problem.known, rms)])
    v = (rough**2 @ at_first.astype(np.float32) ** 2).astype(float)
    scales = np.concatenate([np.full(t.size, rms), np.full(y.size, 3 * rms)])
    image, spread, best, waited, tried = np.full(previous.layer.unknowns, 0.5), rms, np.inf, 0, False
    if prior is None:
        first = fit(problem.activation, m, v)
        image = previous.lift(first.alpha + first.beta * m, y)
    for step in range(MAX_STEPS):
        if prior is not None and not hopeless and (step >= 10 or (step >= 4 and spread < 0.02 * rms)):
            prior = None
        fitted = fit(problem.activation, m, v)
        rows = assemble(problem, fitted, m, image, channels, prior, noise, wide=spread > WIDE_SPREAD * rms)
        theta, v, chi2, eps = update(rows, fitted, rough, scales)
        move, t, y = np.linalg.norm(theta[: t.size] - t), theta[: t.size], theta[t.size :]
        v = v * max(1.0, chi2)
        spread, m = float(np.sqrt(v.mean())), problem.x + N @ t
        beliefs.append(m)
        if channels.size or not problem.activation.homogeneous:
            image = previous.lift(fitted.alpha + fitted.beta * m + eps, y)
        sharp, still = spread < 20 * noise * rms, move < 0.1 * spread * np.sqrt(len(m))
        waited = 0 if spread < 0.9 * best else waited + 1
        best = min(best, spread)
        fits, early = prior is None and chi2 < 100, spread < SHARP_SPREAD * rms and problem.activation.homogeneous
        done = (fits and (sharp or still)) or (hopeless and step >= 4 and still) or waited > 8 or step == MAX_STEPS - 1
        if done or (fits and early and not tried):
            yield np.pad(t, (0, whole.N.shape[1] - t.size)), image
            tried = True
        if done:
            return
