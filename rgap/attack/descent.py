"""Layer by layer from a start down to the images, for one image and a batch alike.

A single image has a noise probe beside it, which predicts errors (ours): one draw of the noise on the gradient, and by
how much it changes the recovered x and δx. Each layer maps the probe with the factors that solved it, so errors of the
layers above arrive with all their correlations; a sign in doubt is flipped in the probe with its probability. A layer
has so many entries that one draw suffices for their root mean square.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rgap.attack.misfit import NoiseProbe
from rgap.attack.pattern import Slopes, decide_activation_pattern, settle_signs
from rgap.equations import LayerSolution, bias_residual, identity_residual, solve_layer
from rgap.head.hypothesis import Start
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.results import LayerReport
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient
from rgap.virtual.certificate import VirtualSolution
from rgap.virtual.closure import ERROR_AMPLIFICATION, close_by_previous
from rgap.virtual.range import close_by_range

MAX_PRECISION_CONDITION = 1e-5  # precision times condition from which range constraints join a batch's system anyway
DOUBT_RATIO = 1e4  # outputs smaller than this times the precision times their root mean square may have the wrong sign
MIN_DOUBT = 1e-8  # smallest such size, relative to the root mean square
MAX_ZERO_INPUT = 1e-6  # ‖z − b‖ / ‖z‖ up to which a layer's input counts as zero where its weight's gradient is zero

Closer = Callable[[Layer, SharedGradient, LayerSolution, Tensor, Tensor], VirtualSolution | None]
"""(layer before, gradients, a layer's solution, its z, δx by its input) -> the closed solution, None where none is."""


@dataclass(frozen=True)
class Descent:
    """A start that was followed down the chain."""

    start: Start  # the start
    layer_inputs: Mapping[str, Tensor]  # layer name -> recovered input, (B, *feature_shape), from the image to the head
    reports: tuple[LayerReport, ...]  # from the last layer to the first
    mismatch: float  # the largest identity residual met on the way
    complete: bool  # whether the images were reached
    open_layers: tuple[str, ...] = ()  # names of rank-deficient layers whose null space nothing closed
    # name of a layer that virtual constraints closed -> belief on its input after each step, (steps, n)
    beliefs: Mapping[str, Tensor] = field(default_factory=dict)
    # noise on the gradient's entries, from the surplus equations of each layer that its gradient equations alone
    # overdetermine, from the last on
    noise_stds: tuple[float, ...] = ()
    probe: NoiseProbe | None = None  # how a draw of the noise changes the image
    # name of a layer whose activation has two slopes -> which of its pre-activations are positive, (B, …); of a mean of
    # gradients, for which part of them
    positive: Mapping[str, Tensor] = field(default_factory=dict)
    # of a batch, layer name -> its own solution
    solutions: Mapping[str, LayerSolution] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class _PreActivation:
    """A layer's pre-activation and the gradient by it, from its output."""

    x: Tensor  # output, (B, O, H′, W′), of a batch with doubtful signs settled
    z: Tensor  # pre-activation, of the same shape
    known: Tensor | None  # entries of z that x determines; None where it determines all
    slopes: Slopes | None  # σ′(z) by a noise probe; None where σ has no kink
    dz: Tensor  # gradient by z
    G: Tensor  # the weight's gradient; zeros where none is shared
    has_equations: bool  # whether K(δz) x = vec(G) holds
    mismatch: float  # identity residual


def descend(
    chain: Chain, received: SharedGradient, start: Start, *, probe: NoiseProbe | None = None,
    close: Closer | None = None, give_up: float = math.inf, like: Descent | None = None,
) -> Descent:  # fmt: skip
    """Recovers the inputs of every layer below a start, whose inputs and gradients by them are known for all images.

    For one image a probe of the noise, at the start, predicts errors and decides signs. `close` may close the null
    space of a rank-deficient layer, as `close_by_virtual_constraints` does. An identity residual above `give_up` drops
    the start, and the descent stays incomplete. The factors of a batch's descent by almost the same gradient, `like`,
    serve once more.
    """
    reports, x, dx, mismatch = list(start.reports), start.x, start.dx, 0.0
    if probe is not None:
        reports[-1] = replace(reports[-1], predicted_error=probe.error)
    inputs, positive = _above(chain, start)
    left_open, beliefs, noise_stds, solutions = [], {}, [], {}
    for i in reversed(range(start.layer if len(x) else 0)):
        layer, above, begin = chain.layers[i], chain.layers[i + 1], time.perf_counter()
        x, dx = (t.reshape(-1, *layer.output_shape) for t in (x, dx))
        at = _through_activation(layer, received, x, dx, probe, reports[-1])
        inputs[above.name], mismatch = at.x.reshape(-1, *above.feature_shape), max(mismatch, at.mismatch)
        if layer.activation.has_kink or at.slopes is not None:
            positive[layer.name] = at.z > 0 if at.slopes is None else at.slopes.positive
        if mismatch > give_up and not left_open:  # below an open layer identities fail for every label
            return Descent(start, inputs, tuple(reports), mismatch, False)
        options = {"known": at.known, "precision": received.precision, "like": like and like.solutions.get(layer.name)}
        solution = solve_layer(
            layer, at.G, at.dz if at.has_equations else 0 * at.dz, at.z, rcond=received.rcond, **options
        )
        x, report = solution.x, solution.report
        noise_stds += [] if solution.noise_std is None or left_open else [solution.noise_std]
        if probe is None:
            dx = layer.adjoint(at.dz)
        else:
            probe, dx = _propagate(layer, received, probe, solution, at, dx)
            report = replace(report, predicted_error=probe.error)
        if at.known is not None:
            report = replace(report, saturated=int((~at.known).sum()))
        closable = close and i and not left_open  # below an open layer z is wrong, and no solution fits
        closed = close(chain.layers[i - 1], received, solution, at.z, dx) if closable else None
        certified = closed is not None and closed.certified
        if len(x) > 1:
            solutions[layer.name] = replace(solution, closed=closed) if certified else solution
        if closed is not None and (certified or report.deficit):
            x, report, probe = _closed(closed, x, report, probe)
            if closed.beliefs is not None:
                beliefs[layer.name] = torch.from_numpy(closed.beliefs)
        if report.deficit and not certified:
            left_open.append(layer.name)
        inputs[layer.name] = x.reshape(-1, *layer.feature_shape)
        reports.append(replace(report, seconds=time.perf_counter() - begin))
    inputs = {layer.name: inputs[layer.name] for layer in chain.layers}
    found = (tuple(left_open), beliefs, tuple(noise_stds), probe, positive, solutions)
    return Descent(start, inputs, tuple(reports), mismatch, True, *found)


def _through_activation(
    layer: Layer, received: SharedGradient, x: Tensor, dx: Tensor, probe: NoiseProbe | None, above: LayerReport
) -> _PreActivation:
    """Inverts a layer's activation at x and decides doubtful signs; `above` reports on the layer that gave x."""
    has_gradient = not layer.is_fixed and not set(layer.weight_names) & set(received.absent)
    G = layer.gradient(received.gradients) if has_gradient else torch.zeros_like(layer.weight)
    if len(x) == 1:
        z, known = layer.activation.invert(x, _accuracy(above, received))
    else:  # a batch crosses only activations with an inverse everywhere
        if has_gradient:
            x = settle_signs(layer, G, x, dx, doubt=max(DOUBT_RATIO * received.precision, MIN_DOUBT))
        z, known = layer.activation.inverse(x), None
    slopes = None
    if has_gradient and probe is not None:
        std = rms(layer.gradient(received.noise)).item()
        path = received.positive_shares, received.reach.get(layer.name)
        slopes = decide_activation_pattern(layer, G, x, dx, probe.error, std, *path)
    dz = (layer.activation.derivative(z) if slopes is None else slopes.values) * dx
    mismatch = identity_residual(layer, G, dz, z, known) if has_gradient else 0.0
    if has_gradient and layer.bias_name is not None and layer.bias_name not in received.absent:
        mismatch = max(mismatch, bias_residual(layer, received.gradients[layer.bias_name], dz))
    return _PreActivation(x, z, known, slopes, dz, G, has_gradient or _reads_zeros(layer, received, z), mismatch)


def close_by_virtual_constraints(
    before: Layer, received: SharedGradient, solution: LayerSolution, z: Tensor, dx: Tensor, *, full: bool = True
) -> VirtualSolution | None:
    """What the layer before adds to a layer's solution; None where it is not needed or has nothing to add.

    For one image it adds its range and its gradient; for a batch its range, also to a system without deficit whose
    condition number blurs the solution. z (B, O, H′, W′) is the layer's pre-activation, dx the gradient by its input;
    unless `full`, a system that takes long is not approached.
    """
    report = solution.report
    if len(solution.x) == 1:
        return close_by_previous(before, received, solution, z, dx, full=full) if report.deficit else None
    blurred = received.precision * (report.condition or 1.0) > MAX_PRECISION_CONDITION
    return close_by_range(before, received, solution) if report.deficit or blurred else None


def _propagate(
    layer: Layer, received: SharedGradient, probe: NoiseProbe, solution: LayerSolution, at: _PreActivation, dx: Tensor
) -> tuple[NoiseProbe, Tensor]:
    """The probe of a layer's input, from that of its output, and the gradient by it; dx is that by the output."""
    changed, _ = layer.activation.invert(at.x + probe.x.reshape(at.x.shape))
    if at.slopes is not None:
        slope = at.slopes.draw(probe.generator)
    else:  # which entries lie on a flat part is known
        slope = layer.activation.derivative(at.z if layer.activation.clips else changed)
    dz_change = slope * (dx + probe.dx.reshape(at.x.shape)) - at.dz
    rest = torch.zeros_like(layer.weight)
    if not layer.is_fixed:
        rest = layer.rest_of_gradient(layer.gradient(received.noise), solution.x[0], dz_change[0])
    dx, change = layer.adjoint(torch.cat([at.dz, dz_change])).split(len(at.dz))
    return NoiseProbe(solution.sensitivity(rest, changed - at.z), change, probe.generator), dx


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


def _reads_zeros(layer: Layer, received: SharedGradient, z: Tensor) -> bool:
    """Whether a weight's gradient is zero although the client trains the layer, as that of a black image is: z is b."""
    if layer.bias_name not in received.usable:
        return False
    return bool(rms(z - layer.pre_bias()) <= MAX_ZERO_INPUT * rms(z))


def _accuracy(report: LayerReport, received: SharedGradient) -> float:
    """Rough relative error of a layer's recovered input: rounding, amplified by its condition number."""
    condition = report.condition if report.condition and math.isfinite(report.condition) else 1.0
    return min(ERROR_AMPLIFICATION * condition * max(received.precision, FLOAT64_FLOOR), 1e-3)


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
