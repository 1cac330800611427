"""The image behind the gradient of a residual or pooling network, from a cut down, and a verdict without any truth."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.linalg import rms
from rgap.residual.bits import Known, activation_above, correct_bits, correct_maxima, decide
from rgap.residual.cut import Cut, ResidualNetwork, delta_at_top, enter
from rgap.residual.invert import START_STD, below, draw_error, invert
from rgap.residual.walk import Walk
from rgap.results import (
    MAX_CERTIFIED_ERROR,
    PIXEL_SLACK_FACTOR,
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

ERROR_SAFETY = 4.0  # times the error predicted from independent noise: errors of tensors walked through correlate
CONVERGED_KNOWN = 15.0  # known numbers a pixel value with which the inversion below a walk converged in trials
STALLED_KNOWN = 7.0  # the same with which it stalled
MAX_ROUNDING_ERRORS = 30.0  # errors of a pre-activation within which its sign may differ from the client's
MAX_INVERSIONS = 4  # times that what lies below a walk is inverted, each time with other bits
MAX_TRIED_ENDS = 3  # blind layers that are tried from either end: a gradient that all of these refuse is foreign


@dataclass(frozen=True)
class WalkedImage:
    """How far one cut has led."""

    walk: Walk | None  # the walk, None where the cut itself failed
    image: Tensor | None  # (C, H, W), None where nothing was found
    error: float  # predicted root-mean-square error of the image
    reports: tuple[LayerReport, ...]  # of the cut, of the walk's tensors, of the inversion
    notes: tuple[str, ...]  # what was decided, and on what evidence
    open_layers: tuple[str, ...] = ()  # tensors that nothing determined

    def lower_residual(self) -> tuple[float, str]:
        """Largest relative residual of the gradients of the cut and of all layers below it, given δz at the cut.

        A unit within rounding of zero, or of a window's maximum, may have been on the other side in the client's
        arithmetic: division decides. Also how many were, in words; empty for none.
        """
        walk, graph = self.walk, self.walk.graph
        names = graph.below([walk.top])
        values = graph.forward({graph.image: self.image}, names)
        slopes = graph.slopes(values)
        draw = self.error * torch.randn(self.image.shape, generator=torch.Generator().manual_seed(0)).double()
        moved = graph.push(slopes, draw, names)
        check = replace(walk, values={}, deltas={walk.top: walk.deltas[walk.top]}, slopes=slopes, decided=set())
        worst, flipped, moved_maxima = 0.0, 0, 0
        for name in reversed(names):
            for reader in walk.readers(name):
                if reader not in check.deltas:
                    continue
                act, x = activation_above(graph, reader), values[name]
                if act in check.deltas:
                    source = graph.nodes[act].sources[0]
                    margin = MAX_ROUNDING_ERRORS * (rms(moved[source]) + walk.precision * rms(values[source]))
                    moved_maxima += correct_maxima(check, reader, x, values[act], margin)
                    flipped += correct_bits(check, reader, x, values[source].abs() < margin)
                G, layer = walk.gradient(reader), graph.nodes[reader].layer
                mine = layer.weight_gradient(x, check.deltas[reader])
                worst = max(worst, ((mine - G).norm() / G.norm().clamp(min=1e-300)).item())
            check.find_delta(name)
        counts = {"units within rounding of zero": flipped, "maxima within rounding of another entry": moved_maxima}
        return worst, " and ".join(f"{count} {what}" for what, count in counts.items() if count)

    def inputs(self, image: Tensor) -> dict[str, Tensor]:
        """Path of each layer below the cut that was solved -> its input, the image first."""
        if self.walk is None:
            return {}
        nodes, values = self.walk.graph.nodes, reversed(self.walk.values.items())
        found = {nodes[one].path: known.value[None] for name, known in values for one in self.walk.readers(name)}
        first = next(node.path for node in nodes.values() if node.has_weight)
        found.pop(first, None)
        return {first: image, **found}


def best_descent(network: ResidualNetwork, received: SharedGradient, start: Tensor) -> WalkedImage:
    """Down from the first cut that is certified and whose equations agree; else the best of those that failed."""
    tried, failed = [], []
    for cut in dict.fromkeys((*network.cuts[:MAX_TRIED_ENDS], *network.cuts[-MAX_TRIED_ENDS:])):
        begun, path = begin(network, received, cut), network.graph.nodes[cut.layer].path
        if isinstance(begun, str):
            failed.append(f"{path!r} is no place to enter: {begun}")
            continue
        walk, report = begun
        found = _descend(walk.run(), report, failed, start)
        if not found.open_layers:
            return found
        tried.append(found)
        if not walk.contradicted:
            break
        failed.append(f"from {path!r} {walk.why}")
    if tried:
        return min(tried, key=lambda one: one.error)
    first = network.graph.nodes[network.cuts[0].layer]
    report = LayerReport(first.path, first.layer.unknowns)
    return WalkedImage(None, None, math.inf, (report,), tuple(failed), (report.name,))


def begin(network: ResidualNetwork, received: SharedGradient, cut: Cut) -> tuple[Walk, LayerReport] | str:
    """A walk that stands at a cut, and the cut's report; the reason where the cut is no place to enter."""
    graph, started = network.graph, time.perf_counter()
    walk = Walk(graph, received.gradients, cut.top, received.precision, received.rcond, received.absent)
    node, last = graph.nodes[cut.layer], graph.nodes[cut.last]
    if lost := {node.layer.weight_name, node.total, last.layer.weight_name} & set(received.absent):
        return f"the gradient of {min(lost)!r} is not shared, or zero"
    solution = enter(graph, cut, received.gradients, received.entry_std)
    if not solution.certified:
        return solution.reason
    delta = delta_at_top(graph, cut, solution.x, solution.dz, walk.gradient(cut.last))
    if delta is None:
        return f"it does not determine δz of {cut.last!r}"
    walk.values[node.sources[0]] = Known(solution.x, error=solution.predicted_error * rms(solution.x))
    walk.deltas[cut.top] = walk.deltas[cut.last] = delta
    return walk, LayerReport(
        node.path, node.layer.unknowns, rank=node.layer.unknowns, deficit=0, sigma_above_cut=solution.sigma_above_cut,
        sigma_below_cut=solution.sigma_below_cut, residual=solution.residual,
        predicted_error=solution.predicted_error * rms(solution.x).item(), seconds=time.perf_counter() - started,
    )  # fmt: skip


