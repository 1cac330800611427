"""What one layer's W says of every image alone: its minimum-norm solution and its null space, factored once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import linalg
from torch import Tensor

from rgap.equations.blocks import weight_matrix
from rgap.network.layer import Layer

LARGEST = 8000
"""Most rows of W (or columns, where they are fewer) for which a dense Gram matrix is made (0.5 GB)."""

DEPENDENT = 1e-6
"""Smallest over largest pivot of the Gram matrix's Cholesky factor at which W still counts as of full rank."""

TURNS = 4
"""StrideBlock inverse iterations for these directions; the weakest, which matter most, are exact after two."""


@dataclass(frozen=True)
class RangeComplement:
    """A matrix A (rows × columns, more rows) of full column rank: what is left of its range.

    For a layer with fewer outputs than inputs A = Wᵀ, and `basis` is the null space of W; for one with more outputs
    A = W, and `basis`ᵀ (z − b) = 0 are the combinations of its outputs that vanish whatever its input.

    Attributes:
        layer: The layer, without groups.
        factor: Cholesky factor of AᵀA, lower, as LAPACK has it.
        basis: Orthonormal basis of the complement of the range of A, (rows, rows − columns).
    """

    layer: Layer
    factor: NDArray
    basis: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """(AᵀA)⁻¹ of columns, (columns, k)."""
        return torch.from_numpy(linalg.cho_solve((self.factor, True), right.numpy(), check_finite=False))

    def minimum_norm(self, z: Tensor) -> Tensor:
        """W⁺ z of every image for a layer with fewer outputs than inputs: (B, O, H′, W′) -> (B, C, H, W)."""
        x = z.new_zeros(len(z), *self.layer.input_shape)
        for _ in range(2):  # the second pass refines
            rest = (z - self.layer.apply(x)).flatten(1).T
            solved = self.solve(rest).T.reshape(z.shape)
            x = x + self.layer.adjoint(solved)
        return x


def complement(layer: Layer) -> RangeComplement | None:
    """The factors of a layer without groups, made once; None where it is too large or W is not of full rank."""
    if min(layer.unknowns, math.prod(layer.output_shape)) > LARGEST:
        return None
    return layer.cached("complement", lambda: _factor(layer))


@dataclass(frozen=True)
class WeakSubspace:
    """What W of full row rank says of an input badly or not at all.

    Attributes:
        factor: W's null space and minimum-norm solutions.
        basis: Orthonormal: the null space, and the directions of W's row space that it sees dimly, (n, q).
        sigmas: ‖W v‖ of each, 0 in the null space, (q,).
    """

    factor: RangeComplement
    basis: Tensor
    sigmas: Tensor


def weak_subspace(layer: Layer, ratio: float = 0.03) -> WeakSubspace | None:
    """The directions that W leaves to the gradients, made once; None where W has not full row rank or is too large."""
    factor = complement(layer) if math.prod(layer.output_shape) <= layer.unknowns else None
    return None if factor is None else layer.cached(f"weak_subspace {ratio}", lambda: _weak(factor, ratio))


def null_directions(layer: Layer) -> WeakSubspace | None:
    """The null space of W alone."""
    factor = complement(layer) if math.prod(layer.output_shape) <= layer.unknowns else None
    return None if factor is None else WeakSubspace(factor, factor.basis, factor.basis.new_zeros(factor.basis.shape[1]))


def _weak(factor: RangeComplement, ratio: float) -> WeakSubspace:
    """StrideBlock inverse iteration on W Wᵀ, with twice the block as long as all of it is weak."""
    layer, rows = factor.layer, len(factor.factor)
    generator, size = torch.Generator().manual_seed(0), max(8, rows // 20)
    largest = _largest(layer)
    while True:
        size = min(size, rows)
        U = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        for _ in range(TURNS):
            U = torch.linalg.qr(factor.solve(U))[0]
        V = layer.adjoint(U.T.reshape(-1, *layer.output_shape)).flatten(1)
        _, sigmas, turn = torch.linalg.svd(V.T, full_matrices=False)
        if sigmas[0] > ratio * largest or size == rows:
            break
        size *= 2
    kept = sigmas < ratio * largest
    V = torch.linalg.qr((turn[kept] @ V).T)[0]
    seen = layer.apply(V.T.reshape(-1, *layer.input_shape)).flatten(1).norm(dim=1)
    return WeakSubspace(
        factor, torch.cat([factor.basis, V], 1), torch.cat([seen.new_zeros(factor.basis.shape[1]), seen])
    )


def _largest(layer: Layer, steps: int = 20) -> float:
    """σ_max of W by power iteration."""
    x = torch.randn(1, *layer.input_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(steps):
        x = layer.adjoint(layer.apply(x / x.norm()))
    return x.norm().item() ** 0.5


def _factor(layer: Layer) -> RangeComplement | None:
    W = weight_matrix(layer)
    wide = W.shape[0] <= W.shape[1]
    gram = (W @ W.T if wide else W.T @ W).toarray()
    factor, failed = linalg.lapack.dpotrf(gram.T, lower=1)  # symmetric: columns first at no cost
    pivots = np.abs(np.diag(factor))
    if failed or pivots.min() < DEPENDENT * pivots.max():
        return None
    inputs, outputs = layer.input_shape, layer.output_shape
    shape = inputs if wide else outputs
    into, out = (layer.apply, layer.adjoint) if wide else (layer.adjoint, layer.apply)

    def project(vectors: Tensor) -> Tensor:  # rows of `vectors`, off the range of A
        seen = into(vectors.reshape(-1, *shape)).flatten(1)
        solved = none.solve(seen.T).T.reshape(-1, *(outputs if wide else inputs))
        return vectors - out(solved).flatten(1)

    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape) - min(W.shape)
    none = RangeComplement(layer, factor, torch.zeros(math.prod(shape), 0, dtype=torch.float64))
    if not count:
        return none
    vectors = torch.randn(count, math.prod(shape), generator=generator, dtype=torch.float64)
    # random vectors, projected; again after orthonormalisation, which makes the small rests large
    basis = project(torch.linalg.qr(project(vectors).T)[0].T)
    return replace(none, basis=basis.T.contiguous())
