"""Candidates: the image of a descent, weighed by its own gradient and by the effect of noise on it.

A candidate must reproduce the shared gradient to within the gradient's own errors. Where it misses by more than the
format explains, either it is wrong or the layers amplify those errors; the noise probe predicts by how much (ours).

Where the rank laws foresee that nothing can determine a layer's input, no system need be solved (ours). A layer's own
equations leave at least unknowns − rank [W; K] open, by law. The layer before supplies at most the |z| − rank W
equations of its range and the rank of its K, and has the null space of its W as further unknowns. Where that is too
little for a certificate, the verdict is certain, and only a rough picture is left to be solved for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rgap.attack.descent import Closer, Descent
from rgap.attack.misfit import NOISE_RESIDUAL_FACTOR, Misfit, NoiseProbe, misfit
from rgap.attack.pattern import project_to_pattern
from rgap.client.gradients import loss_gradients
from rgap.equations.limits import DEFAULT_LIMITS
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS, RankLaws, layer_laws
from rgap.head.hypothesis import REAL_TARGET, Start, Twin
from rgap.linalg import rms
from rgap.network.layer import Chain, Layer
from rgap.results import PIXEL_SLACK_FACTOR, Candidate, LayerReport, PixelRange
from rgap.shared_gradient import FLOAT64_FLOOR, SharedGradient

MIN_PIXEL_SLACK = (
    1e-8  # distance outside the range, in widths of it, that a pixel may have, for errors of float64 arithmetic
)
MAX_PATTERN_FLIPS = 30  # units of an image that may lie on another piece than was decided; noise flips more
UNKNOWNS_A_SECOND = 1000  # open unknowns of a dense system solved within about a second; time grows with the cube
MAX_FUTILE_SECONDS = 0.5  # seconds, by estimate, that may be spent on the part of a hopeless network that is determined


@dataclass(frozen=True)
class Attack:
    """What all steps of one attack share."""

    chain: Chain  # the prepared network
    received: SharedGradient  # the gradients
    loss: str  # a name in `rgap.client.LOSSES`
    close: Closer | None = None  # what may close rank-deficient layers; None leaves them open
    pixels: PixelRange = field(default_factory=PixelRange)  # the values that a pixel may have
    # whether the gradient's noise was inferred from surplus equations, not declared or seen by its format
    inferred: bool = False
    gradient_scale: float | None = 1.0  # factor κ of the shared gradient κ ∇ℓ; None to estimate it
    label_smoothing: float | None = 0.0  # ε of the client's labels; None to estimate it

    def gradients(self, images: Tensor, labels: Tensor, start: Start) -> dict[str, Tensor]:
        """The gradient that a client with these images (B, C, H, W) and the loss of a start would share, by name."""
        return loss_gradients(self.chain.model, self.chain.parameters, images, labels, self.loss, **start.client_loss)

    def images(self, descent: Descent) -> Tensor:
        """The recovered input of the first layer, (B, C, H, W)."""
        return descent.layer_inputs[self.chain.layers[0].name].reshape(len(descent.start.x), *self.chain.image_shape)

    def inputs(self, descent: Descent, images: Tensor) -> dict[str, Tensor]:
        """The recovered inputs by layer name, with these images in place of the first layer's."""
        name = self.chain.layers[0].name
        return {**descent.layer_inputs, name: images.reshape(descent.layer_inputs[name].shape)}

    def slack(self, largest_error: float) -> float:
        """How far outside the range a pixel may lie where the largest error of a pixel is predicted to be this."""
        return PIXEL_SLACK_FACTOR * largest_error + MIN_PIXEL_SLACK * self.pixels.width


@dataclass(frozen=True)
class Weighed:
    """The candidates of a descent, compared with the shared gradient."""

    start: Start  # where the descent started
    joint: Candidate  # the candidate of all images together
    # for each image of a batch its candidates, one for each of its twins, those in the pixel range first
    each: tuple[tuple[Candidate, ...], ...] = ()
    # whether the scales of a batch rest on its size alone, without confirmation by the gradient's rank
    unconfirmed: bool = False
    doubt: str = ""  # why noise that was inferred does not explain the misfit; empty where it does
    match: Misfit | None = None  # of a single image as recovered; None where it is not finite


