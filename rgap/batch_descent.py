"""A mini-batch through convolutions: the fully connected layers tell the images apart, the convolutions give them back.

Images are known one by one at the first fully connected layer; below it the shared gradient is solved for all of them
together. Everything in this module is ours; no other closed form takes batches through convolutions.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.batch_heads import output_gradients, output_jacobians, scale_hypotheses
from rgap.batch_recovery import (
    check_separable,
    checked_batch_labels,
    head_reports,
    joint_residual,
    on_device,
    what_was_chosen,
    what_was_found,
)
from rgap.batch_refine import Head, refine_head
from rgap.batch_separate import Separation, separate
from rgap.batch_size import BatchSize, first_dense
from rgap.chain import Chain, Layer
from rgap.evidence import Evidence
from rgap.joint_descent import descend_jointly, joint_identities
from rgap.joint_signs import agree
from rgap.recursion import Descent
from rgap.results import VERDICTS, Candidate, GradientMismatchError, LayerReport, Reconstruction, UnsupportedLayerError

COMBINATIONS = 64
"""Most combinations of scale hypotheses between which the last convolution is asked to choose."""


@dataclass(frozen=True)
class Reading:
    """A hypothesis on all images at the first fully connected layer.

    Attributes:
        labels: (B,).
        head: The layer's inputs and the gradients by them.
        twins: For each image the factors by which it may as well be scaled; the first is 1.
    """

    labels: Tensor
    head: Head
    twins: tuple[tuple[float, ...], ...]


def recover_through_convolutions(
    chain: Chain,
    evidence: Evidence,
    size: BatchSize,
    loss: str,
    *,
    labels: Tensor | Sequence[int] | None = None,
    virtual_constraints: bool = True,
    pixel_range: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """Every image of a mini-batch through convolutions and two or more fully connected layers.

    The first two fully connected layers are separated into one input an image, with label and scale; together they are
    fitted to all fully connected gradients; then the convolutions are solved for all images at once. A convolution's
    gradient is a sum over the batch, so that with an image missing nothing below is determined.

    Args:
        chain: The prepared network.
        evidence: The gradients.
        size: How many images.
        loss: "logistic" or "cross_entropy".
        labels: Labels if they are known, in any order: compared with those found.
        virtual_constraints: Whether the layer before may close what a layer leaves open.
        pixel_range: Smallest and largest value of a pixel; chooses between twins, where it can.
        seed: Of the random starts.
        device: Where the returned images and labels live.

    Returns:
        The `Reconstruction`, with `per_image` and one joint candidate; it holds no image where not all came apart.

    Raises:
        UnsupportedLayerError: If a layer cannot be taken apart or inverted.
        GradientMismatchError: If the labels contradict what was found.
    """
    below = first_dense(chain)
    tail = chain.layers[below:]
    check_separable(tail, loss)
    _check_convolutions(chain.layers[:below])
    known = checked_batch_labels(labels, size.size)
    begin = time.perf_counter()
    apart = separate(*tail[:2], evidence.gradients, precision=evidence.precision, seed=seed, span=size.span)
    reading, said = _read(chain, evidence, apart, loss) if len(apart.inputs) == size.size else (None, [])
    reports = head_reports(tail, apart, size.size, time.perf_counter() - begin)
    notes = [*size.notes, *what_was_found(tail, apart, size.size), *said]
    if reading is None:
        return _nothing(chain, apart, size.size, reports, notes, device)
    found = sorted(reading.labels.tolist())
    if known is not None and known != found:
        raise GradientMismatchError(f"labels {known} were given; the gradient is that of {found}")
    head = reading.head
    descent = descend_jointly(chain, evidence, head.x, head.dx, below=below, virtual_constraints=virtual_constraints)
    return _judge(chain, evidence, loss, reading, descent, pixel_range, reports, notes, device)


def _check_convolutions(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if layer.is_fixed:
            raise UnsupportedLayerError(
                f"layer {layer.name!r} has no weight of its own: a batch is taken through convolutions with an "
                "activation each, poolings beside them are no layers of their own"
            )
        if not layer.activation.one_to_one:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: a batch is taken through convolutions with invertible activations, and "
                f"{layer.activation.name} is constant on a half-line; single images go through it (batch_size=1)"
            )


def _read(chain: Chain, evidence: Evidence, apart: Separation, loss: str) -> tuple[Reading | None, list[str]]:
    """Labels and scales of the separated inputs, then all of it fitted together; None where an image has no scale."""
    below, count = first_dense(chain), len(apart.inputs)
    tail = chain.layers[below:]
    c, f = output_gradients(tail, evidence.gradients, apart.inputs, apart.dz, complete=True)
    hypotheses, notes = [], []
    for f_b, c_b in zip(f, count * c, strict=True):
        found, said = scale_hypotheses(loss, f_b, c_b, tail[0].bias is not None)
        notes += [note for note in said if note not in notes]
        hypotheses.append(found)
    if not all(hypotheses):
        return None, [*notes, "without a scale for every image the convolutions were not solved"]
    combinations = list(itertools.islice(itertools.product(*hypotheses), COMBINATIONS))
    if len(combinations) > 1 and not chain.homogeneous:
        shares = torch.einsum("bco,bc->bo", output_jacobians(tail, apart.inputs)[1][0], c)
        misses = [_mismatch(chain, evidence, apart.inputs, shares, one) for one in combinations]
        best = min(range(len(misses)), key=misses.__getitem__)
        notes.append(
            f"the last convolution chose between {len(combinations)} combinations of scales: it misses its identities "
            f"by {misses[best]:.2g}, with the next one by {sorted(misses)[1]:.2g}"
        )
        hypotheses = [[one] for one in combinations[best]]
    heads = []
    for number in range(max(map(len, hypotheses))):
        chosen = [found[min(number, len(found) - 1)] for found in hypotheses]
        labels = torch.tensor([label for label, _ in chosen])
        scales = apart.inputs.new_tensor([scale for _, scale in chosen])
        heads.append((labels, refine_head(tail, evidence.gradients, scales[:, None] * apart.inputs, labels, loss)))
    labels, head = heads[0]
    factors = [((other.x * head.x).sum(1) / head.x.square().sum(1)).tolist() for _, other in heads]
    twins = tuple((1.0, *(factors[n][b] for n in range(1, len(each)))) for b, each in enumerate(hypotheses))
    return Reading(labels, head, twins), notes


def _mismatch(
    chain: Chain, evidence: Evidence, inputs: Tensor, shares: Tensor, chosen: Sequence[tuple[int, float]]
) -> float:
    """How badly a combination of scales fits the last convolution's gradient, before anything is solved."""
    below = first_dense(chain)
    layer, scales = chain.layers[below - 1], inputs.new_tensor([scale for _, scale in chosen])[:, None]
    x, dx = scales * inputs, shares @ chain.layers[below].weight.flatten(1) / scales
    z = layer.activation.inverse(x.reshape(len(x), *layer.output_shape))
    dz = layer.activation.derivative(z) * dx.reshape(z.shape)
    return joint_identities(layer, layer.gradient(evidence.gradients), dz, z)


