"""W on what one basis of pixels spans in every channel: x = (I ⊗ V) y, with W (I ⊗ V) never formed (ours).

Tap t of a convolution reads S_t V of that basis, whatever the channel, so that

    (I ⊗ V)ᵀ WᵀW (I ⊗ V)  =  Σ_{s,t} R_st ⊗ (S_s V)ᵀ (S_t V),    R_st[c, c′] = Σ_o W[o, c, s] W[o, c′, t]

costs a few products of the taps' small Gram matrices, in place of one of O·H′·W′ rows and C·k columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.blocks import tap_pixels
from rgap.linalg import Operator, gram_matrix
from rgap.network.layer import Layer


def weights_on(layer: Layer, V: Tensor) -> Operator:
    """W (I ⊗ V) as an operator.

    Args:
        layer: The layer, without groups.
        V: (H·W, k).

    Returns:
        From (C·k,), in the order (channel, vector), to (O·H′·W′,).
    """

    def apply(Y: Tensor) -> Tensor:
        images = spread(V, Y, layer.input_shape[0]).T.reshape(-1, *layer.input_shape)
        return layer.apply(images).flatten(1).T

    def adjoint(R: Tensor) -> Tensor:
        images = layer.adjoint(R.T.reshape(-1, *layer.output_shape))
        return (images.flatten(2) @ V).flatten(1).T

    return Operator(weight_gram(layer, V), apply, adjoint)


def spread(V: Tensor, Y: Tensor, channels: int) -> Tensor:
    """(I ⊗ V) Y: (C·k, p) -> (C·H·W, p)."""
    return (V @ Y.reshape(channels, V.shape[1], -1)).flatten(0, 1)


def weight_gram(layer: Layer, V: Tensor) -> Tensor:
    """(I ⊗ V)ᵀ WᵀW (I ⊗ V).

    Args:
        layer: The layer, without groups.
        V: (H·W, k).

    Returns:
        (C·k, C·k), rows and columns in the order (channel, vector).
    """
    channels, count = layer.input_shape[0], V.shape[1]
    read = _read_by_taps(layer, V)
    taps = len(read)
    inner = gram_matrix(read.permute(1, 0, 2).reshape(read.shape[1], taps * count))
    inner = inner.reshape(taps, count, taps, count).permute(0, 2, 1, 3).reshape(taps * taps, count * count)
    weight = layer.weight.reshape(-1, channels * taps)
    outer = gram_matrix(weight).reshape(channels, taps, channels, taps).transpose(1, 2)
    first, second = torch.triu_indices(channels, channels)
    upper = (outer[first, second].flatten(1) @ inner).reshape(-1, count, count)
    result = V.new_empty(channels, channels, count, count)
    result[second, first] = upper.mT
    result[first, second] = upper
    return result.transpose(1, 2).reshape(channels * count, channels * count)


def _read_by_taps(layer: Layer, V: Tensor) -> Tensor:
    """What each tap reads of each vector at each position of the output, (taps, positions, k)."""
    if layer.before is not None:
        V = layer.before.apply(V.T.reshape(-1, *layer.before.inputs)).flatten(1).T
    read = F.pad(V, (0, 0, 0, 1))[tap_pixels(layer)]  # −1, the row of zeros, stands for padding
    if layer.after is None:
        return read
    return layer.after.apply(read.mT.reshape(*read.mT.shape[:2], *layer.after.inputs)).flatten(2).mT
