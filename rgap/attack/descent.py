"""Layer by layer from a start down to the images, for one image and a batch alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rgap.attack.pattern import settle_signs
from rgap.attack.propagation import NoiseProbe, Slopes, decide_activation_pattern, propagate
from rgap.equations import LayerSolution, bias_residual, identity_residual, solve_layer
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.head.hypothesis import Start
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.results import LayerReport
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient
from rgap.virtual.closure import ERROR_AMPLIFICATION, VirtualSolution, close_by_previous
from rgap.virtual.range import close_by_range, range_factor

MAX_PRECISION_CONDITION = 1e-5
"""Precision times condition number from which range constraints join a batch's system even without a deficit."""

DOUBT_RATIO = 1e4
"""Outputs smaller than this times the precision times their root mean square may have the wrong sign."""

MIN_DOUBT = 1e-8
"""Smallest such size that is considered, relative to the root mean square."""

Closer = Callable[[Layer, SharedGradient, LayerSolution, Tensor, Tensor], VirtualSolution | None]
"""(layer before, gradients, a layer's solution, its z, δx by its input) -> the closed solution, None where none is."""


@dataclass(frozen=True)
class Descent:
    """A start that was followed down the chain.

    Attributes:
        layer_inputs: Layer name -> recovered input, (B, *feature_shape), from the image to the head.
        reports: From the last layer to the first.
        mismatch: The largest identity residual met on the way.
        complete: Whether the images were reached.
        open_layers: Names of rank-deficient layers whose null space nothing closed.
        beliefs: Name of a layer that virtual constraints closed -> belief on its input after each step, (steps, n).
        noise_stds: Noise on the gradient's entries by the misfit of each layer whose gradient equations alone determine
            it with some to spare, from the last on.
        probe: What a draw of the noise changes in the image.
        positive: Name of a layer whose activation has two slopes -> which of its pre-activations are positive, (B, …).
    """

    layer_inputs: Mapping[str, Tensor]
    reports: tuple[LayerReport, ...]
    mismatch: float
    complete: bool
    open_layers: tuple[str, ...] = ()
    beliefs: Mapping[str, Tensor] = field(default_factory=dict)
    noise_stds: tuple[float, ...] = ()
    probe: NoiseProbe | None = None
    positive: Mapping[str, Tensor] = field(default_factory=dict)


def descend(
    chain: Chain,
    received: SharedGradient,
    start: Start,
    *,
    probe: NoiseProbe | None = None,
    close: Closer | None = None,
    give_up: float = math.inf,
) -> Descent:
    """Recovers the inputs of every layer below a start.

    Args:
        chain: The prepared network.
        received: The gradients of the mean loss, their precision and the cutoff.
        start: The inputs of one layer and the gradients by them, of all images.
        probe: A draw of the noise and what it makes of the start, to predict errors and to decide signs; one image
            only.
        close: What may close the null space of a rank-deficient layer: `close_by_virtual_constraints`, for one.
        give_up: Identity residual above which the start is dropped; infinity follows it to the end.

    Returns:
        A `Descent`; incomplete where the start was dropped.
    """
    reports, x, dx, mismatch = list(start.reports), start.x, start.dx, 0.0
    if probe is not None:
        reports[-1] = replace(reports[-1], predicted_error=probe.error)
    inputs, positive = _above(chain, start)
    left_open, beliefs, noise_stds = [], {}, []
    for i in reversed(range(start.layer if len(x) else 0)):
        layer, above, begin = chain.layers[i], chain.layers[i + 1], time.perf_counter()
        has_gradient = not layer.is_fixed and layer.weight_name not in received.underflowed
        G = layer.gradient(received.gradients) if has_gradient else torch.zeros_like(layer.weight)
        x, dx = (t.reshape(-1, *layer.output_shape) for t in (x, dx))
        if len(x) > 1 and has_gradient:
            x = settle_signs(layer, G, x, dx, doubt=max(DOUBT_RATIO * received.precision, MIN_DOUBT))
            inputs[above.name] = x.reshape(-1, *above.feature_shape)
        z, known = _inverted(layer, x, _accuracy(reports[-1], received))
        slopes = _decided_slopes(layer, G, x, dx, probe) if has_gradient else None
        dz = (layer.activation.derivative(z) if slopes is None else slopes.values) * dx
        if slopes is not None or layer.activation.has_kink:
            positive[layer.name] = z > 0 if slopes is None else slopes.positive
        if has_gradient:
            mismatch = max(mismatch, _identities(layer, received, G, dz, z, known))
        if mismatch > give_up:
            return Descent(inputs, tuple(reports), mismatch, False)
        equations = (G, dz if has_gradient else 0 * dz, z)
        solution = solve_layer(layer, *equations, rcond=received.rcond, known=known, precision=received.precision)
        report = solution.report
        noise_stds += [] if solution.noise_std is None else [solution.noise_std]
        if probe is not None:
            probe = propagate(layer, probe, solution, x, dx, z, dz, slopes)
            report = replace(report, predicted_error=probe.error)
        if known is not None:
            report = replace(report, saturated=int((~known).sum()))
        x, dx = solution.x, layer.adjoint(dz)
        closed = close(chain.layers[i - 1], received, solution, z, dx) if close and i else None
        if closed is not None and (closed.certified or report.deficit):
            x, report, probe = _closed(closed, x, report, probe)
            if closed.beliefs is not None:
                beliefs[layer.name] = torch.from_numpy(closed.beliefs)
        if report.deficit and (closed is None or not closed.certified):
            left_open.append(layer.name)
        inputs[layer.name] = x.reshape(-1, *layer.feature_shape)
        reports.append(replace(report, seconds=time.perf_counter() - begin))
    inputs = {layer.name: inputs[layer.name] for layer in chain.layers}
    found = (tuple(left_open), beliefs, tuple(noise_stds), probe, positive)
    return Descent(inputs, tuple(reports), mismatch, True, *found)