def twins(descent: Descent) -> Iterator[Descent]:
    """A single image's twins: with positively homogeneous activations every layer's input scales with the image."""
    yield descent
    for twin in descent.start.twins[0][1:]:
        factor = twin.factor
        scaled = [{name: factor * x for name, x in of.items()} for of in (descent.layer_inputs, descent.beliefs)]
        errors = [None if r.predicted_error is None else abs(factor) * r.predicted_error for r in descent.reports]
        reports = tuple(replace(r, predicted_error=e) for r, e in zip(descent.reports, errors, strict=True))
        probe = None if descent.probe is None else replace(descent.probe, x=factor * _relengthened(descent, twin))
        label = descent.start.labels if twin.label == REAL_TARGET else torch.tensor([twin.label])
        start = replace(descent.start, labels=label, length_errors=(twin.length_error,))
        yield replace(descent, start=start, layer_inputs=scaled[0], beliefs=scaled[1], reports=reports, probe=probe)


def _relengthened(descent: Descent, twin: Twin) -> Tensor:
    """The change of the image by the noise, where its length has the error of a twin's."""
    before, after = (
        error if math.isfinite(error) else 0.0 for error in (*descent.start.length_errors, twin.length_error)
    )
    image = descent.layer_inputs[descent.reports[-1].name]
    return descent.probe.x + (after - before) * image.reshape(descent.probe.x.shape)


def weigh_images(attack: Attack, descents: Sequence[Descent]) -> list[Weighed]:
    """Weighs single images, of twins the one in the pixel range first.

    Twins have the same gradient: where its twin's is the shared one, an image outside the pixel range, by more than any
    error explains, needs no comparison of its own. Nothing that may be certified goes without.
    """
    found: dict[int, Weighed] = {}
    order = sorted(range(len(descents)), key=lambda i: not attack.pixels.contains(attack.images(descents[i]), 0.0))
    for place in order:
        found[place] = weigh_image(attack, descents[place], list(found.values()))
    return [found[place] for place in range(len(descents))]


def weigh_image(attack: Attack, descent: Descent, others: Sequence[Weighed] = ()) -> Weighed:
    """Compares the gradient of a single image with the shared one, and with the effect of noise on both.

    The others were weighed before, and may be its twins.
    """
    received, labels, image = attack.received, descent.start.labels, attack.images(descent)
    match, recovered = Misfit(math.inf, received.arithmetic), None
    if torch.isfinite(image).all():
        match = recovered = _of_twin(attack, descent, image, others) or _match(attack, descent, image)
        moved = _on_decided_pattern(attack.chain, descent, image) if not match.residual <= match.allowed else None
        if moved is not None:
            pairs = (image, match), (moved, _match(attack, descent, moved))
            image, match = min(pairs, key=lambda pair: pair[1].residual)
    reports = descent.reports
    if descent.probe is not None:
        reports = tuple(replace(r, predicted_error=match.excess * r.predicted_error) for r in reports)
    inside = attack.pixels.contains(image, attack.slack(max(match.largest_errors, default=0.0)))
    factor, brightness = descent.start.scales(0)
    if not inside and match.residual <= match.allowed and attack.chain.leaves_brightness_open:
        brightness = math.inf  # the factor that was asserted is not believed
    return Weighed(descent.start, Candidate(
        image, labels, match.residual, inside, attack.inputs(descent, image), reports, descent.open_layers,
        descent.beliefs, match.allowed, max(match.errors, default=None), None, factor / received.unit, brightness,
    ), doubt=match.doubt, match=recovered)  # fmt: skip


def _of_twin(attack: Attack, descent: Descent, image: Tensor, others: Sequence[Weighed]) -> Misfit | None:
    """The comparison of a twin that was consistent as recovered, with this image's errors; None if these may matter."""
    same = (one.match for one in others if one.match is not None and one.start.twins is descent.start.twins)
    match = next((match for match in same if match.residual <= match.allowed), None)
    if match is None:
        return None
    match = _with_errors(match, descent.probe)
    return None if attack.pixels.contains(image, attack.slack(max(match.largest_errors, default=0.0))) else match


def _match(attack: Attack, descent: Descent, image: Tensor) -> Misfit:
    """Compares the gradients of one image, and of the image as the noise may have changed it."""
    start, probe = descent.start, descent.probe
    mine = attack.gradients(image, start.labels, start)
    if probe is None:
        return misfit(attack.received, mine, mine)
    moved = attack.gradients(image + probe.x.reshape(image.shape), start.labels, start)
    return _with_errors(misfit(attack.received, mine, moved, inferred=attack.inferred), probe)


