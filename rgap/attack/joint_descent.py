"""Layer after layer for a whole batch, from where the head's images have come apart down to the images."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from rgap.attack.descent import Descent
from rgap.attack.joint_signs import settle_signs
from rgap.equations import LayerSolution, identity_residual, solve_layer
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.network.layer import Chain, Layer
from rgap.shared_gradient import SharedGradient
from rgap.virtual.range import RangeSolution, close_by_range, range_factor

BLURRED = 1e-5
"""Precision times condition of a layer's system from which the layer before is asked for its range constraints."""

DOUBT = 1e4
"""Share of their root-mean-square, in units of the precision, below which outputs may have the wrong sign."""

LEAST = 1e-8
"""Least such share."""


def descend_jointly(
    chain: Chain, received: SharedGradient, x: Tensor, dx: Tensor, *, below: int, virtual_constraints: bool = True
) -> Descent:
    """Recovers the inputs of every layer below a place at which each image is known by itself.

    Args:
        chain: The prepared network.
        received: The gradients of the mean loss, their precision and the cutoff.
        x: Input of layer `below` of every image, (B, …).
        dx: Gradient of the mean loss by it, (B, …).
        below: Index in `chain.layers`; the layers before it are solved.
        virtual_constraints: Whether the range of the layer before may join a system that is deficient or blurred.

    Returns:
        A `Descent` with inputs (B, *feature_shape) of the layers up to `below`, and reports from the last of the solved
        layers to the first.
    """
    inputs = {chain.layers[below].name: x.reshape(len(x), *chain.layers[below].feature_shape)}
    reports, left_open, mismatch = [], [], 0.0
    for i in reversed(range(below)):
        layer, begin = chain.layers[i], time.perf_counter()
        G = torch.zeros_like(layer.weight) if layer.is_fixed else layer.gradient(received.gradients)
        x, dx = (t.reshape(len(x), *layer.output_shape) for t in (x, dx))
        if not layer.is_fixed:
            x = settle_signs(layer, G, x, dx, doubt=max(DOUBT * received.precision, LEAST))
        inputs[chain.layers[i + 1].name] = x.reshape(len(x), *chain.layers[i + 1].feature_shape)
        z = layer.activation.inverse(x)
        dz = layer.activation.derivative(z) * dx
        mismatch = mismatch if layer.is_fixed else max(mismatch, identity_residual(layer, G, dz, z))
        solution = solve_layer(layer, G, dz, z, rcond=received.rcond)
        x, dx, report = solution.x, layer.adjoint(dz), solution.report
        closed = _close(chain.layers[i - 1], received, solution) if i and virtual_constraints else None
        if closed is not None and (closed.certified or report.deficit):
            x = closed.x.reshape(x.shape)
            report = replace(report, virtual_constraints=closed.equations, iterations=closed.iterations,
                             condition=closed.condition, residual=closed.residual)  # fmt: skip
        if report.deficit and (closed is None or not closed.certified):
            left_open.append(layer.name)
        inputs = {layer.name: x.reshape(len(x), *layer.feature_shape), **inputs}
        reports.append(replace(report, seconds=time.perf_counter() - begin))
    return Descent(inputs, tuple(reports), mismatch, True, tuple(left_open))


def _close(before: Layer, received: SharedGradient, solution: LayerSolution) -> RangeSolution | None:
    """Joins the range constraints of the layer before where they are needed and there are any."""
    report, system = solution.report, solution.systems[0]
    blurred = received.precision * (report.condition or 1.0) > BLURRED
    if before.is_fixed or len(solution.systems) > 1 or system is None or not (report.deficit or blurred):
        return None
    factor = range_factor(before)
    if factor is None or len(solution.x) * factor.basis.shape[1] < report.deficit + CERTIFICATE_SURPLUS:
        return None
    precision = max(received.precision, 1e-13)
    return close_by_range(
        before, factor, system, solution.x, deficit=report.deficit, precision=precision, rcond=received.rcond
    )