def close_by_virtual_constraints(
    before: Layer, received: SharedGradient, solution: LayerSolution, z: Tensor, dx: Tensor
) -> VirtualSolution | None:
    """What the layer before adds to a layer's solution; None where that is not called for, or it has nothing to add.

    For one image these are its range and its gradient, for a batch its range, which also joins a system that is not
    deficient where its condition number blurs the solution.

    Args:
        before: The layer before.
        received: The gradients.
        solution: Of the layer, (B, C, H, W).
        z: Pre-activations of the layer, (B, O, H′, W′).
        dx: Gradient of the loss by the layer's input.
    """
    if len(solution.x) == 1:
        return close_by_previous(before, received, solution, z, dx) if solution.report.deficit else None
    return _by_range(before, received, solution)


def _above(chain: Chain, start: Start) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs of the start's layer and of those above it, and which of their pre-activations are positive."""
    inputs, positive, x = {}, {}, start.x
    if not len(x):  # no image: nothing below either
        return chain.layer_inputs(x.new_zeros(0, *chain.image_shape)), {}
    for layer in chain.layers[start.layer :]:
        inputs[layer.name] = x.reshape(-1, *layer.feature_shape)
        if layer is chain.layers[-1]:
            break
        z = layer.apply(x.reshape(-1, *layer.input_shape)) + layer.pre_bias()
        if layer.activation.has_kink:
            positive[layer.name] = z > 0
        x = layer.activation.forward(z)
    return inputs, positive


def _inverted(layer: Layer, x: Tensor, accuracy: float) -> tuple[Tensor, Tensor | None]:
    """σ⁻¹(x) and where it is known; a batch is taken through activations that have an inverse everywhere."""
    return layer.activation.invert(x, accuracy) if len(x) == 1 else (layer.activation.inverse(x), None)


def _decided_slopes(layer: Layer, G: Tensor, x: Tensor, dx: Tensor, probe: NoiseProbe | None) -> Slopes | None:
    """The slopes that the likelihood decides, None without a probe or a kink."""
    if probe is None:
        return None
    return decide_activation_pattern(layer, G, x, dx, probe.error, rms(layer.gradient(probe.noise)).item())


def _accuracy(report: LayerReport, received: SharedGradient) -> float:
    """Error of a layer's recovered input relative to its size, roughly: what rounding makes of its condition number."""
    condition = report.condition if report.condition and math.isfinite(report.condition) else 1.0
    return min(ERROR_AMPLIFICATION * condition * max(received.precision, FLOAT64_FLOOR), 1e-3)


def _identities(
    layer: Layer, received: SharedGradient, G: Tensor, dz: Tensor, z: Tensor, known: Tensor | None
) -> float:
    """The largest identity residual of the layer's groups and of its bias."""
    found = identity_residual(layer, G, dz, z, known)
    if layer.bias_name is None or layer.bias_name in received.underflowed:
        return found
    return max(found, bias_residual(layer, received.gradients[layer.bias_name], dz))


def _closed(
    closed: VirtualSolution, x: Tensor, report: LayerReport, probe: NoiseProbe | None
) -> tuple[Tensor, LayerReport, NoiseProbe | None]:
    """A layer's input as the layer before has closed it; its error joins the probe's."""
    if probe is not None:
        probe = replace(probe, x=probe.x + torch.from_numpy(closed.draw).reshape(probe.x.shape))
        report = replace(report, predicted_error=probe.error)
    report = replace(report, virtual_constraints=closed.equations, iterations=closed.iterations,
                     condition=closed.condition, residual=closed.residual)  # fmt: skip
    return torch.as_tensor(closed.x).reshape(x.shape), report, probe


def _by_range(before: Layer, received: SharedGradient, solution: LayerSolution) -> VirtualSolution | None:
    """Joins the range constraints of the layer before where they are needed and there are any."""
    report, solved = solution.report, solution.solved[0]
    blurred = received.precision * (report.condition or 1.0) > MAX_PRECISION_CONDITION
    if before.is_fixed or len(solution.solved) > 1 or solved is None or not (report.deficit or blurred):
        return None
    factor = range_factor(before)
    if factor is None or len(solution.x) * factor.basis.shape[1] < report.deficit + CERTIFICATE_SURPLUS:
        return None
    precision = max(received.precision, FLOAT64_FLOOR)
    return close_by_range(
        before, factor, solved[0], solution.x, deficit=report.deficit, precision=precision, rcond=received.rcond
    )