def _with_errors(match: Misfit, probe: NoiseProbe | None) -> Misfit:
    """The comparison with the errors of an image that the noise changes by this much, as far as it tells."""
    if probe is None:
        return match
    errors = (match.excess * probe.error,), (match.excess * probe.x.abs().max().item(),)
    return replace(match, errors=errors[0], largest_errors=errors[1])


def _on_decided_pattern(chain: Chain, descent: Descent, image: Tensor) -> Tensor | None:
    """The image moved onto the activation pattern that the descent decided, None where that exceeds its error.

    A unit whose pre-activation is smaller than its error may lie on the other piece when the image goes forward again;
    one in ten thousand changes the gradient by a per cent, and is no evidence against the image.
    """
    if descent.probe is None or descent.open_layers:
        return None
    moved = project_to_pattern(chain.layers[:-1], image, descent.positive, MAX_PATTERN_FLIPS)
    by, size = rms(moved - image), rms(image).item()
    return moved if 0 < by <= NOISE_RESIDUAL_FACTOR * max(descent.probe.error, FLOAT64_FLOOR * size) else None


def foreseen_deficits(attack: Attack) -> dict[str, int] | None:
    """The layers' deficits by law, down to the first that nothing can close.

    None where there is no such layer, or where solving for what is determined takes half a second at most.
    """
    layers, absent, seconds = attack.chain.layers, set(attack.received.absent), 0.0
    deficits: dict[str, int] = {}
    hopeless: dict[str, int] | None = None
    for i in reversed(range(len(layers) - 1)):
        layer, before = layers[i], layers[i - 1] if i else None
        laws = _laws(layer, absent)
        if laws.both is None:
            continue
        deficit = layer.unknowns - laws.both
        seconds += ((layer.unknowns - (laws.gradients or 0)) / UNKNOWNS_A_SECOND) ** 3
        if not deficit:
            continue
        deficits[layer.name] = deficit
        supply, further = (0, 0) if before is None or attack.close is None else _supplied(before, absent)
        seconds += ((deficit + further) / UNKNOWNS_A_SECOND) ** 3 * bool(supply)
        if supply < deficit + further + CERTIFICATE_SURPLUS:
            hopeless = hopeless or dict(deficits)
    return hopeless if seconds > MAX_FUTILE_SECONDS else None


def _laws(layer: Layer, absent: set[str]) -> RankLaws:
    """The rank laws of a layer with the equations that it has."""
    if layer.is_fixed:
        if layer.after is None or layer.before is not None:
            return RankLaws(layer.unknowns, 0, layer.unknowns)
        rank = min(layer.unknowns, layer.input_shape[0] * layer.after.rank)
        return RankLaws(rank, 0, rank)
    laws = layer_laws(layer)
    return laws if not absent & set(layer.weight_names) else RankLaws(laws.weights, 0, laws.weights)


def _supplied(before: Layer, absent: set[str]) -> tuple[int, int]:
    """Equations that a layer supplies at most to the next one, and unknowns that come with them."""
    laws, outputs = _laws(before, absent), math.prod(before.output_shape)
    usable, largest = before.groups == 1 and before.activation.one_to_one, max(outputs, before.unknowns)
    if before.is_fixed or not usable or largest > DEFAULT_LIMITS.max_pinv_side:
        return 0, 0
    if laws.weights is None:
        return largest + before.weight.numel(), 0
    gradients = before.weight.numel() if laws.gradients is None else laws.gradients
    redundant = before.output_shape[0] if before.activation.homogeneous and before.bias is before.shift is None else 0
    return outputs - laws.weights + max(gradients - redundant, 0), before.unknowns - laws.weights


def without_solving(attack: Attack, start: Start, deficits: dict[str, int]) -> Weighed:
    """A candidate with the head's reading alone, a uniform image, and reports by law."""
    chain = attack.chain
    images = torch.full((1, *chain.image_shape), attack.pixels.middle, dtype=torch.float64)
    reports, absent = list(start.reports), set(attack.received.absent)
    for layer in reversed(chain.layers[:-1]):
        rank = _laws(layer, absent).both
        deficit = None if rank is None else layer.unknowns - rank
        reports.append(LayerReport(layer.name, layer.unknowns, rank=rank, deficit=deficit))
    inputs = {chain.layers[-1].name: start.x.reshape(1, *chain.layers[-1].feature_shape)}
    left_open = tuple(deficits)[-1:]
    return Weighed(start, Candidate(images, start.labels, math.inf, True, inputs, tuple(reports), left_open))
