"""Gradient matching as a closer of the closed form's descent: it moves a layer's input within its null space (ours).

A deficient layer's input is x = x_mn + N t, and only t is optimised; what the layer determines stays. The objective
uses the layer before: σ⁻¹(x) − b lies in the range of its weights, and its gradient is the shared one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rgap.attack.descent import Closer, close_by_virtual_constraints
from rgap.baselines.optimisers import Record, lbfgs
from rgap.client import loss_value
from rgap.equations import LayerSolution
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain, Layer
from rgap.results import Candidate
from rgap.shared_gradient import SharedGradient
from rgap.virtual.certificate import VirtualSolution
from rgap.virtual.previous import PreviousLayer, previous_factors

RANGE_ONLY_SHARE = 0.9  # open unknowns per range equation up to which the range is matched alone, without the gradient
GRADIENT_WEIGHT = 0.1  # weight of the relative gradient residual beside the relative range residual


def start_of(chain: Chain, found: Candidate, loss: str) -> Start:
    """The hypothesis behind a candidate for one image, at the last layer."""
    head = chain.layers[-1]
    x = found.layer_inputs[head.name].reshape(1, *head.input_shape)
    z = (head.apply(x) + head.pre_bias()).reshape(1, -1).requires_grad_()
    (dz,) = torch.autograd.grad(loss_value(loss, z, found.labels.cpu()), z)
    dx = head.adjoint(dz.reshape(1, *head.output_shape))
    return Start(len(chain.layers) - 1, found.labels.cpu(), x.flatten(1), dx.flatten(1), ((),), found.layers[:1])


def gradient_matching_closer(
    chain: Chain, open_layers: Sequence[str], steps: int, record: Record, notes: list[str]
) -> Closer:
    """A closer that fills null spaces by L-BFGS, and never certifies what it has filled in.

    Fills the first of the open layers (names) and every deficient layer below; those above are closed by virtual
    constraints, as they were for the candidate. At most `steps` evaluations per layer, each layer a restart of its own
    in the record; `notes`, empty at first, receives a sentence for each layer that was filled.
    """

    def close(before: Layer, received: SharedGradient, solution: LayerSolution, z: Tensor, dx: Tensor):
        name = solution.report.name
        if name not in open_layers and not notes:
            return close_by_virtual_constraints(before, received, solution, z, dx)
        factors = previous_factors(before, weak_ratio=0) if solution.null_basis is not None else None
        if factors is None:
            return None
        notes.append(f"{solution.null_basis.shape[1]} open unknowns of layer {name!r} by gradient matching")
        shown = before is chain.layers[0]
        is_shared = not set(before.weight_names) & set(received.absent)
        G = before.gradient(received.gradients) if is_shared else None
        return _filled(solution, factors, G, dx, steps, record, shown)

    return close


def _filled(
    solution: LayerSolution,
    previous: PreviousLayer,
    G: Tensor | None,
    dx: Tensor,
    steps: int,
    record: Record,
    shown: bool,
) -> VirtualSolution:
    """The layer's input with the t that matches best; `shown`: the input of the layer before is the image to record."""
    before, x0, N = previous.layer, solution.x.flatten(), solution.null_basis
    left, pinv, order = map(torch.from_numpy, (previous.left, previous.pinv, np.argsort(previous.order)))
    bias = torch.from_numpy(previous.bias.copy())
    size = (before.activation.inverse(x0) - bias).square().sum()
    range_only = G is None or N.shape[1] <= RANGE_ONLY_SHARE * left.shape[1]

    def input_before(t: Tensor) -> Tensor:
        z = before.activation.inverse(x0 + N @ t)
        return (pinv @ (z - bias))[order].reshape(1, *before.input_shape)

    def misfit(t: Tensor) -> tuple[Tensor, float]:
        z = before.activation.inverse(x0 + N @ t)
        value = (left.T @ (z - bias)).square().sum() / size
        if range_only:
            return value, value.item() ** 0.5
        dz = (before.activation.derivative(z) * dx.flatten()).reshape(before.output_shape)
        missed = (before.weight_gradient(input_before(t), dz) - G).square().sum() / G.square().sum()
        return value + GRADIENT_WEIGHT * missed, missed.item() ** 0.5

    record.next_restart()
    found = lbfgs(misfit, x0.new_zeros(N.shape[1]), steps, record, "null space", images=input_before if shown else None)
    x = (x0 + N @ found.best).numpy()
    nothing = np.zeros((0, len(x)))
    return VirtualSolution(x, False, left.shape[1], steps, found.loss**0.5, 1.0, nothing, np.zeros(len(x)))
