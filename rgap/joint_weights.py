"""What one layer's W says of every image alone: its minimum-norm solution and its null space, factored once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from rgap.chain import Layer
from rgap.constraints import weight_matrix

LARGEST = 8000
"""Most rows of W (or columns, where they are fewer) for which a dense Gram matrix is made (0.5 GB)."""

DEPENDENT = 1e-6
"""Smallest over largest pivot of the Gram matrix's Cholesky factor at which W still counts as of full rank."""


@dataclass(frozen=True)
class Complement:
    """A matrix A (rows × columns, more rows) of full column rank: what is left of its range.

    For a layer with fewer outputs than inputs A = Wᵀ, and `basis` is the null space of W; for one with more outputs
    A = W, and `basis`ᵀ (z − b) = 0 are the combinations of its outputs that vanish whatever its input.

    Attributes:
        layer: The layer, without groups.
        lower: Cholesky factor of AᵀA.
        basis: Orthonormal basis of the complement of the range of A, (rows, rows − columns).
    """

    layer: Layer
    lower: Tensor
    basis: Tensor

    def minimum_norm(self, z: Tensor) -> Tensor:
        """W⁺ z of every image for a layer with fewer outputs than inputs: (B, O, H′, W′) -> (B, C, H, W)."""
        x = z.new_zeros(len(z), *self.layer.input_shape)
        for _ in range(2):  # the second pass refines
            rest = (z - self.layer.apply(x)).flatten(1).T
            solved = torch.cholesky_solve(rest, self.lower).T.reshape(z.shape)
            x = x + self.layer.adjoint(solved)
        return x


def complement(layer: Layer) -> Complement | None:
    """The factors of a layer without groups, made once; None where it is too large or W is not of full rank."""
    if min(layer.unknowns, math.prod(layer.output_shape)) > LARGEST:
        return None
    return layer.cached("complement", lambda: _factor(layer))


def _factor(layer: Layer) -> Complement | None:
    W = weight_matrix(layer)
    wide = W.shape[0] < W.shape[1]
    gram = (W @ W.T if wide else W.T @ W).toarray()
    factor, failed = linalg.lapack.dpotrf(gram, lower=1)
    pivots = np.abs(np.diag(factor))
    if failed or pivots.min() < DEPENDENT * pivots.max():
        return None
    lower = torch.from_numpy(factor).tril()
    inputs, outputs = layer.input_shape, layer.output_shape
    shape = inputs if wide else outputs
    into, out = (layer.apply, layer.adjoint) if wide else (layer.adjoint, layer.apply)

    def project(vectors: Tensor) -> Tensor:  # rows of `vectors`, off the range of A
        seen = into(vectors.reshape(-1, *shape)).flatten(1)
        solved = torch.cholesky_solve(seen.T, lower).T.reshape(-1, *(outputs if wide else inputs))
        return vectors - out(solved).flatten(1)

    generator = torch.Generator().manual_seed(0)
    count = math.prod(shape) - min(W.shape)
    vectors = torch.randn(count, math.prod(shape), generator=generator, dtype=torch.float64)
    # random vectors, projected; again after orthonormalisation, which makes the small rests large
    basis = project(torch.linalg.qr(project(vectors).T)[0].T)
    return Complement(layer, lower, basis.T.contiguous())
