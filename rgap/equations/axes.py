"""One axis of a convolution as sets of (output, tap, pixel): its connected parts, and the blocks of W and M in each.

j = stride·p + dilation·u − padding for output p, tap u and pixel j inside the image. W connects p with j and M connects
u with j. Pixels that no tap reads, and taps that read only padding, appear nowhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, maximum_flow


@dataclass(frozen=True)
class AxisBlock:
    """A block of W (its rows are outputs) or of M (taps) along one axis.

    `classes` has for each class of its pixels in the other system: weights that serve it, whether one of them serves
    all rows, whether one serves all pixels.
    """

    rows: int
    pixels: int
    edges: np.ndarray  # (row, pixel) pairs that are connected
    balanced: bool  # whether rows and pixels can be matched evenly, so that none has too few partners
    padded: bool  # whether a weight misses, on padding, a row and a pixel that another serves
    classes: tuple[tuple[int, bool, bool], ...]


@dataclass(frozen=True)
class Axis:
    """A connected part of one axis."""

    outputs: int
    taps: int
    triples: np.ndarray  # (output, tap, pixel), numbered within the part
    weight: tuple[AxisBlock, ...]  # the blocks of W
    gradient: tuple[AxisBlock, ...]  # and of M
    phase: np.ndarray  # the block of M that each triple belongs to
    grow: tuple[int, ...]  # for each block of M, 1 less the ends at which padding cuts windows off


@functools.cache
def axis_parts(pixels: int, taps: int, stride: int, padding: tuple[int, int], dilation: int) -> tuple:
    """Splits one axis of so many pixels and taps into connected parts, whose ranks add up.

    A part that is a plain matrix product is given as the factors (a, b, c) by which it multiplies filters, channels and
    images, any other as an `Axis`. Raises ValueError where the taps do not fit the padded pixels.
    """
    outputs = (pixels + sum(padding) - dilation * (taps - 1) - 1) // stride + 1
    if outputs < 1:
        raise ValueError(f"{taps} taps with dilation {dilation} do not fit {pixels} pixels with padding {padding}")
    u, p = np.divmod(np.arange(taps * outputs), outputs)
    j = stride * p + dilation * u - padding[0]
    triples = np.stack([p, u, j], 1)[(j >= 0) & (j < pixels)]
    if not len(triples):
        return ()
    label = _labels(np.r_[triples[:, 0], triples[:, 0]], np.r_[triples[:, 1], taps + triples[:, 2]])[: len(triples)]
    return tuple(_as_factors(_relabel(triples[label == part])) for part in np.unique(label))


def _as_factors(triples: np.ndarray) -> tuple[int, int, int] | Axis:
    (p, u, j), size = (int(v) + 1 for v in triples.max(0)), len(triples)
    if size == j == p * u:  # every output and tap have a pixel of their own
        return 1, u, p
    if size == p == u * j:
        return u, 1, j
    if size == u == p * j:
        return p, j, 1
    phase = np.unique(_labels(triples[:, 1], triples[:, 2]), return_inverse=True)[1]
    grow = []
    for block in range(phase.max() + 1):
        part = triples[phase == block]
        first, last = (part[part[:, 1] == tap, 0] for tap in (part[:, 1].min(), part[:, 1].max()))
        grow.append(1 - int(first.min() > 0) - int(last.max() < p - 1))
    return Axis(p, u, triples, tuple(_blocks(triples, 0)), tuple(_blocks(triples, 1)), phase, tuple(grow))


def _labels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Connected component of each edge (a, b) of a bipartite graph."""
    size = int(a.max()) + int(b.max()) + 2
    graph = csr_matrix((np.ones(len(a)), (a, a.max() + 1 + b)), shape=(size, size))
    return connected_components(graph, directed=False)[1][a]


def _relabel(table: np.ndarray) -> np.ndarray:
    return np.stack([np.unique(column, return_inverse=True)[1] for column in table.T], 1)


def _blocks(triples: np.ndarray, row: int) -> Iterator[AxisBlock]:
    """The blocks of W (row = 0) or of M (row = 1) along one axis."""
    block, other = (_labels(triples[:, x], triples[:, 2]) for x in (row, 1 - row))
    for b in np.unique(block):
        part, kinds = _relabel(triples[block == b]), other[block == b]
        rows, pixels = int(part[:, row].max()) + 1, int(part[:, 2].max()) + 1
        classes, padded = [], False
        for kind in np.unique(kinds):
            serves = np.unique(part[kinds == kind, 1 - row], return_counts=True)[1]
            in_class = len(np.unique(part[kinds == kind, 2]))
            padded |= bool(serves.min() < min(rows, in_class))
            classes.append((len(serves), bool(serves.max() == rows), bool(serves.max() == in_class)))
        edges, common = part[:, [row, 2]], math.gcd(rows, pixels)
        matched = matching(edges, pixels // common, rows // common)
        yield AxisBlock(rows, pixels, edges, matched == rows * pixels // common, padded, tuple(classes))


def matching(edges: np.ndarray, row_size: int, pixel_size: int) -> int:
    """Largest flow through the edges where a row carries row_size and a pixel pixel_size: a bound on the rank."""
    edges = np.unique(edges, axis=0)
    rows, pixels = (int(v) + 1 for v in edges.max(0))
    end = rows + pixels + 1
    i = np.r_[np.zeros(rows, int), 1 + edges[:, 0], rows + 1 : end]
    j = np.r_[1 : rows + 1, 1 + rows + edges[:, 1], np.full(pixels, end)]
    capacity = np.repeat([row_size, min(row_size, pixel_size), pixel_size], [rows, len(edges), pixels])
    graph = csr_matrix((capacity.astype(np.int32), (i, j)), shape=(end + 1, end + 1))
    return int(maximum_flow(graph, 0, end).flow_value)
