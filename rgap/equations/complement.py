"""What W of full rank leaves of its longer side: null space, left null space and W⁺ by dense factors, made once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from rgap.equations.limits import DEFAULT_LIMITS
from rgap.equations.weights import weight_matrix
from rgap.linalg import largest_eigenvalue
from rgap.network.layer import Layer

MIN_PIVOT_RATIO = 1e-6
"""Smallest over largest pivot of a dense Gram matrix's Cholesky factor at which W still counts as of full rank."""

INVERSE_ITERATIONS = 4
"""Block inverse iterations for W's weak directions; the weakest, which matter most, are exact after two."""


@dataclass(frozen=True)
class RangeComplement:
    """W of full rank by a dense Cholesky factor: W⁺, and what is left of the range of its longer side.

    With A = W where W has more rows than columns, A = Wᵀ else, `basis` is the left null space of W (`basis`ᵀ (z − b)
    = 0 whatever the input), or the null space of W.
    """

    layer: Layer  # without groups
    factor: NDArray  # Cholesky factor of AᵀA, lower, as LAPACK has it
    basis: Tensor  # orthonormal, of the complement of the range of A, (rows of A, rows − columns of A)

    @property
    def is_wide(self) -> bool:
        """Whether A is Wᵀ: no more outputs than inputs."""
        return math.prod(self.layer.output_shape) <= self.layer.unknowns

    def solve(self, right: Tensor) -> Tensor:
        """(AᵀA)⁻¹ of columns, (columns of A, k)."""
        return torch.from_numpy(linalg.cho_solve((self.factor, True), right.numpy(), check_finite=False))

    def minimum_norm(self, z: Tensor) -> Tensor:
        """W⁺ z of every image for a layer with no more outputs than inputs: (B, O, H′, W′) -> (B, C, H, W)."""
        x = z.new_zeros(len(z), *self.layer.input_shape)
        for _ in range(2):  # the second pass refines
            rest = (z - self.layer.apply(x)).flatten(1).T
            x = x + self.layer.adjoint(self.solve(rest).T.reshape(z.shape))
        return x

    def pseudo_inverse(self) -> NDArray:
        """W⁺ as a dense matrix, (C·H·W, O·H′·W′)."""
        inverse = np.tril(linalg.lapack.dpotri(self.factor, lower=1)[0])
        inverse += np.tril(inverse, -1).T
        W = weight_matrix(self.layer)
        return W.T @ inverse if self.is_wide else (W @ inverse).T


def complement(layer: Layer, max_side: int = DEFAULT_LIMITS.max_pinv_side) -> RangeComplement | None:
    """The dense factor of a layer without groups, made once; None where W is too large or not of full rank."""
    if min(layer.unknowns, math.prod(layer.output_shape)) > max_side:
        return None
    return layer.cached("complement", lambda: _complement(layer))


def _complement(layer: Layer) -> RangeComplement | None:
    W = weight_matrix(layer)
    A = W.T.tocsr() if W.shape[0] <= W.shape[1] else W
    factor, failed = linalg.lapack.dpotrf((A.T @ A).toarray().T, lower=1)  # symmetric: columns first at no cost
    pivots = np.abs(np.diag(factor))
    if failed or pivots.min() < MIN_PIVOT_RATIO * pivots.max():
        return None
    found = RangeComplement(layer, factor, torch.zeros(A.shape[0], 0, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(A.shape[0], A.shape[0] - A.shape[1], generator=generator, dtype=torch.float64)
    for _ in range(2):  # random vectors, projected; and once more when orthonormal, since the rest may be small
        seen = found.solve(torch.from_numpy(A.T @ rest.numpy()))
        rest = torch.linalg.qr(rest - torch.from_numpy(A @ seen.numpy()))[0]
    return replace(found, basis=rest.contiguous())


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
    layer, rows = factor.layer, len(factor.factor)
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
