"""A layer of B images as a least-squares problem in what one kind of equations leaves open.

Weight equations hold for each image alone, W x_b = z_b − b; gradient equations are shared by all images, and the same
for every channel. Where the gradients go first they leave x = x0 + (I ⊗ V) y, with the same V_b for every channel of an
image, and W (I ⊗ V) is never formed: tap t of a convolution reads S_t V_b, whatever the channel, so that

    Σ_b (I ⊗ V_b)ᵀ WᵀW (I ⊗ V_b) = Σ_{s,t} R_st ⊗ Σ_b (S_s V_b)ᵀ (S_t V_b),   R_st[c, c′] = Σ_o W[o, c, s] W[o, c′, t]

costs a few products of the taps' small Gram matrices, in place of one of B·O·H′·W′ rows and C·k columns (ours).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.complement import WeakSubspace
from rgap.equations.gradient import GradientSolution, blocks, gradient_matrix
from rgap.linalg import GRAM_RESOLUTION, BorderedGram, LeastSquares, Operator, dense_operator, gram_matrix, rms
from rgap.network.layer import Layer


@dataclass(frozen=True)
class ReducedSystem:
    """x = x0 + N y over all images, and the least-squares problem min ‖A y − b‖² + ‖damping ∘ y‖² for y.

    `seen_by` gives for (image, L, entries), L (q, e) on these entries of the image's x, the columns of y that they
    depend on, and L N of them; `change` how x0 and b change with G and z, (O, C, kh, kw) and (B, O, H′, W′) -> (B, n)
    and as b.
    """

    x0: Tensor  # (B, n)
    spread: Callable[[Tensor], Tensor]  # Y -> N Y, (k, p) -> (B, n, p)
    project: Callable[[Tensor], Tensor]  # X -> Nᵀ X, (B, n, p) -> (k, p)
    basis: Tensor  # what N is made of
    seen_by: Callable[[int, Tensor, Tensor], tuple[slice, Tensor]]
    A: Operator  # from (k,) to the equations of the other kind
    b: Tensor  # their right-hand side
    damping: Tensor  # singular values, scaled as A is, with which the first kind sees N's columns, (k,)
    size: float  # what the residual of the equations is relative to
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    rank_weights: int | None = None  # of the first kind of equations over all images, None for the other kind
    rank_gradients: int | None = None
    most: int | None = None  # the rank of A and damping together cannot exceed, None where that is not known

    def neighbour(self, other: ReducedSystem, found: LeastSquares) -> LeastSquares | None:
        """The solution of almost the same equations as one for this system's y; None where more or less is open."""
        if other.A.columns != self.A.columns:
            return None
        if other.basis is self.basis:
            return found

        def here(y: Tensor) -> Tensor:
            return self.project(other.spread(y))

        def invert(v: Tensor) -> Tensor:
            return here((found.rough or found.invert)(other.project(self.spread(v))))

        return replace(found, invert=invert, rough=invert, null=None if found.null is None else here(found.null))


def gradients_first(
    layer: Layer, G: Tensor, z: Tensor, known: Tensor | None, found: GradientSolution, rcond: float
) -> ReducedSystem:
    """W's equations for what the gradients leave open, with the arguments of `solve_layer`, but z less the bias.

    Both kinds of rows are scaled by the size of their right-hand side: K's entries carry δz, which is tiny.
    """
    V, channels, right = found.V, layer.input_shape[0], rows_known(z, known)
    on_known = None if known is None else dense_operator(weight_columns(layer, V[0])[known.flatten()])
    A = _without_rounding(on_known or weights_on(layer, V, found.apart), layer, rcond)

    def seen_by(image: int, L: Tensor, entries: Tensor) -> tuple[slice, Tensor]:
        full = L.new_zeros(len(L), layer.unknowns).index_copy_(1, entries, L)
        return slice(None), torch.einsum("qcp,pk->qck", full.reshape(len(L), channels, -1), V[image]).flatten(1)

    def change(dG: Tensor, z_change: Tensor) -> tuple[Tensor, Tensor]:
        moved = found.sensitivity(dG)
        return moved.flatten(1), rows_known(z_change, known) - rows_known(layer.apply(moved), known)

    return ReducedSystem(
        found.x0.flatten(1), lambda Y: spread(V, Y, channels),
        lambda X: torch.einsum("bpk,bcpj->ckj", V, X.reshape(len(X), channels, -1, X.shape[2])).flatten(0, 1), V,
        seen_by, A, right - rows_known(layer.apply(found.x0), known),
        (rows_scale(right, G) * found.sigmas).repeat(channels), max(right.norm().item(), torch.finfo(z.dtype).tiny),
        change, rank_gradients=channels * found.rank,
    )  # fmt: skip


