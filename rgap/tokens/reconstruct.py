"""The image of a vision transformer's gradient, and a verdict that needs no ground truth."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from rgap.client import UpdateGradients, check_loss, gradients_of, loss_value, outputs_fit
from rgap.noise import entry_noise
from rgap.results import Candidate, GradientMismatchError, LayerReport, Reconstruction, UnsupportedLayerError
from rgap.shared_gradient import SharedGradient, receive_gradients
from rgap.tokens.embedding import PatchEmbedding
from rgap.tokens.solve import (
    PatchSolution,
    patch_system,
    regularised_patches,
    ridge_prior,
    smooth_prior,
    solve_patches,
)

MAX_CERTIFIED_ERROR = 2e-3
"""Predicted error, as a share of the pixel range, from which noise has drowned the image: nothing is certified."""

NOISE_RESIDUAL_FACTOR = 5.0
"""Times its predicted error by which an image may leave the pixel range."""

MIN_RELATIVE_RMS = 1e-3
"""Smallest root mean square of a gradient, relative to the median over the parameters, to which a miss is compared.

The gradient of a key's bias is zero but for rounding: softmax does not feel a shift of all its arguments.
"""

MAX_FLOAT64_PARAMETERS = 20_000_000
"""Parameters up to which an image's own gradient is computed in float64 whatever the precision of the shared one."""

MAX_LABELS_TRIED = 16
"""Classes up to which every label is tried where no parameter of the head tells it."""

LABEL_MISFIT_RATIO = 1.01
"""Misfit of the head's gradient, relative to the smallest, up to which a label is tried."""


