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

from rgap.attack.pattern import Slopes, decide_activation_pattern, settle_signs
from rgap.equations import LayerSolution, bias_residual, identity_residual, solve_layer
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.head.hypothesis import Start, least_squares_input, rank_one
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.results import LayerReport
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient
from rgap.virtual.certificate import VirtualSolution
from rgap.virtual.closure import ERROR_AMPLIFICATION, close_by_previous
from rgap.virtual.range import close_by_range, range_factor

MAX_PRECISION_CONDITION = 1e-5
"""Precision times condition number above which range constraints join a batch's system even without a deficit."""

DOUBT_RATIO = 1e4  # outputs smaller than this times the precision times their root mean square may have the wrong sign

MAX_ZERO_INPUT = 1e-6
"""Size of z − b relative to z up to which a layer's input is taken for zero where its weight's gradient is."""

MIN_DOUBT = 1e-8  # smallest such size, relative to the root mean square

Closer = Callable[[Layer, SharedGradient, LayerSolution, Tensor, Tensor], VirtualSolution | None]
"""(layer before, gradients, a layer's solution, its z, δx by its input) -> the closed solution, None where none is."""


@dataclass(frozen=True)
class NoiseProbe:
    """One draw of the noise, and how it changes a layer's output."""

    x: Tensor  # change of the output, (B, …)
    dx: Tensor  # change of the gradient by it, (B, …)
    noise: Mapping[str, Tensor]  # parameter name -> change of its gradient
    generator: torch.Generator  # source of the random numbers drawn on the way

    @property
    def error(self) -> float:
        """Root mean square of the change of x."""
        largest = self.x.abs().max()
        return (largest * rms(self.x / largest)).item() if largest > 0 else 0.0


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


def descend(
    chain: Chain,
    received: SharedGradient,
    start: Start,
    *,
    probe: NoiseProbe | None = None,
    close: Closer | None = None,
    give_up: float = math.inf,
    like: Descent | None = None,
) -> Descent:
    """Recovers the inputs of every layer below a start.

    Args:
        chain: The prepared network.
        received: The gradients of the mean loss, their precision and the cutoff.
        start: The inputs of one layer and the gradients by them, of all images.
        probe: A draw of the noise and its effect on the start, to predict errors and decide signs; one image only.
        close: What may close the null space of a rank-deficient layer, such as `close_by_virtual_constraints`.
        give_up: Identity residual above which the start is dropped and the descent stays incomplete.
        like: A batch's descent by almost the same gradient, whose factors serve once more.
    """
    reports, x, dx, mismatch = list(start.reports), start.x, start.dx, 0.0
    if probe is not None:
        reports[-1] = replace(reports[-1], predicted_error=probe.error)
    inputs, positive = _above(chain, start)
    left_open, beliefs, noise_stds, solutions = [], {}, [], {}
    for i in reversed(range(start.layer if len(x) else 0)):
        layer, above, begin = chain.layers[i], chain.layers[i + 1], time.perf_counter()
        has_gradient = not layer.is_fixed and not set(layer.weight_names) & set(received.absent)
        G = layer.gradient(received.gradients) if has_gradient else torch.zeros_like(layer.weight)
        x, dx = (t.reshape(-1, *layer.output_shape) for t in (x, dx))
        if len(x) > 1 and has_gradient:
            x = settle_signs(layer, G, x, dx, doubt=max(DOUBT_RATIO * received.precision, MIN_DOUBT))
            inputs[above.name] = x.reshape(-1, *above.feature_shape)
        if len(x) == 1:
            z, known = layer.activation.invert(x, _accuracy(reports[-1], received))
        else:  # a batch crosses only activations with an inverse everywhere
            z, known = layer.activation.inverse(x), None
        slopes = None
        if has_gradient and probe is not None:
            std = rms(layer.gradient(probe.noise)).item()
            path = received.positive_shares, received.reach.get(layer.name)
            slopes = decide_activation_pattern(layer, G, x, dx, probe.error, std, *path)
        dz = (layer.activation.derivative(z) if slopes is None else slopes.values) * dx
        if slopes is not None or layer.activation.has_kink:
            positive[layer.name] = z > 0 if slopes is None else slopes.positive
        if has_gradient:
            mismatch = max(mismatch, identity_residual(layer, G, dz, z, known))
            if layer.bias_name is not None and layer.bias_name not in received.absent:
                mismatch = max(mismatch, bias_residual(layer, received.gradients[layer.bias_name], dz))
        if mismatch > give_up and not left_open:  # below an open layer identities fail for every label
            return Descent(start, inputs, tuple(reports), mismatch, False)
        equations = (G, dz if has_gradient or _reads_zeros(layer, received, z) else 0 * dz, z)
        options = {"known": known, "precision": received.precision, "like": like and like.solutions.get(layer.name)}
        solution = solve_layer(layer, *equations, rcond=received.rcond, **options)
        report = solution.report
        noise_stds += [] if solution.noise_std is None or left_open else [solution.noise_std]
        if probe is None:
            dx = layer.adjoint(dz)
        else:
            probe, dx = _propagate(layer, probe, solution, x, dx, z, dz, slopes)
            report = replace(report, predicted_error=probe.error)
        if known is not None:
            report = replace(report, saturated=int((~known).sum()))
        x = solution.x
        closable = close and i and not left_open  # below an open layer z is wrong, and no solution fits
        closed = close(chain.layers[i - 1], received, solution, z, dx) if closable else None
        if len(x) > 1:
            again = closed is not None and closed.certified
            solutions[layer.name] = replace(solution, closed=closed) if again else solution
        if closed is not None and (closed.certified or report.deficit):
            x, report, probe = _closed(closed, x, report, probe)
            if closed.beliefs is not None:
                beliefs[layer.name] = torch.from_numpy(closed.beliefs)
        if report.deficit and (closed is None or not closed.certified):
            left_open.append(layer.name)
        inputs[layer.name] = x.reshape(-1, *layer.feature_shape)
        reports.append(replace(report, seconds=time.perf_counter() - begin))
    inputs = {layer.name: inputs[layer.name] for layer in chain.layers}
    found = (tuple(left_open), beliefs, tuple(noise_stds), probe, positive, solutions)
    return Descent(start, inputs, tuple(reports), mismatch, True, *found)


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
    solved = solution.solved[0]
    blurred = received.precision * (report.condition or 1.0) > MAX_PRECISION_CONDITION
    if before.is_fixed or len(solution.solved) > 1 or solved is None or not (report.deficit or blurred):
        return None
    factor = range_factor(before)
    if factor is None or len(solution.x) * factor.basis.shape[1] < report.deficit + CERTIFICATE_SURPLUS:
        return None
    precision = max(received.precision, FLOAT64_FLOOR)
    return close_by_range(before, factor, solution, precision=precision, rcond=received.rcond)


