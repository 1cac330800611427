"""The taps of a convolution split between its two sides: what its own gradient determines with nothing else known.

The gradient is G[o, c, t] = Σ_p δz[o, p] x[c, stride p + t − padding]. With t = t₁ + t₂ and the hidden position
n = stride p + t₁ it is a matrix of rows (t₁, o) and columns (t₂, c),

    G[o, c, t₁ + t₂] = Σ_n δ̃[(t₁, o), n] x̃[n, (t₂, c)],

whose factors are shifts of δz and of x, one for each share of the taps. Where the matrix has the rank N of all hidden
positions, its row space holds x̃ and its column space δ̃, and only (δz, x) up to a scalar can be shifts of each other
in it (ours). More taps on a side make more rows of few channels, at slightly more hidden positions: of 3×3 taps,
1×1 and 3×3 need O ≥ H·W filters, 2×2 and 2×2 only 4 O ≥ (H + 1)(W + 1).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

COMFORTABLE_ROWS = 1.3  # rows and columns, over positions, from which a split is tried first: ReLU silences some

Geometry = tuple[tuple[int, int, int, tuple[int, int], int], ...]
"""For each axis pixels, taps, stride, padding (before, after) and dilation."""


@dataclass(frozen=True, eq=False)
class TapSplit:
    """One split of the taps, seen from one of its sides."""

    taps: tuple[int, int]  # taps (vertical, horizontal) on the rows, the side of δz
    # tables (taps of the side, N): the entry of δz and of x that a hidden position reads, −1 where it reads none
    outputs: np.ndarray
    pixels: np.ndarray
    of_input: bool  # whether the row space, which holds x̃, is searched, or the column space for δ̃
    surplus: int  # equations beyond the N² − 1 that say which matrices of that space are shifts of one another

    @property
    def positions(self) -> int:
        """Hidden positions N, the rank of the matrix."""
        return self.pixels.shape[1]

    def matrix(self, G: Tensor) -> Tensor:
        """A gradient (O, C, kh, kw) as the matrix of rows (t₁, o) and columns (t₂, c)."""
        down, right = (k + 1 - t for k, t in zip(G.shape[2:], self.taps, strict=True))
        places = itertools.product(*map(range, self.taps))
        return torch.cat([G[:, :, i : i + down, j : j + right].permute(0, 2, 3, 1).flatten(1) for i, j in places])


def tap_splits(filters: int, channels: int, geometry: Geometry) -> list[TapSplit]:
    """The splits by which a gradient of generic δz and x determines both up to a scalar, the cheapest first."""
    kernel = [axis[1] for axis in geometry]
    found = []
    for taps in itertools.product(*(range(1, k + 1) for k in kernel)):
        axes = [_axis(*axis, t) for axis, t in zip(geometry, taps, strict=True)]
        positions = np.prod([axis.outputs.shape[1] for axis in axes])
        rows, columns = (
            n * np.prod([axis.reading[side] for axis in axes]) for side, n in enumerate((filters, channels))
        )
        if min(rows, columns) < positions or not all(axis.complete for axis in axes):
            continue
        for of_input in (True, False):
            units = channels if of_input else filters
            reads = positions * np.prod([axis.reading[of_input] for axis in axes])
            entries = np.prod([axis.sizes[of_input] for axis in axes])
            surplus = int(units * (reads - entries) - positions**2 + 1)
            if surplus >= 0 and all(axis.unique[of_input] for axis in axes):
                short = min(rows, columns) < COMFORTABLE_ROWS * positions
                cost = (bool(short), int(positions), of_input)
                found.append((cost, TapSplit(taps, *_tables(axes), of_input, surplus)))
    return [split for _, split in sorted(found, key=lambda pair: pair[0])]


def is_blind(
    in_channels: int, out_channels: int, kernel: tuple[int, int], image: tuple[int, int],
    stride: int | tuple[int, int] = 1, padding: int | tuple[int | tuple[int, int], ...] = 0,
    dilation: int | tuple[int, int] = 1,
) -> bool:  # fmt: skip
    """Whether a convolution's own gradient determines its input and its output gradient up to a scalar, by shapes.

    That holds for one image and generic values; units that ReLU keeps silent or open everywhere take rank.
    """
    stride, dilation, padding = ((v, v) if isinstance(v, int) else tuple(v) for v in (stride, dilation, padding))
    pads = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    return bool(tap_splits(out_channels, in_channels, tuple(zip(image, kernel, stride, pads, dilation, strict=True))))


@dataclass(frozen=True, eq=False)
class _SplitAxis:
    """One axis of a split; pairs are of the side of δz and that of x."""

    outputs: np.ndarray  # (taps on the rows, N), −1 where none is read
    pixels: np.ndarray  # (taps on the columns, N)
    sizes: tuple[int, int]  # outputs and pixels
    reading: tuple[int, int]  # taps that read anything but padding
    complete: bool  # whether every output and every pixel is read

    @functools.cached_property
    def unique(self) -> tuple[bool, bool]:
        """Whether shifts of generic values remain shifts under scalars alone."""
        return tuple(map(_only_scalars, (self.outputs, self.pixels), self.sizes))


@functools.cache
def _axis(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, taps: int) -> _SplitAxis:
    count = (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    hidden = np.arange(max(stride * (count - 1) + dilation * (taps - 1) + 1, 0))
    p = hidden - dilation * np.arange(taps)[:, None]
    p = np.where((p >= 0) & (p % stride == 0) & (p < stride * count), p // stride, -1)
    j = hidden + dilation * np.arange(kernel + 1 - taps)[:, None] - padding[0]
    j = np.where((j >= 0) & (j < size), j, -1)
    used = (p >= 0).any(0) & (j >= 0).any(0)
    p, j = p[:, used], j[:, used]
    sides = ((p, count), (j, size))
    reading = tuple(int((table >= 0).any(1).sum()) for table, _ in sides)
    complete = all(len(np.unique(table[table >= 0])) == entries for table, entries in sides)
    return _SplitAxis(p, j, (count, size), reading, complete)


def _only_scalars(table: np.ndarray, size: int) -> bool:
    """Whether B Sₜ = Sₜ Y for all taps t of a table leaves (B, Y) one scalar; Sₜ reads entry table[t, n] at n.

    Every equation ties two entries of B and Y, or one to zero: what remains free are the connected components that no
    zero touches.
    """
    positions = table.shape[1]
    zero = positions**2 + size**2
    edges: list[tuple[int, int]] = []
    for reads in table:
        reader = {int(pixel): n for n, pixel in enumerate(reads) if pixel >= 0}
        for n, pixel in itertools.product(range(positions), range(size)):
            left = n * positions + reader[pixel] if pixel in reader else zero
            edges.append((left, positions**2 + int(reads[n]) * size + pixel if reads[n] >= 0 else zero))
    i, j = np.array(edges, int).reshape(-1, 2).T
    graph = csr_matrix((np.ones(len(i)), (i, j)), shape=(zero + 1, zero + 1))
    label = connected_components(graph, directed=False)[1]
    used = np.unique(label[np.r_[i, j]])  # entries of Y whose pixel no tap reads appear nowhere
    return len(used[used != label[zero]]) == 1


def _tables(axes: list[_SplitAxis]) -> Iterator[np.ndarray]:
    """The tables of both axes together, of δz and of x."""
    for side in ("outputs", "pixels"):
        (down, right), width = (getattr(axis, side) for axis in axes), axes[1].sizes[side == "pixels"]
        down, right = down[:, None, :, None], right[None, :, None, :]
        both = np.where((down >= 0) & (right >= 0), down * width + right, -1)
        yield both.reshape(both.shape[0] * both.shape[1], -1)
