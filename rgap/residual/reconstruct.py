"""The image behind a residual or pooling network's gradient, and a verdict that needs neither loss nor ground truth."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.linalg import rms
from rgap.residual.blind import BlindSolution
from rgap.residual.cut import Cut, ResidualNetwork, delta_at_top, enter
from rgap.residual.invert import START_STD, Below, Inverted, below, draw_error, invert
from rgap.residual.walk import Known, Walk
from rgap.results import (
    MAX_CERTIFIED_ERROR,
    Candidate,
    LayerReport,
    PixelRange,
    Reconstruction,
    UnsupportedLayerError,
    noise_limit,
    with_accuracy,
)
from rgap.shared_gradient import SharedGradient, receive_gradients
from rgap.tokens.replay import Replay

ERROR_SAFETY = 4.0
"""Times the error predicted from independent noise: errors of the tensors walked through are correlated."""

CONVERGED_KNOWN = 15.0
"""Known numbers a pixel value with which the inversion of what lies below a walk converged in trials."""

STALLED_KNOWN = 7.0
"""The same with which it stalled."""

MAX_ROUNDING_ERRORS = 30.0
"""Errors of a pre-activation within which its sign may differ from the client's."""

NOISE_RESIDUAL_FACTOR = 5.0
"""Times its predicted error by which an image may leave the pixel range."""


def reconstruct_residual(
    network: ResidualNetwork,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    loss: str = "cross_entropy",
    *,
    batch_size: int | None = 1,
    labels: Tensor | Sequence[int] | None = None,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    rcond: float | None = None,
    noise_std: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    gradient_scale: float | None = None,
    label_smoothing: float | None = None,
) -> Reconstruction:
    """Computes an image back from the gradient of a network with branches or pooling (ours).

    A blind layer is solved from its own gradient, blocks are walked down by gradient equations, and what lies below the
    last full-rank layer is inverted as one nonlinear least squares. Nothing above the blind layer is needed: it only
    checks, where the loss is known.

    Args:
        network: From `prepare_residual`.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        loss: A name in `rgap.client.LOSSES`; for the check of the whole gradient.
        batch_size: 1; a blind layer is that of one image.
        labels: The label if it is known, (1,).
        pixel_range: Smallest and largest value of a pixel.
        rcond: Singular values below rcond times the largest count as zero; by default matched to the precision.
        noise_std: Standard deviation of noise known to be on every gradient entry.
        seed: Seed of the noise that the inversion starts from.
        device: Where the returned images and labels live, by default the CPU.
        gradient_scale: Factor κ of the shared gradient κ ∇ℓ, which does not change the image; None to estimate it.
        label_smoothing: ε of a client that smooths its labels; None for 0.

    Returns:
        A `Reconstruction`; its layers are the blind layer, each tensor of the walk, and the inversion.

    Raises:
        UnsupportedLayerError: For more than one image, or outputs that the loss does not take.
        GradientMismatchError: If the gradients do not belong to the network or are not finite.
        ValueError: If another argument is out of range.
    """
    if batch_size != 1:
        raise UnsupportedLayerError(
            f"batch_size is {batch_size}: a convolution's own gradient gives its input for one image; for a batch it "
            "is a sum over the images; 1 is supported"
        )
    graph = network.graph
    received = receive_gradients(graph.parameters, gradients, rcond, noise_std, model=network.model)
    pixels = PixelRange(*pixel_range)
    replay = Replay(network.model, received, loss, label_smoothing or 0.0, gradient_scale)
    noise = torch.randn(network.image_shape, generator=torch.Generator().manual_seed(seed)).double()
    middle = (pixels.low + pixels.high) / 2 if math.isfinite(pixels.high - pixels.low) else 0.0
    found = _best_descent(network, received, middle + START_STD * pixels.width * noise)
    image = torch.zeros(1, *network.image_shape, dtype=torch.float64) if found.image is None else found.image[None]
    label, about_label = _label(replay, image, labels)
    scale, whole = replay.match(image, label) if label.item() >= 0 else (1.0, math.inf)
    notes = [*received.notes, *found.notes, *about_label]
    part = math.inf if found.image is None else found.lower_residual()
    by_noise = min(NOISE_RESIDUAL_FACTOR * found.error, pixels.width / 2) if math.isfinite(found.error) else 0.0
    inside = pixels.contains(image, MAX_CERTIFIED_ERROR * pixels.width + by_noise)
    candidate = Candidate(
        image, label, min(whole, part), inside, found.inputs(image), tuple(found.reports), found.open_layers,
        residual_allowed=received.tolerance, predicted_error=found.error, gradient_scale=scale,
    )  # fmt: skip
    verdict, why = _verdict(candidate, whole, part, pixels)
    if whole <= received.tolerance and scale != 1 and gradient_scale is None and verdict == "exact":
        why = [f"the shared gradient is {scale:.4g} times the image's own, missed by {whole:.2g}"]
    image, label = image.to(device or "cpu"), label.to(device or "cpu")
    candidate = replace(candidate, images=image, labels=label)
    result = Reconstruction(
        image, label, verdict, (candidate,), candidate.layers, (*notes, *why),
        gradient_scale=scale if whole <= received.tolerance else None,
    )  # fmt: skip
    return with_accuracy(result, pixels)


