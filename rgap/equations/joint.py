"""One layer of a mini-batch: the inputs of all images together, each image exactly (ours).

W x_b = z_b − b holds for each image alone, the gradient constraints are shared. Where these determine every channel
nothing else is needed; else one kind of constraints goes first and the other one decides what it leaves open, in the
order that leaves less.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.equations.blocks import blocks, split_groups
from rgap.equations.joint_dense import solve_normal
from rgap.equations.joint_system import ReducedSystem, gradient_first, shared_gradient, weights_first
from rgap.equations.joint_weights import null_directions, weak_subspace
from rgap.equations.solution import merged_report
from rgap.equations.solve import solve_layer
from rgap.equations.weights import ConjugateGradients, weight_factor
from rgap.linalg import LeastSquares
from rgap.network.chain import Layer
from rgap.results import LayerReport

WEIGHTS_ALONE = 300.0
"""Condition number of W up to which W alone is used where the gradients leave many unknowns open."""

FEW = 800
"""Unknowns that the gradients may leave open before W alone is preferred."""

WORTH = 1 / 3
"""Share of what the gradients leave open up to which W goes first: it is the quicker way, and passes on more error."""

PRECISE = 3e-5
"""Cutoff, which follows the gradient's precision, up to which W may go first in directions that it sees dimly."""

MOST = 12_000
"""Open unknowns up to which a dense system is solved at all (1.2 GB)."""


@dataclass(frozen=True)
class JointSolution:
    """The inputs of one layer for all images, and what is left open.

    Attributes:
        x: (B, C, H, W); of all solutions the one of minimum norm.
        report: The layer's report; counts are over all images.
        systems: For each group of channels what was solved, None where W or the gradients alone did.
        nulls: For each of them an orthonormal basis of what it leaves open, None where that is nothing.
    """

    x: Tensor
    report: LayerReport
    systems: tuple[ReducedSystem | None, ...]
    nulls: tuple[Tensor | None, ...]

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


def solve_joint(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, *, rcond: float) -> JointSolution:
    """Recovers one layer's inputs of all images of a batch from its weights and the gradient of their mean loss.

    Args:
        layer: The linear layer.
        G: Gradient of the mean loss by the weight, shaped as the weight; zeros of a fixed layer.
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).
        z: Pre-activations, (B, O, H′, W′).
        rcond: Singular values below rcond times the largest count as zero.

    Returns:
        A `JointSolution`; where the constraints fall short of full rank, the minimum-norm solution with the null basis.
    """
    start = time.perf_counter()
    if layer.is_fixed:
        return _one_by_one(layer, G, dz, z, rcond)
    parts = split_groups(layer)
    chunks = zip(parts, G.chunk(len(parts)), *(t.chunk(len(parts), 1) for t in (dz, z)), strict=True)
    solved = [_solve_group(*chunk, rcond) for chunk in chunks]
    x = torch.cat([s.x for s in solved], 1)
    report = merged_report(layer.name, [s.report for s in solved], time.perf_counter() - start)
    systems, nulls = (tuple(part for s in solved for part in getattr(s, field)) for field in ("systems", "nulls"))
    return JointSolution(x, report, systems, nulls)


def _one_by_one(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, rcond: float) -> JointSolution:
    """Each image alone: a normalisation or pooling of its own shares no gradient."""
    start = time.perf_counter()
    solved = [solve_layer(layer, G, *one, rcond=rcond) for one in zip(dz, z, strict=True)]
    report = merged_report(layer.name, [s.report for s in solved], time.perf_counter() - start)
    return JointSolution(torch.stack([s.x for s in solved]), report, (None,), (None,))


def _solve_group(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, rcond: float) -> JointSolution:
    z, count = z - layer.pre_bias(), len(z)
    channels, outputs = layer.input_shape[0], math.prod(layer.output_shape)
    left_open = count * layer.unknowns - channels * sum(
        min(len(G) * len(b.taps), count * len(b.pixels)) for b in blocks(layer)
    )
    if left_open > FEW and outputs >= layer.unknowns:
        factor = weight_factor(layer)
        if factor.full_rank and (factor.condition < WEIGHTS_ALONE or left_open > MOST):
            return _by_weights(layer, z, factor)
    precise = rcond <= PRECISE or left_open > MOST
    if count * max(layer.unknowns - outputs, 1) < WORTH * left_open and (precise or outputs < layer.unknowns):
        dim = weak_subspace(layer) if precise else null_directions(layer)
        if dim is not None and not len(dim.sigmas):
            return _by_weights(layer, z, weight_factor(layer))
        if dim is not None and count * len(dim.sigmas) < min(WORTH * left_open, MOST):
            return _closed(layer, weights_first(layer, G, dz, z, dim), rcond, count * outputs)
    if left_open > MOST:
        return _minimum_norm(layer, z)
    found = shared_gradient(layer, G, dz, rcond)
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
        return JointSolution(found.x0.transpose(1, 2).reshape(count, *layer.input_shape), report, (None,), (None,))
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
    return JointSolution(x, report, (system,), (dense.null,))


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
    return JointSolution(x, report, (None,), (None,))


def _minimum_norm(layer: Layer, z: Tensor) -> JointSolution:
    """W's minimum-norm solutions alone, of a layer whose open unknowns no dense system can hold."""
    solver = ConjugateGradients(layer)
    solved = [solver.solve(image) for image in z]
    x = torch.stack([s[0] for s in solved]).reshape(len(z), *layer.input_shape)
    full, deficit = len(z) * layer.unknowns, len(z) * solver.missing
    report = LayerReport(
        layer.name, full, full - deficit, None, full - deficit, deficit, residual=max(s[1] for s in solved)
    )
    return JointSolution(x, report, (None,), (None,))
