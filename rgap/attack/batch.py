"""The images of a batch, weighed by their own gradient, each in the best of its twins.

How far noise moves the images is measured by a bootstrap: a gradient with errors of the same size goes through the same
attack once more, without the search. Behind convolutions it is that of the images found, in the client's arithmetic,
whose errors are amplified more than white noise is; else the shared one with one more draw of the noise (ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rgap.attack.candidates import Attack, Weighed
from rgap.attack.descent import Descent, descend
from rgap.attack.misfit import NOISE_RESIDUAL_FACTOR, Misfit, misfit
from rgap.attack.pattern import batch_on_pattern
from rgap.client import gradients_of
from rgap.head.hypothesis import Start, Twin
from rgap.linalg import rms
from rgap.results import Candidate
from rgap.separation.joint_softmax import fit_and_refit
from rgap.separation.read import read_again
from rgap.separation.scales import refine_inputs

MAX_SHARE_RESIDUAL = 1e-3  # residual of an image's share of the gradient that needs no noise as an explanation


@dataclass(frozen=True)
class _Again:
    """The images of a batch, found again from a gradient with errors of the same size."""

    change: Tensor  # of every image, (B, C, H, W); NaN where it was not found again
    shares: Tensor  # residual of every image's share of the gradient, (B,); 0 where it has none

    @property
    def errors(self) -> Tensor:
        """Root mean square of every image's change, (B,)."""
        return self.change.flatten(1).square().mean(1).sqrt().nan_to_num(math.inf)

    @property
    def largest(self) -> Tensor:
        """Every image's largest change of a pixel, (B,)."""
        return self.change.flatten(1).abs().amax(1).nan_to_num(math.inf)


def weigh_batch(attack: Attack, descent: Descent) -> Weighed:
    """Weighs the images of a batch, each in the best of its twins."""
    chain, start = attack.chain, descent.start
    images = attack.images(descent)
    finite = len(images) > 0 and bool(torch.isfinite(images).all())
    if start.layer and finite:
        images = batch_on_pattern(chain, images, descent.positive)
    inputs = attack.inputs(descent, images)
    again = _Again(torch.full_like(images, math.nan), torch.zeros(len(images)))
    if finite and not descent.open_layers:
        again = _find_again(attack, descent, images)

    match = _match(attack, descent, images, again) if finite else Misfit(math.inf if len(images) else 1.0, 0.0)

    # Each image has its own share of fully connected gradients, which tests it unless the share has only a scale.
    one_scale = chain.leaves_brightness_open
    consistent = match.residual <= match.allowed
    has_shares = start.layer == 0 and (not one_scale or consistent or len(images) < start.batch_size)
    errors = again.errors if start.errors is None else torch.maximum(again.errors, start.errors)

    def candidate(b: int, twin: Twin) -> Candidate:
        factor, brightness = start.scales(b)
        own, image = {key: twin.factor * x[b : b + 1] for key, x in inputs.items()}, twin.factor * images[b : b + 1]
        size = (match.excess if consistent else 1.0) * abs(twin.factor)
        known = 0.0 if math.isinf(brightness) else brightness
        # A share that misses by more than noise moves the image by about as much.
        misses = 0.0 if consistent or not has_shares else twin.residual or 0.0
        error = math.hypot(size * errors[b].item(), (known + misses) * rms(image).item())
        slack = attack.slack(size * again.largest[b].item() + (known + misses) * image.abs().max().item())
        inside = attack.pixels.contains(image, slack)
        residual, allowed = match.residual, match.allowed
        if has_shares:
            residual = math.nan if twin.residual is None else twin.residual
            allowed = _allowed_of_share(attack, start, b, image, again.shares[b].item())
        return Candidate(
            image, torch.tensor([twin.label]), residual, inside, own, descent.reports, descent.open_layers,
            residual_allowed=allowed, predicted_error=None if descent.open_layers else error,
            gradient_scale=factor / attack.received.unit, brightness_error=brightness,
        )  # fmt: skip

    def preference(one: Candidate) -> tuple[bool, float]:  # inside the pixel range first, then the darker
        return not one.in_pixel_range, one.images.abs().max().item()

    each = [sorted((candidate(b, twin) for twin in twins), key=preference) for b, twins in enumerate(start.twins)]
    outside = [found[0] for found in each if not found[0].in_pixel_range]
    if one_scale and consistent and outside:  # the factor that was asserted for all is not believed
        each = [[replace(one, brightness_error=math.inf) for one in found] for found in each]
    unconfirmed = start.ranks[0] < start.batch_size and one_scale
    return Weighed(
        start, _together(descent, images[:0], [found[0] for found in each], match), tuple(map(tuple, each)), unconfirmed
    )


