"""Rank laws proved for single shapes: a rank modulo a prime bounds the generic rank from below, the law from above.

Every entry of W is zero or a weight, every entry of K zero or an entry of δz. A minor of r rows is therefore a
polynomial with whole coefficients in them; if it is not zero modulo a prime at one point it is not the zero polynomial,
and the generic rank is at least r. The laws bound that rank from above, by counting and by the identities between W and
K. Where the rank modulo the prime at random weights and δz reaches the law, the law is proved for the shape.
"""

from __future__ import annotations

import csv
import functools
import itertools
import math
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rgap.equations.prime_field import PRIME_MODULUS, null_space, product, rank
from rgap.equations.rank_laws import RankLaws, rank_laws

SPARE_ROWS = 64  # rows beyond the columns that a random part of a tall matrix gets, so as to have its rank
PROOF_TABLE = "proved_laws.csv"  # shapes for which elimination has proved the laws, and these laws


class LayerShape(NamedTuple):
    """The arguments of `rank_laws` for one group: the ranks of several groups of equal shapes add up."""

    channels: int
    filters: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    image: tuple[int, ...]
    batch: int

    def laws(self, tested: bool = True) -> RankLaws:
        """Its rank laws; without `tested` only those that are proved for every shape."""
        geometry = (self.kernel, self.stride, self.padding, self.dilation)
        return rank_laws(self.channels, self.filters, *geometry, image=self.image, batch=self.batch, tested=tested)

    @property
    def text(self) -> str:
        """The shape in one line, the key of the table of proofs."""
        return repr(tuple(self)).replace(" ", "")


def is_proved(shape: LayerShape) -> bool | None:
    """Whether all laws of a shape are proved, for every shape or by the table; None where a law is missing."""
    laws = shape.laws()
    if None in laws:
        return None
    return None not in shape.laws(tested=False) or _proofs().get(shape.text) == laws


@functools.cache
def _proofs() -> dict[str, RankLaws]:
    with resources.files(__package__).joinpath(PROOF_TABLE).open(encoding="utf-8", newline="") as file:
        return {row["shape"]: RankLaws(*(int(row[name]) for name in RankLaws._fields)) for row in csv.DictReader(file)}


def elimination_work(shape: LayerShape) -> float:
    """About how many multiplications `rank_bounds` takes, of a shape with all three laws."""
    laws, known = shape.laws(), shape.laws(tested=False)
    n, outputs = shape.channels * math.prod(shape.image), math.prod(_outputs(shape))
    W = (shape.filters * outputs, n)
    M = (shape.filters * math.prod(shape.kernel), shape.batch * math.prod(shape.image))
    sizes = [size for size, law in ((W, known.weights), (M, known.gradients)) if law is None]
    if known.both is None:
        free_w, free_k = shape.batch * n - laws.weights, shape.batch * n - laws.gradients
        by_gradients = free_k <= free_w
        sizes.append(M if by_gradients else W)
        sizes.append((shape.batch * W[0], free_k) if by_gradients else (M[0] * shape.channels, free_w))
    return sum(float(max(size)) * min(size) ** 2 for size in sizes)


def rank_bounds(shape: LayerShape, seed: int = 0) -> RankLaws:
    """Lower bounds of the generic ranks of W, K and [W; K]: their ranks modulo a prime at random weights and δz.

    The null space of one system is put into the other, whichever leaves fewer unknowns.
    """
    rng = np.random.default_rng(seed)
    outputs = math.prod(_outputs(shape))
    weight = _random(rng, shape.filters, shape.channels, math.prod(shape.kernel))
    dz = _random(rng, shape.batch, shape.filters, outputs)
    known = shape.laws(tested=False)
    M = _gradient_matrix(shape, dz)
    gradients = _least_rank(M, rng) * shape.channels if known.gradients is None else known.gradients
    unknowns = shape.batch * shape.channels * math.prod(shape.image)
    W = None
    if known.weights is None:
        W = _weight_matrix(shape, weight)
        weights = _least_rank(W, rng) * shape.batch
    else:
        weights = known.weights
    if known.both is not None:
        return RankLaws(weights, gradients, known.both)
    if unknowns - gradients <= unknowns - weights:
        basis = np.array_split(null_space(M), shape.batch)
        rest = np.vstack([_seen_by_weights(shape, weight, one) for one in basis])
        return RankLaws(weights, gradients, gradients + _least_rank(rest, rng))
    basis = null_space(_weight_matrix(shape, weight) if W is None else W)
    rest = np.hstack([_seen_by_gradients(shape, one, basis) for one in dz])
    return RankLaws(weights, gradients, weights + _least_rank(rest, rng))


