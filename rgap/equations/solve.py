"""One layer's inputs for all images at once, from W x_b = z_b − b and the shared gradient equations.

The two kinds of equations are the paper's (Zhu & Blaschko 2021, section 3), the order of steps is ours. Where the
gradients determine every channel nothing else is needed. Where they leave many unknowns open W alone may determine x:
its factorisation, which no gradient changes, is kept between attacks. Else one kind goes first and the other decides
what it leaves open, by a dense least-squares problem, or conjugate gradients take both where that would be too large.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rgap.equations.blocks import blocks, split_groups
from rgap.equations.complement import weak_subspace
from rgap.equations.gradient import solve_gradients
from rgap.equations.limits import DEFAULT_LIMITS, SolverLimits
from rgap.equations.rank_laws import layer_laws
from rgap.equations.solution import LayerSolution
from rgap.equations.systems import ReducedSystem, gradients_first, rows_known, rows_scale, weights_first
from rgap.equations.weights import ConjugateGradients, SparseFactor, weight_factor
from rgap.linalg import least_squares
from rgap.network.layer import Layer
from rgap.results import LayerReport

MAX_WEIGHTS_ONLY_ERROR = 1e-4
"""Largest relative error of x with which W alone is trusted where it is ill-conditioned."""

FLOAT64_FLOOR = 1e-14
"""Relative error that z has at least."""

MAX_RCOND_WEIGHTS_FIRST = 3e-5
"""Cutoff, which follows the gradient's precision, up to which W may go first in directions that it sees badly."""

ROUGH = {"tolerance": 1e-3, "max_iterations": 300}
"""How far a system is solved that leaves something open."""


def solve_layer(
    layer: Layer,
    G: Tensor,
    dz: Tensor,
    z: Tensor,
    *,
    rcond: float,
    known: Tensor | None = None,
    precision: float = 0.0,
    limits: SolverLimits = DEFAULT_LIMITS,
) -> LayerSolution:
    """Recovers one layer's inputs from its weight and gradient equations.

    Args:
        layer: The linear layer.
        G: Gradient of the mean loss by the weight, shaped as the weight; zeros of a fixed layer.
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).
        z: Pre-activations, (B, O, H′, W′).
        rcond: Singular values below rcond times the largest count as zero.
        known: Mask of the entries of z that are known, (1, O, H′, W′), None for all: W's other rows are not used.
        precision: Relative error of the gradient, and so of z: decides whether an ill-conditioned W is trusted alone;
            one image only.
        limits: Sizes and ratios that choose the way.

    Returns:
        A `LayerSolution`; where [W; K] falls short of full rank, its minimum-norm solution with the null basis.

    Raises:
        ValueError: If shapes do not fit the layer, or a mask is given for more than one image.
    """
    start = time.perf_counter()
    shape = (len(z), *layer.output_shape)
    for name, value in {"dz": dz, "z": z, "known": z if known is None else known}.items():
        if value.shape != shape:
            raise ValueError(f"layer {layer.name!r}: {name} is {tuple(value.shape)}, but must be {shape}")
    if known is not None and len(z) > 1:
        raise ValueError(f"layer {layer.name!r}: a mask of known outputs needs a single image, not {len(z)}")
    if layer.is_fixed and known is None:
        solutions = [_fixed(layer, z, limits)]
    else:
        parts = split_groups(layer)
        masks = [None] * len(parts) if known is None else known.chunk(len(parts), 1)
        split = (G.chunk(len(parts)), dz.chunk(len(parts), 1), z.chunk(len(parts), 1), masks)
        solutions = [
            _solve(_Problem(part, G, dz, z - part.pre_bias(), mask, rcond, precision, limits))
            for part, G, dz, z, mask in zip(parts, *split, strict=True)
        ]
    return _merged(layer.name, solutions, time.perf_counter() - start)


@dataclass(frozen=True)
class _Problem:
    """The equations of one group of channels."""

    layer: Layer
    G: Tensor
    dz: Tensor
    z: Tensor  # (B, O, H′, W′), less the bias
    known: Tensor | None
    rcond: float
    precision: float
    limits: SolverLimits

    @property
    def unknowns(self) -> int:
        """Over all images."""
        return len(self.z) * self.layer.unknowns

    @property
    def is_batch(self) -> bool:
        """Whether there is more than one image."""
        return len(self.z) > 1

    @cached_property
    def left_open(self) -> int:
        """Unknowns that the gradients leave open at least, by their number."""
        sizes = ((len(self.G) * len(b.taps), len(self.z) * len(b.pixels)) for b in blocks(self.layer))
        return self.unknowns - self.layer.input_shape[0] * sum(min(size) for size in sizes)

    @property
    def is_too_large(self) -> bool:
        """Whether no dense system can hold what the gradients leave open."""
        limits = self.limits
        return self.left_open > (limits.max_dense_unknowns_batch if self.is_batch else limits.max_dense_unknowns)

    def report(self, rank: int, **fields) -> LayerReport:
        """A report on all images."""
        return LayerReport(self.layer.name, self.unknowns, rank=rank, deficit=self.unknowns - rank, **fields)