def _together(descent: Descent, nothing: Tensor, best: list[Candidate], match: Misfit) -> Candidate:
    """The candidate of all images, each in its best twin; `nothing` has the shape of none, (0, C, H, W)."""
    start, inputs = descent.start, descent.layer_inputs
    return Candidate(
        torch.cat([nothing, *(one.images for one in best)]),
        torch.cat([start.labels[:0], *(one.labels for one in best)]),
        match.residual, all(one.in_pixel_range for one in best),
        {key: torch.cat([x[:0], *(one.layer_inputs[key] for one in best)]) for key, x in inputs.items()},
        descent.reports, descent.open_layers, residual_allowed=match.allowed,
        predicted_error=max((one.predicted_error for one in best if one.predicted_error is not None), default=None),
    )  # fmt: skip


def _allowed_of_share(attack: Attack, start: Start, b: int, image: Tensor, again: float) -> float:
    """Residual that image b's share of the gradient may have; `again` is that of the image found again."""
    allowed = min(max(NOISE_RESIDUAL_FACTOR * again, MAX_SHARE_RESIDUAL), attack.received.tolerance)
    if start.errors is None:
        return allowed
    relative = start.errors[b].item() / max(rms(image).item(), 1e-300)  # the share's error is that of the image
    return max(allowed, min(relative, MAX_SHARE_RESIDUAL))


def _match(attack: Attack, descent: Descent, images: Tensor, again: _Again) -> Misfit:
    """Compares the gradients of the images, those not found contributing nothing, and as the noise changes them."""
    start = descent.start
    found = len(images) / start.batch_size

    def gradients(images: Tensor) -> dict[str, Tensor]:
        return {key: found * g for key, g in attack.gradients(images, start.labels, start).items()}

    mine = gradients(images)
    moved = gradients(images + again.change) if torch.isfinite(again.change).all() else mine
    return misfit(attack.received, mine, moved, single=False)


def _find_again(attack: Attack, descent: Descent, images: Tensor) -> _Again:
    """The images from a gradient with errors of the same size, in the order of those found first."""
    chain, received, start = attack.chain, attack.received, descent.start
    if start.layer == 0:
        draws = {name: start.noise_ratio * draw for name, draw in received.noise.items()}
        noisy = replace(received, gradients={name: g + draws[name] for name, g in received.gradients.items()})
        other = read_again(chain, noisy, attack.loss, start)
        found = other.x.reshape(-1, *images.shape[1:])
        shares = [twins[0].residual or 0.0 for twins in other.twins]
    else:
        noisy = replace(received, gradients=_as_shared(attack, images, start))
        fit = fit_and_refit if attack.loss == "cross_entropy" else partial(refine_inputs, loss=attack.loss)
        features = descent.layer_inputs[chain.layers[start.layer].name].flatten(1)
        head = fit(
            chain.layers[start.layer :], noisy.gradients, features, start.labels, weights=start.client_loss["weights"]
        )
        other = descend(chain, noisy, replace(start, x=head.x, dx=head.dx), close=attack.close, like=descent)
        found, shares = attack.images(other), [0.0] * len(images)
        if other.open_layers:
            found = torch.full_like(found, math.nan)
        elif torch.isfinite(found).all():
            found = batch_on_pattern(chain, found, other.positive)
    return _Again(found - images, images.new_tensor(shares))


def _as_shared(attack: Attack, images: Tensor, start: Start) -> dict[str, Tensor]:
    """The gradient that a client with these images would share, in the arithmetic of the shared one and as noisy.

    Errors of a client's own forward and backward pass are no white noise on the gradient, and are amplified more.
    """
    chain, received = attack.chain, attack.received
    single = all(torch.equal(g.float().double(), g) for g in received.gradients.values())
    dtype = torch.float32 if single else torch.float64
    parameters = {name: p.to(dtype) for name, p in chain.parameters.items()}
    found = gradients_of(chain.model, parameters, images.to(dtype), start.labels, attack.loss, **start.client_loss)
    found = {name: g.to("cpu", torch.float64) for name, g in found.items()}
    if received.precision <= 2 * torch.finfo(dtype).eps:
        return found
    return {name: g + received.noise[name] for name, g in found.items()}
