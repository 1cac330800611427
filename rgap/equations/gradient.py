"""The gradient equations K x = vec(G) of a layer: their matrix, their identities with W x = z − b, their solution.

For a convolution G[o, c, t] = Σ_p δz[o, p] x_c[pixel(t, p)], where tap t at output position p reads that pixel of
channel c. The equation depends on c only through the channel it reads, so K = I_C ⊗ M with M of H·W columns. A stride s
splits M into s² independent blocks, for a tap only ever reads pixels of one residue modulo s (the Kronecker form and
the split are ours). Zero padding is not unknown: those entries are dropped, no row is needed for them. Other padding
and pooling are maps of pixels that stand before and behind the convolution. For a batch, Σ_b M_b x_bc = vec(G[:, c]):
the images stand side by side, [M_1 … M_B], and one factorisation of each block of the stride serves all channels.

All functions but the residuals take layers without groups (`Layer.split_groups`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.linalg import GRAM_RESOLUTION, gram_matrix, largest_entry, norm, svd
from rgap.network.layer import Layer

MAX_CHANNELS_TESTED = 32  # channels up to which every one is tested against the layer's identities
RANDOM_SUMS = 4  # sums of channels that are tested where there are more
MIN_SURPLUS_EQUATIONS = 30  # surplus equations whose residual determines the noise's size to about an eighth


@dataclass(frozen=True)
class StrideBlock:
    """An independent part of M: the taps and the pixels of one residue of the stride."""

    taps: Tensor  # indices into the kh·kw taps, (t,)
    pixels: Tensor  # indices into the H·W pixels, sorted, (m,)
    columns: Tensor  # (t, positions): column of M's block that tap and position read, or `size` where they read padding
    size: int  # columns of the block before `Layer.before` is applied, m where there is none


def blocks(layer: Layer) -> list[StrideBlock]:
    """The independent blocks of M, from most taps to fewest; pixels that no tap reads belong to none. Made once."""
    return layer.cached("blocks", lambda: sorted(_blocks(layer), key=lambda b: (-len(b.taps), len(b.pixels))))


def _blocks(layer: Layer) -> list[StrideBlock]:
    pixels = layer.tap_pixels().numpy()
    if layer.before is not None:  # it mixes the residues
        size = math.prod(layer.pixels_in)
        every = (np.arange(n) for n in (len(pixels), math.prod(layer.input_shape[1:])))
        return [StrideBlock(*map(torch.from_numpy, (*every, np.where(pixels >= 0, pixels, size))), size)]
    axes = zip(layer.weight.shape[2:], layer.dilation, layer.stride, strict=True)
    vertical, horizontal = (np.arange(taps) * dilation % stride for taps, dilation, stride in axes)
    residue = (vertical[:, None] * layer.stride[1] + horizontal).ravel()
    result = []
    for value in np.unique(residue):
        taps = np.flatnonzero(residue == value)
        read = pixels[taps]
        members = np.unique(read[read >= 0])
        if len(members):  # there are taps that read nothing but padding
            columns = np.where(read >= 0, np.searchsorted(members, read), len(members))
            result.append(StrideBlock(*map(torch.from_numpy, (taps, members, columns)), len(members)))
    return result


def gradient_matrix(layer: Layer, block: StrideBlock, dz: Tensor) -> Tensor:
    """One block of M for a δz (O, H′, W′): (O·t, m), rows in the order (output channel, tap of the block)."""
    outputs, taps, size = len(dz), len(block.taps), block.size
    dz = layer.conv_gradient(dz)
    M = dz.new_zeros(outputs, taps, size + 1)  # the last column collects what falls on padding
    M.scatter_(2, block.columns.expand(outputs, -1, -1), dz.reshape(outputs, 1, -1).expand(-1, taps, -1))
    M = M[:, :, :size].reshape(outputs * taps, size)
    return M if layer.before is None else layer.before.adjoint(M.reshape(-1, *layer.before.shape)).flatten(1)


def gradient_values(layer: Layer, block: StrideBlock, G: Tensor) -> Tensor:
    """The right-hand sides of M's block, one column a channel: (O, C, kh, kw) -> (O·t, C)."""
    return G.flatten(2).transpose(1, 2).index_select(1, block.taps).flatten(0, 1)


