"""Rank laws: exact generic ranks of a layer's constraints from its shapes alone, without any matrix (ours).

W connects a layer's outputs with its pixels, M its taps with its pixels (K = I ⊗ M; `rgap.equations.axes`). Both fall
apart into blocks, and generically

    rank W      = Σ min(rows, columns) over the blocks of W, O·outputs by C·pixels
    rank M      = Σ min(rows, columns) over the blocks of M, O·taps by B·pixels
    rank [W; K] = min(n, rank W + rank K − O²)      over what neither K nor W determines alone

for O filters, C channels and B images. The O² are rows that are dependent: ⟨G[o], W[o′]⟩ = ⟨δz[o], z[o′]⟩.

Proved: that parts and blocks add up, that every law is an upper bound, what one system determines alone, and the rank
of a block in which one weight can serve every filter (any padded 3×3 of stride 1). That there are no further relations
is proved shape by shape, by elimination modulo a prime (`rgap.equations.proofs`), and tested elsewhere. Shapes at which
some are known, or at which a proved bound undercuts the law, get None, "no law".
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np

from rgap.equations.axes import Axis, AxisBlock, axis_parts, matching
from rgap.network.layer import Layer

SPARE_UNITS = 4
"""Units that the first fully connected layer must have beyond the ranks of its gradient and of the next one for a batch
to come apart: without any, every mixture of the images passes both tests of the search."""

CERTIFICATE_SURPLUS = 8  # surplus equations that a certificate of virtual constraints needs


class RankLaws(NamedTuple):
    """Generic ranks; None where no law is known."""

    weights: int | None  # of W
    gradients: int | None  # of K
    both: int | None  # of [W; K]


def rank_laws(
    in_channels: int, out_channels: int, kernel: tuple[int, ...] = (), stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int | tuple[int, int], ...] = 0, dilation: int | tuple[int, ...] = 1, groups: int = 1,
    image: tuple[int, ...] = (), batch: int = 1, tested: bool = True,
) -> RankLaws:  # fmt: skip
    """The ranks of W, K and [W; K] of a convolution in any dimension, or of a linear layer.

    Exact for generic weights and output gradients; under ReLU, which drops rows of W, an upper bound. On a batch W
    holds for each image alone and K is shared; the ranks are over all groups and images. Zero padding is no unknown.

    `kernel` and `image` have an entry for each axis, none for a linear layer, whose features are channels; stride and
    dilation are one number, or one an axis, the padding one number, or an axis a number or a pair (before, after).
    Without `tested` only ranks that are proved for every shape are given. Raises ValueError where the groups do not
    divide the channels, or the kernel does not fit the padded image.
    """
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"{groups} groups must divide {in_channels} and {out_channels} channels")
    axes = [(v,) * len(image) if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding, dilation)]
    pads = tuple((p, p) if isinstance(p, int) else tuple(p) for p in axes[2])
    geometry = tuple(zip(image, axes[0], axes[1], pads, axes[3], strict=True))
    laws = _group(out_channels // groups, in_channels // groups, batch, geometry, tested)
    return RankLaws(*(None if rank is None else groups * rank for rank in laws))


def layer_laws(layer: Layer, batch: int = 1) -> RankLaws:
    """The rank laws of a prepared layer; none where maps of pixels stand before or behind its convolution."""
    if layer.before is not None or layer.after is not None:
        return RankLaws(None, None, None)
    left, right, top, bottom = layer.padding
    geometry = (tuple(layer.weight.shape[2:]), layer.stride, ((top, bottom), (left, right)), layer.dilation)
    (channels, *image), filters = layer.input_shape, layer.output_shape[0]
    return rank_laws(channels, filters, *geometry, layer.groups, tuple(image), batch)


@functools.cache
def _group(filters: int, channels: int, images: int, geometry: tuple, tested: bool) -> tuple:
    """Sums over connected parts; a part that is a plain matrix product multiplies the filters, channels or images."""
    parts = [(0, 0, 0)]
    for combination in itertools.product(*(axis_parts(*axis) for axis in geometry)):
        factors = [part for part in combination if not isinstance(part, Axis)]
        o, c, b = (math.prod(v) for v in zip((filters, channels, images), *factors, strict=True))
        parts.append(_part(o, c, b, [part for part in combination if isinstance(part, Axis)], tested))
    return tuple(_total(ranks) for ranks in zip(*parts, strict=True))


def _total(ranks: list[int | None]) -> int | None:
    return None if None in ranks else sum(ranks)


def _part(filters: int, channels: int, images: int, axes: list[Axis], tested: bool) -> tuple:
    """Ranks (W, K, both) of one connected part.

    Only O·taps combinations of the channels meet W, and only O·outputs of the images meet δz; the rest sees one system.
    """
    if not axes:
        w, k = min(filters, channels), min(filters, images)
        return images * w, channels * k, channels * images - (channels - w) * (images - k)
    c = min(channels, filters * math.prod(a.taps for a in axes))
    b = min(images, filters * math.prod(a.outputs for a in axes))
    w_blocks = [_block_rank(filters, c, blocks, tested) for blocks in itertools.product(*(a.weight for a in axes))]
    m_blocks = [_block_rank(filters, b, blocks, tested) for blocks in itertools.product(*(a.gradient for a in axes))]
    weights, gradients = (_total([rank for *_, rank in blocks]) for blocks in (w_blocks, m_blocks))
    both = _both(filters, c, b, axes, w_blocks, m_blocks, tested)
    for extra, rank in ((images - b, weights), (channels - c, gradients)):
        if extra and both is not None:
            both = None if rank is None else both + extra * rank
    return None if weights is None else images * weights, None if gradients is None else channels * gradients, both


def _block_rank(
    filters: int, channels: int, blocks: tuple[AxisBlock, ...], tested: bool
) -> tuple[int, int, int | None]:
    """Rows, columns and rank of one block, a product over the axes; for M the channels are the images."""
    classes = [[math.prod(v) for v in zip(*c, strict=True)] for c in itertools.product(*(b.classes for b in blocks))]
    rows, columns = filters * math.prod(b.rows for b in blocks), channels * math.prod(b.pixels for b in blocks)
    if filters <= channels * sum(c[1] for c in classes):  # a class of pixels of its own for every filter
        return rows, columns, rows
    if filters >= channels * len(classes) and all(c[2] for c in classes):
        return rows, columns, columns
    if not tested:
        return rows, columns, None
    if len(blocks) == 1 and not blocks[0].balanced:
        return rows, columns, matching(blocks[0].edges, filters, channels)
    # A few filters more or less than classes allow relations with polynomial coefficients (Koszul, Buchsbaum-Rim).
    if len(blocks) > 1 and not (all(b.balanced for b in blocks) and _no_relations(filters, channels, blocks)):
        return rows, columns, None
    return rows, columns, min(rows, columns)


def _no_relations(filters: int, channels: int, blocks: tuple[AxisBlock, ...]) -> bool:
    """Whether there are too many or too few filters for such relations, or they would not fit along some axis."""
    count = math.prod(len(b.classes) for b in blocks)
    gap = filters - channels * count
    if gap == 0 or abs(gap) > len(blocks):
        return True
    degrees = [sum(c[0] - 1 for c in b.classes) / len(b.classes) for b in blocks]
    if gap > 0:
        return any(b.rows <= channels * count * degree for b, degree in zip(blocks, degrees, strict=True))
    return any(b.pixels <= filters * degree for b, degree in zip(blocks, degrees, strict=True))


def _both(
    filters: int, channels: int, images: int, axes: list[Axis], w_blocks: list, m_blocks: list, tested: bool
) -> int | None:
    """Rank [W; K] of one part: what K determines goes first; on the rest the identities are taken off."""
    full = channels * sum(columns for _, columns, _ in m_blocks)
    if any(all(rank == columns for _, columns, rank in blocks) for blocks in (w_blocks, m_blocks)):
        return full
    if not tested or any(rank is None or rank < min(rows, columns) for rows, columns, rank in w_blocks + m_blocks):
        return None
    copies = images * len(w_blocks)
    for block in (block for a in axes for block in a.weight):
        # Few outputs, or many images under padding: there relations abound.
        if block.rows <= max(c[0] for c in block.classes) or (block.padded and copies > max(1, filters)):
            return None
    left = [k for k, (_, columns, rank) in enumerate(m_blocks) if rank < columns]
    if len(w_blocks) > 1 and (len(left) < len(m_blocks) or any(rank == columns for _, columns, rank in w_blocks)):
        return None
    unknown, rows = (channels * sum(m_blocks[k][i] for k in left) for i in (1, 0))
    rank = full - unknown + min(unknown, images * filters * _outputs_seen(axes, left) + rows - filters * filters)
    bound = channels * sum(rank for *_, rank in m_blocks) + _bound(filters, channels, images, axes, m_blocks)
    return rank if rank <= bound else None


def _outputs_seen(axes: list[Axis], left: list[int]) -> int:
    """Outputs that read a pixel of the blocks of M in `left`."""
    seen = 0
    for phases in zip(*np.unravel_index(left, [len(a.gradient) for a in axes]), strict=True):
        reads = [np.isin(np.arange(a.outputs), a.triples[a.phase == k, 0]) for a, k in zip(axes, phases, strict=True)]
        seen = functools.reduce(np.kron, reads) | seen
    return int(seen.sum())


def _bound(filters: int, channels: int, images: int, axes: list[Axis], m_blocks: list) -> int:
    """Bounds rank [W; K] − rank K from above, by what W can still determine of the null space of M.

    z lies in the room of B·outputs − O directions that are orthogonal to every δz. For any subspace Z of it,
    rank [W; K] − rank K ≤ O dim Z + C Σ_r dim(null M_r modulo the vectors all of whose shifts lie in Z). Tried are Z
    that hold the shifts, over one or two boxes of taps, of vectors whose shifts lie in that room: null vectors of a
    block of M with more taps catch those of blocks with fewer.
    """
    outputs = images * math.prod(a.outputs for a in axes)
    room = outputs - min(filters, outputs)
    taps = np.array([math.prod(b.rows for b in blocks) for blocks in itertools.product(*(a.gradient for a in axes))])
    null = np.array([columns - rank for _, columns, rank in m_blocks])
    spaces: dict[tuple[int, ...], np.ndarray] = {}  # box -> rows (dim Z, vectors caught in each block of M)
    for box in itertools.product(*(range(1, max(b.rows for b in a.gradient) + 5) for a in axes)):
        shifts = math.prod(box)
        caught, vectors = (functools.reduce(np.kron, v) for v in zip(*map(_catch, axes, box), strict=True))
        there = np.where(caught > 0, np.clip(images * vectors - filters * shifts, 0, room // shifts), 0)
        turns = null[caught > 0] / caught[caught > 0]
        sizes = np.minimum(there.max(), np.concatenate([there, np.floor(turns), np.ceil(turns)])).astype(int)
        if sizes.any():
            spaces[box] = np.array([np.r_[shifts * k, np.minimum(k, there) * caught] for k in set(sizes[sizes > 0])])
    rows = [np.zeros((1, 1 + len(null)), int), *spaces.values()]
    for one, two in itertools.combinations(spaces, 2):
        if not (np.less_equal(one, two).all() or np.less_equal(two, one).all()):
            rows.append((spaces[one][:, None] + spaces[two][None]).reshape(-1, 1 + len(null)))
    Z = np.concatenate(rows)
    Z = Z[Z[:, 0] <= room]
    open_ = np.minimum(np.maximum(0, null - Z[:, 1:]), taps * (room - Z[:, :1]))
    return min(filters * room, int((filters * Z[:, 0] + channels * open_.sum(1)).min()))


def _catch(axis: Axis, box: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, for each block of M: shifts of a vector over a box that it catches, and a vector's entries."""
    taps, pixels = (np.array([getattr(b, name) for b in axis.gradient]) for name in ("rows", "pixels"))
    entries = pixels + len(axis.weight) * np.array(axis.grow) * (box - taps)
    return np.maximum(0, box - taps + 1), np.maximum(0, entries)