def reconstruct_tokens(
    model: nn.Module,
    embedding: PatchEmbedding,
    gradients: Sequence[Tensor] | Mapping[str, Tensor],
    loss: str = "cross_entropy",
    *,
    batch_size: int | None = 1,
    labels: Tensor | Sequence[int] | None = None,
    virtual_constraints: bool = True,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    rcond: float | None = None,
    noise_std: float | None = None,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Computes an image back from the gradient of a transformer with learned position embeddings (ours).

    The gradient of the position embedding is that of every token, and with it the gradient of the patch embedding is
    linear in the patches. What stands above is used for the verdict alone: the image's own gradient must be the shared
    one. Updates of several local steps of SGD or momentum give the image by the same equations; no single gradient
    reproduces them, so that they are not certified.

    Args:
        model: The network.
        embedding: From `recognise`.
        gradients: One tensor for each parameter, in the order of `model.parameters()`, or a mapping from name.
        loss: A name in `rgap.client.LOSSES`.
        batch_size: 1; the position embedding's gradient is a sum over the images of a batch.
        labels: The label if it is known, (1,).
        virtual_constraints: Whether the gradients of the layers above may close a deficit.
        pixel_range: Smallest and largest value of a pixel; under noise, also what is known of them beforehand.
        rcond: Singular values below rcond times the largest count as zero; by default matched to the precision.
        noise_std: Standard deviation of noise known to be on every gradient entry.
        device: Where the returned images and labels live, by default the CPU.

    Returns:
        A `Reconstruction`. Where noise keeps the image from being certified, its candidates are the smoothest image
        and ridge regression, both matched to the noise; the notes name them in their order.

    Raises:
        UnsupportedLayerError: For more than one image, or a head of zeros.
        GradientMismatchError: If the gradients do not belong to the network, are not finite, or zero.
        ValueError: If another argument is out of range.
    """
    check_loss(loss)
    if batch_size != 1:
        raise UnsupportedLayerError(
            f"batch_size is {batch_size}: the gradient of the position embedding {embedding.position_name!r} is a sum "
            "over the images of a batch, of which no way to the single ones is known; 1 is supported"
        )
    received = _receive(model, embedding, gradients, noise_std)
    started = time.perf_counter()
    shared = {name: received.gradients[name] for name in _used(embedding)}
    system = patch_system(embedding, shared, entry_noise(shared, noise_std, received.known, has_zeros=False))
    solution = solve_patches(system, received.precision, rcond)
    _, scale = embedding.affine()
    report = _report(embedding, solution, scale, time.perf_counter() - started)
    images = {"least squares": (embedding.image(solution.patches), report.predicted_error)}
    width = _width(pixel_range)
    if solution.rank < len(system.delta) or report.predicted_error > MAX_CERTIFIED_ERROR * width:
        images = {}
        for name, prior in (("smoothest image", smooth_prior), ("ridge regression", ridge_prior)):
            patches, std = regularised_patches(system, prior(embedding, pixel_range), solution.excess or 1.0)
            images[name] = embedding.image(patches), std / scale.square().mean().sqrt().item()
    client = _Client(model, received, loss)
    label, about_label = client.find_label(next(iter(images.values()))[0], labels)
    found = [
        client.candidate(image, label, error, report, pixel_range, solution.rank < len(system.delta))
        for image, error in images.values()
    ]
    notes = [*received.notes, *_about(embedding, solution, shared), *about_label]
    if len(found) > 1:
        notes.append(f"candidates, in their order: {', '.join(images)}, both matched to the noise of the gradient")
    verdict, why = _verdict(found, report, width, isinstance(gradients, UpdateGradients))
    if device is not None:
        found = [replace(c, images=c.images.to(device), labels=c.labels.to(device)) for c in found]
    best = found[0]
    return Reconstruction(best.images, best.labels, verdict, tuple(found), best.layers, (*notes, *why))


@dataclass(frozen=True)
class _Client:
    """The client as the attack imitates it: the gradients that an image has."""

    model: nn.Module
    received: SharedGradient
    loss: str

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """In float64; in float32 where the network is large and its gradients are no finer."""
        parameters = dict(self.model.named_parameters())
        large = sum(p.numel() for p in parameters.values()) > MAX_FLOAT64_PARAMETERS
        coarse = self.received.precision >= torch.finfo(torch.float32).eps
        dtype = torch.float32 if large and coarse else torch.float64
        return {name: p.detach().to("cpu", dtype) for name, p in parameters.items()}

    def residual(self, image: Tensor, label: Tensor) -> float:
        """Largest over the tensors of ‖g′ − g‖ / ‖g‖."""
        shared = {n: g for n, g in self.received.gradients.items() if n not in self.received.underflowed}
        sizes = {name: (g.norm().item(), g.numel() ** 0.5) for name, g in shared.items()}
        least = MIN_RELATIVE_RMS * median(norm / root for norm, root in sizes.values() if norm > 0)
        mine = gradients_of(self.model, self.parameters, image, label, self.loss)
        return max(
            (mine[name] - g).norm().item() / max(sizes[name][0], least * sizes[name][1]) for name, g in shared.items()
        )

    def outputs(self, image: Tensor) -> Tensor:
        """(1, C), or a refusal where the loss does not take them."""
        some = next(self.model.parameters())
        with torch.no_grad():
            outputs = self.model(image.to(some)).double().cpu()
        if outputs.ndim != 2 or not outputs_fit(self.loss, outputs.shape[1]):
            raise UnsupportedLayerError(
                f"the network gives {tuple(outputs.shape)}, which the {self.loss} loss does not take"
            )
        return outputs

    def find_label(self, image: Tensor, known: Tensor | Sequence[int] | None) -> tuple[Tensor, list[str]]:
        """The label whose ∂ℓ/∂z is that of the head's bias, or points along the head's rank-one gradient."""
        z = self.outputs(image)
        classes = max(z.shape[1], 2)
        if known is not None:
            values = torch.as_tensor(known)
            if values.shape != (1,) or values.is_floating_point() or not 0 <= values.item() < classes:
                raise ValueError(f"labels are {values.tolist()}; a single image takes [0] to [{classes - 1}]")
            return values.long(), []
        every = torch.arange(classes)
        logits = z.expand(classes, -1).clone().requires_grad_()
        with torch.enable_grad():
            dz = torch.autograd.grad(classes * loss_value(self.loss, logits, every), logits)[0]
        misfits = self._misfits(dz)
        if misfits is None and classes > MAX_LABELS_TRIED:
            raise ValueError(f"no parameter of the head tells the label of {classes} classes; give labels=")
        likely = every if misfits is None else every[misfits <= LABEL_MISFIT_RATIO * misfits.min() + 1e-9]
        if len(likely) == 1:
            return likely, [f"label {likely.item()} by the head's gradient, missed by {misfits.min():.2g}"]
        residuals = [self.residual(image, label[None]) for label in likely[:MAX_LABELS_TRIED]]
        best = min(range(len(residuals)), key=residuals.__getitem__)
        return likely[best][None], [f"label {likely[best].item()} by the gradient, the best of {len(residuals)} tried"]

    def _misfits(self, dz: Tensor) -> Tensor | None:
        """How far each label's ∂ℓ/∂z, a row of `dz`, is from the gradient of the head; None where none is found."""
        for G in reversed(list(self.received.gradients.values())):
            if G.shape[:1] != dz.shape[1:] or not G.any():
                continue
            if G.ndim == 1:
                return (dz - G).norm(dim=1) / G.norm()
            if G.ndim == 2:
                u = torch.linalg.svd(G, full_matrices=False)[0][:, 0]
                return 1 - (dz @ u).abs() / dz.norm(dim=1).clamp(min=1e-300)
        return None

    def candidate(
        self, image: Tensor, label: Tensor, error: float, report: LayerReport, pixel_range, deficient: bool
    ) -> Candidate:
        """Weighs an image by the gradient that it has."""
        width = _width(pixel_range)
        slack = max(width * min(self.received.tolerance, MAX_CERTIFIED_ERROR), NOISE_RESIDUAL_FACTOR * error)
        beyond = max((pixel_range[0] - image).max().item(), (image - pixel_range[1]).max().item())
        report = replace(report, predicted_error=error)
        return Candidate(
            image, label, self.residual(image, label), beyond <= slack, {report.name: image}, (report,),
            (report.name,) if deficient else (), {}, self.received.tolerance, error,
        )  # fmt: skip


def _used(embedding: PatchEmbedding) -> list[str]:
    """Parameters whose gradients give the patches."""
    return [n for n in (embedding.weight_name, embedding.position_name, embedding.bias_name) if n]


def _receive(model: nn.Module, embedding: PatchEmbedding, gradients, noise_std: float | None) -> SharedGradient:
    """The gradients, checked, with the precision of those that give the patches.

    Others may be nothing but rounding, as that of a key's bias is, and seem to be in a coarser format.
    """
    parameters = dict(model.named_parameters())
    received = receive_gradients(parameters, gradients, noise_std=noise_std)
    _check_reached(model, embedding, received)
    used = {name: received.gradients[name] for name in _used(embedding)}
    if received.known:
        used = UpdateGradients(used, {name: received.known[name] for name in used})
    first = receive_gradients({name: parameters[name] for name in used}, used, noise_std=noise_std)
    return replace(received, precision=first.precision)


def _check_reached(model: nn.Module, embedding: PatchEmbedding, received: SharedGradient) -> None:
    """Refuses gradients of which nothing reaches the patches, by name."""
    if all(received.gradients[name].any() for name in (embedding.weight_name, embedding.position_name)):
        return
    reached = [name for name, g in received.gradients.items() if g.any()]
    parameters = dict(model.named_parameters())
    if zero := [name for name in reached if parameters[name].ndim == 2 and not parameters[name].any()]:
        raise UnsupportedLayerError(
            f"the head's weight {zero[-1]!r} is zero: no gradient reaches the image. Draw it, or take trained weights"
        )
    raise GradientMismatchError(
        f"the gradients of {embedding.weight_name!r} and {embedding.position_name!r} must not be zero; others are "
        f"not: {', '.join(reached[:3])}"
    )


def _report(embedding: PatchEmbedding, solution: PatchSolution, scale: Tensor, seconds: float) -> LayerReport:
    tokens, n = solution.patches.shape
    error = (solution.std / torch.where(scale == 0, torch.inf, scale)).square().mean().sqrt().item()
    return LayerReport(
        embedding.name,
        unknowns=tokens * n,
        rank_gradients=solution.rank * n,
        rank=solution.rank * n,
        deficit=(tokens - solution.rank) * n,
        condition=solution.condition,
        sigma_above_cut=solution.above,
        sigma_below_cut=solution.below,
        residual=solution.residual,
        predicted_error=error,
        seconds=seconds,
    )


def _about(embedding: PatchEmbedding, solution: PatchSolution, shared: Mapping[str, Tensor]) -> list[str]:
    """What the equations of the patches show before the network is asked."""
    tokens, width = embedding.position_entries.shape
    surplus = max(0, width - 1 - solution.rank)
    notes = [
        f"{tokens} patches, width {width}: their gradients have rank {solution.rank}; {surplus} surplus equations for "
        f"each entry of a patch, all equations missed by {solution.residual:.2g}"
    ]
    if embedding.bias_name:
        total = shared[embedding.position_name].flatten()[embedding.position_entries].sum(0)
        miss = (total - shared[embedding.bias_name]).norm() / shared[embedding.bias_name].norm().clamp(min=1e-300)
        notes.append(f"the tokens' gradients add up to that of {embedding.bias_name!r}, missed by {miss.item():.2g}")
    return notes


def _verdict(found: list[Candidate], report: LayerReport, width: float, update: bool) -> tuple[str, list[str]]:
    """The first verdict that holds, and why."""
    best = found[0]
    if report.deficit:
        why = f"the patches of {report.name!r} lack {report.deficit} of {report.unknowns} equations"
        return "rank-deficient", [f"{why}: the width does not exceed their number"]
    if len(found) > 1:
        why = f"the gradient's noise drowns the image: its predicted error is {best.predicted_error:.2g}"
        return "inconsistent", [why]
    if not best.consistent:
        why = f"the image's own gradient misses the shared one by {best.gradient_residual:.2g}"
        why = f"{why}; {best.residual_allowed:.2g} is allowed at this precision"
        if update:
            why = (
                f"{why}. An update of several steps is no single gradient: the image solves its equations, and nothing "
                "certifies it but their residual and the sum of the tokens' gradients"
            )
        return "inconsistent", [why]
    return "exact", []


def _width(pixel_range: tuple[float, float]) -> float:
    width = pixel_range[1] - pixel_range[0]
    return width if width < float("inf") else 1.0
