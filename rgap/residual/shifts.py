"""The one matrix in a row space whose columns are shifts of one image: the first eigenvector of two projections."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

DENSE_UNKNOWNS = 600  # unknowns up to which the operator is formed and decomposed
LANCZOS_VECTORS = 60  # vectors that Lanczos keeps
LANCZOS_RESTARTS = 25  # restarts after which other eigenvalues lie too close to 1
VECTOR_TOLERANCE = 1e-10  # residual of the first eigenvector


class Shifts(NamedTuple):
    """The matrix found, as its pixels, and how alone it stands."""

    pixels: Tensor  # (C, pixels), of norm 1
    missed: float  # 1 − the largest eigenvalue: 0 where the row space holds such a matrix
    gap: float  # 1 − the second largest: 0 where it holds several


class ShiftSpace:
    """Matrices (N, taps·C) in the span of N orthonormal rows against those that are shifts of C channels."""

    def __init__(self, V: Tensor, table: np.ndarray, pixels: int):
        """V is (N, taps, C); `table` (taps, N) names the pixel that a row reads by a tap, −1 in the padding."""
        self.V, self.channels, self.count = V.flatten(1), V.shape[2], pixels
        reads = torch.from_numpy(table)
        self.index = torch.where(reads >= 0, reads, pixels)
        times = torch.bincount(self.index.flatten(), minlength=pixels + 1)[:pixels]
        self.weight = times.clamp(min=1).to(V.dtype).rsqrt()[:, None]

    def collect(self, L: Tensor) -> Tensor:
        """Pixels of L V, (N, N) -> (pixels, C): their sums over what reads them, with the weight of a unit vector."""
        parts = (L @ self.V).reshape(len(L), -1, self.channels)
        out = parts.new_zeros(self.count + 1, self.channels)
        for tap, index in enumerate(self.index):
            out.index_add_(0, index, parts[:, tap])
        return out[:-1] * self.weight

    def spread(self, x: Tensor) -> Tensor:
        """The adjoint of `collect`."""
        x = torch.cat([x * self.weight, x.new_zeros(1, self.channels)])
        return x[self.index.T].flatten(1) @ self.V.T

    def solve(self) -> Shifts | None:
        """The two largest eigenvalues of the smaller of the two products; None where Lanczos does not find them."""
        N, pixels = len(self.V), (self.count, self.channels)
        by_rows = N * N <= self.count * self.channels
        if by_rows:
            shape, product = (N, N), lambda L: self.spread(self.collect(L))
        else:
            shape, product = pixels, lambda x: self.collect(self.spread(x))
        found = _largest_two(product, shape)
        if found is None:
            return None
        values, vector = found
        x = (self.collect(vector) if by_rows else vector) * self.weight
        return Shifts(x.T / x.norm(), 1 - values[-1], 1 - values[-2] if len(values) > 1 else 1.0)


def _largest_two(product: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> tuple[np.ndarray, Tensor] | None:
    size = shape[0] * shape[1]

    def apply(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(v).reshape(shape)).flatten().numpy()

    if size <= DENSE_UNKNOWNS:
        values, vectors = np.linalg.eigh(np.stack([apply(unit) for unit in np.eye(size)]))
        return values[-2:], torch.from_numpy(vectors[:, -1].copy()).reshape(shape)
    steps = itertools.count()
    start = np.random.default_rng(0).standard_normal(size)
    options = {"ncv": LANCZOS_VECTORS, "maxiter": LANCZOS_RESTARTS, "tol": VECTOR_TOLERANCE}
    operator = LinearOperator((size, size), matvec=lambda v: (next(steps), apply(v))[1], dtype=float)
    try:
        (value,), vectors = eigsh(operator, 1, which="LA", v0=start, **options)
    except ArpackNoConvergence:
        return None
    vector = vectors[:, 0].copy()
    second = _largest(lambda v: apply(v) - value * vector * (vector @ v), np.roll(start, 1), next(steps) // 2)
    return np.array([second, value]), torch.from_numpy(vector).reshape(shape)


def _largest(apply: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int) -> float:
    """The largest eigenvalue, from below, by so many steps of Lanczos without restarts, whose vectors are not kept.

    Steps that sufficed to find an eigenvalue of 1 from a random start would show another one.
    """
    v, before, b = start / np.linalg.norm(start), np.zeros_like(start), 0.0
    diagonal, beside = [], []
    for _ in range(steps):
        w = apply(v) - b * before
        diagonal.append(w @ v)
        w -= diagonal[-1] * v
        b = np.linalg.norm(w)
        beside.append(b)
        v, before = w / b, v
    return float(eigvalsh_tridiagonal(diagonal, beside[:-1])[-1])
