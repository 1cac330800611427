"""The images of a batch, weighed by their own gradient, each in the best of its twins.

How much of a misfit noise explains is measured by a parametric bootstrap: the images' own gradient, with errors of the
same size, goes through the same attack, and the result misses by as much as right images would (ours).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from rgap.attack.descent import Descent, descend
from rgap.attack.pattern import batch_on_pattern
from rgap.attack.problem import NOISE_RESIDUAL_FACTOR, Attack, Match, Weighed
from rgap.client import gradients_of
from rgap.head.hypothesis import Twin
from rgap.results import Candidate
from rgap.separation.joint_softmax import fit_and_refit
from rgap.separation.scales import refine_inputs
from rgap.shared_gradient import relative_residuals

MAX_NOISE_RESIDUAL = 0.05
"""Residual of a batch from which noise is no explanation, and no bootstrap is run."""


def weigh_batch(attack: Attack, descent: Descent) -> Weighed:
    """Weighs the images of a batch, each in the best of its twins."""
    chain, received, pixels, start = attack.chain, attack.received, attack.pixels, descent.start
    images = attack.images(descent)
    if start.layer and torch.isfinite(images).all():
        images = batch_on_pattern(chain, images, descent.positive)
    inputs = attack.inputs(descent, images)

    def candidate(b: int, twin: Twin) -> Candidate:
        own, image = {key: twin.factor * x[b : b + 1] for key, x in inputs.items()}, twin.factor * images[b : b + 1]
        residual, inside = math.nan if twin.residual is None else twin.residual, pixels.contains(image, attack.slack)
        return Candidate(
            image, torch.tensor([twin.label]), residual, inside, own, descent.reports, descent.open_layers,
            residual_allowed=received.tolerance,
        )  # fmt: skip

    def preference(one: Candidate) -> tuple[bool, float]:  # inside the pixel range first, then the darker
        return not one.in_pixel_range, one.images.abs().max().item()

    each = [sorted((candidate(b, twin) for twin in twins), key=preference) for b, twins in enumerate(start.twins)]
    best = [found[0] for found in each]
    joint = torch.cat([images[:0], *(one.images for one in best)])
    labels = torch.cat([start.labels[:0], *(one.labels for one in best)])
    match = Match(math.inf if len(joint) else 1.0, received.tolerance)
    if len(joint) and torch.isfinite(joint).all():
        found = len(joint) / start.batch_size  # images that were not found contribute nothing
        mine = {key: found * g for key, g in attack.gradients(joint, labels).items()}
        residual = max(relative_residuals(mine, received.usable).values())
        match = _residual_under_noise(attack, descent, images, residual)
    numbers = {"residual_allowed": match.allowed, "predicted_error": match.error}
    whole = Candidate(
        joint, labels, match.residual, all(one.in_pixel_range for one in best),
        {key: torch.cat([x[:0], *(one.layer_inputs[key] for one in best)]) for key, x in inputs.items()},
        descent.reports, descent.open_layers, **numbers,
    )  # fmt: skip
    if start.layer:  # the images' shares of the gradients of the layers below cannot be separated
        each = [[replace(one, gradient_residual=match.residual, **numbers) for one in found] for found in each]
    unconfirmed = start.ranks[0] < start.batch_size and chain.homogeneous and chain.layers[-1].output_shape[0] == 1
    return Weighed(start, whole, tuple(map(tuple, each)), unconfirmed)


def _residual_under_noise(attack: Attack, descent: Descent, images: Tensor, residual: float) -> Match:
    """How much of a batch's residual the gradient's own noise explains, by a bootstrap on the images that were found.

    The format's tolerance alone where the residual is below it or beyond `MAX_NOISE_RESIDUAL`, layers are left open, or
    no layer lies below the start that could amplify errors.
    """
    chain, received, start = attack.chain, attack.received, descent.start
    in_doubt = received.tolerance < residual < MAX_NOISE_RESIDUAL
    if not in_doubt or descent.open_layers or start.layer == 0:
        return Match(residual, received.tolerance)
    noisy = replace(received, gradients=_as_shared(attack, images, start.labels))
    fit = fit_and_refit if attack.loss == "cross_entropy" else partial(refine_inputs, loss=attack.loss)
    features = descent.layer_inputs[chain.layers[start.layer].name].flatten(1)
    head = fit(chain.layers[start.layer :], noisy.gradients, features, start.labels)
    again = descend(chain, noisy, replace(start, x=head.x, dx=head.dx), close=attack.close)
    moved = attack.images(again)
    if again.open_layers or not torch.isfinite(moved).all():
        return Match(residual, received.tolerance, math.inf)
    moved = batch_on_pattern(chain, moved, again.positive)
    expected = max(relative_residuals(attack.gradients(moved, start.labels), noisy.usable).values())
    error = (moved - images).flatten(1).square().mean(1).sqrt().max().item()
    allowed = min(NOISE_RESIDUAL_FACTOR * expected, MAX_NOISE_RESIDUAL)
    return Match(residual, max(received.tolerance, allowed), error)


def _as_shared(attack: Attack, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradient that a client with these images would share, in the arithmetic of the shared one and as noisy.

    Errors of a client's own forward and backward pass are no white noise on the gradient, and are amplified more.
    """
    chain, received = attack.chain, attack.received
    single = all(torch.equal(g.float().double(), g) for g in received.gradients.values())
    dtype = torch.float32 if single else torch.float64
    parameters = {name: p.to(dtype) for name, p in chain.parameters.items()}
    found = gradients_of(chain.model, parameters, images.to(dtype), labels, attack.loss)
    found = {name: g.to("cpu", torch.float64) for name, g in found.items()}
    if received.precision <= 2 * torch.finfo(dtype).eps:
        return found
    return {name: g + received.noise[name] for name, g in found.items()}
