"""How many images are behind a gradient: as many as it has singular values above rounding, if they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rgap.network.layer import Chain
from rgap.results import UnsupportedLayerError
from rgap.separation.subspaces import Span, row_span
from rgap.shared_gradient import SharedGradient


@dataclass(frozen=True)
class BatchSize:
    """How many images the attack goes by, and why.

    Attributes:
        size: Images in the batch.
        notes: Sentences for the report.
        span: Spaces of the first fully connected layer's gradient.
    """

    size: int
    notes: tuple[str, ...]
    span: Span


def find_batch_size(chain: Chain, received: SharedGradient, given: int | None) -> BatchSize:
    """The batch size, from the rank of the first fully connected layer's gradient where it was not given.

    G_1 = Δ_1ᵀ X has as many singular values above rounding as there are different images. Equal images count once, and
    without bias an image of zeros does not count.

    Args:
        chain: The prepared network.
        received: The gradients.
        given: The batch size if it is known.

    Raises:
        UnsupportedLayerError: If convolutions are followed by a single fully connected layer and the batch has more
            than one image.
        ValueError: If it is not known and no gradient can tell it.
    """
    below = first_dense(chain)
    first, lone = chain.layers[below], below == len(chain.layers) - 1 > 0
    if given is not None and lone:
        raise UnsupportedLayerError(_behind_convolutions(given, first.name))
    span = row_span(first, received.gradients, received.precision)
    gap = math.inf if span.below_cut == 0 else span.above_cut / span.below_cut
    found = f"the gradient of {first.name!r} has {span.rank} singular values above rounding, {gap:.1g} times the next"
    if given is None:
        if min(len(span.U), len(span.V)) == 1:
            raise ValueError(
                f"batch_size is None, and the gradient of {first.name!r}, a single row, cannot tell it; give a number"
            )
        if lone and span.rank > 1:
            raise UnsupportedLayerError(_behind_convolutions(span.rank, first.name))
        said = (f"{found}: a batch of {span.rank}, if its images differ", *_only_by_rank(chain))
        return BatchSize(span.rank, said, span)
    if span.rank > given:
        small = f"batch_size={given} is too small, at least {span.rank} images have this gradient; taken as so"
        return BatchSize(span.rank, (f"{found}: {small}", *_only_by_rank(chain)), span)
    if span.rank == given:
        return BatchSize(given, (f"{found}, as a batch of {given} has",), span)
    why = "equal images, an image of zeros, or a batch_size that is too large"
    if span.is_full:
        why = f"no more fit into a gradient of {len(span.U)} rows and {len(span.V)} columns; or {why}"
    return BatchSize(given, (f"{found}, {given - span.rank} fewer than the batch has images: {why}",), span)


def _only_by_rank(chain: Chain) -> tuple[str, ...]:
    """Without bias and with one output nothing but the rank tells the batch size, by which every scale goes."""
    if not chain.homogeneous or chain.layers[-1].output_shape[0] > 1:
        return ()
    return (
        "the images' scales go by this batch size; without bias and with one output, equal images or an image of zeros "
        "make a batch look smaller than it is, and nothing else shows it",
    )


def first_dense(chain: Chain) -> int:
    """Index of the layer from which on all are fully connected."""
    after = [i + 1 for i, layer in enumerate(chain.layers) if not layer.is_dense]
    return after[-1] if after else 0


def _behind_convolutions(size: int, name: str) -> str:
    return (
        f"a batch of {size} images cannot be taken apart: {name!r} is the only fully connected layer, and its gradient "
        "is one sum that many batches have; two or more fully connected layers tell images apart, and a single image "
        "needs one only (batch_size=1)"
    )
