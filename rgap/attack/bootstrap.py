"""What noise leaves of a batch: the attack once more, on the gradient that the found images have (ours).

Where a candidate misses the gradient by more than its format explains, either it is wrong or the layers amplify the
format's errors. The second is tried out: the candidate's own gradient, with errors of the same size, is put through the
same attack; what comes back misses by as much as a right candidate would (a parametric bootstrap).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rgap.attack.descent import Closer, Descent, descend
from rgap.attack.pattern import batch_on_pattern
from rgap.client import gradients_of
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain
from rgap.separation.joint_softmax import fit_and_refit
from rgap.separation.scales import refine_inputs
from rgap.shared_gradient import SharedGradient, relative_residuals

NOISE_RESIDUAL_FACTOR = 5.0
"""Times the predicted error up to which a miss is put down to noise."""

MAX_NOISE_RESIDUAL = 0.05
"""Residual of a batch from which noise is no excuse and nothing is tried out."""


@dataclass(frozen=True)
class ExpectedResidual:
    """What a right candidate may miss.

    Attributes:
        residual: Largest residual at which a candidate counts as consistent.
        error: Predicted root-mean-square error of the worst image's pixels, None where nothing was tried out.
    """

    residual: float
    error: float | None = None


def residual_under_noise(
    chain: Chain,
    received: SharedGradient,
    start: Start,
    descent: Descent,
    images: Tensor,
    residual: float,
    loss: str,
    close: Closer | None,
) -> ExpectedResidual:
    """How much of a batch's residual the gradient's own noise explains.

    Args:
        chain: The prepared network.
        received: The gradients.
        start: The images at the first fully connected layer.
        descent: Down to the images.
        images: The candidate, (B, C, H, W).
        residual: Its gradient residual.
        loss: A name in `rgap.client.LOSSES`.
        close: As in the descent.

    Returns:
        An `ExpectedResidual`; the format's tolerance alone where the residual is below it or beyond
        `MAX_NOISE_RESIDUAL`, or where layers are left open.
    """
    in_doubt = received.tolerance < residual < MAX_NOISE_RESIDUAL
    if not in_doubt or descent.open_layers or start.layer == 0:
        return ExpectedResidual(received.tolerance)
    noisy = replace(received, gradients=_as_shared(chain, received, images, start.labels, loss))
    fit = fit_and_refit if loss == "cross_entropy" else partial(refine_inputs, loss=loss)
    features = descent.layer_inputs[chain.layers[start.layer].name].flatten(1)
    head = fit(chain.layers[start.layer :], noisy.gradients, features, start.labels)
    again = descend(chain, noisy, replace(start, x=head.x, dx=head.dx), close=close)
    moved = again.layer_inputs[chain.layers[0].name].reshape(images.shape)
    if again.open_layers or not torch.isfinite(moved).all():
        return ExpectedResidual(received.tolerance, math.inf)
    moved = batch_on_pattern(chain, moved, again.positive)
    mine = gradients_of(chain.model, chain.parameters, moved, start.labels, loss)
    expected = max(relative_residuals(mine, noisy.usable).values())
    error = (moved - images).flatten(1).square().mean(1).sqrt().max().item()
    return ExpectedResidual(max(received.tolerance, min(NOISE_RESIDUAL_FACTOR * expected, MAX_NOISE_RESIDUAL)), error)


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
