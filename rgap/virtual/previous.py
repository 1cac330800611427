"""The part of the previous layer's equations that depends on the model alone, factored once, and a prior on its input.

Its pre-activation is W x′ + b, so z′ − b lies in the range of W: `left`ᵀ (z′ − b) = 0 are the virtual constraints. And
x′ = W⁺ (z′ − b) + `null` y must satisfy that layer's own gradient constraints. Of an ill-conditioned W the weak
directions V join the null space (ours): W⁺ becomes that of A = W (1 − V Vᵀ), `left` the complement of A's range, and
`left`ᵀ (z′ − b) = `left`ᵀ W V y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import linalg

from rgap.equations.complement import RangeComplement, complement, weak_subspace
from rgap.equations.gradient import blocks, gradient_matrix
from rgap.equations.limits import DEFAULT_LIMITS, SolverLimits
from rgap.equations.weights import weight_matrix
from rgap.linalg import largest_eigenvalue
from rgap.network.layer import Layer

MAX_PLAIN_CONDITION = 1e4  # condition of W above which its weak directions are unknowns: in W⁺ z′ they drown all others
WEAK_RATIO = 1e-2  # singular value of a weak direction, relative to the largest
SKETCH_COLUMNS = 64  # random columns by which the norms of gradient rows are estimated, to a tenth


@dataclass(frozen=True)
class PreviousLayer:
    """Factors of a layer's W of full rank; arrays over x′ have their rows in `order`."""

    factor: RangeComplement  # w⁺ of the layer, without groups
    left: NDArray  # orthonormal basis of the left null space of W, or of A, (n_z, q)
    null: NDArray  # basis of the null space of W, and what the weak directions change, (n_x, r)
    order: NDArray  # entries of x′ by channel and block of M, so that K acts on contiguous rows
    gains: NDArray  # `left`ᵀ (z′ − b) for each unknown y, (q, r)
    strong: NDArray | None = None  # a⁺, (n_x, n_z); None where W⁺ is that of the factor

    @property
    def layer(self) -> Layer:
        """The layer."""
        return self.factor.layer

    @property
    def bias(self) -> NDArray:
        """The bias of every entry of z′, (n_z,)."""
        return (self.layer.pre_bias() + torch.zeros(self.layer.output_shape).double()).flatten().numpy()

    @property
    def spare(self) -> int:
        """Equations of the range of W beyond those that weak directions need."""
        return max(self.left.shape[1] - self.null.shape[1], 0)

    @property
    def is_sharp(self) -> bool:
        """Whether W is so well-conditioned that W⁺ in float32 shows the way to a solution."""
        return self.strong is None and self.factor.factor.is_sharp

    @cached_property
    def rough_left(self) -> NDArray:
        """`left` in float32."""
        return self.left.astype(np.float32)

    @cached_property
    def pinv(self) -> NDArray:
        """W⁺, (n_x, n_z); only beliefs on gradient rows need it whole."""
        if self.strong is not None:
            return self.strong
        return np.ascontiguousarray(self.factor.pseudo_inverse()[self.order])

    @cached_property
    def sketch(self) -> NDArray:
        """[W⁺ Ω, null] for random columns Ω: the norm of a row times this is about that of the row times [W⁺, null]."""
        columns = np.random.default_rng(0).standard_normal((len(self.left), SKETCH_COLUMNS)) / SKETCH_COLUMNS**0.5
        return np.hstack([self.invert(columns), self.null])

    def invert(self, columns: NDArray, rough: bool = False) -> NDArray:
        """W⁺ of columns, (n_z, k) -> (n_x, k); `rough` by a factor in float32."""
        if self.strong is not None:
            return self.strong @ columns
        images = torch.from_numpy(np.ascontiguousarray(columns.T)).reshape(-1, *self.layer.output_shape)
        return self.factor.lift(images, rough).flatten(1).numpy().T[self.order]

    def lift(self, z: NDArray, y: NDArray) -> NDArray:
        """x′ = W⁺ (z′ − b) + null y in natural order, (n_x,)."""
        x = np.empty(self.layer.unknowns)
        x[self.order] = self.invert((z - self.bias)[:, None])[:, 0] + self.null @ y
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
        matrices = (gradient_matrix(self.layer, b, torch.from_numpy(dz)) for b in blocks(self.layer))
        return self.layer.input_shape[0] * int(sum(np.linalg.matrix_rank(M) for M in matrices))

    def patches(self, x: NDArray) -> NDArray:
        """The patch of x′ that each output position reads, (C·kh·kw, H′·W′)."""
        layer = self.layer
        image = torch.from_numpy(x).reshape(1, *layer.input_shape)
        image = F.pad(image if layer.before is None else layer.before.apply(image), layer.padding)
        columns = F.unfold(image, layer.weight.shape[2:], layer.dilation, 0, layer.stride)[0]
        if layer.after is not None:
            columns = layer.after.apply(columns.reshape(-1, *layer.pixels_out)).flatten(1)
        return columns.numpy()


