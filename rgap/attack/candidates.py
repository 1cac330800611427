"""Candidates: the images of a descent, weighed by their own gradient and by the effect of noise on it.

A candidate must reproduce the shared gradient to within the gradient's own errors. Where it misses by more than the
format explains, either it is wrong or the layers amplify those errors. For one image the noise probe predicts by how
much. For a batch a parametric bootstrap measures it: the candidate's own gradient, with errors of the same size, goes
through the same attack, and the result misses by as much as a right candidate would (both ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
"""Multiple of the predicted residual up to which a residual is attributed to noise."""

MAX_ALLOWED_RESIDUAL = 0.5
"""Residual from which an image's gradient is not reproduced, however large the noise is."""

MAX_NOISE_RESIDUAL = 0.05
"""Residual of a batch from which noise is no explanation, and no bootstrap is run."""

MAX_PATTERN_FLIPS = 30
"""Units of an image that may lie on another piece than was decided when it goes forward again; noise flips more."""

MAX_PIXEL_SLACK = 0.1
"""Largest distance outside the pixel range that the gradient's precision excuses, in widths of the range."""


@dataclass(frozen=True)
class Attack:
    """What all steps of one attack share.

    Attributes:
        chain: The prepared network.
        received: The gradients.
        loss: A name in `rgap.client.LOSSES`.
        close: What may close rank-deficient layers; None leaves them open.
        pixels: The values that a pixel may have.
    """

    chain: Chain
    received: SharedGradient
    loss: str
    close: Closer | None = None
    pixels: PixelRange = field(default_factory=PixelRange)

    def gradients(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The gradient that a client with these images (B, C, H, W) would share, by parameter name."""
        return gradients_of(self.chain.model, self.chain.parameters, images, labels, self.loss)

    def images(self, descent: Descent) -> Tensor:
        """The recovered input of the first layer, (B, C, H, W)."""
        return descent.layer_inputs[self.chain.layers[0].name].reshape(len(descent.start.x), *self.chain.image_shape)

    def inputs(self, descent: Descent, images: Tensor) -> dict[str, Tensor]:
        """The recovered inputs by layer name, with these images in place of the first layer's."""
        name = self.chain.layers[0].name
        return {**descent.layer_inputs, name: images.reshape(descent.layer_inputs[name].shape)}

    @property
    def slack(self) -> float:
        """How far outside the range a pixel may lie by the gradient's precision."""
        return self.pixels.width * min(self.received.tolerance, MAX_PIXEL_SLACK)


@dataclass(frozen=True)
class Weighed:
    """The candidates of a descent, compared with the shared gradient.

    Attributes:
        start: Where the descent started.
        joint: The candidate of all images together.
        each: For each image of a batch its candidates, one for each of its twins, those in the pixel range first.
        unconfirmed: Whether the scales of a batch rest on its size alone, without confirmation by the gradient's rank.
    """

    start: Start
    joint: Candidate
    each: tuple[tuple[Candidate, ...], ...] = ()
    unconfirmed: bool = False


@dataclass(frozen=True)
class _Match:
    """How the images' gradient compares with the shared one.

    Attributes:
        residual: The largest relative residual of a parameter's gradient.
        allowed: The residual up to which the images are consistent.
        error: Predicted root-mean-square error of the image, of a batch that of the worst one; None without prediction.
        excess: Ratio of the noise to that assumed in the descent, at least 1.
    """

    residual: float
    allowed: float
    error: float | None = None
    excess: float = 1.0


def weigh(attack: Attack, descent: Descent) -> Weighed:
    """Compares the gradient of a descent's images with the shared one, and with the effect of noise on both."""
    if descent.start.batch_size > 1:
        return _weigh_batch(attack, descent)
    received, labels, image = attack.received, descent.start.labels, attack.images(descent)
    match = _Match(math.inf, received.tolerance)
    if torch.isfinite(image).all():
        match = _match(attack, descent, image)
        moved = _on_decided_pattern(attack.chain, descent, image) if match.residual > match.allowed else None
        if moved is not None:
            pairs = (image, match), (moved, _match(attack, descent, moved))
            image, match = min(pairs, key=lambda pair: pair[1].residual)
    reports = descent.reports
    if match.error is not None:
        reports = tuple(replace(r, predicted_error=match.excess * r.predicted_error) for r in reports)
    by_noise = min(NOISE_RESIDUAL_FACTOR * (match.error or 0.0), attack.pixels.width / 2)
    inside = attack.pixels.contains(image, max(attack.slack, by_noise))
    return Weighed(descent.start, Candidate(
        image, labels, match.residual, inside, attack.inputs(descent, image), reports, descent.open_layers,
        descent.beliefs, match.allowed, match.error,
    ))  # fmt: skip


def _match(attack: Attack, descent: Descent, image: Tensor) -> _Match:
    """Compares the gradients of one image, and of the image as the noise may have changed it."""
    received, labels, probe = attack.received, descent.start.labels, descent.probe
    mine = attack.gradients(image, labels)
    misses = relative_residuals(mine, received.usable)
    if probe is None:
        return _Match(max(misses.values()), received.tolerance)
    noisy = attack.gradients(image + probe.x.reshape(image.shape), labels)
    noisy = {name: noisy[name].cpu() + received.entry_std[name] for name in misses}
    expected = relative_residuals(noisy, {name: mine[name].cpu() for name in misses})
    allowed = min(NOISE_RESIDUAL_FACTOR * max(expected.values()), MAX_ALLOWED_RESIDUAL)
    # Residuals above those predicted show that there was more noise than the descent assumed.
    excess = max(1.0, median(miss / max(expected[name], 1e-300) for name, miss in misses.items()))
    return _Match(max(misses.values()), max(received.tolerance, allowed), excess * probe.error, excess)


def _on_decided_pattern(chain: Chain, descent: Descent, image: Tensor) -> Tensor | None:
    """The image moved onto the activation pattern that the descent decided, None where that exceeds its error.

    A unit whose pre-activation is smaller than its error may lie on the other piece when the image goes forward again;
    one in ten thousand changes the gradient by a per cent, and is no evidence against the image.
    """
    if descent.probe is None or descent.open_layers:
        return None
    moved = project_to_pattern(chain.layers[:-1], image, descent.positive, MAX_PATTERN_FLIPS)
    by = (moved - image).square().mean().sqrt().item()
    size = image.square().mean().sqrt().item()
    return moved if 0 < by <= NOISE_RESIDUAL_FACTOR * max(descent.probe.error, FLOAT64_FLOOR * size) else None


def _weigh_batch(attack: Attack, descent: Descent) -> Weighed:
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
    match = _Match(math.inf if len(joint) else 1.0, received.tolerance)
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


def _residual_under_noise(attack: Attack, descent: Descent, images: Tensor, residual: float) -> _Match:
    """How much of a batch's residual the gradient's own noise explains, by a bootstrap on the images that were found.

    The format's tolerance alone where the residual is below it or beyond `MAX_NOISE_RESIDUAL`, layers are left open, or
    no layer lies below the start that could amplify errors.
    """
    chain, received, start = attack.chain, attack.received, descent.start
    in_doubt = received.tolerance < residual < MAX_NOISE_RESIDUAL
    if not in_doubt or descent.open_layers or start.layer == 0:
        return _Match(residual, received.tolerance)
    noisy = replace(received, gradients=_as_shared(attack, images, start.labels))
    fit = fit_and_refit if attack.loss == "cross_entropy" else partial(refine_inputs, loss=attack.loss)
    features = descent.layer_inputs[chain.layers[start.layer].name].flatten(1)
    head = fit(chain.layers[start.layer :], noisy.gradients, features, start.labels)
    again = descend(chain, noisy, replace(start, x=head.x, dx=head.dx), close=attack.close)
    moved = attack.images(again)
    if again.open_layers or not torch.isfinite(moved).all():
        return _Match(residual, received.tolerance, math.inf)
    moved = batch_on_pattern(chain, moved, again.positive)
    expected = max(relative_residuals(attack.gradients(moved, start.labels), noisy.usable).values())
    error = (moved - images).flatten(1).square().mean(1).sqrt().max().item()
    allowed = min(NOISE_RESIDUAL_FACTOR * expected, MAX_NOISE_RESIDUAL)
    return _Match(residual, max(received.tolerance, allowed), error)


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
