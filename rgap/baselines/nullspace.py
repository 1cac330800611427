"""The descent of the closed form, with an optimiser where a layer leaves a null space open (ours).

A deficient layer's input is x = x_mn + N t: the optimiser moves t alone, what the layer determines stays. It matches
what the layer before knows: σ⁻¹(x) lies in the range of its weights, and its gradient is the shared one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rgap.baselines.matching import GradientObjective
from rgap.baselines.optimisers import Record, lbfgs
from rgap.client import loss_value
from rgap.equations import LayerSolution, solve_layer
from rgap.network.layer import Chain, Layer
from rgap.results import Candidate
from rgap.virtual.previous import PreviousLayer, previous_factors

RANGE_ONLY_SHARE = 0.9
"""Open unknowns per range equation up to which the range is matched alone, without the gradient."""

GRADIENT_WEIGHT = 0.1
"""Weight of the relative gradient misfit beside the relative range misfit, where both are used."""


def descend_open(
    chain: Chain, problem: GradientObjective, found: Candidate, steps: int, record: Record
) -> tuple[Tensor, list[str]] | None:
    """Walks a candidate down again and fills, by gradient matching, every null space that was left open.

    Args:
        chain: The prepared network.
        problem: The shared gradient.
        found: The closed form's candidate with open layers.
        steps: Most evaluations for each open layer.
        record: Where they are noted, in a restart of their own.

    Returns:
        The image, (1, C, H, W), and a sentence for each layer; None where no open layer could be worked on.
    """
    head, notes = chain.layers[-1], []
    x = found.layer_inputs[head.name].reshape(head.input_shape)
    dx = head.adjoint(_output_gradient(head, x, found.labels, problem.loss))
    for i in reversed(range(len(chain.layers) - 1)):
        layer = chain.layers[i]
        z = layer.activation.inverse(x.reshape(layer.output_shape))
        dz = layer.activation.derivative(z) * dx.reshape(layer.output_shape)
        dx = layer.adjoint(dz)
        if layer.name not in found.open_layers and not notes:
            x = found.layer_inputs[layer.name]
            continue
        G = problem.received.gradients[layer.weight_name].reshape(layer.weight.shape)
        solution = solve_layer(layer, G, dz[None], z[None], rcond=problem.received.rcond)
        x = solution.x[0]
        factors = previous_factors(chain.layers[i - 1]) if i and solution.null_basis is not None else None
        if factors is not None:
            x = _fill(solution, factors, problem, dx, steps, record, shown=i == 1)
            notes.append(f"{solution.null_basis.shape[1]} open unknowns of layer {layer.name!r} by gradient matching")
    return (x.reshape(1, *chain.image_shape), notes) if notes else None


def _output_gradient(head: Layer, x: Tensor, labels: Tensor, loss: str) -> Tensor:
    """δz of the last layer for a recovered input of it."""
    z = (head.apply(x) + head.pre_bias()).reshape(1, -1).requires_grad_()
    return torch.autograd.grad(loss_value(loss, z, labels), z)[0].reshape(head.output_shape)


def _fill(
    solution: LayerSolution,
    factors: PreviousLayer,
    problem: GradientObjective,
    dx: Tensor,
    steps: int,
    record: Record,
    shown: bool,
) -> Tensor:
    """The deficient layer's input with the t that matches best."""
    before = factors.layer
    x0, N, left = solution.x.flatten(), solution.null_basis, torch.from_numpy(factors.left)
    bias = torch.from_numpy(factors.bias.copy())
    order = torch.from_numpy(np.argsort(factors.order))
    pinv = torch.from_numpy(factors.pinv)
    G = problem.received.gradients[before.weight_name].reshape(before.weight.shape)
    size = (before.activation.inverse(x0) - bias).square().sum()

    def below(t: Tensor) -> tuple[Tensor, Tensor]:
        z = before.activation.inverse(x0 + N @ t)
        return z, (pinv @ (z - bias))[order].reshape(1, *before.input_shape)

    def misfit(t: Tensor) -> tuple[Tensor, float]:
        if few:
            z = before.activation.inverse(x0 + N @ t)
            value = (left.T @ (z - bias)).square().sum() / size
            return value, value.item() ** 0.5
        z, image = below(t)
        dz = before.activation.derivative(z) * dx.flatten()
        mine = _weight_gradient(before, image, dz)
        missed = (mine - G).square().sum() / G.square().sum()
        value = (left.T @ (z - bias)).square().sum() / size + GRADIENT_WEIGHT * missed
        return value, missed.item() ** 0.5

    record.next_restart()
    few = N.shape[1] <= RANGE_ONLY_SHARE * left.shape[1]
    found = lbfgs(misfit, x0.new_zeros(N.shape[1]), steps, record, title="null space",
                  images=(lambda t: below(t)[1]) if shown else None)  # fmt: skip
    return (x0 + N @ found.best).reshape(before.output_shape)


def _weight_gradient(layer: Layer, image: Tensor, dz: Tensor) -> Tensor:
    """∂ℓ/∂W for an input and a gradient by the output; differentiable by both."""
    W = layer.weight.detach().requires_grad_()
    x = torch.nn.functional.pad(image, layer.padding)
    z = torch.nn.functional.conv2d(x, W, None, layer.stride, 0, layer.dilation)
    return torch.autograd.grad(z.flatten() @ dz, W, create_graph=True)[0]
