"""WᵀW of a layer as a band, and its Cholesky factor: a convolution couples the pixels of a few rows alone.

Both take layers without groups (`Layer.split_groups`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg.lapack import dpbtrf, dpbtrs
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Tensor

from rgap.network.layer import Layer

MAX_BAND_ENTRIES = 40_000_000  # entries of the largest band that is made (320 MB)


@dataclass(frozen=True)
class SymmetricBand:
    """A symmetric matrix by its lower band in an order of the unknowns."""

    order: NDArray  # the unknowns as the band has them, (n,)
    band: NDArray  # row i: the i-th diagonal below the main one, columns first, (width + 1, n)

    def factored(self) -> BandCholesky | None:
        """L of L Lᵀ, in the place of the matrix; None where it is not positive definite."""
        factor, failed = dpbtrf(self.band, lower=1, overwrite_ab=1)
        return None if failed else BandCholesky(self.order, factor)


@dataclass(frozen=True)
class BandCholesky:
    """S = L Lᵀ with L as a band."""

    order: NDArray
    factor: NDArray

    def solve(self, right: NDArray) -> NDArray:
        """S⁻¹ of one vector or a few, (n,) or (n, k)."""
        result = np.empty_like(right)
        result[self.order] = dpbtrs(self.factor, right[self.order], lower=1)[0]
        return result


def pixel_order(layer: Layer, of_outputs: bool = False) -> NDArray:
    """Unknowns, or outputs: channels of a pixel side by side, and pixels of an input that a stride steps over at once.

    So pixels that one output reads stand close together.
    """
    channels, *sides = layer.output_shape if of_outputs else layer.input_shape
    steps, (left, _, top, _) = (1, 1) if of_outputs else layer.stride, layer.padding
    i, j = (axis.ravel() for axis in np.indices(sides))
    pixels = np.lexsort((j, i, (j + left) // steps[1], (i + top) // steps[0]))
    return np.arange(channels * len(pixels)).reshape(channels, -1)[:, pixels].T.ravel()


def band_by_taps(layer: Layer, known: Tensor | None = None) -> SymmetricBand | None:
    """WᵀW of a layer without maps of pixels, by its kernel's own Gram matrix at every pair of taps; None if too large.

    Only the outputs of a mask, (O, H′, W′), are used where one is given.
    """
    order, (outputs, channels, *_) = pixel_order(layer), layer.weight.shape
    place = np.append(np.argsort(order)[: len(order) // channels] // channels, -1)  # −1 is padding
    read, W = place[layer.tap_pixels().numpy()], layer.weight.flatten(2).numpy()  # (taps, positions), (O, C, taps)
    width = (read.max(0) - np.where(read < 0, read.max(0), read).min(0)).max() + 1
    if width * channels * len(order) > MAX_BAND_ENTRIES:
        return None
    blocks = np.zeros((len(place) - 1, width, channels, channels))  # of pixels: column, row − column
    used = np.ones((1, outputs)) if known is None else known.flatten(1).T.double().numpy()
    for tap, rows in enumerate(read):
        others, at = np.nonzero((read >= 0) & (read <= rows))
        columns, pairs = read[others, at], W.transpose(2, 0, 1)[..., None] * W[:, None, :, tap]
        products = (used @ pairs.reshape(len(read), outputs, -1)).reshape(len(read), -1, channels, channels)
        blocks[columns, rows[at] - columns] += products[others, 0 if known is None else at]  # no place twice
    blocks = blocks.transpose(0, 2, 1, 3).reshape(len(order), -1)
    band = np.zeros_like(blocks)
    for channel in range(channels):
        band[channel::channels, : band.shape[1] - channel] = blocks[channel::channels, channel:]
    return SymmetricBand(order, band.T)


def band_of(S: sp.csr_array) -> SymmetricBand | None:
    """A sparse symmetric matrix, in an order that is found for it; None if its band is too large."""
    order = reverse_cuthill_mckee(sp.csr_matrix(S), symmetric_mode=True)
    entries = S[order][:, order].tocoo()
    below = entries.row - entries.col
    width = int(below.max(initial=0)) + 1
    if width * len(order) > MAX_BAND_ENTRIES:
        return None
    band = np.zeros((len(order), width))
    lower = below >= 0
    band[entries.col[lower], below[lower]] = entries.data[lower]
    return SymmetricBand(order, band.T)
