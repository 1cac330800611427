"""The largest mini-batch whose every image follows from one gradient, predicted from shapes alone (ours).

Fully connected layers must separate the images, which limits their widths; convolutions must determine all images
together, which the rank laws decide, with the virtual constraints of the layer before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rgap.arguments import check_tensor
from rgap.client import check_loss
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS, SPARE_UNITS, layer_laws
from rgap.isolation import isolated
from rgap.network.chain import Chain, Layer, prepare
from rgap.ranks.numbers import MAX_UNKNOWNS, numerical_ranks, too_large
from rgap.ranks.peeled import active_shares, largest_peeled
from rgap.separation.linear_units import MAX_LINEAR_UNKNOWNS
from rgap.separation.subspaces import first_dense

MAX_BATCH_TRIED = 512  # largest batch size that is tried
RECOMMENDED_UNITS_PER_IMAGE = 4  # hidden units per image from which batches are usually separated


@dataclass(frozen=True)
class BatchLimit:
    """The largest batch that the layer `name` lets through, and what stops the next larger one.

    The limit is 0 for none and None where no rank is known; `alone` is the limit without virtual constraints.
    """

    name: str
    limit: int | None
    alone: int | None
    reason: str


@dataclass(frozen=True)
class LargestBatch:
    """The prediction for a network.

    Attributes:
        batch_size: Largest batch that is usually recovered, every image of it; 0 where not even one is. Some larger
            ones come back where images happen to switch different units, and some smaller ones do not.
        alone: The same without virtual constraints.
        limits: What each layer usually allows, from the image to the output.
        reason: The layer that limits, and why.
        bound: Batch size above which not every image is ever recovered, from ranks alone.
        safe: Largest batch that is recovered as a rule: four units of the first fully connected layer an image.
        peeled: Largest batch of such images as were given that is predicted to peel off whole, one image after the
            other; above it peeling stalls and leaves a part. None without images.
    """

    batch_size: int
    alone: int
    limits: tuple[BatchLimit, ...]
    reason: str
    bound: int = 0
    safe: int = 0
    peeled: int | None = None


@isolated()
def largest_batch(
    model: nn.Module | Chain,
    image_shape: tuple[int, ...],
    loss: str = "cross_entropy",
    *,
    images: Tensor | None = None,
) -> LargestBatch:
    """Predicts how many images behind one gradient can be recovered, each by itself.

    Args:
        model: A chain of layers, as `rgap.prepare` takes it.
        image_shape: (C, H, W), or (n,) for the rows of a table.
        loss: The client's loss; the rows of a softmax's gradient sum to zero, which costs one image.
        images: Some images of the kind that the client has, (N, *image_shape), a hundred or more. How often they
            switch the units of the first fully connected layer on predicts how many peel off, far beyond the classes.

    Returns:
        The `LargestBatch`, for generic weights and images: a usual size, a bound, and a safe size. Convolutions reach
        their limit. Of fully connected layers separation depends on which images activate which units.

    Raises:
        UnsupportedLayerError: If the network is no chain of invertible layers.
        ValueError: If the image shape does not fit, or the loss is unknown.

    Example:
        >>> import rgap
        >>> limit = rgap.largest_batch(rgap.models.cnn6_batch(), image_shape=(3, 32, 32))
        >>> limit.batch_size, limit.alone
        (9, 4)
    """
    check_loss(loss)
    chain = prepare(model, image_shape)
    below, tail = _parts(chain)
    convolutions = [*map(_convolution, below, (None, *below))]
    heads = _heads(tail, loss)
    peeled = None if images is None else _peeled(chain, tail, _checked(images, chain.image_shape))
    if peeled is not None:
        reason = f"{peeled} such images peel off, by how often they switch its units on"
        heads = _raised(heads, peeled, reason)
    limits = [*convolutions, *heads]
    known = [limit for limit in limits if limit.limit is not None]
    worst = min(known, key=lambda limit: limit.limit)
    unknown = [repr(limit.name) for limit in limits if limit.limit is None]
    reason = f"layer {worst.name!r} lets {worst.limit} through: {worst.reason}"
    if unknown:
        reason += f"; no rank is known for {', '.join(unknown)}"
    usual, alone = worst.limit, min(limit.alone for limit in known)
    bound = min([limit.limit for limit in convolutions if limit.limit is not None] + [_most_directions(tail)])
    safe = min(usual, max(tail[0].output_shape[0] // RECOMMENDED_UNITS_PER_IMAGE, min(usual, 1)))
    return LargestBatch(usual, alone, tuple(limits), reason, max(bound, usual), safe, peeled)


def separable_images(model: nn.Module | Chain, image_shape: tuple[int, ...]) -> int | None:
    """Images that the fully connected layers at a network's end tell apart as a rule, in the attack's hands.

    None where the network is no chain, ends in a single one of them, or they, or the convolutions, are of a kind
    through which no batch is taken.
    """
    try:
        below, tail = _parts(prepare(model, tuple(image_shape)))
    except ValueError:  # UnsupportedLayerError among them
        return None
    biased = [layer.bias is not None for layer in tail]
    plain = all(not layer.is_fixed and layer.shift is None and layer.output_scale is None for layer in tail)
    if len(tail) < 2 or not plain or any(layer.is_frozen for layer in tail) or (any(biased) and not biased[0]):
        return None
    if not all(layer.activation.homogeneous for layer in tail) or not all(
        layer.activation.one_to_one for layer in below
    ):
        return None
    loss = "logistic" if tail[-1].output_shape[0] == 1 else "cross_entropy"
    safe = tail[0].output_shape[0] // RECOMMENDED_UNITS_PER_IMAGE
    return min(safe, *(limit.limit for limit in _heads(tail, loss)))


def _parts(chain: Chain) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The layers below the first from which on all are fully connected, and those."""
    first = first_dense(chain)
    return chain.layers[:first], chain.layers[first:]


