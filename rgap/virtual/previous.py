"""What the layer before a deficient one gives that depends on the model alone, factored once.

Its pre-activation is W x′ + b, so z′ − b lies in the range of W: `left`ᵀ (z′ − b) = 0 are the virtual constraints. And
x′ = W⁺ (z′ − b) + `null` y must fulfil that layer's own gradient constraints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import linalg

from rgap.equations.blocks import blocks, gradient_matrix, weight_matrix
from rgap.network.layer import Layer

LARGEST = 8000
"""Most rows or columns of W for which its dense pseudo-inverse is made (0.5 GB)."""


@dataclass(frozen=True)
class PreviousLayer:
    """Factors of a layer's W of full rank; arrays over x′ have their rows in `order`.

    Attributes:
        layer: The layer, without groups.
        pinv: W⁺, (n_x, n_z).
        left: Orthonormal basis of the left null space of W, (n_z, q).
        null: Orthonormal basis of the null space of W, (n_x, r).
        order: Entries of x′ sorted by channel and block of M, so that K acts on contiguous rows.
    """

    layer: Layer
    pinv: NDArray
    left: NDArray
    null: NDArray
    order: NDArray

    @property
    def bias(self) -> NDArray:
        """The bias of every entry of z′, (n_z,)."""
        shape = self.layer.output_shape
        return (self.layer.pre_bias() + torch.zeros(shape, dtype=torch.float64)).flatten().numpy()

    def lift(self, z: NDArray, y: NDArray) -> NDArray:
        """x′ = W⁺ (z′ − b) + null y in natural order, (n_x,)."""
        x = np.empty(len(self.pinv))
        x[self.order] = self.pinv @ (z - self.bias) + self.null @ y
        return x

    def gradient_rows(self, dz: NDArray, X: NDArray) -> NDArray:
        """K(δz) X for X with rows in `order`: (n_x, k) -> (len(dz)·C·kh·kw, k), rows as vec(G)."""
        taps = self.layer.weight.shape[2] * self.layer.weight.shape[3]
        result = np.zeros((len(dz), self.layer.input_shape[0], taps, X.shape[1]))
        start = 0
        matrices = [(b, gradient_matrix(self.layer, b, torch.from_numpy(dz)).numpy()) for b in blocks(self.layer)]
        for channel in range(self.layer.input_shape[0]):
            for block, M in matrices:
                stop = start + len(block.pixels)
                result[:, channel, block.taps.numpy()] = (M @ X[start:stop]).reshape(len(dz), len(block.taps), -1)
                start = stop
        return result.reshape(-1, X.shape[1])

    def gradient_rank(self, dz: NDArray) -> int:
        """Numerical rank of K(δz)."""
        ranks = [
            np.linalg.matrix_rank(gradient_matrix(self.layer, b, torch.from_numpy(dz))) for b in blocks(self.layer)
        ]
        return self.layer.input_shape[0] * int(sum(ranks))

    def patches(self, x: NDArray) -> NDArray:
        """What each output position reads of x′, (C·kh·kw, H′·W′)."""
        layer = self.layer
        image = torch.from_numpy(x).reshape(1, *layer.input_shape)
        image = F.pad(image if layer.before is None else layer.before.apply(image), layer.padding)
        columns = F.unfold(image, layer.weight.shape[2:], layer.dilation, 0, layer.stride)[0]
        if layer.after is not None:
            columns = layer.after.apply(columns.reshape(-1, *layer.pixels_out)).flatten(1)
        return columns.numpy()


def previous_factors(layer: Layer) -> PreviousLayer | None:
    """The factors of a layer, made once; None where it has groups or no weight, is too large, or short of full rank."""
    size = (np.prod(layer.output_shape), layer.unknowns)
    if layer.groups > 1 or layer.is_fixed or max(size) > LARGEST:
        return None
    return layer.cached("previous_factors", lambda: _factor(layer))


def smooth_image_rows(previous: PreviousLayer, count: int = 1000) -> tuple[NDArray, NDArray, NDArray]:
    """Rows F x′ ≈ target of unit variance that say how photographs are: their spectrum falls as 1/f; made once.

    The `count` stiffest rows of a cosine basis with variance 40 / (1 + k²)^1.25 in luminance, 15 and 60 times less in
    the opponent colours. They steer the first steps of a fixed point, and no certificate rests on them.

    Args:
        previous: Factors of the layer that reads the image.
        count: How many rows.

    Returns:
        F with columns in `order` (count, n_x), target (count,), and F W⁺ (count, n_z).
    """
    return previous.layer.cached(f"smooth_image_rows {count}", lambda: _smooth_rows(previous, count))


def _factor(layer: Layer) -> PreviousLayer | None:
    W = weight_matrix(layer)
    tall = W.shape[0] >= W.shape[1]
    A = W if tall else W.T.tocsr()
    try:
        factor = linalg.cho_factor((A.T @ A).toarray(), lower=True)
    except linalg.LinAlgError:
        return None
    pivots = np.abs(np.diag(factor[0]))
    if pivots.min() < 1e-6 * pivots.max():
        return None
    rest = np.random.default_rng(0).standard_normal((A.shape[0], A.shape[0] - A.shape[1]))
    for _ in range(2):  # the complement of range(A): random vectors, projected twice for accuracy
        rest = linalg.qr(rest - A @ linalg.cho_solve(factor, A.T @ rest), mode="economic")[0]
    inverse = np.tril(linalg.lapack.dpotri(factor[0], lower=1)[0])
    inverse += np.tril(inverse, -1).T
    pinv = (A @ inverse).T  # of A; W⁺ is its transpose where A = Wᵀ
    empty = np.zeros((W.shape[1] if tall else W.shape[0], 0))
    order = _order(layer)
    left, null, pinv = (rest, empty, pinv) if tall else (empty, rest, pinv.T)
    return PreviousLayer(layer, np.ascontiguousarray(pinv[order]), left, null[order], order)


def _order(layer: Layer) -> NDArray:
    pixels = np.concatenate([b.pixels.numpy() for b in blocks(layer)])
    channels, size = layer.input_shape[0], layer.input_shape[1] * layer.input_shape[2]
    read = (np.arange(channels)[:, None] * size + pixels).ravel()
    return np.concatenate([read, np.setdiff1d(np.arange(layer.unknowns), read)])


def _smooth_rows(previous: PreviousLayer, count: int) -> tuple[NDArray, NDArray, NDArray]:
    channels, height, width = previous.layer.input_shape
    frequency = np.add.outer((np.arange(height) * 32 / height) ** 2, (np.arange(width) * 32 / width) ** 2)
    share = np.array([1, 1 / 15, 1 / 60])[:channels] if channels <= 3 else np.ones(channels)
    variance = np.multiply.outer(share, 40 / (1 + frequency) ** 1.25).ravel()
    colour = linalg.qr(np.array([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]).T)[0].T if channels == 3 else np.eye(channels)
    cosines = [_cosine_basis(n) for n in (height, width)]
    stiffest = np.argsort(variance, kind="stable")[:count]
    rows = np.kron(colour, np.kron(*cosines))[stiffest] / np.sqrt(variance[stiffest])[:, None]
    ordered = np.ascontiguousarray(rows[:, previous.order])
    return ordered, rows @ np.full(rows.shape[1], 0.5), ordered @ previous.pinv


def _cosine_basis(n: int) -> NDArray:
    basis = np.cos(np.pi * np.outer(np.arange(n), np.arange(n) + 0.5) / n) * np.sqrt(2 / n)
    basis[0] /= np.sqrt(2)
    return basis
