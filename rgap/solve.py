"""One layer's input from its weight constraints W x = z − b and its gradient constraints (I ⊗ M) x = vec(G).

The order of steps is ours; the two kinds of constraints are the paper's (Zhu & Blaschko 2021, section 3). With M of
full column rank the gradient alone gives x. Otherwise the null space of M is small enough for a dense least-squares
problem in W, or W alone determines x and its sparse factorisation, which no gradient changes, is kept between attacks.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.chain import Layer
from rgap.constraints import blocks, gradient_matrix, gradient_values, split_groups, weight_columns
from rgap.dense import least_squares, svd
from rgap.results import LayerReport
from rgap.sparse import ConjugateGradients, weight_factor

DENSE_UNKNOWNS = 1600
"""Open unknowns up to which the dense problem in null(M) is preferred to a sparse one in W alone."""


DENSE_MOST = 10_000
"""Open unknowns up to which the dense problem is solved at all (1 GB); beyond, W's own minimum-norm solution stands."""

TRUSTED = 0.02
"""Directions of M whose singular value is below this share of the largest are shared with the weight constraints."""


@dataclass(frozen=True)
class LayerSolution:
    """A layer's input and what is left open.

    Attributes:
        x: The input, (C, H, W); of all solutions the one of minimum norm.
        null_basis: Orthonormal basis of the directions left open, (C·H·W, deficit), or None where nothing is.
        weak_basis: Where something is: directions that are determined, but badly, (C·H·W, w).
        weak_gain: How many times the pre-activation's error is their error, (w,).
        report: The layer's report.
    """

    x: Tensor
    null_basis: Tensor | None
    weak_basis: Tensor
    weak_gain: Tensor
    report: LayerReport


@dataclass(frozen=True)
class _Gradients:
    """What the gradient constraints say: x = x0 + (I ⊗ V) y, where ‖sigmas ∘ y‖ should be small.

    V holds M's null space (sigma 0) and, where that is not empty, the directions that M sees too dimly to be trusted
    alone: noise comes back divided by sigma.
    """

    x0: Tensor  # (H·W, C)
    V: Tensor  # (H·W, k)
    sigmas: Tensor  # (k,), singular values of M
    rank: int  # of M
    above: float  # smallest singular value kept, relative to the largest
    below: float | None  # largest dropped
    residual: float


def solve_layer(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, *, rcond: float) -> LayerSolution:
    """Recovers one layer's input from its weight and gradient constraints.

    Args:
        layer: The linear layer.
        G: Gradient of the loss by the weight, shaped as the weight.
        dz: Gradient of the loss by the pre-activation, (O, H′, W′).
        z: Pre-activation, (O, H′, W′).
        rcond: Singular values below rcond times the largest count as zero.

    Returns:
        A `LayerSolution`; where [W; K] falls short of full rank, its minimum-norm solution with the null basis.
    """
    start = time.perf_counter()
    parts = split_groups(layer)
    split = (t.chunk(len(parts)) for t in (G, dz, z))
    solutions = [_solve_group(*part, rcond) for part in zip(parts, *split, strict=True)]
    x = torch.cat([s.x for s in solutions])
    report = _merge(layer.name, [s.report for s in solutions], time.perf_counter() - start)
    bases = (s.null_basis if s.null_basis is not None else s.x.new_zeros(s.x.numel(), 0) for s in solutions)
    null = torch.block_diag(*bases)
    null = null if null.shape[1] else None
    weak = torch.block_diag(*(s.weak_basis for s in solutions))
    return LayerSolution(x, null, weak, torch.cat([s.weak_gain for s in solutions]), report)


def _solve_group(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, rcond: float) -> LayerSolution:
    z = (z - layer.pre_bias()).flatten()
    channels = layer.input_shape[0]
    at_least_open = layer.unknowns - channels * sum(min(len(G) * len(b.taps), len(b.pixels)) for b in blocks(layer))
    if at_least_open > DENSE_UNKNOWNS and len(z) >= layer.unknowns:
        factor = weight_factor(layer)
        if factor.full_rank:
            x, residual, iterations = factor.solve(z)
            report = LayerReport(
                layer.name,
                layer.unknowns,
                rank_weights=layer.unknowns,
                rank=layer.unknowns,
                deficit=0,
                condition=factor.condition,
                residual=residual,
                iterations=iterations,
            )
            return _determined(x, layer, report)
    if at_least_open > DENSE_MOST:
        return _too_large(layer, z)
    found = _from_gradients(layer, G, dz, rcond)
    if found.V.shape[1] == 0:
        report = LayerReport(
            layer.name,
            layer.unknowns,
            rank_gradients=layer.unknowns,
            rank=layer.unknowns,
            deficit=0,
            condition=1 / found.above,
            sigma_above_cut=found.above,
            sigma_below_cut=found.below,
            residual=found.residual,
        )
        return _determined(found.x0.T, layer, report)
    return _with_weights(layer, G, z, found, rcond)


def _too_large(layer: Layer, z: Tensor) -> LayerSolution:
    """The minimum-norm solution of W x = z alone, of a layer whose open unknowns no dense system can hold."""
    solver = ConjugateGradients(layer)
    x, residual, iterations = solver.solve(z)
    rank = layer.unknowns - solver.missing
    report = LayerReport(
        layer.name, layer.unknowns, rank, None, rank, solver.missing, residual=residual, iterations=iterations
    )
    return _determined(x, layer, report)


