"""Candidates: the images of a descent, weighed by their own gradient and by what noise makes of it.

A candidate must reproduce the shared gradient as well as that is known. Where it misses the gradient by more than the
format explains, either it is wrong or the layers amplify the format's errors. What they make of one image, its noise
probe predicts. For a batch it is tried out (a parametric bootstrap): the candidate's own gradient, with errors of the
same size, goes through the same attack, and what comes back misses by as much as a right candidate would (both ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from rgap.attack.descent import Closer, Descent, descend
from rgap.attack.pattern import batch_on_pattern, project_to_pattern
from rgap.client import gradients_of
from rgap.head.hypothesis import Start, Twin
from rgap.network.layer import Chain
from rgap.results import Candidate, PixelRange
from rgap.separation.joint_softmax import fit_and_refit
from rgap.separation.scales import refine_inputs
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient, relative_residuals

NOISE_RESIDUAL_FACTOR = 5.0
"""Times the predicted error up to which a miss is put down to noise."""

MAX_ALLOWED_RESIDUAL = 0.5
"""Residual from which an image's gradient is not reproduced, however large the noise is."""

MAX_NOISE_RESIDUAL = 0.05
"""Residual of a batch from which noise is no excuse and nothing is tried out."""

MAX_PATTERN_FLIPS = 30
"""Units of an image that may lie on another piece than was decided when it goes forward again; noise flips more."""

MAX_PIXEL_SLACK = 0.1
"""How far outside the pixel range a pixel may lie at most by the gradient's precision, in widths of the range."""


@dataclass(frozen=True)
class Weighed:
    """A start that was followed down, weighed.

    Attributes:
        start: The start.
        joint: The candidate of all images together.
        each: For each image of a batch its candidates, one for each of its twins, those in the pixel range first.
        unconfirmed: Whether the scales of a batch go by its size alone, and the gradient's rank does not confirm that.
    """

    start: Start
    joint: Candidate
    each: tuple[tuple[Candidate, ...], ...] = ()
    unconfirmed: bool = False


def weigh(
    chain: Chain,
    received: SharedGradient,
    start: Start,
    descent: Descent,
    loss: str,
    pixels: PixelRange,
    close: Closer | None = None,
) -> Weighed:
    """Compares the gradient that the images of a descent have with the shared one, and with what noise makes of both.

    Args:
        chain: The prepared network.
        received: The gradients.
        start: Where the descent started.
        descent: Down to the images.
        loss: A name in `rgap.client.LOSSES`.
        pixels: The values that a pixel may have.
        close: As in the descent, for a batch on which noise is tried out.
    """
    if start.batch_size > 1:
        return _weigh_batch(chain, received, start, descent, loss, pixels, close)
    name = chain.layers[0].name
    image = descent.layer_inputs[name].reshape(1, *chain.image_shape)
    match = _Match(math.inf, received.tolerance)
    if torch.isfinite(image).all():
        match = _match(chain, received, start, descent, loss, image)
        moved = _on_decided_pattern(chain, descent, image) if match.residual > match.allowed else None
        if moved is not None:
            pairs = (image, match), (moved, _match(chain, received, start, descent, loss, moved))
            image, match = min(pairs, key=lambda pair: pair[1].residual)
    reports = descent.reports
    if match.error is not None:
        reports = tuple(replace(r, predicted_error=match.excess * r.predicted_error) for r in reports)
    slack = max(_slack(received, pixels), min(NOISE_RESIDUAL_FACTOR * (match.error or 0.0), pixels.width / 2))
    inputs = {**descent.layer_inputs, name: image.reshape(descent.layer_inputs[name].shape)}
    inside = pixels.contains(image, slack)
    return Weighed(start, Candidate(
        image, start.labels, match.residual, inside, inputs, reports, descent.open_layers,
        descent.beliefs, match.allowed, match.error,
    ))  # fmt: skip


