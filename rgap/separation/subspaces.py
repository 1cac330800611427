"""Row and column spaces of a gradient that mixes a batch, and the batch size that their rank tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.network.layer import Chain, Layer
from rgap.results import UnsupportedLayerError
from rgap.shared_gradient import SharedGradient


@dataclass(frozen=True)
class Span:
    """A gradient G, or [G, ∂ℓ/∂b] with a bias, as U diag(S) Vᵀ, cut at its numerical rank.

    Attributes:
        U: Orthonormal basis of the column space, (outputs, rank).
        S: Singular values, (rank,).
        V: Orthonormal basis of the row space, (inputs, rank); with a bias the last row is that of the constant 1.
        above_cut: Smallest singular value kept, relative to the largest.
        below_cut: Largest one dropped, relative to the largest; 0 where none is left.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    above_cut: float
    below_cut: float

    @property
    def rank(self) -> int:
        """Number of singular values above the cut."""
        return len(self.S)

    @property
    def is_full(self) -> bool:
        """Whether the rank is the largest that the gradient's shape allows."""
        return self.rank == min(len(self.U), len(self.V))


@dataclass(frozen=True)
class BatchSize:
    """The batch size that the attack assumes.

    Attributes:
        size: Images in the batch.
        notes: What that rests on, sentences for the report.
        span: Spaces of the first fully connected layer's gradient.
    """

    size: int
    notes: tuple[str, ...]
    span: Span


def row_span(layer: Layer, gradients: Mapping[str, Tensor], precision: float) -> Span:
    """The row and column spaces of one fully connected layer's gradient.

    Rounding leaves singular values of about a tenth of `precision` relative to the largest; those above `precision`
    count.

    Args:
        layer: A fully connected layer.
        gradients: Parameter name -> gradient, float64.
        precision: Relative error of the gradients' entries.
    """
    G = gradients[layer.weight_name].flatten(1)
    if layer.bias_name is not None:
        G = torch.cat([G, gradients[layer.bias_name][:, None]], 1)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    relative = S / S[0].clamp(min=torch.finfo(S.dtype).tiny)
    rank = int((relative > max(precision, 1e-14)).sum())
    above = relative[rank - 1].item() if rank else 0.0
    below = relative[rank].item() if rank < len(S) else 0.0
    return Span(U[:, :rank], S[:rank], Vt[:rank].T, above, below)


def smallest_principal_angle(A: Tensor, V: Tensor) -> tuple[Tensor, float, float]:
    """The unit vector A a that lies closest to the range of V.

    Args:
        A: (m, k), of full column rank.
        V: (m, l), orthonormal.

    Returns:
        a (k,), the sine of the smallest principal angle between the two ranges, and that of the next one (1 for k = 1).
    """
    Q, R = torch.linalg.qr(A)
    _, sines, directions = torch.linalg.svd(Q - V @ (V.T @ Q), full_matrices=False)
    nearest = Q @ directions[-1]
    sine = (nearest - V @ (V.T @ nearest)).norm().item()
    a = torch.linalg.lstsq(R, directions[-1][:, None], driver="gelsd").solution[:, 0]
    return a, sine, sines[-2].item() if len(sines) > 1 else 1.0


def null_of_rows(rows: Tensor) -> Tensor:
    """Orthonormal basis (n, n − k) of the null space of k independent rows (k, n)."""
    return torch.linalg.qr(rows.T, mode="complete")[0][:, len(rows) :]


def first_dense(chain: Chain) -> int:
    """Index of the first layer from which on all layers are fully connected."""
    after = [i + 1 for i, layer in enumerate(chain.layers) if not layer.is_dense]
    return after[-1] if after else 0


def find_batch_size(chain: Chain, received: SharedGradient, given: int | None) -> BatchSize:
    """The batch size: as given, checked against the rank of the first fully connected layer's gradient, or that rank.

    G_1 = Δ_1ᵀ X has as many singular values above rounding as there are different images. Equal images count once, and
    without a bias an image of zeros does not count.

    Args:
        chain: The prepared network.
        received: The gradients.
        given: The batch size if it is known.

    Raises:
        UnsupportedLayerError: If convolutions are followed by a single fully connected layer and the batch has more
            than one image.
        ValueError: If the size is not given and the gradient has a single row.
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
        notes = (f"{found}: a batch of {span.rank}, if its images differ", *_only_by_rank(chain))
        return BatchSize(span.rank, notes, span)
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
    """A warning where, without biases and with one output, every scale rests on a size that only the rank tells."""
    if not chain.homogeneous or chain.layers[-1].output_shape[0] > 1:
        return ()
    return (
        "the images' scales go by this batch size; without bias and with one output, equal images or an image of zeros "
        "make a batch look smaller than it is, and nothing else shows it",
    )


def _behind_convolutions(size: int, name: str) -> str:
    return (
        f"a batch of {size} images cannot be taken apart: {name!r} is the only fully connected layer, and its gradient "
        "is one sum that many batches have; two or more fully connected layers tell images apart, and a single image "
        "needs one only (batch_size=1)"
    )