def _descend(walk: Walk, cut: LayerReport, failed: Sequence[str], start: Tensor) -> WalkedImage:
    """What a finished walk and the inversion below it give."""
    graph, reports = walk.graph, (cut, *walk.reports)
    notes = [*failed, f"entered at {cut.name!r}, by its own gradient: residual {cut.residual:.2g}"]
    if corrected := sum(report.iterations or 0 for report in walk.reports):
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
    for _ in range(MAX_INVERSIONS - 1):  # what the walk left in doubt where it ended
        changed = decide(walk, walk.frontier, graph.forward({graph.image: found.image}, problem.names)[walk.frontier])
        if not changed:
            break
        notes.append(f"{changed} activation bits were corrected by division after the inversion")
        problem = below(walk)
        found = invert(problem, found.image)
    error = ERROR_SAFETY * draw_error(problem, found)
    unknowns, first = math.prod(graph.image_shape), next(node.path for node in graph.nodes.values() if node.has_weight)
    report = LayerReport(first, unknowns, iterations=found.steps, residual=found.misfit, predicted_error=error,
                         seconds=time.perf_counter() - started)  # fmt: skip
    if found.converged:
        report, lost = replace(report, rank=unknowns, deficit=0), ()
    else:
        notes.append(f"the inversion has not converged: it misses what is known by {found.misfit:.2g}")
        lost = (first,)
    return WalkedImage(walk, found.image, error, (*reports, report), tuple(notes), lost)


