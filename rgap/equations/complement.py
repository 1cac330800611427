"""What W of full rank leaves of its longer side: null space, left null space and W⁺, made once.

By block Cholesky factors of WᵀW (or W Wᵀ, whichever is smaller), which a convolution's few pixel rows keep narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.equations.banded import pixel_order
from rgap.equations.block_cholesky import BlockCholesky, block_cholesky
from rgap.equations.limits import DEFAULT_LIMITS
from rgap.equations.weights import weight_matrix
from rgap.linalg import largest_eigenvalue, orthonormal
from rgap.network.layer import Layer

MIN_PIVOT_RATIO = 1e-6  # smallest over largest pivot of a Gram matrix's factor at which W counts as of full rank
INVERSE_ITERATIONS = 4  # for W's weak directions; the weakest, which matter most, are exact after two


@dataclass(frozen=True)
class RangeComplement:
    """W of full rank by a Cholesky factor: W⁺, and what is left of the range of its longer side.

    With A = W where W has more rows than columns, A = Wᵀ else, `basis` is the left null space of W (`basis`ᵀ (z − b)
    = 0 whatever the input), or the null space of W.
    """

    layer: Layer  # without groups
    factor: BlockCholesky  # of AᵀA
    basis: Tensor  # orthonormal, of the complement of the range of A, (rows of A, rows − columns of A)

    @property
    def is_wide(self) -> bool:
        """Whether A is Wᵀ: no more outputs than inputs."""
        return math.prod(self.layer.output_shape) <= self.layer.unknowns

    def solve(self, right: Tensor, rough: bool = False) -> Tensor:
        """(AᵀA)⁻¹ of columns, (columns of A, k); `rough` in float32."""
        return torch.from_numpy((self.factor.rough if rough else self.factor).solve(right.numpy())).to(right.dtype)

    def lift(self, z: Tensor, rough: bool = False) -> Tensor:
        """W⁺ z of every image, not refined: (B, O, H′, W′) -> (B, C, H, W); `rough` by a factor in float32."""
        inner = z if self.is_wide else self.layer.adjoint(z)
        solved = self.solve(inner.flatten(1).T, rough).T.reshape(inner.shape)
        return self.layer.adjoint(solved) if self.is_wide else solved

    def minimum_norm(self, z: Tensor) -> Tensor:
        """W⁺ z of every image, refined once: (B, O, H′, W′) -> (B, C, H, W)."""
        x = self.lift(z)
        return x + self.lift(z - self.layer.apply(x))

    def pseudo_inverse(self) -> NDArray:
        """W⁺ as a dense matrix, (C·H·W, O·H′·W′)."""
        W = weight_matrix(self.layer).toarray()
        return self.factor.solve(W).T if self.is_wide else self.factor.solve(W.T)


def complement(layer: Layer, max_side: int = DEFAULT_LIMITS.max_pinv_side) -> RangeComplement | None:
    """The factor of a layer without groups, made once; None where W is too large or not of full rank."""
    if min(layer.unknowns, math.prod(layer.output_shape)) > max_side:
        return None
    return layer.cached("complement", lambda: _complement(layer))


def _complement(layer: Layer) -> RangeComplement | None:
    W = weight_matrix(layer)
    wide = W.shape[0] <= W.shape[1]
    factor = block_cholesky(W @ W.T if wide else W.T @ W, pixel_order(layer, of_outputs=wide))
    if factor is None or factor.pivots.min() < MIN_PIVOT_RATIO * factor.pivots.max():
        return None
    found = RangeComplement(layer, factor, torch.zeros(max(W.shape), 0, dtype=torch.float64))
    generator, shape = torch.Generator().manual_seed(0), layer.input_shape if wide else layer.output_shape
    rest = torch.rand(abs(W.shape[0] - W.shape[1]), *shape, generator=generator, dtype=torch.float64) - 0.5
    for again in (
        False,
        True,
    ):  # random vectors, projected; again when orthonormal, for the rest may be small
        rough = again and factor.is_sharp
        seen = found.lift(layer.apply(rest), rough) if wide else layer.apply(found.lift(rest, rough))
        rest = orthonormal((rest - seen).flatten(1).T, times=1).T.reshape(rest.shape)
    return replace(found, basis=rest.flatten(1).T.contiguous())


@dataclass(frozen=True)
class WeakSubspace:
    """The null space of a W of full row rank, and the directions of its row space with small singular values."""

    factor: RangeComplement
    basis: Tensor  # orthonormal, (n, q)
    sigmas: Tensor  # ‖W v‖ of each, 0 in the null space, (q,)


def weak_subspace(layer: Layer, ratio: float, max_side: int = DEFAULT_LIMITS.max_pinv_side) -> WeakSubspace | None:
    """The directions with ‖W v‖ less than a ratio of W's largest singular value, made once; 0: its null space alone.

    None where W is too large or not of full row rank.
    """
    factor = complement(layer, max_side) if math.prod(layer.output_shape) <= layer.unknowns else None
    if factor is None:
        return None
    if ratio == 0:
        return WeakSubspace(factor, factor.basis, factor.basis.new_zeros(factor.basis.shape[1]))
    return layer.cached(f"weak_subspace {ratio}", lambda: _weak(factor, ratio))


def _weak(factor: RangeComplement, ratio: float) -> WeakSubspace:
    """Block inverse iteration on W Wᵀ; the block is doubled as long as all of it is weak."""
    layer, rows = factor.layer, len(factor.factor.order)
    generator, size = torch.Generator().manual_seed(0), max(8, rows // 20)

    def gram(v: Tensor) -> Tensor:  # WᵀW v, (n, 1)
        return layer.adjoint(layer.apply(v.reshape(layer.input_shape))).reshape(-1, 1)

    cut = ratio * largest_eigenvalue(gram, layer.unknowns) ** 0.5
    while True:
        size = min(size, rows)
        U = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        for _ in range(INVERSE_ITERATIONS):
            U = torch.linalg.qr(factor.solve(U))[0]
        V = layer.adjoint(U.T.reshape(-1, *layer.output_shape)).flatten(1)
        _, sigmas, turn = torch.linalg.svd(V.T, full_matrices=False)
        if sigmas[0] > cut or size == rows:
            break
        size *= 2
    V = torch.linalg.qr((turn[sigmas < cut] @ V).T)[0]
    seen = layer.apply(V.T.reshape(-1, *layer.input_shape)).flatten(1).norm(dim=1)
    nothing = seen.new_zeros(factor.basis.shape[1])
    return WeakSubspace(factor, torch.cat([factor.basis, V], 1), torch.cat([nothing, seen]))
