"""Row and column spaces of a gradient summed over a batch, and the batch size that follows from their rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.linalg import leading_svd
from rgap.network.layer import Chain, Layer
from rgap.results import UnsupportedLayerError
from rgap.shared_gradient import SharedGradient

MIN_ROW_RATIO = 1e-6  # singular value of the last layer's gradient, relative to the largest, from which on it counts
MIN_BATCH_GAP = 100.0  # ratio of singular values, and of one to the rounding, from which on a rank is clear


@dataclass(frozen=True)
class Span:
    """A gradient G, or [G, ∂ℓ/∂b] with a bias, as U diag(S) Vᵀ, cut at its numerical rank."""

    U: Tensor  # orthonormal basis of the column space, (outputs, rank)
    S: Tensor  # singular values, (rank,)
    V: Tensor  # orthonormal basis of the row space, (inputs, rank); with a bias the last row is that of the constant 1
    above_cut: float  # smallest singular value kept, relative to the largest
    below_cut: float  # largest one dropped, relative to the largest; 0 where none is dropped
    left: float = 0.0  # root mean square of the entries that the dropped ones leave, as far as they are free

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
    """The batch size that the attack assumes."""

    size: int
    notes: tuple[str, ...]  # the evidence for it, sentences for the report
    span: Span  # of the first fully connected layer's gradient
    leaves_lengths: bool = False  # whether the images' lengths rest on a size that nothing else confirms
    is_given: bool = True
    is_exceeded: bool = False  # whether the rank is higher than the given size: more images, or noise


def row_span(layer: Layer, gradients: Mapping[str, Tensor], precision: float, expected: int = 0) -> Span:
    """The row and column spaces of one fully connected layer's gradient.

    Entries with relative errors of `precision` have spurious singular values of about a tenth of it, relative to the
    largest; those above `precision` count. An `expected` rank, if known, saves time.
    """
    G = layer.gradient(gradients).flatten(1)
    if layer.bias_name is not None:
        G = torch.cat([G, gradients[layer.bias_name][:, None]], 1)
    cut = max(precision, 1e-14)
    U, S, Vt = leading_svd(G, cut, expected)
    relative = S / S[0].clamp(min=torch.finfo(S.dtype).tiny)
    rank = int((relative > cut).sum())
    above = relative[rank - 1].item() if rank else 0.0
    below = relative[rank].item() if rank < len(S) else 0.0
    free = (len(U) - rank) * (Vt.shape[1] - rank)
    left = S[rank:].square().sum().sqrt().item() / free**0.5 if free else 0.0
    return Span(U[:, :rank], S[:rank], Vt[:rank].T, above, below, left)


def null_of_rows(rows: Tensor) -> Tensor:
    """Orthonormal basis (n, n − k) of the null space of k independent rows (k, n)."""
    return torch.linalg.qr(rows.T, mode="complete")[0][:, len(rows) :]


def inputs_from_gradients(
    Z: Tensor, H: Tensor, slopes: Tensor, duals: Tensor, tolerance: float, gap_ratio: float
) -> tuple[Tensor, list[int], float, float]:
    """Inputs from activation patterns and ∂ℓ/∂z_1 where only sums of hidden vectors are in the range of H (ours).

    Where images have the same activation pattern in the second layer, or outnumber its units, G_2 has a lower rank than
    G_1; but every ∂ℓ/∂z_1 = D_s W_2ᵀ δ, with δ in the column space of G_2, still lies in the column space of G_1.
    The duals of all other known inputs annihilate q_j: q_j = N_j a_j. That Σ_j D_j Z N_j a_j is in the range of H is
    one smallest principal angle for all j. J inputs have J − l solutions where H lacks l dimensions; each gives the
    same q_j, up to its size. Where all duals are known, N_j is q_j itself.

    Z (h, R) gives pre-activations from coordinates in the row space of G_1, H (h, r) is an orthonormal basis of the row
    space of G_2, `slopes` (J, h) holds the D_j, and `duals` (K, R) the G_1⁺ᵀ ∂ℓ/∂z_1 in coordinates, those of the J
    inputs first. A sine up to `tolerance`, and up to `gap_ratio` times the next, counts as 0. Gives q (J', R) of unit
    length, which of the J these are, the largest sine of the solutions, and by the next one the error that it allows.
    """
    count, rank = len(slopes), Z.shape[1]
    duals = duals / duals.norm(dim=1, keepdim=True)
    spaces = [null_of_rows(torch.cat([duals[:j], duals[j + 1 :]])) for j in range(count)]
    if len(duals) == rank:
        return torch.stack([N[:, 0] for N in spaces]), list(range(count)), 0.0, 0.0
    factors = [torch.linalg.qr(D[:, None] * (Z @ N)) for D, N in zip(slopes, spaces, strict=True)]
    Q, R = torch.linalg.qr(torch.cat([factor[0] for factor in factors], 1))
    _, sines, directions = torch.linalg.svd(Q - H @ (H.T @ Q), full_matrices=False)
    solutions = int((sines <= tolerance).sum())
    if not solutions or solutions == len(sines) or sines[-solutions] > gap_ratio * sines[-solutions - 1]:
        return Z.new_zeros(0, rank), [], 1.0, 1.0
    a = torch.linalg.lstsq(R, directions[-solutions:].T, driver="gelsd").solution
    found, which = [], []
    for j, part in enumerate(a.reshape(count, -1, solutions)):
        left, sizes, _ = torch.linalg.svd(part, full_matrices=False)
        if sizes[0] > 1e-3 and (solutions == 1 or sizes[1] <= 0.05 * sizes[0]):
            found.append(spaces[j] @ torch.linalg.lstsq(factors[j][1], left[:, :1], driver="gelsd").solution[:, 0])
            which.append(j)
    q = torch.stack([Z.new_zeros(rank), *found])[1:]
    miss = sines[-solutions].item()
    return q / q.norm(dim=1, keepdim=True), which, miss, miss / sines[-solutions - 1].item()


def first_dense(chain: Chain) -> int:
    """Index of the first layer from which on all layers are fully connected."""
    after = [i + 1 for i, layer in enumerate(chain.layers) if not layer.is_dense]
    return after[-1] if after else 0


def batch_given_as_one(chain: Chain, received: SharedGradient) -> str:
    """A note where the last layer's gradient is clearly that of several images: of one image its rank is one."""
    head = chain.layers[-1]
    G = received.gradients[head.weight_name]
    powers = torch.linalg.eigvalsh(G @ G.T if len(G) < len(G.T) else G.T @ G).flip(0).clamp(min=0.0)
    ratios = (powers / powers[0]).sqrt()
    above = ratios > max(MIN_ROW_RATIO, MIN_BATCH_GAP * received.precision)
    rank = int(above.sum())
    if rank < 2 or rank >= len(ratios) - 1 or ratios[rank] * MIN_BATCH_GAP > ratios[rank - 1]:
        return ""  # noise, too, has full rank, and no gap
    return (
        f"the gradient of {head.name!r} has rank {rank}, which one image's has not: it is that of a batch of at least "
        f"{rank}; batch_size=None takes it apart where the network ends in two or more fully connected layers"
    )


def find_batch_size(chain: Chain, received: SharedGradient, given: int | None) -> BatchSize:
    """The batch size: as given, checked against the rank of the first fully connected layer's gradient, or that rank.

    G_1 = Δ_1ᵀ X has as many singular values above rounding as there are different images. Equal images count once; an
    image of zeros does not count without a bias.

    Raises UnsupportedLayerError if convolutions are followed by a single fully connected layer and the batch has more
    than one image, ValueError if no size is given and the gradient has a single row.
    """
    below = first_dense(chain)
    first, lone = chain.layers[below], below == len(chain.layers) - 1 > 0
    span = row_span(first, received.gradients, received.precision, given or 0)
    gap = math.inf if span.below_cut == 0 else span.above_cut / span.below_cut
    found = f"the gradient of {first.name!r} has {span.rank} singular values above rounding, {gap:.1g} times the next"
    if given is None and min(len(span.U), len(span.V)) == 1:
        raise ValueError(f"batch_size is None, and the gradient of {first.name!r} has a single row; give it")
    if lone and (given is not None or span.rank > 1):
        raise UnsupportedLayerError(
            f"a batch of {given or span.rank} images cannot be taken apart: {first.name!r} is the only fully connected "
            "layer, and many batches have its gradient; two or more fully connected layers separate images, and a "
            "single image needs only one (batch_size=1)"
        )
    caution = ()
    one_scale = chain.leaves_brightness_open
    if one_scale:
        caution = (
            "the images' scales depend on this batch size; without bias and with one output or two classes, equal "
            "images or an image of zeros make a batch look smaller than it is, and nothing else shows it",
        )
    if given is None:
        why = f"{found}: a batch of {span.rank}, if its images differ"
        return BatchSize(span.rank, (why, *caution), span, one_scale, is_given=False)
    if span.rank > given:
        small = f"batch_size={given} is too small, at least {span.rank} images have this gradient; taken as so"
        return BatchSize(span.rank, (f"{found}: {small}", *caution), span, one_scale, is_exceeded=True)
    if span.rank == given:
        return BatchSize(given, (f"{found}, as a batch of {given} has",), span)
    why = "equal images, an image of zeros, or a batch_size that is too large"
    if span.is_full:
        why = f"a gradient of {len(span.U)} rows and {len(span.V)} columns has no higher rank; or {why}"
    return BatchSize(given, (f"{found}, {given - span.rank} fewer than the batch has images: {why}",), span)
