"""A mini-batch through convolutions: the fully connected layers tell the images apart, the convolutions give them back.

Images are known one by one at the first fully connected layer; below it the shared gradient is solved for all of them
together. Everything in this module is ours; no other closed form takes batches through convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rgap.attack.arguments import check_separable, checked_batch_labels
from rgap.attack.batch_noise import ExpectedResidual, residual_under_noise
from rgap.attack.batch_recovery import joint_residual, on_device, what_was_chosen
from rgap.attack.descent import Descent
from rgap.attack.joint_descent import descend_jointly
from rgap.attack.joint_signs import agree
from rgap.head.hypothesis import Start
from rgap.network.layer import Chain, Layer
from rgap.results import VERDICTS, Candidate, GradientMismatchError, Reconstruction, UnsupportedLayerError
from rgap.separation.read import read_batch
from rgap.separation.subspaces import BatchSize, first_dense
from rgap.shared_gradient import SharedGradient

SHARP = 2e-3
"""Predicted error, as a share of the pixel range, up to which a batch that noise has blurred is certified."""


def recover_through_convolutions(
    chain: Chain,
    received: SharedGradient,
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
        received: The gradients.
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
    start, notes = read_batch(chain, received, size, loss, known, seed)
    if not len(start.x):
        return _nothing(chain, start, notes, device)
    found = sorted(start.labels.tolist())
    if known is not None and known != found:
        raise GradientMismatchError(f"labels {known} were given; the gradient is that of {found}")
    descent = descend_jointly(chain, received, start.x, start.dx, below=below, virtual_constraints=virtual_constraints)
    return _judge(chain, received, loss, start, descent, pixel_range, notes, device, virtual_constraints)


def _check_convolutions(layers: Sequence[Layer]) -> None:
    for layer in layers:
        if not layer.activation.one_to_one:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: a batch is taken through convolutions with invertible activations, and "
                f"{layer.activation.name} is constant on a half-line; single images go through it (batch_size=1)"
            )


def _nothing(chain: Chain, start: Start, notes: list[str], device) -> Reconstruction:
    """No image: the convolutions' gradients are sums over the batch, of which some images are missing."""
    images = torch.zeros(0, *chain.image_shape, dtype=torch.float64)
    inputs = chain.layer_inputs(images)
    none = Candidate(images, torch.zeros(0, dtype=torch.int64), 1.0, True, inputs, start.reports)
    none = none if device is None else on_device(none, device)
    verdict = "rank-deficient" if min(start.ranks) < start.batch_size else "inconsistent"
    return Reconstruction(none.images, none.labels, verdict, (none,), start.reports, tuple(notes))


def _judge(
    chain: Chain,
    received: SharedGradient,
    loss: str,
    start: Start,
    descent: Descent,
    pixel_range: tuple[float, float],
    notes: list[str],
    device: torch.device | str | None,
    virtual_constraints: bool,
) -> Reconstruction:
    """Candidates of every image, the joint one with the residual of its own gradient, and the verdicts."""
    reports = (*start.reports, *descent.reports)
    images = descent.layer_inputs[chain.layers[0].name].reshape(-1, *chain.image_shape)
    if torch.isfinite(images).all():
        images = agree(chain, images, descent.layer_inputs, first_dense(chain))
    width = pixel_range[1] - pixel_range[0]
    slack = (width if math.isfinite(width) else 1.0) * min(received.tolerance, 0.1)

    def candidate(image: Tensor, label: Tensor, inputs: dict[str, Tensor]) -> Candidate:
        inside = bool((image >= pixel_range[0] - slack).all() and (image <= pixel_range[1] + slack).all())
        return Candidate(image, label, 0.0, inside, inputs, reports, descent.open_layers)

    each = []
    for b, twins in enumerate(start.twins):
        factors = [twin.factor for twin in twins]
        inputs = {name: x[b : b + 1] for name, x in descent.layer_inputs.items()}
        scaled = [{name: factor * x for name, x in inputs.items()} for factor in factors]
        found = [
            candidate(a * images[b : b + 1], start.labels[b : b + 1], s) for a, s in zip(factors, scaled, strict=True)
        ]
        each.append(sorted(found, key=lambda one: (not one.in_pixel_range, one.images.abs().max().item())))
    joint = torch.cat([found[0].images for found in each])
    residual, allowed = math.inf, ExpectedResidual(received.tolerance)
    if torch.isfinite(joint).all():
        residual = joint_residual(chain, received, joint, start.labels, loss, len(joint))
        options = {"virtual_constraints": virtual_constraints}
        allowed = residual_under_noise(chain, received, loss, start, descent, images, residual, **options)
    inputs = {name: torch.cat([found[0].layer_inputs[name] for found in each]) for name in descent.layer_inputs}
    weighed = {"gradient_residual": residual, "residual_allowed": allowed.residual, "predicted_error": allowed.error}
    whole = replace(candidate(joint, start.labels, inputs), **weighed)
    each = [[replace(one, **weighed) for one in found] for found in each]
    verdicts = [_verdict(found, SHARP * (width if math.isfinite(width) else 1.0)) for found in each]
    notes = [*notes, *_what_was_solved(descent, residual, allowed)]
    notes += [note for note in what_was_chosen(each, verdicts) if "inconsistent" not in verdicts]
    if device is not None:
        whole, each = on_device(whole, device), [[on_device(one, device) for one in found] for found in each]
    per_image = tuple((verdict, tuple(found)) for verdict, found in zip(verdicts, each, strict=True))
    top = min(verdicts, key=VERDICTS.index)
    return Reconstruction(whole.images, whole.labels, top, (whole,), reports, tuple(notes), per_image)


def _verdict(candidates: list[Candidate], sharp: float) -> str:
    """Of one image; the residual is that of all, for their gradients cannot be told apart."""
    if candidates[0].open_layers:
        return "rank-deficient"
    if not candidates[0].consistent or (candidates[0].predicted_error or 0.0) > sharp:
        return "inconsistent"
    inside = sum(one.in_pixel_range for one in candidates)
    return "ambiguous" if inside > 1 or (len(candidates) > 1 and not inside) else "exact"


def _what_was_solved(descent: Descent, residual: float, allowed: ExpectedResidual) -> list[str]:
    notes = []
    short = [f"{r.name!r} by {r.deficit}" for r in descent.reports if r.deficit]
    if short and not descent.open_layers:
        notes.append(f"layers short of full rank, closed by virtual constraints: {', '.join(short)}")
    if descent.open_layers:
        notes.append(f"layers short of full rank: {', '.join(short)}; what they leave open was not determined")
    elif residual > allowed.residual:
        notes.append(f"what was found misses the gradient by {residual:.2g}; {allowed.residual:.2g} is allowed")
    if allowed.error is not None:
        notes.append(f"the gradient's noise explains an error of {allowed.error:.2g} of the images, tried out on them")
    return notes