def _slack(received: SharedGradient, pixels: PixelRange) -> float:
    """How far outside the range a pixel may lie by the gradient's precision."""
    return pixels.width * min(received.tolerance, MAX_PIXEL_SLACK)


@dataclass(frozen=True)
class _Match:
    """How the images' gradient compares with the shared one.

    Attributes:
        residual: By how much it misses.
        allowed: By how much it may.
        error: Predicted root-mean-square error of the image, of a batch that of the worst one; None where nothing
            predicts it.
        excess: How many times more noise there was than was known of, at least 1.
    """

    residual: float
    allowed: float
    error: float | None = None
    excess: float = 1.0


def _match(chain: Chain, received: SharedGradient, start: Start, descent: Descent, loss: str, image: Tensor) -> _Match:
    """Compares the gradients of one image, and of the image as the noise may have made it."""
    labels, probe = start.labels, descent.probe
    mine = gradients_of(chain.model, chain.parameters, image, labels, loss)
    misses = relative_residuals(mine, received.usable)
    if probe is None:
        return _Match(max(misses.values()), received.tolerance)
    noisy = gradients_of(chain.model, chain.parameters, image + probe.x.reshape(image.shape), labels, loss)
    noisy = {name: noisy[name].cpu() + received.entry_std[name] for name in misses}
    expected = relative_residuals(noisy, {name: mine[name].cpu() for name in misses})
    allowed = min(NOISE_RESIDUAL_FACTOR * max(expected.values()), MAX_ALLOWED_RESIDUAL)
    # What is missed by more than the noise that was known of shows that there was more of it.
    excess = max(1.0, median(miss / max(expected[name], 1e-300) for name, miss in misses.items()))
    return _Match(max(misses.values()), max(received.tolerance, allowed), excess * probe.error, excess)


def _on_decided_pattern(chain: Chain, descent: Descent, image: Tensor) -> Tensor | None:
    """The image with its units on the pieces that the descent has decided on, None where its error does not allow that.

    A unit whose pre-activation is smaller than its error may lie on the other piece when the image goes forward again;
    one in ten thousand makes the gradient miss by a per cent, and is no evidence against the image.
    """
    if descent.probe is None or descent.open_layers:
        return None
    moved = project_to_pattern(chain.layers[:-1], image, descent.positive, MAX_PATTERN_FLIPS)
    by = (moved - image).square().mean().sqrt().item()
    size = image.square().mean().sqrt().item()
    return moved if 0 < by <= NOISE_RESIDUAL_FACTOR * max(descent.probe.error, FLOAT64_FLOOR * size) else None


def _weigh_batch(
    chain: Chain, received: SharedGradient, start: Start, descent: Descent, loss: str, pixels: PixelRange,
    close: Closer | None,
) -> Weighed:  # fmt: skip
    """Weighs the images of a batch, each in the best of its twins."""
    name, slack = chain.layers[0].name, _slack(received, pixels)
    images = descent.layer_inputs[name].reshape(len(start.x), *chain.image_shape)
    if start.layer and torch.isfinite(images).all():
        images = batch_on_pattern(chain, images, descent.positive)
    inputs = {**descent.layer_inputs, name: images.reshape(descent.layer_inputs[name].shape)}

    def candidate(b: int, twin: Twin) -> Candidate:
        own, image = {key: twin.factor * x[b : b + 1] for key, x in inputs.items()}, twin.factor * images[b : b + 1]
        inside, residual = pixels.contains(image, slack), math.nan if twin.residual is None else twin.residual
        return Candidate(
            image, torch.tensor([twin.label]), residual, inside, own, descent.reports, descent.open_layers,
            residual_allowed=received.tolerance,
        )  # fmt: skip

    each = [sorted((candidate(b, twin) for twin in twins), key=_preference) for b, twins in enumerate(start.twins)]
    best = [found[0] for found in each]
    joint = torch.cat([images[:0], *(one.images for one in best)])
    labels = torch.cat([start.labels[:0], *(one.labels for one in best)])
    match = _Match(math.inf if len(joint) else 1.0, received.tolerance)
    if len(joint) and torch.isfinite(joint).all():
        mine = gradients_of(chain.model, chain.parameters, joint, labels, loss)
        found = len(joint) / start.batch_size  # images that were not found add nothing
        residual = max(relative_residuals({key: found * g for key, g in mine.items()}, received.usable).values())
        match = _residual_under_noise(chain, received, start, descent, images, residual, loss, close)
    numbers = {"residual_allowed": match.allowed, "predicted_error": match.error}
    whole = Candidate(
        joint, labels, match.residual, all(one.in_pixel_range for one in best),
        {key: torch.cat([x[:0], *(one.layer_inputs[key] for one in best)]) for key, x in inputs.items()},
        descent.reports, descent.open_layers, **numbers,
    )  # fmt: skip
    if start.layer:  # what each image adds to the gradients of the layers below cannot be told apart
        each = [[replace(one, gradient_residual=match.residual, **numbers) for one in found] for found in each]
    unconfirmed = start.ranks[0] < start.batch_size and chain.homogeneous and chain.layers[-1].output_shape[0] == 1
    return Weighed(start, whole, tuple(map(tuple, each)), unconfirmed)