def _solve(problem: _Problem) -> LayerSolution:
    """The first way that is open to a problem."""
    between = (_weights_before_gradients, _minimum_norm) if problem.is_batch else (_iterate,)
    for way in (_weights_alone, *between):
        if (solution := way(problem)) is not None:
            return solution
    return _gradients_before_weights(problem)


def _fixed(layer: Layer, z: Tensor, limits: SolverLimits) -> LayerSolution:
    """By the pseudo-inverse of the map of pixels, which acts on every channel alike."""

    def solve(y: Tensor) -> Tensor:
        return y if layer.after is None else layer.after.solve(y)

    count, channels, missing, null = len(z), layer.input_shape[0], 0, None
    if layer.after is not None and not layer.after.injective:
        missing = layer.unknowns - channels * layer.after.rank
        if missing * layer.unknowns <= limits.max_null_entries:

            def null() -> Tensor:
                return torch.kron(torch.eye(count * channels, dtype=z.dtype), layer.after.null_basis())

    rank = count * (layer.unknowns - missing)
    report = LayerReport(layer.name, count * layer.unknowns, rank, 0, rank, count * missing)
    return LayerSolution(solve(z - layer.pre_bias()), report, lambda _, z_change: solve(z_change), (null,))


def _weights_alone(problem: _Problem) -> LayerSolution | None:
    """W alone, where it determines x well and the gradients leave much open."""
    layer, limits, known = problem.layer, problem.limits, problem.known
    rows = problem.z[0].numel() if known is None else int(known.sum())
    if problem.is_batch:
        many, allowed = limits.dense_unknowns_batch, limits.well_conditioned_batch
    else:
        precise = MAX_WEIGHTS_ONLY_ERROR / max(problem.precision, FLOAT64_FLOOR)
        many, allowed = limits.dense_unknowns, max(limits.well_conditioned, precise)
    if problem.left_open <= many or rows < layer.unknowns:
        return None
    factor = weight_factor(layer, None if known is None else known[0], limits.max_factor_unknowns)
    if not factor.full_rank or (factor.condition > allowed and not problem.is_too_large):
        return None
    return _by_weights(problem, factor)


def _by_weights(problem: _Problem, factor: SparseFactor | ConjugateGradients, missing: int = 0) -> LayerSolution:
    """Each image by W alone, which leaves so many of its unknowns open."""
    solved, residuals, iterations = zip(*(factor.solve(image) for image in problem.z), strict=True)
    x = torch.stack(solved).reshape(-1, *problem.layer.input_shape)
    rank, fields = problem.unknowns - len(x) * missing, {"residual": max(residuals)}
    if not missing:
        fields |= {"condition": factor.condition, "iterations": max(iterations)}

    def sensitivity(_: Tensor, z_change: Tensor) -> Tensor:
        return torch.stack([factor.sensitivity(image) for image in z_change]).reshape(x.shape)

    return LayerSolution(x, problem.report(rank, rank_weights=rank, **fields), sensitivity)


def _weights_before_gradients(problem: _Problem) -> LayerSolution | None:
    """W first, where it leaves much less open than the gradients do."""
    layer, limits, (count, *outputs) = problem.layer, problem.limits, problem.z.shape
    lacking = layer.unknowns - math.prod(outputs)
    few = limits.weights_first_ratio * problem.left_open
    precise = problem.rcond <= MAX_RCOND_WEIGHTS_FIRST or problem.is_too_large
    if count * max(lacking, 1) >= few or not (precise or lacking > 0):
        return None
    weak = weak_subspace(layer, limits.weak_ratio if precise else 0, limits.max_pinv_side)
    if weak is None or count * len(weak.sigmas) >= min(few, limits.max_dense_unknowns_batch):
        return None
    if not len(weak.sigmas):
        return _by_weights(problem, weight_factor(layer, None, limits.max_factor_unknowns))
    return _reduced(problem, weights_first(layer, problem.G, problem.dz, problem.z, weak))


def _minimum_norm(problem: _Problem) -> LayerSolution | None:
    """W's minimum-norm solutions alone, where no dense system can hold the open unknowns of a batch."""
    if not problem.is_too_large:
        return None
    solver = ConjugateGradients(problem.layer)
    return _by_weights(problem, solver, solver.missing)