def drawn_head(chain: Chain, received: SharedGradient) -> tuple[Tensor, Tensor]:
    """Directions of the last layer's input and of the gradient by it, after a draw of the noise on its gradient."""
    head, dz = chain.layers[-1], None
    G = (head.gradient(received.gradients) + head.gradient(received.noise)).flatten(1)
    if head.bias_name is not None:
        dz = received.gradients[head.bias_name] + received.noise[head.bias_name]
    if dz is None or not received.gradients[head.bias_name].any():
        factors = rank_one(G)
        x, dz = factors.v, factors.u
    else:
        x = least_squares_input(G, dz)
    return x, head.adjoint(dz[None, :, None, None]).flatten(1)


def start_probe(
    chain: Chain, received: SharedGradient, start: Start, drawn: tuple[Tensor, Tensor] | None = None
) -> NoiseProbe:
    """A single image's start with a draw of the noise on the last layer's gradient, as by `drawn_head`.

    The draw turns x and δz. Their lengths are one number, of which a draw could be any small one: it has its standard
    deviation, except where nothing determines it.
    """
    x, dx = drawn or drawn_head(chain, received)
    (error,) = start.length_errors
    error = error if math.isfinite(error) else 0.0
    x, dx = _turned(x, start.x, error), _turned(dx, start.dx, -error)
    return NoiseProbe(x, dx, received.noise, torch.Generator().manual_seed(1))


def _turned(drawn: Tensor, values: Tensor, error: float) -> Tensor:
    """The change of `values` (1, n) that turns them into the direction drawn, and lengthens them by `error`."""
    drawn = drawn.reshape(values.shape) / drawn.abs().max()
    unit = values.abs().max().clamp(min=torch.finfo(values.dtype).tiny)  # squares of small gradients underflow
    size = unit * (values / unit).norm() / drawn.norm()
    return (1 + error) * size * (drawn * (values / unit)).sum().sign() * drawn - values


def _propagate(
    layer: Layer, probe: NoiseProbe, solution: LayerSolution, x: Tensor, dx: Tensor, z: Tensor, dz: Tensor,
    slopes: Slopes | None,
) -> tuple[NoiseProbe, Tensor]:  # fmt: skip
    """The probe of a layer's input, from that of its output x (B, O, H′, W′), and the gradient by it.

    Slopes are None where σ has no kink.
    """
    changed, _ = layer.activation.invert(x + probe.x.reshape(x.shape))
    if slopes is not None:
        slope = slopes.draw(probe.generator)
    else:  # which entries lie on a flat part is known
        slope = layer.activation.derivative(z if layer.activation.clips else changed)
    dz_change = slope * (dx + probe.dx.reshape(x.shape)) - dz
    rest = torch.zeros_like(layer.weight)
    if not layer.is_fixed:
        rest = layer.rest_of_gradient(layer.gradient(probe.noise), solution.x[0], dz_change[0])
    dx, change = layer.adjoint(torch.cat([dz, dz_change])).split(len(dz))
    return NoiseProbe(solution.sensitivity(rest, changed - z), change, probe.noise, probe.generator), dx


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