def weights_first(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, weak: WeakSubspace) -> ReducedSystem:
    """The gradients' equations for what W leaves open of each image, or sees badly: x_b = W⁺ z_b + N u_b.

    N is the basis of `weak`; the other arguments are those of `solve_layer`, but z less the bias.
    """
    count, N = len(z), weak.basis
    x0, q = weak.factor.minimum_norm(z), N.shape[1]

    def seen(x: Tensor) -> Tensor:  # Σ_b K(δz_b) x_b
        return sum(map(layer.weight_gradient, x, dz)).flatten()

    def change(dG: Tensor, z_change: Tensor) -> tuple[Tensor, Tensor]:
        moved = weak.factor.minimum_norm(z_change)
        return moved.flatten(1), dG.flatten() - seen(moved)

    def spread(Y: Tensor) -> Tensor:
        return torch.stack([*(N @ torch.hstack([*Y.split(q)])).chunk(count, 1)])

    def project(X: Tensor) -> Tensor:
        return torch.cat([*(N.T @ torch.hstack([*X])).chunk(count, 1)])

    def apply(Y: Tensor) -> Tensor:
        inputs = spread(Y).permute(2, 0, 1).reshape(-1, count, *layer.input_shape)
        return torch.stack([*map(seen, inputs)], 1)

    def adjoint(R: Tensor) -> Tensor:  # K takes δz to the pixels as Wᵀ does, with G in the place of the weight
        columns = [replace(layer, weight=r.reshape(layer.weight.shape), cache={}).adjoint(dz) for r in R.T]
        return project(torch.stack(columns, 4).flatten(1, 3))

    return ReducedSystem(
        x0.flatten(1), spread, project, N,
        lambda image, L, entries: (slice(image * q, (image + 1) * q), L @ N[entries]),
        Operator(count * q, lambda dtype: gradient_gram(layer, dz, N.to(dtype)), apply, adjoint),
        G.flatten() - seen(x0), (rows_scale(G, z) * weak.sigmas).repeat(count),
        max(G.norm().item(), torch.finfo(z.dtype).tiny), change, rank_weights=count * math.prod(layer.output_shape),
        most=_most_by_gradients(layer) + count * int((weak.sigmas > 0).sum()),
    )  # fmt: skip


def _most_by_gradients(layer: Layer) -> int:
    """The most that gradient equations can determine of what W leaves open.

    Σ_{c,t} W[o′, c, t] of the rows (o, c, t) of K x is ⟨δz[o], (W x)[o′]⟩, the same for every x in W's null space.
    """
    outputs, taps = len(layer.weight), layer.weight[0].numel()
    return outputs * (taps - int(torch.linalg.matrix_rank(layer.weight.flatten(1))))


def gradient_gram(layer: Layer, dz: Tensor, N: Tensor) -> Tensor:
    """The Gram matrix of Σ_b K(δz_b) N u_b for N (C·H·W, q): (B·q, B·q), by way of M's own for all channels at once."""
    (count, channels, q), pixels = (len(dz), layer.input_shape[0], N.shape[1]), math.prod(layer.input_shape[1:])
    squares = dz.new_zeros(count * pixels, count * pixels)
    for block in blocks(layer):
        at = (pixels * torch.arange(count)[:, None] + block.pixels).flatten()
        squares[at[:, None], at] = gram_matrix(torch.cat([gradient_matrix(layer, block, image) for image in dz], 1))
    squares = squares.to(N.dtype).reshape(count, pixels, count, pixels)
    by_pixel = N.reshape(channels, pixels, q).transpose(0, 1).flatten(1)
    result = N.new_empty(count, q, count, q)
    for one, other in itertools.combinations_with_replacement(range(count), 2):
        part = by_pixel.reshape(-1, q).T @ (squares[one, :, other] @ by_pixel).reshape(-1, q)
        result[one, :, other], result[other, :, one] = part, part.T
    return result.reshape(count * q, count * q)


def weights_on(layer: Layer, V: Tensor, apart: int = 0) -> Operator:
    """W (I ⊗ V_b) of all images, one below the other, for V (B, H·W, k): (C·k,) -> (B·O·H′·W′,), channels first.

    The last columns of V may stand apart, as those of a `GradientSolution`.
    """
    count, channels = len(V), layer.input_shape[0]

    def apply(Y: Tensor) -> Tensor:
        images = spread(V, Y, channels).permute(2, 0, 1).reshape(-1, count, *layer.input_shape)
        return layer.apply(images).flatten(1).T

    def adjoint(R: Tensor) -> Tensor:
        images = layer.adjoint(R.T.reshape(-1, count, *layer.output_shape))
        return (images.flatten(3) @ V[None]).sum(1).flatten(1).T

    def make(dtype: torch.dtype) -> Tensor | BorderedGram:
        return bordered_gram(layer, V, apart, dtype) if apart else weight_gram(layer, V, dtype)

    return Operator(channels * V.shape[2], make, apply, adjoint)


def spread(V: Tensor, Y: Tensor, channels: int) -> Tensor:
    """(I ⊗ V_b) Y of every image: (B, H·W, k) and (C·k, p) -> (B, C·H·W, p)."""
    return torch.einsum("bnk,ckp->bcnp", V, Y.reshape(channels, V.shape[2], -1)).flatten(1, 2)


