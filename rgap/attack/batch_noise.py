"""What noise leaves of a batch: the attack once more, on what the found images' gradient would be (ours).

Where a candidate misses the gradient by more than its format explains, either it is wrong or the layers amplify the
format's errors. The second is tried out: the candidate's own gradient, with errors of the same size, is put through the
same attack; what comes back misses by as much as a right candidate would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rgap.attack.batch_recovery import joint_residual
from rgap.attack.descent import Descent
from rgap.attack.joint_descent import descend_jointly
from rgap.attack.joint_signs import agree
from rgap.attack.propagation import draw_noise
from rgap.attack.verdict import EXPLAINED
from rgap.client import gradients_of
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain
from rgap.noise import entry_noise
from rgap.separation.joint_softmax import fit_and_refit
from rgap.separation.scales import refine_inputs
from rgap.separation.subspaces import first_dense
from rgap.shared_gradient import SharedGradient

MOST = 0.05
"""Residual from which noise is no excuse and nothing is tried out."""


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
    loss: str,
    reading: Start,
    descent: Descent,
    images: Tensor,
    residual: float,
    *,
    virtual_constraints: bool,
) -> ExpectedResidual:
    """How much of a candidate's residual the gradient's own noise explains.

    Args:
        chain: The prepared network.
        received: The gradients.
        loss: A name in `rgap.client.LOSSES`.
        reading: The head's hypothesis.
        descent: Down to the images.
        images: The candidate, (B, C, H, W).
        residual: Its gradient residual.
        virtual_constraints: As for the attack.

    Returns:
        An `ExpectedResidual`; the format's tolerance alone where the residual is below it or beyond `MOST`, or where
        layers are left open.
    """
    if not received.tolerance < residual < MOST or descent.open_layers:
        return ExpectedResidual(received.tolerance)
    below = first_dense(chain)
    noisy = replace(received, gradients=_as_shared(chain, received, images, reading.labels, loss))
    start = descent.layer_inputs[chain.layers[below].name].flatten(1)
    fit = fit_and_refit if loss == "cross_entropy" else partial(refine_inputs, loss=loss)
    head = fit(chain.layers[below:], noisy.gradients, start, reading.labels)
    again = descend_jointly(chain, noisy, head.x, head.dx, below=below, virtual_constraints=virtual_constraints)
    moved = again.layer_inputs[chain.layers[0].name].reshape(images.shape)
    if again.open_layers or not torch.isfinite(moved).all():
        return ExpectedResidual(received.tolerance, math.inf)
    moved = agree(chain, moved, again.layer_inputs, below)
    expected = joint_residual(chain, noisy, moved, reading.labels, loss, len(moved))
    error = (moved - images).flatten(1).square().mean(1).sqrt().max().item()
    return ExpectedResidual(max(received.tolerance, min(EXPLAINED * expected, MOST)), error)


def _as_shared(chain: Chain, received: SharedGradient, images: Tensor, labels: Tensor, loss: str) -> dict[str, Tensor]:
    """The gradient that a client with these images would share: in the arithmetic that the shared one shows, and noisy.

    Errors of a client's own forward and backward pass are no white noise on the gradient, and are amplified more.
    """
    single = all(torch.equal(g.float().double(), g) for g in received.gradients.values())
    dtype = torch.float32 if single else torch.float64
    parameters = {name: p.to(dtype) for name, p in chain.parameters.items()}
    found = gradients_of(chain.model, parameters, images.to(dtype), labels, loss)
    found = {name: g.to("cpu", torch.float64) for name, g in found.items()}
    if received.precision <= 2 * torch.finfo(dtype).eps:
        return found
    noise = draw_noise(entry_noise(received.gradients, known=received.known))
    return {name: g + noise[name] for name, g in found.items()}