def identity_residual(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, known: Tensor | None = None) -> float:
    """How badly (z, δz) of all images fit the layer's own gradient, before anything is solved.

    ⟨G[o], W[o′]⟩ = Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩ holds for every pair of channels of a group; the right pair (z, δz)
    fulfils it to rounding, one of the wrong label misses it by about its own size. Where z is not known everywhere, δz
    vanishes, and the identities with o = o′ still hold. Of more than `MAX_CHANNELS_TESTED` channels o, a few sums with
    random signs are tested.

    Args:
        layer: The layer.
        G: Gradient of the mean loss by the weight, shaped as the weight.
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).
        z: Pre-activations, (B, O, H′, W′).
        known: Mask of the entries of z that are known, (B, O, H′, W′), None for all.

    Returns:
        ‖left − right‖ / max(‖left‖, ‖right‖), the largest of the layer's groups; 0 where both sides vanish.
    """
    by_channel = (t.transpose(0, 1).flatten(1) for t in (dz, z - layer.pre_bias()))
    groups = (t.chunk(layer.groups) for t in (G.flatten(1), layer.weight.flatten(1), *by_channel))
    return max(_group_residual(*group, known is not None) for group in zip(*groups, strict=True))


def _group_residual(G: Tensor, W: Tensor, dz: Tensor, inputs: Tensor, same_channel: bool) -> float:
    """Of one group; all tensors have a row for each channel."""
    if same_channel:
        return _relative_gap((G * W).sum(1), (dz * inputs).sum(1))
    if len(G) > MAX_CHANNELS_TESTED:
        signs = _random_signs(len(G))
        G, dz = signs @ G, signs @ dz
    return _relative_gap(G @ W.T, dz @ inputs.T)