def weight_columns(layer: Layer, V: Tensor) -> Tensor:
    """W (I ⊗ V) for V (H·W, k), without W: (O·H′·W′, C·k), columns in the order (channel, vector)."""
    return torch.einsum("oct,tpk->opck", layer.weight.flatten(2), _read_by_taps(layer, V)).flatten(0, 1).flatten(1)


def weight_gram(layer: Layer, V: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Σ_b (I ⊗ V_b)ᵀ WᵀW (I ⊗ V_b) for V (B, H·W, k): (C·k, C·k), in the order (channel, vector)."""
    channels, count, (outputs, taps) = layer.input_shape[0], V.shape[2], (len(layer.weight), layer.weight[0, 0].numel())
    positions = math.prod(layer.output_shape[1:])
    if taps**2 * (len(V) * positions + channels**2) > len(V) * channels**2 * outputs * positions:  # few channels
        return sum(gram_matrix(weight_columns(layer, image).to(dtype)) for image in V)
    read = torch.cat([_read_by_taps(layer, image) for image in V], 1)
    inner = gram_matrix(read.to(dtype).permute(1, 0, 2).flatten(1)).reshape(taps, count, taps, count)
    inner = inner.permute(0, 2, 1, 3).reshape(taps * taps, count * count)
    outer = gram_matrix(layer.weight.to(dtype).reshape(-1, channels * taps)).reshape(channels, taps, channels, taps)
    first, second = torch.triu_indices(channels, channels)
    upper = (outer.transpose(1, 2)[first, second].flatten(1) @ inner).reshape(len(first), count, count)
    result = upper.new_empty(channels, count, channels, count)
    by_channels = result.transpose(1, 2)
    by_channels[second, first], by_channels[first, second] = upper.mT, upper
    return result.reshape(channels * count, channels * count)


def bordered_gram(layer: Layer, V: Tensor, apart: int, dtype: torch.dtype = torch.float64) -> BorderedGram:
    """The same by its parts, where one tap t alone reads what the last columns of V, orthonormal, are not zero on.

    It reads each pixel at one position: (S_t V)ᵀ (S_t V) = I, and these columns have the same R_tt, one by one.
    """
    channels, (rest, last) = layer.input_shape[0], V.split([V.shape[2] - apart, apart], 2)
    (tap,) = blocks(layer)[-1].taps.tolist()
    seen = F.pad(last, (0, 0, 0, 1))[:, layer.tap_pixels()[tap]].flatten(0, 1).to(dtype)
    read = torch.cat([_read_by_taps(layer, image) for image in rest], 1).to(dtype)
    weights = layer.weight.flatten(2).to(dtype)
    R = torch.einsum("oc,odt->cdt", weights[:, :, tap], weights)
    border = torch.einsum("cdt,tjk->cjdk", R, seen.T @ read).reshape(channels * apart, -1)
    return BorderedGram(R[:, :, tap].contiguous(), border, weight_gram(layer, rest, dtype))


def _read_by_taps(layer: Layer, V: Tensor) -> Tensor:
    """What each tap reads of each vector (H·W, k) at each position of the output, (taps, positions, k)."""
    if layer.before is not None:
        V = layer.before.apply(V.T.reshape(-1, *layer.before.inputs)).flatten(1).T
    read = F.pad(V, (0, 0, 0, 1))[layer.tap_pixels()]  # −1, the row of zeros, stands for padding
    if layer.after is None:
        return read
    return layer.after.apply(read.mT.reshape(*read.mT.shape[:2], *layer.after.inputs)).flatten(2).mT


def rows_known(z: Tensor, known: Tensor | None) -> Tensor:
    """The entries of z that are known, flat."""
    return z.flatten() if known is None else z[known]


def rows_scale(right: Tensor, other: Tensor) -> float:
    """Factor that makes equations with right-hand side `other` as large as those with `right`; 0 if all are zero."""
    return (rms(right) / rms(other)).item() if other.any() and right.numel() else 0.0


def _without_rounding(A: Operator, layer: Layer, rcond: float) -> Operator:
    """A, or zeros where A is rounding alone, because W repeats K there."""
    unit = layer.weight.flatten(1).norm(dim=1).max()
    some = torch.randn(A.columns, 1, generator=torch.Generator().manual_seed(0), dtype=unit.dtype)  # ‖A y‖ ≈ ‖A‖
    if A.apply(some).norm() > max(rcond, GRAM_RESOLUTION) * unit or A.matrix().norm() > rcond * unit:
        return A
    nothing = torch.zeros_like
    gram = lambda dtype: unit.new_zeros(A.columns, A.columns, dtype=dtype)  # noqa: E731
    return Operator(A.columns, gram, lambda Y: A.apply(nothing(Y)), lambda R: A.adjoint(nothing(R)))