def previous_factors(
    layer: Layer, limits: SolverLimits = DEFAULT_LIMITS, weak_ratio: float = WEAK_RATIO
) -> PreviousLayer | None:
    """The factors of a layer, made once; None where it has groups, no weight or a rank deficit, or is too large.

    With a `weak_ratio` of 0 they are those of W however ill-conditioned it is.
    """
    if layer.groups > 1 or layer.is_fixed or max(math.prod(layer.output_shape), layer.unknowns) > limits.max_pinv_side:
        return None
    return layer.cached(f"previous_factors {weak_ratio}", lambda: _factor(layer, weak_ratio))


def _factor(layer: Layer, weak_ratio: float) -> PreviousLayer | None:
    found = complement(layer)
    if found is None:
        return None
    if weak_ratio and found.is_wide and _condition(found) > MAX_PLAIN_CONDITION:
        return _without_weak(found, weak_ratio)
    order, basis = _order(layer), found.basis.numpy()
    rows, columns = math.prod(layer.output_shape), layer.unknowns
    left, null = (np.zeros((rows, 0)), basis) if rows <= columns else (basis, np.zeros((columns, 0)))
    return PreviousLayer(found, left, null[order], order, np.zeros((left.shape[1], null.shape[1])))


def _condition(found: RangeComplement) -> float:
    """Condition number of a W that is not tall."""
    W, rows = weight_matrix(found.layer), len(found.factor.order)
    largest = largest_eigenvalue(lambda v: torch.from_numpy(W @ (W.T @ v.numpy())), rows)
    return math.sqrt(largest * largest_eigenvalue(found.solve, rows))


def _without_weak(found: RangeComplement, ratio: float) -> PreviousLayer:
    """The factors of A: A Aᵀ + U Uᵀ, with U the complement of A's range, has no small eigenvalue."""
    W, V, order = weight_matrix(found.layer), weak_subspace(found.layer, ratio).basis.numpy(), _order(found.layer)
    WV = W @ V
    U = np.linalg.qr(found.factor.solve(WV[:, found.basis.shape[1] :]))[0]
    gram = (W @ W.T).toarray() - WV @ WV.T
    factor = linalg.lapack.dpotrf(gram + np.trace(gram) / len(gram) * (U @ U.T), lower=1)[0]
    lower = np.tril(linalg.lapack.dpotri(factor, lower=1)[0])
    inverse = lower + np.tril(lower, -1).T
    inverse -= (inverse @ U) @ U.T
    strong = W.T @ inverse - V @ (WV.T @ inverse)
    null = V - strong @ WV
    return PreviousLayer(found, U, null[order], order, U.T @ WV, np.ascontiguousarray(strong[order]))


def _order(layer: Layer) -> NDArray:
    pixels = np.concatenate([b.pixels.numpy() for b in blocks(layer)])
    channels, size = layer.input_shape[0], layer.input_shape[1] * layer.input_shape[2]
    read = (np.arange(channels)[:, None] * size + pixels).ravel()
    return np.concatenate([read, np.setdiff1d(np.arange(layer.unknowns), read)])


def smooth_image_rows(previous: PreviousLayer, count: int = 1000) -> tuple[NDArray, NDArray, NDArray]:
    """Rows F x′ ≈ target of unit variance: a prior on photographs, whose amplitudes fall about as 1/f; made once.

    The `count` rows of smallest variance of a cosine basis with variance 40 / (1 + k²)^1.25 in luminance, 15 and 60
    times less in the opponent colours. They take part in the first steps only, and in no certificate. Gives F with
    columns in `order` (count, n_x), the target (count,), and F W⁺ (count, n_z).
    """
    return previous.layer.cached(f"smooth_image_rows {count}", lambda: _smooth_rows(previous, count))


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
