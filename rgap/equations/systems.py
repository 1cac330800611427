"""A layer of B images as a least-squares problem in what one kind of equations leaves open; what its solution yields.

Weight equations hold for each image alone, W x_b = z_b − b; gradient equations are shared by all images, and the same
for every channel. Where the gradients go first they leave x = x0 + (I ⊗ V) y, with the same V_b for every channel of an
image, and W (I ⊗ V) is never formed: tap t of a convolution reads S_t V_b, whatever the channel, so that

    Σ_b (I ⊗ V_b)ᵀ WᵀW (I ⊗ V_b) = Σ_{s,t} R_st ⊗ Σ_b (S_s V_b)ᵀ (S_t V_b),   R_st[c, c′] = Σ_o W[o, c, s] W[o, c′, t]

costs a few products of the taps' small Gram matrices, in place of one of B·O·H′·W′ rows and C·k columns (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.complement import WeakSubspace
from rgap.equations.gradient import GradientSolution, blocks, gradient_matrix, gradient_values
from rgap.linalg import GRAM_RESOLUTION, BorderedGram, LeastSquares, Operator, dense_operator, gram_matrix, rms
from rgap.network.layer import Layer
from rgap.results import LayerReport


@dataclass(frozen=True)
class ReducedSystem:
    """x = x0 + N y over all images, and the least-squares problem min ‖A y − b‖² + ‖damping ∘ y‖² for y.

    `seen_by` gives for (image, L), L (q, n), the columns of y that this image depends on, and L N of them; `change` how
    x0 and b change with G and z, (O, C, kh, kw) and (B, O, H′, W′) -> (B, n) and as b.
    """

    x0: Tensor  # (B, n)
    spread: Callable[[Tensor], Tensor]  # Y -> N Y, (k, p) -> (B, n, p)
    project: Callable[[Tensor], Tensor]  # Nᵀ of vectors (B, n), (k,)
    seen_by: Callable[[int, Tensor], tuple[slice, Tensor]]
    A: Operator  # from (k,) to the equations of the other kind
    b: Tensor  # their right-hand side
    damping: Tensor  # singular values, scaled as A is, with which the first kind sees N's columns, (k,)
    size: float  # what the residual of the equations is relative to
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    rank_weights: int | None = None  # of the first kind of equations over all images, None for the other kind
    rank_gradients: int | None = None


@dataclass(frozen=True)
class LayerSolution:
    """The input of a layer for every image, and what is left open."""

    x: Tensor  # the inputs, (B, C, H, W); of all solutions the one of minimum norm
    report: LayerReport  # the layer's report; counts are over all images
    # how x changes, to first order, with G and z: shaped as the weight and (B, O, H′, W′) -> (B, C, H, W)
    sensitivity: Callable[[Tensor, Tensor], Tensor]
    # for each group of channels the reduced system and its solution, None where W or the gradients alone were enough
    solved: tuple[tuple[ReducedSystem, LeastSquares] | None, ...] = (None,)
    # standard deviation of noise on G's entries, from the residual of surplus equations where the gradient alone
    # determines x; None elsewhere
    noise_std: float | None = None
    # what makes the null basis of a fixed layer, None where it is empty or would be too large
    fixed_null: Callable[[], Tensor] | None = None

    @cached_property
    def null_basis(self) -> Tensor | None:
        """Orthonormal basis of the directions left open, (B·C·H·W, deficit); None where nothing is."""
        basis = self._basis("null") if self.fixed_null is None else self.fixed_null()
        return basis if basis.shape[1] else None

    @cached_property
    def weak_basis(self) -> Tensor:
        """Where something is open for a single image: directions determined, but badly, (B·C·H·W, w)."""
        return self._basis("ill_conditioned")

    @property
    def weak_gain(self) -> Tensor:
        """Their error, in units of the pre-activation's, (w,)."""
        gains = (1 / group[1].ill_conditioned_sigmas for group in self.solved if group is not None)
        return torch.cat([self.x.new_zeros(0), *gains])

    def _basis(self, kind: str) -> Tensor:
        """Directions of one kind of all groups, each on its own channels."""
        nothing = self.x.new_zeros(len(self.x), self.x[0].numel() // len(self.solved), 0)
        found = [None if group is None else getattr(group[1], kind) for group in self.solved]
        bases = [nothing if y is None else group[0].spread(y) for group, y in zip(self.solved, found, strict=True)]
        if len(bases) == 1:
            return bases[0].flatten(0, 1)
        return torch.cat([torch.block_diag(*image) for image in zip(*bases, strict=True)])


def gradients_first(
    layer: Layer, G: Tensor, z: Tensor, known: Tensor | None, found: GradientSolution, rcond: float
) -> ReducedSystem:
    """W's equations for what the gradients leave open, with the arguments of `solve_layer`, but z less the bias.

    Both kinds of rows are scaled by the size of their right-hand side: K's entries carry δz, which is tiny.
    """
    V, channels, right = found.V, layer.input_shape[0], rows_known(z, known)
    on_known = None if known is None else dense_operator(weight_columns(layer, V[0])[known.flatten()])
    A = _without_rounding(on_known or weights_on(layer, V, found.apart), layer, rcond)

    def seen_by(image: int, L: Tensor) -> tuple[slice, Tensor]:
        return slice(None), torch.einsum("qcp,pk->qck", L.reshape(len(L), channels, -1), V[image]).flatten(1)

    def change(dG: Tensor, z_change: Tensor) -> tuple[Tensor, Tensor]:
        moved = found.sensitivity(dG)
        return moved.flatten(1), rows_known(z_change, known) - rows_known(layer.apply(moved), known)

    return ReducedSystem(
        found.x0.flatten(1),
        lambda Y: spread(V, Y, channels),
        lambda x: torch.einsum("bpk,bcp->ck", V, x.reshape(len(x), channels, -1)).flatten(),
        seen_by,
        A,
        right - rows_known(layer.apply(found.x0), known),
        (rows_scale(right, G) * found.sigmas).repeat(channels),
        max(right.norm().item(), torch.finfo(z.dtype).tiny),
        change,
        rank_gradients=channels * found.rank,
    )


def weights_first(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, weak: WeakSubspace) -> ReducedSystem:
    """The gradients' equations for what W leaves open of each image, or sees badly: x_b = W⁺ z_b + N u_b.

    N is the basis of `weak`; the other arguments are those of `solve_layer`, but z less the bias.
    """
    count, channels, N = len(z), layer.input_shape[0], weak.basis
    x0, q, by_pixel = weak.factor.minimum_norm(z).flatten(1), N.shape[1], N.reshape(channels, -1, N.shape[1])
    parts = [(block, [gradient_matrix(layer, block, image) for image in dz]) for block in blocks(layer)]
    rows = [torch.cat([M @ by_pixel[:, block.pixels] for M in matrices], 2).flatten(0, 1) for block, matrices in parts]

    def missing(G: Tensor, x: Tensor) -> Tensor:  # vec(G) − K x
        rest, x = [], x.reshape(count, channels, -1)
        for block, matrices in parts:
            seen = sum(one @ M.T for M, one in zip(matrices, x[:, :, block.pixels], strict=True))
            rest.append((gradient_values(layer, block, G).T - seen).flatten())
        return torch.cat(rest)

    def change(dG: Tensor, z_change: Tensor) -> tuple[Tensor, Tensor]:
        moved = weak.factor.minimum_norm(z_change).flatten(1)
        return moved, missing(dG, moved)

    return ReducedSystem(
        x0,
        lambda Y: torch.einsum("nq,bqp->bnp", N, Y.reshape(count, q, -1)),
        lambda x: (x @ N).flatten(),
        lambda image, L: (slice(image * q, (image + 1) * q), L @ N),
        dense_operator(torch.cat(rows)),
        missing(G, x0),
        (rows_scale(G, z) * weak.sigmas).repeat(count),
        max(G.norm().item(), torch.finfo(z.dtype).tiny),
        change,
        rank_weights=count * math.prod(layer.output_shape),
    )


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

    make = partial(bordered_gram, layer, V, apart) if apart else partial(weight_gram, layer, V)
    return Operator(channels * V.shape[2], make, apply, adjoint)


def spread(V: Tensor, Y: Tensor, channels: int) -> Tensor:
    """(I ⊗ V_b) Y of every image: (B, H·W, k) and (C·k, p) -> (B, C·H·W, p)."""
    return torch.einsum("bnk,ckp->bcnp", V, Y.reshape(channels, V.shape[2], -1)).flatten(1, 2)


def weight_columns(layer: Layer, V: Tensor) -> Tensor:
    """W (I ⊗ V) for V (H·W, k), without W: (O·H′·W′, C·k), columns in the order (channel, vector)."""
    return torch.einsum("oct,tpk->opck", layer.weight.flatten(2), _read_by_taps(layer, V)).flatten(0, 1).flatten(1)


def weight_gram(layer: Layer, V: Tensor) -> Tensor:
    """Σ_b (I ⊗ V_b)ᵀ WᵀW (I ⊗ V_b) for V (B, H·W, k): (C·k, C·k), in the order (channel, vector)."""
    channels, count, (outputs, taps) = layer.input_shape[0], V.shape[2], (len(layer.weight), layer.weight[0, 0].numel())
    positions = math.prod(layer.output_shape[1:])
    if taps**2 * (len(V) * positions + channels**2) > len(V) * channels**2 * outputs * positions:  # few channels
        return sum(gram_matrix(weight_columns(layer, image)) for image in V)
    read = torch.cat([_read_by_taps(layer, image) for image in V], 1)
    inner = gram_matrix(read.permute(1, 0, 2).flatten(1)).reshape(taps, count, taps, count)
    inner = inner.permute(0, 2, 1, 3).reshape(taps * taps, count * count)
    outer = gram_matrix(layer.weight.reshape(-1, channels * taps)).reshape(channels, taps, channels, taps)
    first, second = torch.triu_indices(channels, channels)
    upper = (outer.transpose(1, 2)[first, second].flatten(1) @ inner).reshape(len(first), count, count)
    result = V.new_empty(channels, count, channels, count)
    by_channels = result.transpose(1, 2)
    by_channels[second, first], by_channels[first, second] = upper.mT, upper
    return result.reshape(channels * count, channels * count)


def bordered_gram(layer: Layer, V: Tensor, apart: int) -> BorderedGram:
    """The same by its parts, where one tap t alone reads what the last columns of V, orthonormal, are not zero on.

    It reads each pixel at one position: (S_t V)ᵀ (S_t V) = I, and these columns have the same R_tt, one by one.
    """
    channels, (rest, last) = layer.input_shape[0], V.split([V.shape[2] - apart, apart], 2)
    (tap,) = blocks(layer)[-1].taps.tolist()
    seen = F.pad(last, (0, 0, 0, 1))[:, layer.tap_pixels()[tap]].flatten(0, 1)
    read = torch.cat([_read_by_taps(layer, image) for image in rest], 1)
    weights = layer.weight.flatten(2)
    R = torch.einsum("oc,odt->cdt", weights[:, :, tap], weights)
    border = torch.einsum("cdt,tjk->cjdk", R, seen.T @ read).reshape(channels * apart, -1)
    return BorderedGram(R[:, :, tap].contiguous(), border, weight_gram(layer, rest))


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
    gram = lambda: unit.new_zeros(A.columns, A.columns)  # noqa: E731
    return Operator(A.columns, gram, lambda Y: A.apply(nothing(Y)), lambda R: A.adjoint(nothing(R)))