def _iterate(problem: _Problem) -> LayerSolution | None:
    """Both kinds of one image's equations together by conjugate gradients; None where a dense system says more.

    Where the rank law leaves something open, and no dense system can hold it, the iterations stop early: what they
    find is the solution of minimum norm, roughly, and the report has the law's rank. Without a law the rank is that by
    which a random vector comes back.
    """
    layer, G, z, known = problem.layer, problem.G, problem.z, problem.known
    if problem.left_open <= problem.limits.iterative_unknowns:
        return None
    law = layer_laws(layer).both
    missing = 0 if law is None else layer.unknowns - law
    if missing and not problem.is_too_large:
        return None
    scale = rows_scale(rows_known(z, known), G)
    solver = ConjugateGradients(layer, None if known is None else known[0], scale * problem.dz[0])
    x, residual, iterations = solver.solve(z[0], scale * G, **(ROUGH if missing else {}))
    fields = {"condition": solver.condition, "residual": residual, "iterations": iterations}
    missing = missing or solver.missing
    if missing and not problem.is_too_large:
        return None

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        return solver.sensitivity(z_change[0], scale * dG).reshape(1, *layer.input_shape)

    x = x.reshape(1, *layer.input_shape)
    return LayerSolution(x, problem.report(layer.unknowns - missing, **fields), sensitivity)


def _gradients_before_weights(problem: _Problem) -> LayerSolution:
    """The gradients first; W decides what they leave open, if anything."""
    layer, G, rcond = problem.layer, problem.G, problem.rcond
    found = solve_gradients(layer, G, problem.dz, rcond, problem.limits.trusted_ratio)
    if found.V.shape[2]:
        return _reduced(problem, gradients_first(layer, G, problem.z, problem.known, found, rcond))
    report = problem.report(
        problem.unknowns,
        rank_gradients=problem.unknowns,
        condition=1 / found.sigma_min_kept,
        sigma_above_cut=found.sigma_min_kept,
        sigma_below_cut=found.sigma_max_dropped,
        residual=found.residual,
    )
    return LayerSolution(found.x0, report, lambda dG, _: found.sensitivity(dG), noise_std=found.noise_std)


def _reduced(problem: _Problem, system: ReducedSystem) -> LayerSolution:
    """Solves for what one kind of equations leaves open."""
    found = least_squares(system.A, system.b, problem.rcond, system.damping, gram_only=problem.is_batch)
    y = found.y[:, None]
    x = (system.x0 + system.spread(y)[:, :, 0]).reshape(-1, *problem.layer.input_shape)
    report = problem.report(
        problem.unknowns - (0 if found.null is None else found.null.shape[1]),
        rank_weights=system.rank_weights,
        rank_gradients=system.rank_gradients,
        condition=found.condition,
        sigma_above_cut=found.sigma_min_kept,
        sigma_below_cut=found.sigma_max_dropped,
        residual=(system.b - system.A.apply(y)[:, 0]).norm().item() / system.size,
    )

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        x0, b = system.change(dG, z_change)
        return (x0 + system.spread(found.invert(system.A.adjoint(b[:, None])))[:, :, 0]).reshape(x.shape)

    def null() -> Tensor:
        return system.spread(found.null).flatten(0, 1)

    def weak() -> Tensor:
        return system.spread(found.ill_conditioned).flatten(0, 1)

    nulls = (None if found.null is None else null,)
    return LayerSolution(x, report, sensitivity, nulls, ((weak, 1 / found.ill_conditioned_sigmas),), systems=(system,))


def _merged(name: str, parts: Sequence[LayerSolution], seconds: float) -> LayerSolution:
    """The solution of a layer from those of its groups of channels."""

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        changes = zip(parts, dG.chunk(len(parts)), z_change.chunk(len(parts), 1), strict=True)
        return torch.cat([part.sensitivity(*change) for part, *change in changes], 1)

    return LayerSolution(
        torch.cat([part.x for part in parts], 1),
        _merged_report(name, [part.report for part in parts], seconds),
        sensitivity if len(parts) > 1 else parts[0].sensitivity,
        *(sum((getattr(part, field) for part in parts), ()) for field in ("nulls", "weak")),
        max((part.noise_std for part in parts if part.noise_std is not None), default=None),
        sum((part.systems for part in parts), ()),
    )


def _merged_report(name: str, reports: list[LayerReport], seconds: float) -> LayerReport:
    """One report for the groups of a layer: counts add up, the worst value of the rest stands for all."""

    def over(field: str, combine):
        values = [getattr(r, field) for r in reports]
        return None if any(v is None for v in values) else combine(values)

    counts = {f: over(f, sum) for f in ("unknowns", "rank_weights", "rank_gradients", "rank", "deficit")}
    worst = {f: over(f, max) for f in ("iterations", "condition", "sigma_below_cut", "residual")}
    return LayerReport(name, **counts, **worst, sigma_above_cut=over("sigma_above_cut", min), seconds=seconds)
