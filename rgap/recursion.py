"""Layer after layer, from the head down to the image."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from rgap.chain import Chain
from rgap.constraints import identity_residual, split_groups
from rgap.head import Hypothesis
from rgap.results import LayerReport
from rgap.solve import solve_layer

REFUTED = 0.3
"""Mismatch of a layer's identities (0 for the right label, about 0.9 for the wrong one) that ends a hypothesis."""


@dataclass(frozen=True)
class Descent:
    """One hypothesis followed down the chain.

    Attributes:
        layer_inputs: Layer name -> recovered input, (1, *feature_shape), from the image to the head.
        reports: From the last layer to the first.
        mismatch: The largest identity residual met on the way.
        complete: Whether the image was reached.
    """

    layer_inputs: Mapping[str, Tensor]
    reports: tuple[LayerReport, ...]
    mismatch: float
    complete: bool


def descend(
    chain: Chain, gradients: Mapping[str, Tensor], start: Hypothesis, *, rcond: float, give_up: float
) -> Descent:
    """Recovers the input of every layer, from the last to the first.

    Args:
        chain: The prepared network.
        gradients: Parameter name -> gradient, float64.
        start: The head's hypothesis.
        rcond: Relative cutoff of singular values, as in `solve_layer`.
        give_up: Identity residual above which the hypothesis is dropped; infinity follows it to the end.

    Returns:
        A `Descent`; incomplete where the hypothesis was dropped.
    """
    head, n = chain.layers[-1], len(start.x)
    inputs = {head.name: start.x[None]}
    reports = [LayerReport(head.name, n, rank_gradients=n, rank=n, deficit=0, condition=1.0, seconds=0.0)]
    dz, x, above, mismatch = start.dz[:, None, None], start.x, head, 0.0
    for layer in reversed(chain.layers[:-1]):
        begin = time.perf_counter()
        G = gradients[layer.weight_name].reshape(layer.weight.shape)
        z = layer.activation.inverse(x.reshape(layer.output_shape))
        dz = layer.activation.derivative(z) * above.adjoint(dz).reshape(layer.output_shape)
        parts = split_groups(layer)
        chunks = zip(parts, *(t.chunk(len(parts)) for t in (G, dz, z)), strict=True)
        mismatch = max(mismatch, *(identity_residual(*chunk) for chunk in chunks))
        if mismatch > give_up:
            return Descent(inputs, tuple(reports), mismatch, False)
        solution = solve_layer(layer, G, dz, z, rcond=rcond)
        x, above = solution.x, layer
        inputs = {layer.name: x.reshape(1, *layer.feature_shape), **inputs}
        reports.append(replace(solution.report, seconds=time.perf_counter() - begin))
    return Descent(inputs, tuple(reports), mismatch, True)