def _from_gradients(layer: Layer, G: Tensor, dz: Tensor, rcond: float) -> _Gradients:
    """Solves (I ⊗ M) x = vec(G) block by block; the cutoff is relative to M's largest singular value."""
    pixels, channels = math.prod(layer.input_shape[1:]), layer.input_shape[0]
    systems = []
    for block in blocks(layer):
        M = gradient_matrix(layer, block, dz)
        systems.append((block.pixels, gradient_values(layer, block, G), *svd(M, full_matrices=M.shape[0] < M.shape[1])))
    largest = max(S[0].item() for _, _, _, S, _ in systems)
    x0, missed = G.new_zeros(pixels, channels), 0.0
    untouched = torch.ones(pixels, dtype=torch.bool)
    bases, sigmas = [], []
    for places, values, U, S, Vh in systems:
        rank = int((S > rcond * largest).sum())
        coefficients = U[:, :rank].T @ values
        x0[places] = Vh[:rank].T @ (coefficients / S[:rank, None])
        missed += max(values.square().sum().item() - coefficients.square().sum().item(), 0.0)
        untouched[places] = False
        bases.append(_rows(Vh.T, places, pixels))
        sigmas.append(F.pad(S, (0, len(Vh) - len(S))))
    sigma = torch.cat(sigmas) / largest if largest > 0 else torch.cat(sigmas)
    kept, dropped = sigma[sigma > rcond], sigma[sigma <= rcond]
    full = len(kept) == pixels
    open_ = sigma <= (0.0 if full else max(rcond, TRUSTED))
    V = torch.cat([torch.cat(bases, 1)[:, open_], torch.eye(pixels, dtype=G.dtype)[:, untouched]], 1)
    weights = F.pad(torch.where(sigma > rcond, sigma, 0.0)[open_] * largest, (0, int(untouched.sum())))
    size = G.norm().item()
    return _Gradients(
        x0,
        V,
        weights,
        len(kept),
        kept.min().item() if len(kept) else 0.0,
        dropped.max().item() if len(dropped) else None,
        missed**0.5 / size if size > 0 else 0.0,
    )


def _with_weights(layer: Layer, G: Tensor, z: Tensor, found: _Gradients, rcond: float) -> LayerSolution:
    """Closes the null space of the gradient constraints by W x = z.

    Both kinds of rows are scaled by the size of their right-hand side: K's entries carry δz, which is tiny.
    """
    channels = layer.input_shape[0]
    A = weight_columns(layer, found.V)
    b = z - layer.apply(found.x0.T.reshape(layer.input_shape)).flatten()
    scale = _rms(z) / _rms(G) if G.any() else 0.0
    dim = (scale * found.sigmas).repeat(channels)
    dense = least_squares(A, b, rcond, dim)

    def spread(basis: Tensor | None) -> Tensor | None:  # of the open unknowns, to the layer's input
        if basis is None:
            return None
        pixels = torch.einsum("pk,ckd->cpd", found.V, basis.reshape(channels, found.V.shape[1], -1))
        return pixels.flatten(0, 1)

    x = found.x0.T.reshape(layer.input_shape) + spread(dense.y[:, None]).reshape(layer.input_shape)
    rank_gradients = channels * found.rank
    rank = layer.unknowns - (0 if dense.null is None else dense.null.shape[1])
    misfit = (b - A @ dense.y).norm().item() / max(z.norm().item(), torch.finfo(z.dtype).tiny)
    report = LayerReport(
        layer.name,
        layer.unknowns,
        rank_gradients=rank_gradients,
        rank=rank,
        deficit=layer.unknowns - rank,
        condition=1 / dense.above if dense.above else math.inf,
        sigma_above_cut=dense.above,
        sigma_below_cut=dense.below,
        residual=misfit,
    )
    return LayerSolution(x, spread(dense.null), spread(dense.weak), 1 / dense.weak_sigmas, report)


def _determined(x: Tensor, layer: Layer, report: LayerReport) -> LayerSolution:
    """A solution that leaves nothing open."""
    return LayerSolution(x.reshape(layer.input_shape), None, x.new_zeros(layer.unknowns, 0), x.new_zeros(0), report)


def _rms(values: Tensor) -> float:
    largest = values.abs().max()  # squares of the smallest gradients underflow
    return (largest * (values / largest).square().mean().sqrt()).item() if largest > 0 else 0.0


def _rows(values: Tensor, rows: Tensor, size: int) -> Tensor:
    result = values.new_zeros(size, values.shape[1])
    result[rows] = values
    return result


def _merge(name: str, reports: list[LayerReport], seconds: float) -> LayerReport:
    """One report for the groups of a layer: counts add up, the worst value of the rest stands for all."""

    def over(field: str, combine):
        values = [getattr(r, field) for r in reports]
        return None if any(v is None for v in values) else combine(values)

    counts = {f: over(f, sum) for f in ("unknowns", "rank_weights", "rank_gradients", "rank", "deficit")}
    worst = {f: over(f, max) for f in ("iterations", "condition", "sigma_below_cut", "residual")}
    return LayerReport(name, **counts, **worst, sigma_above_cut=over("sigma_above_cut", min), seconds=seconds)