@cache
def _random_signs(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(2, (RANDOM_SUMS, channels), generator=generator).to(torch.float64) - 1.0


def bias_residual(layer: Layer, gradient: Tensor, dz: Tensor) -> float:
    """How badly δz of all images fits the bias's own gradient, ∂ℓ/∂b[o] = Σ_b Σ_p δz_b[o, p].

    Args:
        layer: The layer.
        gradient: Of the mean loss by the bias, (O,).
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).

    Returns:
        ‖left − right‖, relative to the larger of both and a thousandth of Σ |δz|, for both may vanish by cancellation.
    """
    dz = layer.conv_gradient(dz)
    if layer.output_scale is not None:
        dz = dz * layer.output_scale[:, None, None]
    return _relative_gap(gradient, dz.sum((0, 2, 3)), 1e-3 * dz.abs().sum((0, 2, 3)).norm().item())


def _relative_gap(left: Tensor, right: Tensor, floor: float = 0.0) -> float:
    scale = max(left.norm().item(), right.norm().item(), floor)
    return (left - right).norm().item() / scale if scale > 0 else 0.0


@dataclass(frozen=True)
class GradientSolution:
    """What the gradient equations determine: x_bc = x0_bc + V_b y_c, where ‖sigmas ∘ y_c‖ should be small.

    V holds the null space of [M_1 … M_B] and, where some of it is left to the weight equations anyway, the directions
    of small singular value: noise comes back divided by it.
    """

    x0: Tensor  # (B, C, H, W)
    V: Tensor  # (B, H·W, k)
    sigmas: Tensor  # singular values of V's columns, 0 where they are cut off, (k,)
    rank: int  # of [M_1 … M_B]
    sigma_min_kept: float  # relative to the largest singular value
    sigma_max_dropped: float | None  # the same; None where none was dropped
    residual: float  # ‖K x − vec(G)‖ / ‖G‖
    noise_std: float | None  # of G's entries, from the residual of surplus equations; None where there are too few
    sensitivity: Callable[[Tensor], Tensor]  # how x0 changes with G, (O, C, kh, kw) -> (B, C, H, W)
    # how many of V's last columns, all cut off, lie on pixels that one tap reads, each at one output position
    apart: int = 0


@dataclass(frozen=True)
class _Factor:
    """One block of [M_1 … M_B], for δz in units of its largest entry: squares of the smallest gradients underflow."""

    block: StrideBlock
    M: Tensor  # (O·t, B·m)
    S: Tensor  # singular values, from the largest on, (B·m,)
    directions: Tensor | None  # right singular vectors, (B·m, B·m); None where they are made when needed
    gram: Tensor | None = None  # MᵀM in that case

    @cached_property
    def V(self) -> Tensor:
        """Right singular vectors, (B·m, B·m)."""
        return torch.linalg.eigh(self.gram)[1].flip(1) if self.directions is None else self.directions

    def inverse(self, rank: int) -> Tensor:
        """(MᵀM)⁺ by the `rank` largest singular values, (B·m, B·m)."""
        if self.directions is None and rank == len(self.S):
            return torch.cholesky_inverse(torch.linalg.cholesky(self.gram))
        seen = self.V[:, :rank]
        return (seen / self.S[:rank].square()) @ seen.T

    def place(self, columns: Tensor, result: Tensor) -> None:
        """Puts vectors over the block's pixels of all images, (B·m, k), among all pixels, (B, pixels, k)."""
        result[:, self.block.pixels] = columns.reshape(len(result), len(self.block.pixels), columns.shape[1])


def solve_gradients(layer: Layer, G: Tensor, dz: Tensor, rcond: float, trusted_ratio: float) -> GradientSolution:
    """Solves the gradient equations of all images, block by block of the stride.

    G is (O, C, kh, kw), dz (B, O, H′, W′). Singular values below rcond times the largest count as zero; directions
    below trusted_ratio of it are left to W, too, those of a single image only where it is not determined.
    """
    if len(dz) == 1 and layer.is_dense and dz.any():
        return _solve_column(G, dz.flatten())
    shape, unit = (len(dz), math.prod(layer.input_shape[1:])), largest_entry(dz) or 1.0
    dz = dz / unit
    factors = [_factor(layer, block, dz, rcond) for block in blocks(layer)]
    sigma = torch.cat([f.S for f in factors])
    largest = sigma.max().item()
    sigma = sigma / largest if largest > 0 else sigma
    by_factor = zip(factors, sigma.split([len(f.S) for f in factors]), strict=True)
    inverses = [f.inverse(int((part > rcond).sum())) for f, part in by_factor]

    def on_input(parts: list[Tensor]) -> Tensor:
        placed = G.new_zeros(*shape, layer.input_shape[0])
        for factor, part in zip(factors, parts, strict=True):
            factor.place(part, placed)
        return placed.transpose(1, 2).reshape(-1, *layer.input_shape) / unit

    def sensitivity(dG: Tensor) -> Tensor:
        pairs = zip(factors, inverses, strict=True)
        return on_input([P @ (f.M.T @ gradient_values(layer, f.block, dG)) for f, P in pairs])

    parts, missed = [], 0.0
    for factor, P in zip(factors, inverses, strict=True):
        right = gradient_values(layer, factor.block, G)
        x = P @ (factor.M.T @ right)
        rest = right - factor.M @ x
        x += P @ (factor.M.T @ rest)  # what squaring the singular values has cost
        missed = math.hypot(missed, norm(torch.addmm(right, factor.M, x, alpha=-1)))
        parts.append(x)
    kept, dropped = sigma[sigma > rcond], sigma[sigma <= rcond]
    surplus = (sum(len(f.M) for f in factors) - len(kept)) * layer.input_shape[0]
    V, sigmas, apart = _open(layer, factors, sigma, shape, rcond, trusted_ratio)
    return GradientSolution(
        on_input(parts),
        V,
        sigmas * (largest * unit),
        len(kept),
        kept.min().item() if len(kept) else 0.0,
        dropped.max().item() if len(dropped) else None,
        *_misfit(missed, surplus, G),
        sensitivity,
        apart,
    )


def _solve_column(G: Tensor, column: Tensor) -> GradientSolution:
    """A linear layer's for one image, whose M is the one column δz: x = Gᵀ δz / ‖δz‖²."""
    unit = column.abs().max()  # squares of the smallest gradients underflow
    weights = column / unit / (column / unit).square().sum() / unit

    def sensitivity(dG: Tensor) -> Tensor:
        return (weights[None] @ dG.flatten(1))[:, :, None, None]

    x0, none = sensitivity(G), column[:0]
    missed = torch.addr(G.flatten(1), column, x0.flatten(), alpha=-1).norm().item()
    misfit = _misfit(missed, (len(G) - 1) * x0.numel(), G)
    return GradientSolution(x0, none.reshape(1, 1, 0), none, 1, 1.0, None, *misfit, sensitivity)


def _misfit(missed: float, surplus: int, G: Tensor) -> tuple[float, float | None]:
    """Relative residual, and standard deviation of the noise, of so many surplus equations that miss G by so much."""
    size = norm(G)
    return missed / size if size > 0 else 0.0, missed / surplus**0.5 if surplus >= MIN_SURPLUS_EQUATIONS else None


def _factor(layer: Layer, block: StrideBlock, dz: Tensor, rcond: float) -> _Factor:
    """By the eigenvectors of MᵀM, which hold σ down to 1e-8 of the largest, or of M itself below that.

    A tall M of one image is mostly of full rank and needs eigenvalues alone. M of a batch may have many more columns
    than rows: a decomposition of M itself is quicker then, too.
    """
    M = torch.cat([gradient_matrix(layer, block, image) for image in dz], 1)
    wide = M.shape[0] < M.shape[1]
    if rcond < GRAM_RESOLUTION or (len(dz) > 1 and wide):
        _, S, Vh = svd(M, full_matrices=wide)
        return _Factor(block, M, F.pad(S, (0, len(Vh) - len(S))), Vh.T)
    gram = gram_matrix(M)
    if len(dz) == 1 and len(M) > len(gram):
        values, V = torch.linalg.eigvalsh(gram), None
    else:
        values, V = torch.linalg.eigh(gram)
    return _Factor(block, M, values.clamp(min=0).sqrt().flip(0), None if V is None else V.flip(1), gram)


def _open(
    layer: Layer, factors: list[_Factor], sigma: Tensor, shape: tuple[int, int], rcond: float, trusted_ratio: float
) -> tuple[Tensor, Tensor, int]:
    """Basis (B, H·W, k) of what is left to the weight equations, its singular values, 0 below the cutoff, and `apart`.

    Pixels that no tap reads belong to it. Where one image is determined, nothing does, however small a singular value.
    """
    full = len(sigma) == math.prod(shape) and bool((sigma > rcond).all())
    alone = full and (shape[0] == 1 or bool(sigma.min() > trusted_ratio))
    if alone:
        return sigma.new_zeros(*shape, 0), sigma[:0], 0
    left = sigma <= max(rcond, trusted_ratio)
    open_by_factor = left.split([len(f.S) for f in factors])
    unread = torch.ones(shape[1], dtype=torch.bool)
    unread[torch.cat([f.block.pixels for f in factors])] = False
    rest = int(unread.sum())
    counts = [shape[0] * rest, *(int(part.sum()) for part in open_by_factor)]
    V = sigma.new_zeros(*shape, sum(counts))
    free, *bases = V.split(counts, 2)
    free[:, unread] = torch.eye(counts[0], dtype=sigma.dtype).reshape(shape[0], rest, counts[0])
    for factor, part, basis in zip(factors, open_by_factor, bases, strict=True):
        factor.place(factor.V[:, part], basis)
    seen = torch.where(sigma > rcond, sigma, 0.0)[left]
    single = len(factors[-1].block.taps) == 1 and layer.before is layer.after is None
    apart = int((left & (sigma <= rcond))[-len(factors[-1].S) :].sum()) if single else 0
    return V, F.pad(seen, (V.shape[2] - len(seen), 0)), apart
