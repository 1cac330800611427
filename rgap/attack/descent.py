"""Layer after layer, from the head down to the image."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rgap.attack.propagation import NoiseProbe, propagate
from rgap.attack.signs import Slopes, decide_activation_pattern
from rgap.equations import LayerSolution, bias_residual, identity_residual, solve_layer
from rgap.head import Hypothesis
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.results import LayerReport
from rgap.shared_gradient import SharedGradient
from rgap.virtual.closure import ERROR_AMPLIFICATION, VirtualSolution, close_by_previous

REFUTED = 0.3
"""Mismatch of a layer's identities (0 for the right label, about 0.9 for the wrong one) that ends a hypothesis."""

ROUNDING = 1e-13
"""Least relative error of a recovered input: that of the float64 arithmetic here, over a chain of layers."""


@dataclass(frozen=True)
class Descent:
    """One hypothesis followed down the chain.

    Attributes:
        layer_inputs: Layer name -> recovered input, (1, *feature_shape), from the image to the head.
        reports: From the last layer to the first.
        mismatch: The largest identity residual met on the way.
        complete: Whether the image was reached.
        open_layers: Names of rank-deficient layers whose null space nothing closed.
        beliefs: Name of a layer that virtual constraints closed -> belief on its input after each step, (steps, n).
        misfits: Noise on the gradient's entries by the misfit of each layer whose equations alone determine it and that
            has some to spare, from the last on.
        probe: What a draw of the noise makes of the image.
        positive: Name of a layer whose activation has two slopes -> which of its pre-activations are positive.
    """

    layer_inputs: Mapping[str, Tensor]
    reports: tuple[LayerReport, ...]
    mismatch: float
    complete: bool
    open_layers: tuple[str, ...] = ()
    beliefs: Mapping[str, Tensor] = field(default_factory=dict)
    misfits: tuple[float, ...] = ()
    probe: NoiseProbe | None = None
    positive: Mapping[str, Tensor] = field(default_factory=dict)


def descend(
    chain: Chain,
    received: SharedGradient,
    start: Hypothesis,
    *,
    probe: NoiseProbe | None = None,
    virtual_constraints: bool = True,
    give_up: float = math.inf,
) -> Descent:
    """Recovers the input of every layer, from the last to the first.

    Args:
        chain: The prepared network.
        received: The gradients, their precision and the cutoff.
        start: The head's hypothesis.
        probe: A draw of the noise and what it makes of the hypothesis, to predict errors and to decide signs.
        virtual_constraints: Whether the layer before may close the deficit of a rank-deficient layer.
        give_up: Identity residual above which the hypothesis is dropped; infinity follows it to the end.

    Returns:
        A `Descent`; incomplete where the hypothesis was dropped.
    """
    head, n = chain.layers[-1], len(start.x)
    inputs = {head.name: start.x[None]}
    error = None if probe is None else probe.error
    reports = [LayerReport(head.name, n, None, n, n, 0, condition=1.0, predicted_error=error, seconds=0.0)]
    dx, x, mismatch, left_open = head.adjoint(start.dz[:, None, None]), start.x, 0.0, []
    beliefs: dict[str, Tensor] = {}
    positive: dict[str, Tensor] = {}
    misfits: list[float] = []
    for i in reversed(range(len(chain.layers) - 1)):
        layer, begin = chain.layers[i], time.perf_counter()
        has_gradient = not layer.is_fixed and layer.weight_name not in received.underflowed
        G = layer.gradient(received.gradients) if has_gradient else torch.zeros_like(layer.weight)
        x, dx = x.reshape(layer.output_shape), dx.reshape(layer.output_shape)
        z, known = layer.activation.invert(x, _accuracy(reports[-1], received))
        slopes = _slopes(layer, G, x, dx, probe) if has_gradient and probe is not None else None
        dz = (layer.activation.derivative(z) if slopes is None else slopes.values) * dx
        if slopes is not None or _has_kink(layer):
            positive[layer.name] = z > 0 if slopes is None else slopes.positive
        if has_gradient:
            mismatch = max(mismatch, _identities(layer, received, G, dz, z, known))
        if mismatch > give_up:
            return Descent(inputs, tuple(reports), mismatch, False)
        limits = {"rcond": received.rcond, "precision": received.precision}
        mask = None if known is None else known[None]
        solution = solve_layer(layer, G, dz[None] if has_gradient else 0 * dz[None], z[None], known=mask, **limits)
        misfits += [] if solution.noise_std is None else [solution.noise_std]
        if probe is not None:
            probe = propagate(layer, probe, solution, x, dx, z, dz, slopes)
            solution = replace(solution, report=replace(solution.report, predicted_error=probe.error))
        x, dx, report = solution.x[0], layer.adjoint(dz), solution.report
        if known is not None:
            report = replace(report, saturated=int((~known).sum()))
        if report.deficit:
            before = chain.layers[i - 1] if i and virtual_constraints else None
            closed = None if before is None else close_by_previous(before, received, solution, z, dx)
            if closed is not None:
                beliefs[layer.name] = torch.from_numpy(closed.beliefs)
                x, report, probe = _closed(solution, closed, report, probe)
            left_open += [] if closed is not None and closed.certified else [layer.name]
        inputs = {layer.name: x.reshape(1, *layer.feature_shape), **inputs}
        reports.append(replace(report, seconds=time.perf_counter() - begin))
    return Descent(inputs, tuple(reports), mismatch, True, tuple(left_open), beliefs, tuple(misfits), probe, positive)


def _slopes(layer: Layer, G: Tensor, x: Tensor, dx: Tensor, probe: NoiseProbe) -> Slopes | None:
    """The decided slopes of a layer with a kink, None of others."""
    return decide_activation_pattern(layer, G, x, dx, probe.error, rms(layer.gradient(probe.noise)).item())


def _accuracy(report: LayerReport, received: SharedGradient) -> float:
    """Error of a layer's recovered input relative to its size, roughly: what rounding makes of its condition number."""
    condition = report.condition if report.condition and math.isfinite(report.condition) else 1.0
    return min(ERROR_AMPLIFICATION * condition * max(received.precision, ROUNDING), 1e-3)


def _identities(
    layer: Layer, received: SharedGradient, G: Tensor, dz: Tensor, z: Tensor, known: Tensor | None
) -> float:
    """The largest identity residual of the layer and of its bias."""
    found = identity_residual(layer, G, dz[None], z[None], None if known is None else known[None])
    if layer.bias_name is None or layer.bias_name in received.underflowed:
        return found
    return max(found, bias_residual(layer, received.gradients[layer.bias_name], dz[None]))


def _has_kink(layer: Layer) -> bool:
    slope = layer.activation.negative_slope
    return slope is not None and bool((torch.as_tensor(slope) != 1).any())


def _closed(
    solution: LayerSolution, closed: VirtualSolution, report: LayerReport, probe: NoiseProbe | None
) -> tuple[Tensor, LayerReport, NoiseProbe | None]:
    """A deficient layer's input as the layer before has closed it; its error joins the probe's."""
    x = torch.from_numpy(closed.x).reshape(solution.x.shape[1:])
    if probe is not None:
        probe = replace(probe, x=probe.x + torch.from_numpy(closed.draw).reshape(probe.x.shape))
        report = replace(report, predicted_error=probe.error)
    report = replace(report, virtual_constraints=closed.equations, iterations=closed.iterations,
                     condition=closed.condition, residual=closed.residual)  # fmt: skip
    return x, report, probe