def _preference(candidate: Candidate) -> tuple[bool, float]:
    """Of the twins of one image, those inside the pixel range come first, then the darker ones."""
    return not candidate.in_pixel_range, candidate.images.abs().max().item()


def _residual_under_noise(
    chain: Chain, received: SharedGradient, start: Start, descent: Descent, images: Tensor, residual: float, loss: str,
    close: Closer | None,
) -> _Match:  # fmt: skip
    """How much of a batch's residual the gradient's own noise explains, tried out on the images that were found.

    The format's tolerance alone where the residual is below it or beyond `MAX_NOISE_RESIDUAL`, layers are left open, or
    no layer lies below the start that could amplify errors.
    """
    in_doubt = received.tolerance < residual < MAX_NOISE_RESIDUAL
    if not in_doubt or descent.open_layers or start.layer == 0:
        return _Match(residual, received.tolerance)
    noisy = replace(received, gradients=_as_shared(chain, received, images, start.labels, loss))
    fit = fit_and_refit if loss == "cross_entropy" else partial(refine_inputs, loss=loss)
    features = descent.layer_inputs[chain.layers[start.layer].name].flatten(1)
    head = fit(chain.layers[start.layer :], noisy.gradients, features, start.labels)
    again = descend(chain, noisy, replace(start, x=head.x, dx=head.dx), close=close)
    moved = again.layer_inputs[chain.layers[0].name].reshape(images.shape)
    if again.open_layers or not torch.isfinite(moved).all():
        return _Match(residual, received.tolerance, math.inf)
    moved = batch_on_pattern(chain, moved, again.positive)
    mine = gradients_of(chain.model, chain.parameters, moved, start.labels, loss)
    expected = NOISE_RESIDUAL_FACTOR * max(relative_residuals(mine, noisy.usable).values())
    error = (moved - images).flatten(1).square().mean(1).sqrt().max().item()
    return _Match(residual, max(received.tolerance, min(expected, MAX_NOISE_RESIDUAL)), error)


def _as_shared(chain: Chain, received: SharedGradient, images: Tensor, labels: Tensor, loss: str) -> dict[str, Tensor]:
    """The gradient that a client with these images would share, in the arithmetic of the shared one and as noisy.

    Errors of a client's own forward and backward pass are no white noise on the gradient, and are amplified more.
    """
    single = all(torch.equal(g.float().double(), g) for g in received.gradients.values())
    dtype = torch.float32 if single else torch.float64
    parameters = {name: p.to(dtype) for name, p in chain.parameters.items()}
    found = gradients_of(chain.model, parameters, images.to(dtype), labels, loss)
    found = {name: g.to("cpu", torch.float64) for name, g in found.items()}
    if received.precision <= 2 * torch.finfo(dtype).eps:
        return found
    return {name: g + received.noise[name] for name, g in found.items()}
