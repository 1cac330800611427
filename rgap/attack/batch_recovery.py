"""A mini-batch through a fully connected network: every image, its label, its scale hypotheses, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rgap.attack.arguments import check_separable, checked_batch_labels
from rgap.client import gradients_of
from rgap.head.hypothesis import Twin
from rgap.network.layer import Chain
from rgap.results import VERDICTS, Candidate, GradientMismatchError, LayerReport, Reconstruction
from rgap.separation.read import read_batch
from rgap.separation.subspaces import BatchSize
from rgap.shared_gradient import SharedGradient


def recover_batch(
    chain: Chain,
    received: SharedGradient,
    size: BatchSize,
    loss: str,
    *,
    labels: Tensor | Sequence[int] | None = None,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Every image of a mini-batch through a fully connected network (ours; the paper recovers one mixture).

    The first two layers are separated into directions, each image's share of the gradients gives ∂ℓ/∂f, and the loss
    label and scale.

    Args:
        chain: The prepared network, fully connected layers only.
        received: The gradients.
        size: How many images.
        loss: "logistic" or "cross_entropy".
        labels: Labels if they are known, in any order: compared with those found.
        pixel_range: Smallest and largest value of a pixel; chooses between twins, where it can.
        seed: Of the random starts.
        device: Where the returned images and labels live.

    Returns:
        The `Reconstruction`, with `per_image` and one joint candidate; it holds no image where none was found.

    Raises:
        UnsupportedLayerError: If the network is not one that can be separated.
        GradientMismatchError: If the labels contradict what was found.
    """
    check_separable(chain.layers, loss)
    known = checked_batch_labels(labels, size.size)
    start, notes = read_batch(chain, received, size, loss, known, seed)
    images = []
    for x, twins in zip(start.x, start.twins, strict=True):
        each = [_candidate(chain, received, x, twin, pixel_range, start.reports) for twin in twins]
        images.append(sorted(each, key=lambda one: (not one.in_pixel_range, one.images.abs().max().item())))
    return _judge(chain, received, loss, start, images, notes, known, device)


def _candidate(
    chain: Chain,
    received: SharedGradient,
    x: Tensor,
    twin: Twin,
    pixel_range: tuple[float, float],
    reports: tuple[LayerReport, ...],
) -> Candidate:
    image = twin.factor * x.reshape(1, *chain.image_shape)
    width = pixel_range[1] - pixel_range[0]
    slack = (width if math.isfinite(width) else 1.0) * min(received.tolerance, 0.1)
    inside = bool((image >= pixel_range[0] - slack).all() and (image <= pixel_range[1] + slack).all())
    return Candidate(image, torch.tensor([twin.label]), twin.residual, inside, chain.layer_inputs(image), reports)


def joint_residual(
    chain: Chain, received: SharedGradient, joint: Tensor, labels: Tensor, loss: str, size: int
) -> float:
    """Largest over the tensors of ‖g′ − g‖ / ‖g‖; images that were not found give nothing to g′."""
    mine = gradients_of(chain.model, chain.parameters, joint, labels, loss)
    if not len(joint):
        return 1.0
    share = len(joint) / size
    largest = max(g.norm().item() for g in received.gradients.values())
    return max(
        ((share * mine[name].cpu() - g).norm() / (g.norm() if g.any() else largest)).item()
        for name, g in received.gradients.items()
    )


def _judge(chain, received, loss, start, images, notes, known, device) -> Reconstruction:
    """The joint candidate from the best hypothesis of each image, and the verdicts."""
    size, reports = start.batch_size, start.reports
    none = torch.zeros(0, *chain.image_shape, dtype=torch.float64)
    joint = torch.cat([none, *(one[0].images for one in images)])
    labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(one[0].labels for one in images)])
    if known is not None and len(images) == size and known != sorted(labels.tolist()):
        raise GradientMismatchError(f"labels {known} were given; the gradient is that of {sorted(labels.tolist())}")
    residual = joint_residual(chain, received, joint, labels, loss, size)
    # Without a bias a single output fixes a scale by the batch size alone, which the rank then does not confirm.
    unconfirmed = start.ranks[0] < size and chain.homogeneous and chain.layers[-1].output_shape[0] == 1
    verdicts = ["rank-deficient" if unconfirmed else _verdict(each, received.tolerance) for each in images]
    notes = [*notes, *what_was_chosen(images, verdicts)]
    if start.ranks[0] < size or (len(images) < size and start.ranks[1] < size):
        top = "rank-deficient"
    elif len(images) < size or residual > received.tolerance:
        top = "inconsistent"
        notes.append(f"what was found misses the gradient by {residual:.2g}; {received.tolerance:.2g} is allowed")
    else:
        top = min(verdicts, key=VERDICTS.index)
    inputs = chain.layer_inputs(joint)
    whole = Candidate(joint, labels, residual, all(one[0].in_pixel_range for one in images), inputs, reports)
    if device is not None:
        whole = on_device(whole, device)
        images = [[on_device(one, device) for one in each] for each in images]
    per_image = tuple((verdict, tuple(each)) for verdict, each in zip(verdicts, images, strict=True))
    return Reconstruction(whole.images, whole.labels, top, (whole,), reports, tuple(notes), per_image)


def what_was_chosen(images: list[list[Candidate]], verdicts: list[str]) -> list[str]:
    """Notes on scales that the pixel range chose, or did not."""
    notes = []
    if chosen := sum(len(each) > 1 and sum(one.in_pixel_range for one in each) == 1 for each in images):
        notes.append(f"the pixel range chose between two scales for {chosen} of {len(images)} images")
    if twins := verdicts.count("ambiguous"):
        notes.append(f"{twins} of {len(images)} images have two scales between which the pixel range does not choose")
    if odd := verdicts.count("inconsistent"):
        notes.append(
            f"the shares of {odd} of {len(images)} images are not those of one image each: equal images, or another "
            "batch size"
        )
    return notes


def _verdict(candidates: list[Candidate], tolerance: float) -> str:
    if candidates[0].gradient_residual > tolerance:
        return "inconsistent"
    inside = sum(one.in_pixel_range for one in candidates)
    return "ambiguous" if inside > 1 or (len(candidates) > 1 and not inside) else "exact"


def on_device(candidate: Candidate, device) -> Candidate:
    """The candidate with its images and labels there."""
    return replace(candidate, images=candidate.images.to(device), labels=candidate.labels.to(device))