def reconstruct_residual(
    network: ResidualNetwork, gradients: Sequence[Tensor] | Mapping[str, Tensor], loss: str = "cross_entropy", *,
    batch_size: int | None = 1, labels: Tensor | Sequence[int] | None = None, seed: int = 0,
    pixel_range: tuple[float, float] = (0.0, 1.0), rcond: float | None = None, noise_std: float | None = None,
    device: torch.device | str | None = None, gradient_scale: float | None = None, label_smoothing: float | None = None,
) -> Reconstruction:  # fmt: skip
    """Computes an image back from the gradient of a network with branches or pooling (ours).

    A blind layer is solved from its own gradient, blocks are walked down by gradient equations, and what lies below the
    last full-rank layer is inverted as one nonlinear least squares. Nothing above the blind layer is needed: it only
    checks, where the loss is known.

    Arguments and errors are those of `rgap.reconstruct`; `seed` is of the noise that the inversion starts from. The
    result's layers are the blind layer, each tensor of the walk, and the inversion.
    """
    if batch_size != 1:
        raise UnsupportedLayerError(
            f"batch_size is {batch_size}: a convolution's own gradient gives its input for one image; for a batch it "
            "is a sum over the images; 1 is supported"
        )
    model, pixels = network.model, PixelRange(*pixel_range)
    received = receive_gradients(network.graph.parameters, gradients, rcond, noise_std, model=model, any_scale=True)
    replay = Replay(model, received, loss, label_smoothing, gradient_scale)
    noise = torch.randn(network.image_shape, generator=torch.Generator().manual_seed(seed)).double()
    found = best_descent(network, received, pixels.middle + START_STD * pixels.width * noise)
    image = (torch.zeros_like(noise) if found.image is None else found.image)[None]
    label, about_label = _label(replay, image, labels)
    decided = label.is_floating_point() or label.item() >= 0
    scale, whole = replay.match(image, label) if decided else (1.0, math.inf)
    notes = [*received.notes, *found.notes, *about_label]
    part, swapped = (math.inf, "") if found.image is None else found.lower_residual()
    by_noise = min(PIXEL_SLACK_FACTOR * found.error, pixels.width / 2) if math.isfinite(found.error) else 0.0
    inside = pixels.contains(image, MAX_CERTIFIED_ERROR * pixels.width + by_noise)
    candidate = Candidate(
        image.to(device or "cpu"), label.to(device or "cpu"), min(whole, part), inside, found.inputs(image),
        found.reports, found.open_layers,
        residual_allowed=received.tolerance, predicted_error=found.error, gradient_scale=scale,
    )  # fmt: skip
    verdict, why = _verdict(candidate, whole, part, swapped, pixels)
    if whole <= received.tolerance and scale != 1 and gradient_scale is None and verdict == "exact":
        why = [f"the shared gradient is {scale:.4g} times the image's own, missed by {whole:.2g}"]
    result = Reconstruction(
        candidate.images, candidate.labels, verdict, (candidate,), candidate.layers, (*notes, *why),
        gradient_scale=scale if whole <= received.tolerance else None,
    )  # fmt: skip
    return with_accuracy(result, pixels)


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


def _verdict(best: Candidate, whole: float, part: float, swapped: str, pixels: PixelRange) -> tuple[str, list[str]]:
    """The first verdict that holds, and why; `swapped` is what the client's rounding decided the other way."""
    allowed = best.residual_allowed
    if best.open_layers:
        return "rank-deficient", [f"what lies below was not determined: {', '.join(map(repr, best.open_layers))}"]
    if best.predicted_error > MAX_CERTIFIED_ERROR * pixels.width:
        return "inconsistent", [noise_limit(best.predicted_error, pixels)]
    if whole <= allowed:
        return "exact", [f"the image's own gradient reproduces the whole one, missed by {whole:.2g}"]
    if part <= allowed:
        why = f"the image reproduces the gradients of the layer entered and of all below it, missed by {part:.2g}"
        other = "another loss, label or scale was used"
        other += f", or the client's arithmetic decided {swapped} the other way" if swapped else ""
        return "exact", [f"{why}; it misses the whole gradient by {whole:.2g}: {other}"]
    why = f"the image's own gradient misses the shared one by {min(whole, part):.2g}; {allowed:.2g} is allowed"
    return "inconsistent", [why]