def _nothing(chain, apart, size, reports, notes, device) -> Reconstruction:
    """No image: the convolutions' gradients are sums over the batch, of which some images are missing."""
    rank = apart.first.rank
    if len(apart.inputs) < size:
        notes = [
            *notes,
            "the convolutions' gradients are sums over all images; with some of these missing nothing below the fully "
            "connected layers was determined",
        ]
    if rank < size:
        notes.append(f"if the batch has {rank} images, say batch_size={rank} or None")
    short = rank < size or (len(apart.inputs) < size and apart.second.rank < size)
    images = torch.zeros(0, *chain.image_shape, dtype=torch.float64)
    none = Candidate(images, torch.zeros(0, dtype=torch.int64), 1.0, True, chain.layer_inputs(images), reports)
    none = none if device is None else on_device(none, device)
    verdict = "rank-deficient" if short else "inconsistent"
    return Reconstruction(none.images, none.labels, verdict, (none,), reports, tuple(notes))


def _judge(
    chain: Chain,
    evidence: Evidence,
    loss: str,
    reading: Reading,
    descent: Descent,
    pixel_range: tuple[float, float],
    reports: tuple[LayerReport, ...],
    notes: list[str],
    device,
) -> Reconstruction:
    """Candidates of every image, the joint one with the residual of its own gradient, and the verdicts."""
    reports = (*reports, *descent.reports)
    images = descent.layer_inputs[chain.layers[0].name].reshape(-1, *chain.image_shape)
    if torch.isfinite(images).all():
        images = agree(chain, images, descent.layer_inputs, first_dense(chain))
    width = pixel_range[1] - pixel_range[0]
    slack = (width if math.isfinite(width) else 1.0) * min(evidence.tolerance, 0.1)

    def candidate(image: Tensor, label: Tensor, inputs: dict[str, Tensor]) -> Candidate:
        inside = bool((image >= pixel_range[0] - slack).all() and (image <= pixel_range[1] + slack).all())
        return Candidate(image, label, 0.0, inside, inputs, reports, descent.open_layers)

    each = []
    for b, factors in enumerate(reading.twins):
        inputs = {name: x[b : b + 1] for name, x in descent.layer_inputs.items()}
        scaled = [{name: factor * x for name, x in inputs.items()} for factor in factors]
        found = [
            candidate(a * images[b : b + 1], reading.labels[b : b + 1], s) for a, s in zip(factors, scaled, strict=True)
        ]
        each.append(sorted(found, key=lambda one: (not one.in_pixel_range, one.images.abs().max().item())))
    joint = torch.cat([found[0].images for found in each])
    residual = math.inf
    if torch.isfinite(joint).all():
        residual = joint_residual(chain, evidence, joint, reading.labels, loss, len(joint))
    inputs = {name: torch.cat([found[0].layer_inputs[name] for found in each]) for name in descent.layer_inputs}
    whole = replace(candidate(joint, reading.labels, inputs), gradient_residual=residual)
    each = [[replace(one, gradient_residual=residual) for one in found] for found in each]
    verdicts = [_verdict(found, evidence.tolerance) for found in each]
    notes = [*notes, *_what_was_solved(descent, residual, evidence.tolerance)]
    notes += [note for note in what_was_chosen(each, verdicts) if "inconsistent" not in verdicts]
    if device is not None:
        whole, each = on_device(whole, device), [[on_device(one, device) for one in found] for found in each]
    per_image = tuple((verdict, tuple(found)) for verdict, found in zip(verdicts, each, strict=True))
    top = min(verdicts, key=VERDICTS.index)
    return Reconstruction(whole.images, whole.labels, top, (whole,), reports, tuple(notes), per_image)


def _verdict(candidates: list[Candidate], tolerance: float) -> str:
    """Of one image; the residual is that of all, for their gradients cannot be told apart."""
    if candidates[0].open_layers:
        return "rank-deficient"
    if candidates[0].gradient_residual > tolerance:
        return "inconsistent"
    inside = sum(one.in_pixel_range for one in candidates)
    return "ambiguous" if inside > 1 or (len(candidates) > 1 and not inside) else "exact"


def _what_was_solved(descent: Descent, residual: float, tolerance: float) -> list[str]:
    notes = []
    short = [f"{r.name!r} by {r.deficit}" for r in descent.reports if r.deficit]
    if short and not descent.open_layers:
        notes.append(f"layers short of full rank, closed by virtual constraints: {', '.join(short)}")
    if descent.open_layers:
        notes.append(f"layers short of full rank: {', '.join(short)}; what they leave open was not determined")
    elif residual > tolerance:
        notes.append(f"what was found misses the gradient by {residual:.2g}; {tolerance:.2g} is allowed")
    return notes