def _least_rank(A: NDArray, rng: np.random.Generator) -> int:
    """The rank; where A is far from square, that of a random part suffices if it is full."""
    A = A if A.shape[0] >= A.shape[1] else A.T
    if len(A) > 2 * (count := A.shape[1] + SPARE_ROWS):
        found = rank(A[np.sort(rng.permutation(len(A))[:count])])
        if found == A.shape[1]:
            return found
    return rank(A)


def _random(rng: np.random.Generator, *shape: int) -> NDArray:
    return rng.integers(0, PRIME_MODULUS, shape).astype(float)


def _outputs(shape: LayerShape) -> list[int]:
    axes = zip(shape.image, shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    return [(n + sum(pads) - d * (k - 1) - 1) // s + 1 for n, k, s, pads, d in axes]


def _reads(shape: LayerShape) -> Iterator[tuple[NDArray, NDArray]]:
    """For each tap the outputs and the pixels that it connects."""
    along = []
    for n, k, s, (before, _), d, m in zip(shape.image, *shape[2:6], _outputs(shape), strict=True):
        pixels = s * np.arange(m) + d * np.arange(k)[:, None] - before
        along.append([(np.flatnonzero(inside), j[inside]) for j in pixels for inside in [(j >= 0) & (j < n)]])
    for taps in itertools.product(*along):
        outputs, pixels = (np.meshgrid(*each, indexing="ij") for each in zip(*taps, strict=True))
        yield (
            np.ravel_multi_index([o.ravel() for o in outputs], _outputs(shape)),
            np.ravel_multi_index([j.ravel() for j in pixels], shape.image),
        )


def _weight_matrix(shape: LayerShape, weight: NDArray) -> NDArray:
    """W, (O·outputs, C·pixels)."""
    W = np.zeros((shape.filters, math.prod(_outputs(shape)), shape.channels, math.prod(shape.image)))
    for tap, (outputs, pixels) in enumerate(_reads(shape)):
        W[:, outputs, :, pixels] = weight[None, :, :, tap]
    return W.reshape(W.shape[0] * W.shape[1], -1)


def _gradient_matrix(shape: LayerShape, dz: NDArray) -> NDArray:
    """M, (O·taps, B·pixels)."""
    M = np.zeros((shape.filters, math.prod(shape.kernel), shape.batch, math.prod(shape.image)))
    for tap, (outputs, pixels) in enumerate(_reads(shape)):
        M[:, tap, :, pixels] = dz[:, :, outputs].transpose(2, 1, 0)
    return M.reshape(M.shape[0] * M.shape[1], -1)


def _seen_by_weights(shape: LayerShape, weight: NDArray, basis: NDArray) -> NDArray:
    """W times the vectors of `basis` (pixels, k), one channel each: (O·outputs, C·k)."""
    read = np.zeros((basis.shape[1], math.prod(shape.kernel), math.prod(_outputs(shape))))
    for tap, (outputs, pixels) in enumerate(_reads(shape)):
        read[:, tap, outputs] = basis[pixels].T
    columns = read.transpose(1, 2, 0).reshape(weight.shape[2], read.shape[2] * len(read))
    found = [product(weight[:, c], columns) for c in range(shape.channels)]
    return np.hstack([each.reshape(shape.filters * read.shape[2], len(read)) for each in found])


def _seen_by_gradients(shape: LayerShape, dz: NDArray, basis: NDArray) -> NDArray:
    """One image's K times the vectors of `basis` (C·pixels, k): (taps·O·C, k)."""
    basis = basis.reshape(shape.channels, math.prod(shape.image), basis.shape[1])
    width = shape.channels * basis.shape[2]
    rows = [
        product(dz[:, outputs], basis[:, pixels].transpose(1, 0, 2).reshape(len(pixels), width))
        for outputs, pixels in _reads(shape)
    ]
    return np.vstack(rows).reshape(len(rows) * len(dz) * shape.channels, basis.shape[2])