@dataclass(frozen=True)
class WalkedImage:
    """How far one cut has led.

    Attributes:
        walk: The walk, None where the cut itself failed.
        image: (C, H, W), None where nothing was found.
        error: Predicted root-mean-square error of the image.
        reports: Of the cut, of the walk's tensors, of the inversion.
        notes: What was decided, and on what evidence.
        open_layers: Tensors that nothing determined.
    """

    walk: Walk | None
    image: Tensor | None
    error: float
    reports: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    open_layers: tuple[str, ...] = ()

    def lower_residual(self) -> float:
        """Largest relative residual of the gradients of the cut and of all layers below it, given δz at the cut.

        A unit within rounding of zero may have been on the other side in the client's arithmetic: division decides.
        """
        walk, graph = self.walk, self.walk.graph
        names = graph.below([walk.top])
        values = graph.forward({graph.image: self.image}, names)
        slopes = graph.slopes(values)
        draw = self.error * torch.randn(self.image.shape, generator=torch.Generator().manual_seed(0)).double()
        moved = graph.push(slopes, draw, names)
        check = replace(walk, values={}, deltas={walk.top: walk.deltas[walk.top]}, slopes=slopes, decided=set())
        worst = 0.0
        for name in reversed(names):
            for reader in walk.readers(name):
                if reader not in check.deltas:
                    continue
                act, x = walk.activation_above(reader), values[name]
                if act in check.deltas:
                    source = graph.nodes[act].sources[0]
                    error = rms(moved[source]) + walk.precision * rms(values[source])
                    check.correct_bits(reader, x, values[source].abs() < MAX_ROUNDING_ERRORS * error)
                G, layer = walk.gradient(reader), graph.nodes[reader].layer
                mine = layer.weight_gradient(x, check.deltas[reader])
                worst = max(worst, ((mine - G).norm() / G.norm().clamp(min=1e-300)).item())
            check.find_delta(name)
        return worst

    def inputs(self, image: Tensor) -> dict[str, Tensor]:
        """Path of each layer below the cut that was solved -> its input, the image first."""
        graph = None if self.walk is None else self.walk.graph
        found = {} if graph is None else {
            graph.nodes[reader].path: known.value[None]
            for name, known in reversed(self.walk.values.items())
            for reader in self.walk.readers(name)
        }  # fmt: skip
        first = next((n.path for n in graph.nodes.values() if n.has_weight), "") if graph else ""
        found.pop(first, None)
        return {first: image, **found} if self.image is not None else found


def _best_descent(network: ResidualNetwork, received: SharedGradient, start: Tensor) -> WalkedImage:
    """Down from the first cut that is certified and whose equations agree; else the best of those that failed."""
    tried, failed = [], []
    for cut in network.cuts:
        started = time.perf_counter()
        walk = Walk(network.graph, received.gradients, cut.top, received.precision, received.rcond, received.absent)
        node, last = network.graph.nodes[cut.layer], network.graph.nodes[cut.last]
        if lost := {node.layer.weight_name, node.total, last.layer.weight_name} & set(received.absent):
            failed.append(f"{node.path!r} is no place to enter: the gradient of {min(lost)!r} is not shared, or zero")
            continue
        solution = enter(network.graph, cut, received.gradients, received.entry_std)
        path = network.graph.nodes[cut.layer].path
        if not solution.certified:
            failed.append(f"{path!r} is no place to enter: {solution.reason}")
            continue
        delta = delta_at_top(network.graph, cut, solution.x, solution.dz, walk.gradient(cut.last))
        if delta is None:
            failed.append(f"{path!r} is no place to enter: it does not determine δz of {cut.last!r}")
            continue
        report = _cut_report(network, cut, solution, time.perf_counter() - started)
        walk.values[network.graph.nodes[cut.layer].sources[0]] = Known(
            solution.x, error=solution.predicted_error * rms(solution.x)
        )
        walk.deltas[cut.top] = walk.deltas[cut.last] = delta
        walk.run()
        found = _descend(walk, report, failed, start)
        if not found.open_layers:
            return found
        tried.append(found)
        if not walk.contradicted:
            break
        failed.append(f"from {path!r} {walk.why}")
    if tried:
        return min(tried, key=lambda one: one.error)
    reports = [LayerReport(network.graph.nodes[c.layer].path, network.graph.nodes[c.layer].layer.unknowns)
               for c in network.cuts[:1]]  # fmt: skip
    return WalkedImage(None, None, math.inf, tuple(reports), tuple(failed), tuple(r.name for r in reports))


