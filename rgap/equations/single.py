"""One layer's input from its weight constraints W x = z − b and its gradient constraints (I ⊗ M) x = vec(G).

The order of steps is ours; the two kinds of constraints are the paper's (Zhu & Blaschko 2021, section 3). With M of
full column rank the gradient alone gives x. Otherwise the null space of M is small enough for a dense least-squares
problem in W, or W alone determines x and its sparse factorisation, which no gradient changes, is kept between attacks.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from rgap.equations.blocks import blocks, split_groups, weight_columns
from rgap.equations.gradient import GradientSolution, solve_gradients
from rgap.equations.iterated import rows_known, solve_jointly
from rgap.equations.solution import DEFAULT_LIMITS, ImageSolution, SolverLimits, determined, merged_report
from rgap.equations.structured import spread, weights_on
from rgap.equations.weights import weight_factor
from rgap.linalg import RESOLUTION, Operator, dense_operator, least_squares, rms
from rgap.network.layer import Layer
from rgap.results import LayerReport

ALONE = 1e-4
"""Largest relative error of x with which the solution of a W of larger condition number is."""

ROUNDING = 1e-14
"""Relative error that z has at least."""


def solve_image(
    layer: Layer,
    G: Tensor,
    dz: Tensor,
    z: Tensor,
    *,
    rcond: float,
    known: Tensor | None = None,
    precision: float = 0.0,
    limits: SolverLimits = DEFAULT_LIMITS,
) -> ImageSolution:
    """Recovers one layer's input from its weight and gradient constraints.

    Args:
        layer: The linear layer.
        G: Gradient of the loss by the weight, shaped as the weight; zeros of a fixed layer.
        dz: Gradient of the loss by the pre-activation, (O, H′, W′).
        z: Pre-activation, (O, H′, W′).
        rcond: Singular values below rcond times the largest count as zero.
        limits: Sizes and ratios that choose the way.
        known: Mask of the entries of z that are known, None for all: W's other rows are not used.
        precision: Relative error of the gradient, and so of z: decides whether an ill-conditioned W is trusted alone.

    Returns:
        A `ImageSolution`; where [W; K] falls short of full rank, its minimum-norm solution with the null basis.
    """
    start = time.perf_counter()
    if layer.is_fixed and known is None:
        return _solve_fixed(layer, z, start, limits)
    parts = split_groups(layer)
    masks = [None] * len(parts) if known is None else [mask.flatten() for mask in known.chunk(len(parts))]
    split = (t.chunk(len(parts)) for t in (G, dz, z))
    solutions = [_solve_group(*part, rcond, precision, limits) for part in zip(parts, *split, masks, strict=True)]
    x = torch.cat([s.x for s in solutions])
    report = merged_report(layer.name, [s.report for s in solutions], time.perf_counter() - start)
    bases = (s.null_basis if s.null_basis is not None else s.x.new_zeros(s.x.numel(), 0) for s in solutions)
    null = torch.block_diag(*bases)
    null = null if null.shape[1] else None
    weak = torch.block_diag(*(s.weak_basis for s in solutions))

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        changes = zip(solutions, dG.chunk(len(parts)), z_change.chunk(len(parts)), strict=True)
        return torch.cat([s.sensitivity(*change) for s, *change in changes])

    noise = max((s.noise_std for s in solutions if s.noise_std is not None), default=None)
    return ImageSolution(x, null, weak, torch.cat([s.weak_gain for s in solutions]), report, sensitivity, noise)


def _solve_fixed(layer: Layer, z: Tensor, start: float, limits: SolverLimits) -> ImageSolution:
    """By the pseudo-inverse of the map of pixels, which acts on every channel alike."""
    y = z - layer.pre_bias()
    channels, missing, null = layer.input_shape[0], 0, None
    x = y if layer.after is None else layer.after.solve(y)
    if layer.after is not None and not layer.after.injective:
        missing = layer.unknowns - channels * layer.after.rank
        if missing * layer.unknowns <= limits.max_null_entries:
            null = torch.kron(torch.eye(channels, dtype=z.dtype), layer.after.null_basis())
    rank = layer.unknowns - missing
    report = LayerReport(layer.name, layer.unknowns, rank, 0, rank, missing, seconds=time.perf_counter() - start)

    def sensitivity(_: Tensor, z_change: Tensor) -> Tensor:
        return z_change if layer.after is None else layer.after.solve(z_change)

    return ImageSolution(x, null, x.new_zeros(layer.unknowns, 0), x.new_zeros(0), report, sensitivity)


def _solve_group(
    layer: Layer, G: Tensor, dz: Tensor, z: Tensor, known: Tensor | None, rcond: float, precision: float,
    limits: SolverLimits,
) -> ImageSolution:  # fmt: skip
    z = (z - layer.pre_bias()).flatten()
    if known is not None:
        z = z[known]
    channels = layer.input_shape[0]
    at_least_open = layer.unknowns - channels * sum(min(len(G) * len(b.taps), len(b.pixels)) for b in blocks(layer))
    if at_least_open > limits.dense_unknowns and len(z) >= layer.unknowns:
        factor = weight_factor(layer, known, limits.max_factor_unknowns)
        close = factor.condition <= max(limits.well_conditioned, ALONE / max(precision, ROUNDING))
        if factor.full_rank and (close or at_least_open > limits.max_dense_unknowns):
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
            return determined(x, layer, report, lambda _, change: factor.sensitivity(rows_known(change, known)))
    if at_least_open > limits.iterative_unknowns:
        solution = solve_jointly(layer, G, dz, z, known, at_least_open, limits.max_dense_unknowns)
        if solution is not None:
            return solution
    found = solve_gradients(layer, G, dz, rcond, limits.trusted_ratio)
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
        solution = determined(found.x0.T, layer, report, lambda change, _: found.sensitivity(change).T)
        return replace(solution, noise_std=found.noise_std)
    return _with_weights(layer, G, z, known, found, rcond)


def _with_weights(
    layer: Layer, G: Tensor, z: Tensor, known: Tensor | None, found: GradientSolution, rcond: float
) -> ImageSolution:
    """Closes the null space of the gradient constraints by W x = z.

    Both kinds of rows are scaled by the size of their right-hand side: K's entries carry δz, which is tiny.
    """
    channels = layer.input_shape[0]
    x0 = found.x0.T.reshape(layer.input_shape)
    A = weights_on(layer, found.V) if known is None else dense_operator(weight_columns(layer, found.V)[known])
    A = _without_rounding(A, layer, rcond)
    b = z - rows_known(layer.apply(x0), known)
    scale = (rms(z) / rms(G)).item() if G.any() and len(z) else 0.0
    dense = least_squares(A, b, rcond, (scale * found.sigmas).repeat(channels))

    def on_input(Y: Tensor | None) -> Tensor | None:  # of the open unknowns, to the layer's input
        return None if Y is None else spread(found.V, Y, channels)

    y = dense.y[:, None]
    x = x0 + on_input(y).reshape(layer.input_shape)
    rank_gradients = channels * found.rank
    rank = layer.unknowns - (0 if dense.null is None else dense.null.shape[1])
    misfit = (b - A.apply(y)[:, 0]).norm().item() / max(z.norm().item(), torch.finfo(z.dtype).tiny)
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

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        change = found.sensitivity(dG).T.reshape(layer.input_shape)
        rest = rows_known(z_change, known) - rows_known(layer.apply(change), known)
        return change + on_input(dense.invert(A.adjoint(rest[:, None]))).reshape(layer.input_shape)

    weak = on_input(dense.weak)
    return ImageSolution(x, on_input(dense.null), weak, 1 / dense.weak_sigmas, report, sensitivity)


def _without_rounding(A: Operator, layer: Layer, rcond: float) -> Operator:
    """A, or zeros in place of an A that is but rounding: W repeats K there."""
    unit = layer.weight.flatten(1).norm(dim=1).max()
    if A.gram.trace() > (max(rcond, RESOLUTION) * unit) ** 2 or A.matrix().norm() > rcond * unit:
        return A
    nothing = torch.zeros_like
    return Operator(nothing(A.gram), lambda Y: A.apply(nothing(Y)), lambda R: A.adjoint(nothing(R)))
