"""The image behind a vision transformer's gradient, and a verdict that needs no ground truth."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rgap.client import UpdateGradients, check_loss
from rgap.results import (
    PIXEL_SLACK_FACTOR,
    Candidate,
    GradientMismatchError,
    LayerReport,
    PixelRange,
    Reconstruction,
    UnsupportedLayerError,
    noise_limit,
    with_accuracy,
)
from rgap.shared_gradient import SharedGradient, receive_gradients
from rgap.tokens.embedding import PatchEmbedding
from rgap.tokens.replay import MIN_RELATIVE_RMS, Replay
from rgap.tokens.solve import (
    PatchSolution,
    PatchSystem,
    close_by_gradient,
    patch_system,
    regularised_patches,
    ridge_prior,
    smooth_prior,
    solve_patches,
)

MAX_CERTIFIED_ERROR = 2e-3  # predicted error, as a share of the pixel range, up to which an image is certified
MAX_CLOSED_PRECISION = 1e-6  # relative error of the gradients up to which a deficit is closed by the layers above


def reconstruct_tokens(
    embedding: PatchEmbedding, gradients: Sequence[Tensor] | Mapping[str, Tensor], loss: str = "cross_entropy", *,
    batch_size: int | None = 1, labels: Tensor | Sequence[int] | None = None, virtual_constraints: bool = True,
    pixel_range: tuple[float, float] = (0.0, 1.0), rcond: float | None = None, noise_std: float | None = None,
    device: torch.device | str | None = None, gradient_scale: float | None = None, label_smoothing: float | None = None,
) -> Reconstruction:  # fmt: skip
    """Computes an image back from the gradient of a transformer with learned position embeddings (ours).

    The gradient of the position embedding is that of every token, and with it the gradient of the patch embedding is
    linear in the patches. What stands above is used for the verdict, and to close a deficit: the image's own gradient
    must be the shared one. Updates of several local steps of SGD or momentum give the image by the same equations; no
    single gradient reproduces them, so that they are not certified.

    Arguments and errors are those of `rgap.reconstruct`; under noise the pixel range is also what is known of pixels
    beforehand. Where noise or a deficit keeps the image from being certified, the candidates are the smoothest image
    and ridge regression, both matched to the noise; the notes name them in their order.
    """
    check_loss(loss)
    if batch_size != 1:
        raise UnsupportedLayerError(
            f"batch_size is {batch_size}: the gradient of the position embedding {embedding.position_name!r} is a sum "
            "over the images of a batch, of which no way to the single ones is known; 1 is supported"
        )
    pixels, started = PixelRange(*pixel_range), time.perf_counter()
    received, shared = _receive(embedding, gradients, noise_std)
    system = patch_system(embedding, shared.gradients, shared.entry_std)
    solution = solve_patches(system, shared.precision, rcond)
    report = _report(embedding, solution, time.perf_counter() - started)
    replay = Replay(embedding.model, received, loss, label_smoothing, gradient_scale)
    label, about_label = replay.find_label(embedding.image(solution.patches), labels)
    notes = [*received.notes, *_about(embedding, solution, shared.gradients), *about_label]
    found = solution.patches
    if report.deficit and virtual_constraints and received.precision <= MAX_CLOSED_PRECISION:
        report, found = _close(embedding, replay, label, solution, report, pixels)
        if report.virtual_constraints:
            notes.append(f"the gradients of the layers above close the deficit in {report.iterations} steps")
    is_open = report.deficit and not report.virtual_constraints
    if solution.excess is None and not is_open:  # too few surplus equations show the noise: the image's gradient does
        drawn = found + solve_patches(_draw(system), shared.precision, rcond).patches - solution.patches
        excess = replay.excess(embedding.image(found), embedding.image(drawn), label, shared.entry_std)
        report = replace(report, predicted_error=excess * report.predicted_error)
    patches = {"": (found, report.predicted_error)}
    if report.predicted_error > MAX_CERTIFIED_ERROR * pixels.width or is_open:
        patches, size = {}, embedding.scale.square().mean().sqrt().item()
        for name, prior in (("the smoothest image", smooth_prior), ("ridge regression", ridge_prior)):
            found, std = regularised_patches(system, prior(embedding, pixels), solution.excess or 1.0)
            patches[name] = found, std / size
        notes.append(f"candidates, in their order: {' and '.join(patches)}, matched to the noise of the gradient")
    candidates = tuple(
        _candidate(replay, embedding.image(P), label, replace(report, predicted_error=error), pixels, device)
        for P, error in patches.values()
    )
    verdict, why = _verdict(candidates, report, pixels, isinstance(gradients, UpdateGradients))
    best = candidates[0]
    if best.gradient_scale != 1 and gradient_scale is None and verdict == "exact":
        why.append(
            f"the shared gradient is {best.gradient_scale:.4g} times the image's own, over all parameters: the loss "
            "was scaled, or the gradient clipped, which leaves the image as it is"
        )
    scale = best.gradient_scale if best.consistent else gradient_scale
    result = Reconstruction(best.images, best.labels, verdict, candidates, best.layers, (*notes, *why))
    return with_accuracy(replace(result, gradient_scale=scale), pixels)


def _receive(embedding: PatchEmbedding, gradients, noise_std: float | None) -> tuple[SharedGradient, SharedGradient]:
    """The gradients, checked, with the precision of those that give the patches; and these alone.

    Others may be nothing but rounding, as that of a key's bias is, and seem to be in a coarser format.
    """
    parameters = dict(embedding.model.named_parameters())
    received = receive_gradients(parameters, gradients, noise_std=noise_std, model=embedding.model, any_scale=True)
    if not all(received.gradients[name].any() for name in (embedding.weight_name, embedding.position_name)):
        reached = [name for name, g in received.gradients.items() if g.any()]
        if zero := [name for name in reached if parameters[name].ndim == 2 and not parameters[name].any()]:
            raise UnsupportedLayerError(
                f"the head's weight {zero[-1]!r} is zero: no gradient reaches the image; draw it, or take trained ones"
            )
        raise GradientMismatchError(
            f"the gradient of {embedding.weight_name!r} or {embedding.position_name!r} is zero or not shared, and "
            f"that of {reached[-1]!r} is not; nothing can be recovered"
        )
    names = [n for n in (embedding.weight_name, embedding.position_name, embedding.bias_name) if n]
    used = {name: received.gradients[name] for name in names}
    if received.noise_std:
        used = UpdateGradients(used, {name: received.noise_std[name] for name in names})
    std = None if noise_std is None else noise_std * received.unit
    shared = receive_gradients({n: parameters[n] for n in names}, used, noise_std=std, has_zeros=False)
    return replace(received, precision=shared.precision), shared


def _report(embedding: PatchEmbedding, solution: PatchSolution, seconds: float) -> LayerReport:
    tokens, n = solution.patches.shape
    error = solution.std / torch.where(embedding.scale == 0, torch.inf, embedding.scale)
    return LayerReport(
        embedding.name, tokens * n, rank_gradients=solution.rank * n, rank=solution.rank * n,
        deficit=(tokens - solution.rank) * n, condition=solution.condition, sigma_above_cut=solution.above,
        sigma_below_cut=solution.below, residual=solution.residual, seconds=seconds,
        predicted_error=error.square().mean().sqrt().item(),
    )  # fmt: skip


def _about(embedding: PatchEmbedding, solution: PatchSolution, shared: Mapping[str, Tensor]) -> list[str]:
    """What the equations of the patches show before the network is asked."""
    tokens, width = embedding.position_entries.shape
    notes = [
        f"{tokens} patches, width {width}: the tokens' gradients have rank {solution.rank}; with "
        f"{max(0, width - 1 - solution.rank)} surplus equations for each entry of a patch all are missed by "
        f"{solution.residual:.2g}"
    ]
    if embedding.bias_name and shared[embedding.bias_name].any():
        total = shared[embedding.position_name].flatten()[embedding.position_entries].sum(0)
        miss = (total - shared[embedding.bias_name]).norm() / shared[embedding.bias_name].norm().clamp(min=1e-300)
        notes.append(f"the tokens' gradients add up to that of {embedding.bias_name!r}, missed by {miss.item():.2g}")
    return notes


def _close(
    embedding: PatchEmbedding, replay: Replay, label: Tensor, solution: PatchSolution, report: LayerReport, pixels
) -> tuple[LayerReport, Tensor]:
    """The report and patches with the deficit closed by the layers above, or as they were."""
    more = {n: g for n, g in replay.shared.items() if g.norm() >= (1 - MIN_RELATIVE_RMS) * replay.sizes[n]}

    def gradients(P: Tensor) -> dict[str, Tensor]:
        mine = replay.gradients(embedding.image(P), label)
        scale = replay.asserted or replay.scale(mine)
        return {name: scale * g for name, g in mine.items()}

    closed = close_by_gradient(gradients, more, solution.patches, solution.null)
    if closed is None:
        return report, solution.patches
    error = math.hypot(closed.error / embedding.scale.square().mean().sqrt().item(), report.predicted_error)
    inside = pixels.contains(embedding.image(closed.patches), _slack(pixels, error))
    if error > MAX_CERTIFIED_ERROR * pixels.width or not inside:
        return report, solution.patches
    report = replace(report, virtual_constraints=closed.equations, iterations=closed.steps, predicted_error=error)
    return report, closed.patches


def _draw(system: PatchSystem) -> PatchSystem:
    """The equations with one more draw of their known errors, always the same."""
    generator = torch.Generator().manual_seed(0)
    delta, G = (
        values + std * torch.randn(values.shape, generator=generator, dtype=values.dtype)
        for values, std in ((system.delta, system.delta_std), (system.G, system.G_std))
    )
    return replace(system, delta=delta, G=G)


def _slack(pixels: PixelRange, error: float) -> float:
    """By how much an image of that predicted error may leave the pixel range."""
    return MAX_CERTIFIED_ERROR * pixels.width + PIXEL_SLACK_FACTOR * error


def _candidate(replay: Replay, image: Tensor, label: Tensor, report: LayerReport, pixels, device) -> Candidate:
    """Weighs an image by the gradient that it has."""
    inside = pixels.contains(image, _slack(pixels, report.predicted_error))
    scale, residual = replay.match(image, label)
    open_layers = (report.name,) if report.deficit and not report.virtual_constraints else ()
    image, label = image.to(device or "cpu"), label.to(device or "cpu")
    return Candidate(
        image, label, residual, inside, {report.name: image}, (report,), open_layers,
        residual_allowed=replay.received.tolerance, predicted_error=report.predicted_error, gradient_scale=scale,
    )  # fmt: skip


def _verdict(
    candidates: tuple[Candidate, ...], report: LayerReport, pixels: PixelRange, update: bool
) -> tuple[str, list[str]]:
    """The first verdict that holds, and why."""
    best, certified = candidates[0], MAX_CERTIFIED_ERROR * pixels.width
    if best.open_layers:
        why = f"the patches of {report.name!r} lack {report.deficit} of {report.unknowns} equations"
        return "rank-deficient", [f"{why}: rank {report.rank} of the tokens' gradients, times the entries of a patch"]
    if best.predicted_error > certified or len(candidates) > 1:
        return "inconsistent", [noise_limit(best.predicted_error, pixels, certified)]
    if best.consistent:
        return "exact", []
    missed, allowed = best.gradient_residual, best.residual_allowed
    why = f"the image's own gradient misses the shared one by {missed:.2g}; {allowed:.2g} is allowed at this precision"
    if update:
        why = (
            f"{why}. An update of several steps is no single gradient: the image solves its equations, and nothing "
            "certifies it but their residual and the sum of the tokens' gradients"
        )
    return "inconsistent", [why]
