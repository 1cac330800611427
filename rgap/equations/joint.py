"""One layer of a mini-batch: the inputs of all images together, each image exactly (ours).

W x_b = z_b − b holds for each image alone, the gradient constraints are shared. Where these determine every channel
nothing else is needed; else one kind of constraints goes first and the other one decides what it leaves open, in the
order that leaves less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.equations.blocks import blocks, split_groups
from rgap.equations.joint_dense import solve_normal
from rgap.equations.joint_system import ReducedSystem, gradient_first, shared_gradient, weights_first
from rgap.equations.joint_weights import null_directions, weak_subspace
from rgap.equations.solution import DEFAULT_LIMITS, SolverLimits, merged_report
from rgap.equations.weights import ConjugateGradients, weight_factor
from rgap.linalg import LeastSquares
from rgap.network.layer import Layer
from rgap.results import LayerReport

MAX_RCOND_WEIGHTS_FIRST = 3e-5
"""Cutoff, which follows the gradient's precision, up to which W may go first in directions that it sees dimly."""


@dataclass(frozen=True)
class JointSolution:
    """The inputs of one layer for all images, and what is left open.

    Attributes:
        x: (B, C, H, W); of all solutions the one of minimum norm.
        report: The layer's report; counts are over all images.
        systems: For each group of channels what was solved, None where W or the gradients alone did.
        nulls: For each of them an orthonormal basis of what it leaves open, None where that is nothing.
        sensitivity: As in `LayerSolution`.
    """

    x: Tensor
    report: LayerReport
    systems: tuple[ReducedSystem | None, ...]
    nulls: tuple[Tensor | None, ...]
    sensitivity: Callable[[Tensor, Tensor], Tensor]

    def null_basis(self) -> Tensor | None:
        """Orthonormal basis of the directions left open, (B·C·H·W, deficit), or None where nothing is."""
        count, width = len(self.x), sum(0 if null is None else null.shape[1] for null in self.nulls)
        if not width:
            return None
        placed, columns = [], 0
        for system, null in zip(self.systems, self.nulls, strict=True):
            part = self.x.new_zeros(count, self.x[0].numel() // len(self.systems), width)
            if system is not None and null is not None:
                part[:, :, columns : columns + null.shape[1]] = system.spread(null)
                columns += null.shape[1]
            placed.append(part)
        return torch.cat(placed, 1).flatten(0, 1)


def solve_joint(
    layer: Layer, G: Tensor, dz: Tensor, z: Tensor, *, rcond: float, limits: SolverLimits = DEFAULT_LIMITS
) -> JointSolution:
    """Recovers one layer's inputs of all images of a batch from its weights and the gradient of their mean loss.

    Args:
        layer: The linear layer.
        G: Gradient of the mean loss by the weight, shaped as the weight; zeros of a fixed layer.
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).
        z: Pre-activations, (B, O, H′, W′).
        rcond: Singular values below rcond times the largest count as zero.
        limits: Sizes and ratios that choose the way.

    Returns:
        A `JointSolution`; where the constraints fall short of full rank, the minimum-norm solution with the null basis.
    """
    start = time.perf_counter()
    parts = split_groups(layer)
    chunks = zip(parts, G.chunk(len(parts)), *(t.chunk(len(parts), 1) for t in (dz, z)), strict=True)
    solved = [_solve_group(*chunk, rcond, limits) for chunk in chunks]
    x = torch.cat([s.x for s in solved], 1)
    report = merged_report(layer.name, [s.report for s in solved], time.perf_counter() - start)
    systems, nulls = (tuple(part for s in solved for part in getattr(s, field)) for field in ("systems", "nulls"))

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        changes = zip(solved, dG.chunk(len(parts)), z_change.chunk(len(parts), 1), strict=True)
        return torch.cat([s.sensitivity(*change) for s, *change in changes], 1)

    return JointSolution(x, report, systems, nulls, sensitivity)


def _solve_group(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, rcond: float, limits: SolverLimits) -> JointSolution:
    z, count = z - layer.pre_bias(), len(z)
    channels, outputs = layer.input_shape[0], math.prod(layer.output_shape)
    left_open = count * layer.unknowns - channels * sum(
        min(len(G) * len(b.taps), count * len(b.pixels)) for b in blocks(layer)
    )
    if left_open > limits.dense_unknowns_batch and outputs >= layer.unknowns:
        factor = weight_factor(layer, None, limits.max_factor_unknowns)
        if factor.full_rank and (
            factor.condition < limits.well_conditioned_batch or left_open > limits.max_dense_unknowns_batch
        ):
            return _by_weights(layer, z, factor)
    precise = rcond <= MAX_RCOND_WEIGHTS_FIRST or left_open > limits.max_dense_unknowns_batch
    if count * max(layer.unknowns - outputs, 1) < limits.weights_first_ratio * left_open and (
        precise or outputs < layer.unknowns
    ):
        dim = weak_subspace(layer, limits.weak_ratio) if precise else null_directions(layer)
        if dim is not None and not len(dim.sigmas):
            return _by_weights(layer, z, weight_factor(layer, None, limits.max_factor_unknowns))
        if dim is not None and count * len(dim.sigmas) < min(
            limits.weights_first_ratio * left_open, limits.max_dense_unknowns_batch
        ):
            return _closed(layer, weights_first(layer, G, dz, z, dim), rcond, count * outputs)
    if left_open > limits.max_dense_unknowns_batch:
        return _minimum_norm(layer, z)
    found = shared_gradient(layer, G, dz, rcond, limits.trusted_ratio)
    if found.V.shape[2] == 0:
        counts = {"rank_gradients": count * layer.unknowns, "rank": count * layer.unknowns, "deficit": 0}
        report = LayerReport(
            layer.name,
            count * layer.unknowns,
            **counts,
            condition=1 / found.above,
            sigma_above_cut=found.above,
            sigma_below_cut=found.below,
            residual=found.residual,
        )

        def on_input(x: Tensor) -> Tensor:
            return x.transpose(1, 2).reshape(count, *layer.input_shape)

        return JointSolution(
            on_input(found.x0), report, (None,), (None,), lambda dG, _: on_input(found.sensitivity(dG))
        )
    return _closed(layer, gradient_first(layer, G, z, found), rcond, None)


def _closed(layer: Layer, system: ReducedSystem, rcond: float, rank_weights: int | None) -> JointSolution:
    """Solves for what one kind of constraints leaves open."""
    dense: LeastSquares = solve_normal(system.normal, system.b, rcond)
    count = len(system.x0)
    x = (system.x0 + system.spread(dense.y)).reshape(count, *layer.input_shape)
    deficit = 0 if dense.null is None else dense.null.shape[1]
    misfit = (system.b - system.normal.apply(dense.y)).norm().item()
    report = LayerReport(
        layer.name,
        count * layer.unknowns,
        rank_weights=rank_weights,
        rank_gradients=system.rank_gradients,
        rank=count * layer.unknowns - deficit,
        deficit=deficit,
        condition=1 / dense.above if dense.above else math.inf,
        sigma_above_cut=dense.above,
        sigma_below_cut=dense.below,
        residual=misfit / system.size if system.size > 0 else 0.0,
    )

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        x0, b = system.change(dG, z_change)
        y = dense.invert(system.normal.adjoint(b)[:, None])[:, 0]
        return (x0 + system.spread(y)).reshape(x.shape)

    return JointSolution(x, report, (system,), (dense.null,), sensitivity)


def _by_weights(layer: Layer, z: Tensor, factor) -> JointSolution:
    """Each image by W alone."""
    solved = [factor.solve(image.flatten()) for image in z]
    x = torch.stack([s[0] for s in solved]).reshape(len(z), *layer.input_shape)
    full = len(z) * layer.unknowns
    residual, iterations = max(s[1] for s in solved), max(s[2] for s in solved)
    report = LayerReport(
        layer.name,
        full,
        rank_weights=full,
        rank=full,
        deficit=0,
        condition=factor.condition,
        residual=residual,
        iterations=iterations,
    )

    def sensitivity(_: Tensor, z_change: Tensor) -> Tensor:
        return torch.stack([factor.sensitivity(image.flatten()) for image in z_change]).reshape(x.shape)

    return JointSolution(x, report, (None,), (None,), sensitivity)


def _minimum_norm(layer: Layer, z: Tensor) -> JointSolution:
    """W's minimum-norm solutions alone, of a layer whose open unknowns no dense system can hold."""
    solver = ConjugateGradients(layer)
    solved = [solver.solve(image) for image in z]
    x = torch.stack([s[0] for s in solved]).reshape(len(z), *layer.input_shape)
    full, deficit = len(z) * layer.unknowns, len(z) * solver.missing
    report = LayerReport(
        layer.name, full, full - deficit, None, full - deficit, deficit, residual=max(s[1] for s in solved)
    )

    def sensitivity(_: Tensor, z_change: Tensor) -> Tensor:
        return torch.stack([solver.sensitivity(image.flatten()) for image in z_change]).reshape(x.shape)

    return JointSolution(x, report, (None,), (None,), sensitivity)