def _cut_report(network: ResidualNetwork, cut: Cut, solution: BlindSolution, seconds: float) -> LayerReport:
    node = network.graph.nodes[cut.layer]
    unknowns = node.layer.unknowns
    return LayerReport(
        node.path, unknowns, rank=unknowns, deficit=0, sigma_above_cut=solution.sigma_above_cut,
        sigma_below_cut=solution.sigma_below_cut, residual=solution.residual,
        predicted_error=solution.predicted_error * rms(solution.x).item(), seconds=seconds,
    )  # fmt: skip


def _descend(walk: Walk, cut: LayerReport, failed: Sequence[str], start: Tensor) -> WalkedImage:
    """What a finished walk and the inversion below it give."""
    graph, reports = walk.graph, (cut, *walk.reports)
    notes = [*failed, f"entered at {cut.name!r}, by its own gradient: residual {cut.residual:.2g}"]
    corrected = sum(report.iterations or 0 for report in walk.reports)
    if corrected:
        notes.append(f"{corrected} activation bits were corrected by division")
    if not walk.frontier:
        known = walk.known(graph.image)
        last = walk.reports[-1] if walk.reports else cut
        return WalkedImage(walk, known.value, ERROR_SAFETY * last.predicted_error, reports, tuple(notes))
    notes.append(f"the walk ends at {graph.nodes[walk.frontier].path!r}: {walk.why}")
    started = time.perf_counter()
    problem = below(walk)
    density = problem.known_numbers() / math.prod(graph.image_shape)
    kind = "as many as" if density >= CONVERGED_KNOWN else "fewer than"
    trials = f"{kind} the {CONVERGED_KNOWN:g} with which the inversion has converged; it stalled with {STALLED_KNOWN:g}"
    notes.append(f"below it {density:.1f} numbers are known for every pixel value, {trials}")
    found = invert(problem, start)
    error = ERROR_SAFETY * draw_error(problem, found)
    report = _inversion_report(walk, problem, found, error, time.perf_counter() - started)
    if not found.converged:
        notes.append(f"the inversion has not converged: it misses what is known by {found.misfit:.2g}")
    return WalkedImage(
        walk, found.image, error, (*reports, report), tuple(notes), () if found.converged else (report.name,)
    )


def _inversion_report(walk: Walk, problem: Below, found: Inverted, error: float, seconds: float) -> LayerReport:
    unknowns = math.prod(walk.graph.image_shape)
    first = next(node.path for node in walk.graph.nodes.values() if node.has_weight)
    return LayerReport(
        first, unknowns, rank=unknowns if found.converged else None, deficit=0 if found.converged else None,
        iterations=found.steps, residual=found.misfit, predicted_error=error, seconds=seconds,
    )  # fmt: skip


def _label(replay: Replay, image: Tensor, labels) -> tuple[Tensor, list[str]]:
    """The label, −1 where the gradient does not decide it."""
    try:
        return replay.find_label(image, labels)
    except UnsupportedLayerError:
        raise
    except ValueError as error:
        if labels is not None:
            raise
        return torch.tensor([-1]), [f"the label was not decided: {error}"]


def _verdict(best: Candidate, whole: float, part: float, pixels: PixelRange) -> tuple[str, list[str]]:
    """The first verdict that holds, and why."""
    allowed = best.residual_allowed
    if best.open_layers:
        return "rank-deficient", [f"what lies below was not determined: {', '.join(map(repr, best.open_layers))}"]
    if best.predicted_error > MAX_CERTIFIED_ERROR * pixels.width:
        return "inconsistent", [noise_limit(best.predicted_error, pixels)]
    if whole <= allowed:
        return "exact", [f"the image's own gradient reproduces the whole one, missed by {whole:.2g}"]
    if part <= allowed:
        why = f"the image reproduces the gradients of the layer entered and of all below it, missed by {part:.2g}"
        other = "another loss, label or scale was used, or units within rounding of zero were on their other side"
        return "exact", [f"{why}; it misses the whole gradient by {whole:.2g}: {other}"]
    why = f"the image's own gradient misses the shared one by {min(whole, part):.2g}; {allowed:.2g} is allowed"
    return "inconsistent", [why]
