"""One layer's linear equations: W x = z − b from its weights, K x = vec(G) from its gradient.

For a convolution G[o, c, t] = Σ_p δz[o, p] x_c[pixel(t, p)], where tap t at output position p reads that pixel of
channel c. The equation depends on c only through the channel it reads, so K = I_C ⊗ M with M of H·W columns. A stride s
splits M into s² independent blocks, for a tap only ever reads pixels of one residue modulo s (the Kronecker form and
the split are ours). Zero padding is not unknown: those entries are dropped, no row is needed for them. Other padding
and pooling are maps of pixels that stand before and behind the convolution.

Functions that make matrices take layers without groups; `split_groups` makes those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from rgap.network.layer import Layer

MAX_CHANNELS_TESTED = 256
"""Channels up to which every one is tested against the layer's identities."""

RANDOM_SUMS = 4
"""Sums of channels that are tested where there are more."""


@dataclass(frozen=True)
class StrideBlock:
    """An independent part of M: the taps and the pixels of one residue of the stride.

    Attributes:
        taps: Indices into the kh·kw taps, (t,).
        pixels: Indices into the H·W pixels, (m,); sorted.
        columns: (t, positions) column of M's block that tap and position read, or `size` where they read padding.
        size: Columns of the block before `Layer.before` is applied, m where there is none.
    """

    taps: Tensor
    pixels: Tensor
    columns: Tensor
    size: int


def split_groups(layer: Layer) -> list[Layer]:
    """The layer as independent ungrouped layers, one for each group of channels; made once."""
    return [layer] if layer.groups == 1 else layer.cached("groups", lambda: _split(layer))


def blocks(layer: Layer) -> list[StrideBlock]:
    """The independent blocks of M; pixels that no tap ever reads belong to none. Made once."""
    return layer.cached("blocks", lambda: _blocks(layer))


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
    return G.flatten(2)[:, :, block.taps].transpose(1, 2).reshape(-1, G.shape[1])


def weight_matrix(layer: Layer) -> sp.csr_array:
    """W as a sparse matrix, (O·H′·W′, C·H·W); made once."""
    return layer.cached("weight_matrix", lambda: _weight_matrix(layer))


def tap_pixels(layer: Layer) -> Tensor:
    """The pixel that each tap reads at each output position, −1 in padding, (kh·kw, positions); made once."""
    return layer.cached("tap_pixels", lambda: torch.from_numpy(_pixels(layer)))


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
    return max(_identity_residual(layer, *group, known is not None) for group in zip(*groups, strict=True))


def _identity_residual(layer: Layer, G: Tensor, W: Tensor, dz: Tensor, inputs: Tensor, same_channel: bool) -> float:
    """Of one group; all arguments have a row for each channel."""
    if same_channel:
        left, right = (G * W).sum(1), (dz * inputs).sum(1)
    else:
        if len(G) > MAX_CHANNELS_TESTED:
            signs = layer.cached(f"signs of {len(G)} channels", lambda: _signs(len(G)))
            G, dz = signs @ G, signs @ dz
        left, right = G @ W.T, dz @ inputs.T
    scale = max(left.norm().item(), right.norm().item())
    return (left - right).norm().item() / scale if scale > 0 else 0.0


def _signs(channels: int) -> Tensor:
    """A few sums of all channels with random signs, (RANDOM_SUMS, channels)."""
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
    right = dz.sum((0, 2, 3))
    scale = max(gradient.norm().item(), right.norm().item(), 1e-3 * dz.abs().sum((0, 2, 3)).norm().item())
    return (gradient - right).norm().item() / scale if scale > 0 else 0.0


def _split(layer: Layer) -> list[Layer]:
    groups = layer.groups
    biases = [None] * groups if layer.bias is None else layer.bias.chunk(groups)
    shapes = {
        "input_shape": (layer.input_shape[0] // groups, *layer.input_shape[1:]),
        "output_shape": (layer.output_shape[0] // groups, *layer.output_shape[1:]),
    }
    shifts = [None] * groups if layer.shift is None else layer.shift.chunk(groups)
    return [
        replace(layer, weight=w, bias=b, shift=s, groups=1, cache={}, **shapes)
        for w, b, s in zip(layer.weight.chunk(groups), biases, shifts, strict=True)
    ]


def _pixels(layer: Layer) -> np.ndarray:
    """(kh·kw, positions): the pixel that each tap reads at each output position, −1 where that is padding."""
    height, width = layer.pixels_in
    out_height, out_width = layer.pixels_out
    kernel_height, kernel_width = layer.weight.shape[2:]
    left, _, top, _ = layer.padding
    rows = layer.dilation[0] * np.arange(kernel_height)[:, None] + layer.stride[0] * np.arange(out_height) - top
    columns = layer.dilation[1] * np.arange(kernel_width)[:, None] + layer.stride[1] * np.arange(out_width) - left
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None]
    pixels = np.where(inside, rows[:, None, :, None] * width + columns[:, None], -1)
    return pixels.reshape(kernel_height * kernel_width, out_height * out_width)


def _blocks(layer: Layer) -> list[StrideBlock]:
    pixels = _pixels(layer)
    kernel_height, kernel_width = layer.weight.shape[2:]
    if layer.before is not None:  # it mixes the residues
        size = math.prod(layer.pixels_in)
        columns = np.where(pixels >= 0, pixels, size)
        every = (np.arange(n) for n in (len(pixels), math.prod(layer.input_shape[1:])))
        return [StrideBlock(*(torch.from_numpy(a) for a in (*every, columns)), size)]
    residue = (np.arange(kernel_height)[:, None] * layer.dilation[0] % layer.stride[0]) * layer.stride[1]
    residue = (residue + np.arange(kernel_width) * layer.dilation[1] % layer.stride[1]).ravel()
    result = []
    for value in np.unique(residue):
        taps = np.flatnonzero(residue == value)
        read = pixels[taps]
        members = np.unique(read[read >= 0])
        if not len(members):  # taps that read nothing but padding
            continue
        columns = np.where(read >= 0, np.searchsorted(members, read), len(members))
        result.append(StrideBlock(*(torch.from_numpy(a) for a in (taps, members, columns)), len(members)))
    return result


def _weight_matrix(layer: Layer) -> sp.csr_array:
    pixels = _pixels(layer)
    channels, (height, width) = layer.input_shape[0], layer.pixels_in
    outputs, positions = layer.output_shape[0], pixels.shape[1]
    taps, places = np.nonzero(pixels >= 0)
    o, c = np.arange(outputs)[:, None, None], np.arange(channels)[:, None]
    shape = (outputs, channels, len(taps))
    rows = np.broadcast_to(o * positions + places, shape)
    columns = np.broadcast_to(c * height * width + pixels[taps, places], shape)
    values = layer.weight.flatten(2).numpy()[:, :, taps]
    size = (outputs * positions, channels * height * width)
    W = sp.csr_array((values.ravel(), (rows.ravel(), columns.ravel())), shape=size)
    if layer.before is not None:
        W = sp.csr_array(W @ sp.kron(sp.eye_array(channels), layer.before.matrix()))
    return W if layer.after is None else sp.csr_array(sp.kron(sp.eye_array(outputs), layer.after.matrix()) @ W)
