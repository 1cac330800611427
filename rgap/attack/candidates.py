"""Candidates: the image of a descent, weighed by its own gradient and by the effect of noise on it.

A candidate must reproduce the shared gradient to within the gradient's own errors. Where it misses by more than the
format explains, either it is wrong or the layers amplify those errors; the noise probe predicts by how much (ours).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rgap.attack.batch import weigh_batch
from rgap.attack.descent import Descent
from rgap.attack.misfit import NOISE_RESIDUAL_FACTOR, Misfit, misfit
from rgap.attack.pattern import project_to_pattern
from rgap.attack.problem import Attack, Weighed
from rgap.network.layer import Chain
from rgap.results import Candidate
from rgap.shared_gradient import FLOAT64_FLOOR

MAX_PATTERN_FLIPS = 30  # units of an image that may lie on another piece than was decided; noise flips more


def weigh(attack: Attack, descent: Descent) -> Weighed:
    """Compares the gradient of a descent's images with the shared one, and with the effect of noise on both."""
    if descent.start.batch_size > 1:
        return weigh_batch(attack, descent)
    received, labels, image = attack.received, descent.start.labels, attack.images(descent)
    match = Misfit(math.inf, received.arithmetic)
    if torch.isfinite(image).all():
        match = _match(attack, descent, image)
        moved = _on_decided_pattern(attack.chain, descent, image) if not match.residual <= match.allowed else None
        if moved is not None:
            pairs = (image, match), (moved, _match(attack, descent, moved))
            image, match = min(pairs, key=lambda pair: pair[1].residual)
    reports = descent.reports
    if descent.probe is not None:
        reports = tuple(replace(r, predicted_error=match.excess * r.predicted_error) for r in reports)
    inside = attack.pixels.contains(image, attack.slack(max(match.largest_errors, default=0.0)))
    factor, brightness = descent.start.scales(0)
    return Weighed(descent.start, Candidate(
        image, labels, match.residual, inside, attack.inputs(descent, image), reports, descent.open_layers,
        descent.beliefs, match.allowed, max(match.errors, default=None), None, factor / received.unit, brightness,
    ), doubt=match.doubt)  # fmt: skip


def _match(attack: Attack, descent: Descent, image: Tensor) -> Misfit:
    """Compares the gradients of one image, and of the image as the noise may have changed it."""
    start, probe = descent.start, descent.probe
    mine = attack.gradients(image, start.labels, start)
    if probe is None:
        return misfit(attack.received, mine, mine)
    moved = attack.gradients(image + probe.x.reshape(image.shape), start.labels, start)
    match = misfit(attack.received, mine, moved, inferred=attack.inferred)
    errors = (match.excess * probe.error,), (match.excess * probe.x.abs().max().item(),)
    return replace(match, errors=errors[0], largest_errors=errors[1])


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
