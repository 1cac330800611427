"""Numerical ranks of one layer's constraints by their structure, without a dense matrix of the whole layer.

rank K = C · rank M, block by block of the stride. The rank of W comes from the Gram matrix of its shorter side, that of
[W; K] is rank K plus the rank of W on the null space of M. In a batch W holds for each image alone and M is shared:
[M_1 … M_B].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from rgap.equations.gradient import blocks, solve_gradients
from rgap.equations.rank_laws import RankLaws
from rgap.equations.systems import weight_columns
from rgap.equations.weights import weight_factor, weight_matrix
from rgap.linalg import svd
from rgap.network.layer import Layer

MAX_UNKNOWNS = 4000  # unknowns of a group of channels, over the batch, up to which ranks are computed
MAX_BLOCK_COLUMNS = 1200  # most columns of a block of M, likewise
MAX_GROUPS_WORK = 3e8  # cubed unknowns of all groups of a layer up to which each is computed; else one of them
GROUP_OVERHEAD = 5e6  # what a group costs besides, in the same unit
MAX_GROUP_WORK = 1e9  # those of one group up to which it is computed where there are several; else the law
MAX_FINE_SIDE = 2000  # shorter side up to which a matrix is decomposed where its Gram matrix lacks rank
MAX_SVD_SIDE = 400  # shorter side up to which singular values are not taken from the Gram matrix
GRAM_RESOLUTION = 1e-6  # smallest σ / σ_max that a float64 Gram matrix of a few thousand rows shows
WEIGHTS_SUFFICE_RATIO = 1e-4  # σ_min / σ_max of W above which W alone is taken to determine a layer


class RankNumbers(NamedTuple):
    """Ranks of W, K and [W; K], and σ_max over the smallest σ kept of the system that decides the last of them."""

    weights: int
    gradients: int
    both: int
    condition: float


def too_large(layer: Layer, batch: int, limit: int) -> str:
    """Why no numerical ranks are computed for a layer, naming the limit; empty where they are."""
    if (size := batch * layer.unknowns // layer.groups) > limit:
        return f"law only: {size} unknowns, over the limit of {limit}"
    pixels = batch * math.prod(math.ceil(n / s) for n, s in zip(layer.input_shape[1:], layer.stride, strict=True))
    if not layer.is_dense and pixels > MAX_BLOCK_COLUMNS:
        return f"law only: {pixels} unknowns share a block of M, over the limit of {MAX_BLOCK_COLUMNS}"
    return ""


def dense_work(layer: Layer, batch: int) -> tuple[int, float]:
    """Groups of channels, all of equal shapes, whose ranks are worth computing, and the work, in cubed unknowns."""
    each = 0.0 if layer.is_dense else GROUP_OVERHEAD + float(batch * layer.unknowns // layer.groups) ** 3
    if layer.groups == 1 or layer.groups * each <= MAX_GROUPS_WORK:
        return layer.groups, layer.groups * each
    return (1, each) if each <= MAX_GROUP_WORK else (0, 0.0)


def numerical_ranks(
    layer: Layer, batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0, laws: RankLaws | None = None,
    groups: int | None = None,
) -> RankNumbers:  # fmt: skip
    """Ranks of W, K and [W; K] of one layer, with its own float64 weights and a Gaussian δz of the given seed.

    Ranks are sums over the groups, the condition is the worst group's. The arithmetic is float64; singular values below
    max(m, n) times the machine precision of `dtype`, relative to the largest of an m×n matrix, count as zero. Where a
    Gram matrix, whose eigenvalues lose those below 1e-6, shows less than the rank of `laws`, the matrix itself decides.
    Of the first so many `groups` the mean stands for each of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    groups = layer.groups if groups is None else groups
    for part in layer.split_groups()[:groups]:
        dz = torch.randn(batch, *part.output_shape, generator=generator, dtype=torch.float64)
        own = RankLaws(*(None if law is None else law // layer.groups for law in laws or (None,) * 3))
        ranks.append(_group(part, dz, torch.finfo(dtype).eps, own))
    *counts, conditions = zip(*ranks, strict=True)
    return RankNumbers(*(sum(count) * layer.groups // groups for count in counts), max(conditions))


def _rank_and_ratio(A: Tensor, eps: float, law: int | None = None) -> tuple[int, float]:
    """Rank of A (m, n) with singular values below max(m, n)·eps·σ_max as zero, and its smallest σ kept / σ_max."""
    if min(A.shape) == 0:
        return 0, 0.0
    if min(A.shape) <= MAX_SVD_SIDE:
        return _count(svd(A)[1], max(A.shape) * eps)
    found = _gram_rank(A @ A.T if A.shape[0] < A.shape[1] else A.T @ A, max(A.shape) * eps)
    return _finer(found, A, eps, law)


def _finer(found: tuple[int, float], A: Tensor, eps: float, law: int | None) -> tuple[int, float]:
    """Rank and ratio from a Gram matrix, or by A itself where it is not too large and the law's rank is higher."""
    if law is None or found[0] >= law or min(A.shape) > MAX_FINE_SIDE:
        return found
    return _count(torch.linalg.svdvals(A), max(A.shape) * eps)


def pooling_rank(pool: Callable[[Tensor], Tensor], input_shape: tuple[int, ...]) -> int:
    """Rank of average pooling of (C, pixels along each axis) as a matrix: C times its ranks along the axes."""
    rank, *pixels = input_shape
    for axis, size in enumerate(pixels):
        shape = [size if a == axis else 1 for a in range(len(pixels))]
        images = torch.eye(size, dtype=torch.float64).reshape(size, 1, *shape).expand(size, 1, *pixels)
        rank *= int(torch.linalg.matrix_rank(pool(images).reshape(size, -1)))
    return rank


def _group(layer: Layer, dz: Tensor, eps: float, laws: RankLaws) -> RankNumbers:
    batch, (filters, channels) = len(dz), layer.weight.shape[:2]
    unknowns = batch * layer.unknowns
    if not blocks(layer):  # it reads only padding
        return RankNumbers(0, 0, 0, math.inf)
    rank_w, ratio_w = _weight_rank(layer, eps, None if laws.weights is None else laws.weights // batch)
    longest = max(max(filters * len(block.taps), batch * len(block.pixels)) for block in blocks(layer))
    one = replace(layer, weight=layer.weight[:, :1], input_shape=(1, *layer.input_shape[1:]))  # M serves every channel
    alone = solve_gradients(one, torch.zeros_like(one.weight), dz, longest * eps, trusted_ratio=0.0)
    gradients = channels * alone.rank
    if alone.V.shape[-1] == 0:
        return RankNumbers(batch * rank_w, gradients, unknowns, 1 / alone.sigma_min_kept)
    if rank_w == layer.unknowns and ratio_w > WEIGHTS_SUFFICE_RATIO:
        return RankNumbers(batch * rank_w, gradients, unknowns, 1 / ratio_w)
    A = torch.cat([weight_columns(layer, image) for image in alone.V])
    rank, ratio = _rank_and_ratio(A, eps, None if laws.both is None else laws.both - gradients)
    both = unknowns if rank_w == layer.unknowns else gradients + rank
    return RankNumbers(batch * rank_w, gradients, both, 1 / ratio if ratio else math.inf)


def _weight_rank(layer: Layer, eps: float, law: int | None) -> tuple[int, float]:
    """Rank and ratio of W; the Gram matrix of its shorter side comes from the sparse W where that is cheaper.

    A square W may be too ill-conditioned for a Gram matrix (LeNet's first layer: 5·10⁷); its own factors resolve it.
    """
    W = layer.weight.flatten(1) if layer.is_dense else weight_matrix(layer)
    if W.shape[0] == W.shape[1] > MAX_SVD_SIDE and not layer.is_dense:
        condition = weight_factor(layer).condition
        if condition * W.shape[0] * eps < 1:
            return W.shape[1], 1 / condition
    if min(W.shape) <= MAX_SVD_SIDE or layer.is_dense or W.nnz > 0.2 * math.prod(W.shape):
        return _rank_and_ratio(W if isinstance(W, Tensor) else torch.from_numpy(W.toarray()), eps, law)
    gram = W @ W.T if W.shape[0] < W.shape[1] else W.T @ W
    found = _gram_rank(torch.from_numpy(gram.toarray()), max(W.shape) * eps)
    fine = law is not None and found[0] < law and min(W.shape) <= MAX_FINE_SIDE
    return _finer(found, torch.from_numpy(W.toarray()), eps, law) if fine else found


def _count(S: Tensor, cut: float) -> tuple[int, float]:
    """Number of singular values above cut·σ_max, and the smallest of these over σ_max."""
    largest = S.max().item()
    kept = S[S > cut * largest] if largest > 0 else S[:0]
    return len(kept), kept.min().item() / largest if len(kept) else 0.0


def _gram_rank(gram: Tensor, cut: float) -> tuple[int, float]:
    """Rank and ratio of A from AᵀA: by a Cholesky factor where A has full rank, by eigenvalues otherwise."""
    cut = max(cut, GRAM_RESOLUTION)
    G = gram.numpy()
    factor, failed = scipy.linalg.lapack.dpotrf(G, lower=1)
    if not failed:
        rcond, _ = scipy.linalg.lapack.dpocon(factor, np.abs(G).sum(0).max(), uplo="L")
        if rcond**0.5 > 10 * cut:  # an estimate in the 1-norm, within a small factor of (σ_min / σ_max)²
            return len(G), _power_ratio(G, factor)
    return _count(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt(), cut)


def _power_ratio(G: np.ndarray, factor: np.ndarray, steps: int = 12) -> float:
    """σ_min / σ_max of A from AᵀA and its Cholesky factor, by power iteration (an upper bound, close)."""
    large = small = np.random.default_rng(0).standard_normal((len(G), 4))
    for _ in range(steps):
        large = np.linalg.qr(G @ large)[0]
        small = np.linalg.qr(scipy.linalg.cho_solve((factor, True), small, check_finite=False))[0]
    largest = np.linalg.eigvalsh(large.T @ G @ large)[-1]
    smallest = np.linalg.eigvalsh(small.T @ G @ small)[0]
    return float((max(smallest, 0.0) / largest) ** 0.5)