def _most_directions(tail: Sequence[Layer]) -> int:
    """Most images that the first fully connected layer's gradient can hold apart: its rank; 1 where it stands alone."""
    first = tail[0]
    return min(first.output_shape[0], first.unknowns + (first.bias is not None)) if len(tail) > 1 else 1


def _convolution(layer: Layer, before: Layer | None) -> BatchLimit:
    """What a convolution determines with the range constraints of the layer before it."""
    supplied = 0
    if before is not None and before.groups == layer.groups == 1:
        rank = layer_laws(before).weights
        supplied = math.prod(before.output_shape) - rank if rank is not None else 0
    alone, lacking = None, 0
    for batch in range(1, MAX_BATCH_TRIED + 1):
        lacking = _deficit(layer, batch)
        if lacking is None:
            return BatchLimit(layer.name, None, None, f"no rank law, and too large for numbers at {batch} images")
        if lacking and alone is None:
            alone = batch - 1
        if lacking and lacking + CERTIFICATE_SURPLUS > batch * supplied:
            have = f" before {batch * supplied} virtual constraints" if supplied else ""
            return BatchLimit(layer.name, batch - 1, alone, f"{batch} images leave {lacking} unknowns open{have}")
    alone = MAX_BATCH_TRIED if alone is None else alone
    return BatchLimit(layer.name, MAX_BATCH_TRIED, alone, f"none up to {MAX_BATCH_TRIED} images")


def _deficit(layer: Layer, batch: int) -> int | None:
    """Unknowns − rank [W; K] by law, by number where there is no law, None where neither is available."""
    if layer.is_fixed:  # without gradient constraints
        pixels = math.prod(layer.input_shape[1:]) if layer.after is None else layer.after.rank
        return batch * (layer.unknowns - layer.input_shape[0] * pixels)
    laws = layer_laws(layer, batch)
    rank = laws.weights if layer.is_frozen else laws.both
    if rank is None:
        if too_large(layer, batch, MAX_UNKNOWNS):
            return None
        numbers = numerical_ranks(layer, batch)
        rank = numbers.weights if layer.is_frozen else numbers.both
    return batch * layer.unknowns - rank


def _heads(layers: tuple[Layer, ...], loss: str) -> list[BatchLimit]:
    """What the fully connected layers allow: a fixed point between two of them separates the images."""
    outputs = layers[-1].output_shape[0]
    if len(layers) == 1:
        return [BatchLimit(layers[0].name, 1, 1, "one fully connected layer alone does not tell images apart")]
    limits = []
    for layer, after in itertools.pairwise(layers):
        width, last = layer.output_shape[0], after is layers[-1]
        room = outputs - (loss == "cross_entropy") if last else after.output_shape[0] - 1
        if limits:
            limit, reason = width - 1, f"{width} hidden units"
        elif (width - SPARE_UNITS) // 2 <= room:
            limit = max((width - SPARE_UNITS) // 2, 1)
            safe = f"{RECOMMENDED_UNITS_PER_IMAGE} an image are safe"
            reason = f"{width} hidden units, two an image and {SPARE_UNITS} to spare; {safe}"
        else:
            limit, reason = room, f"the next gradient has rank {room} at most"
        limits.append(BatchLimit(layer.name, limit, limit, reason))
    together = min(layers[0].output_shape[0], outputs - 2) if loss == "cross_entropy" else 0
    if together <= min(limit.limit for limit in limits):
        return limits
    reason = f"{outputs} classes and {layers[0].output_shape[0]} hidden units, by the softmax of the outputs"
    return _raised(limits, together, reason)


def _checked(images: Tensor, image_shape: tuple[int, ...]) -> Tensor:
    """Images (N, *image_shape) of a client, at least one."""
    images = check_tensor("images", images, finite=True)
    if not len(images.shape) or not len(images) or tuple(images.shape[1:]) != tuple(image_shape):
        raise ValueError(f"images are {tuple(images.shape)}; give some of shape {tuple(image_shape)}, (N, ...)")
    return images


def _raised(limits: list[BatchLimit], count: int, reason: str) -> list[BatchLimit]:
    """The limits where another way lets `count` images through."""
    return [BatchLimit(one.name, count, count, reason) if one.limit < count else one for one in limits]


def _peeled(chain: Chain, tail: tuple[Layer, ...], images: Tensor) -> int:
    """Images like these that peel off the first fully connected layer, all of them; 0 behind no ReLU."""
    first, *after = tail
    kind, both_ends = first.activation, bool(after) and after[0].output_shape[0] <= MAX_LINEAR_UNKNOWNS
    if not after or not kind.homogeneous or not (kind.clips or (kind.has_kink and both_ends)):
        return 0
    most = min(MAX_BATCH_TRIED, _most_directions(tail))
    return largest_peeled(active_shares(chain, first, images), most, both_ends=both_ends)
