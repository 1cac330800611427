"""Linear maps of pixels, the same for every channel: average pooling, padding of every mode, resizing.

They are separable, y = R x Cᵀ: the matrix of the map is R ⊗ C, its rank the product of the ranks, and its
pseudo-inverse and null space follow from the two small factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import scipy.sparse as sp
import torch
from torch import Tensor

EQUALITY_RTOL = 1e-10  # relative difference below which two computations of the same quantity count as equal


@dataclass(frozen=True, eq=False)
class PixelMap:
    """y = R x Cᵀ on every channel, with `rows` R (H′, H) and `columns` C (W′, W), float64."""

    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(H′, W′)."""
        return len(self.rows), len(self.columns)

    @property
    def inputs(self) -> tuple[int, int]:
        """(H, W)."""
        return self.rows.shape[1], self.columns.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        """(..., H, W) -> (..., H′, W′)."""
        return self.rows @ x @ self.columns.T

    def adjoint(self, y: Tensor) -> Tensor:
        """(..., H′, W′) -> (..., H, W)."""
        return self.rows.T @ y @ self.columns

    def after(self, first: PixelMap | None) -> PixelMap:
        """This map applied after another."""
        return self if first is None else PixelMap(self.rows @ first.rows, self.columns @ first.columns)

    def matrix(self) -> sp.csr_array:
        """R ⊗ C, (H′·W′, H·W)."""
        return sp.csr_array(sp.kron(sp.csr_array(self.rows.numpy()), sp.csr_array(self.columns.numpy())))

    @cached_property
    def _inverses(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """R⁺, C⁺ and the projectors onto the row spaces of R and C."""
        R, C = torch.linalg.pinv(self.rows, rtol=EQUALITY_RTOL), torch.linalg.pinv(self.columns, rtol=EQUALITY_RTOL)
        return R, C, R @ self.rows, C @ self.columns

    @cached_property
    def rank(self) -> int:
        """Rank of the matrix."""
        return round(self._inverses[2].trace().item()) * round(self._inverses[3].trace().item())

    @property
    def injective(self) -> bool:
        """Whether y determines x."""
        return self.rank == math.prod(self.inputs)

    def solve(self, y: Tensor) -> Tensor:
        """The least-squares solution of minimum norm, (..., H′, W′) -> (..., H, W)."""
        return self._inverses[0] @ y @ self._inverses[1].T

    def null_basis(self) -> Tensor:
        """Orthonormal basis of the null space, (H·W, H·W − rank)."""
        (seen_rows, lost_rows), (_, lost_columns) = (_split(P) for P in self._inverses[2:])
        whole = torch.eye(self.columns.shape[1], dtype=torch.float64)
        return torch.cat([torch.kron(lost_rows, whole), torch.kron(seen_rows, lost_columns)], 1)

    def zero_padding(self) -> tuple[int, int, int, int] | None:
        """Numbers of zeros (left, right, top, bottom) where the map only pads with zeros, else None."""
        sides = [_zeros_around(A) for A in (self.columns, self.rows)]
        return None if None in sides else (*sides[0], *sides[1])


def pixel_map(function: Callable[[Tensor], Tensor], channels: int, pixels: tuple[int, ...]) -> PixelMap | None:
    """Finds R and C of a function by applying it to single rows and columns of ones.

    The function maps (N, C, *pixels) to (N, C, *pixels′), or to (N, C) as a mean over all pixels does; pixels are
    (H, W), or (L,), which is taken for (1, L). None where it is not linear, mixes channels, or is not separable.
    """
    height, width = (1, *pixels)[-2:]

    def run(images: Tensor) -> Tensor:
        y = function(images.reshape(*images.shape[:2], *pixels))
        if y.shape[:2] != images.shape[:2]:
            raise ValueError("channels are mixed")
        return y.reshape(*y.shape[:2], *((1, 1, *y.shape[2:])[-2:]))

    rows, columns = (torch.eye(n, dtype=torch.float64) for n in (height, width))
    try:
        by_row = run(rows[:, None, :, None].expand(-1, 1, -1, width))[:, 0]
        by_column = run(columns[:, None, None].expand(-1, 1, height, -1))[:, 0]
        whole = by_row.sum(0)
        i, j = divmod(int(whole.abs().argmax()), whole.shape[1])
        found = PixelMap(by_row[:, :, j].T / whole[i, j], by_column[:, i].T)
        probe = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        probe[1] *= -1
        difference = run(probe) - found.apply(probe)
    except (ValueError, RuntimeError):
        return None
    return found if difference.abs().max() <= EQUALITY_RTOL * (1 + whole.abs().max()) else None


def _split(projector: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the range and of the null space of a projector."""
    values, vectors = torch.linalg.eigh(projector)
    return vectors[:, values > 0.5], vectors[:, values <= 0.5]


def _zeros_around(A: Tensor) -> tuple[int, int] | None:
    """(before, after) where A adds zeros before and after a vector."""
    more = A.shape[0] - A.shape[1]
    first = int(A[:, 0].argmax())
    if not 0 <= first <= more:
        return None
    expected = torch.zeros_like(A)
    expected[first : first + A.shape[1]] = torch.eye(A.shape[1], dtype=A.dtype)
    return (first, more - first) if torch.allclose(A, expected, rtol=0, atol=EQUALITY_RTOL) else None


def image_shape_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A feature shape as (C, H, W): (C, L) is an image of height 1, (n,) has one pixel."""
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"features of shape {shape} are neither an image nor a row of pixels nor a vector")
    channels, *pixels = shape
    height, width = (1, 1, *pixels)[-2:]
    return channels, height, width
