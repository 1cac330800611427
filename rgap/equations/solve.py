"""One layer's inputs for all images at once, from W x_b = z_b − b and the shared gradient equations.

The two kinds of equations are the paper's (Zhu & Blaschko 2021, section 3), the order of steps is ours. Where the
gradients determine every channel nothing else is needed. Where they leave many unknowns open W alone may determine x:
its factorisation, which no gradient changes, is kept between attacks. Else one kind goes first and the other decides
what it leaves open, by a dense least-squares problem; conjugate gradients take both where that would be too large.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rgap.equations.complement import weak_subspace
from rgap.equations.gradient import GradientSolution, blocks, solve_gradients
from rgap.equations.limits import DEFAULT_LIMITS, SolverLimits
from rgap.equations.rank_laws import layer_laws
from rgap.equations.solution import LayerSolution
from rgap.equations.systems import ReducedSystem, gradients_first, rows_known, rows_scale, weights_first
from rgap.equations.weights import ConjugateGradients, SparseFactor, weight_factor
from rgap.linalg import LeastSquares, least_squares
from rgap.network.layer import Layer
from rgap.results import LayerReport

MAX_WEIGHTS_ONLY_ERROR = 1e-4  # largest relative error of x with which W alone is trusted where it is ill-conditioned
FLOAT64_FLOOR = 1e-14  # relative error that z has at least

MAX_RCOND_WEIGHTS_FIRST = 3e-5  # cutoff, which follows the precision, up to which W may go first where it sees badly
MAX_REFINED_RESIDUAL = 1e-6  # residual up to which the equations agree, so that iterating on makes the solution better
ROUGH = {"tolerance": 1e-3, "max_iterations": 300}  # where the iterations end on a system that leaves something open


def solve_layer(
    layer: Layer, G: Tensor, dz: Tensor, z: Tensor, *, rcond: float, known: Tensor | None = None,
    precision: float = 0.0, limits: SolverLimits = DEFAULT_LIMITS, like: LayerSolution | None = None,
) -> LayerSolution:  # fmt: skip
    """Recovers one layer's inputs from its weight and gradient equations.

    G is the gradient of the mean loss by the weight, shaped as that, zeros of a fixed layer; δz the gradient by each
    image's pre-activation z, both (B, O, H′, W′). Of one image the mask `known` (1, O, H′, W′) may leave entries of z
    out: W's rows there are not used. Singular values below rcond times the largest count as zero; the gradient's
    precision decides whether an ill-conditioned W is trusted alone. The factors of `like`, a solution of almost the
    same equations, serve once more. Where [W; K] falls short of full rank, the result is the minimum-norm solution with
    the null basis. Raises ValueError if shapes do not fit the layer, or a mask is given for more than one image.
    """
    start = time.perf_counter()
    shape = (len(z), *layer.output_shape)
    for name, value in {"dz": dz, "z": z, "known": z if known is None else known}.items():
        if value.shape != shape:
            raise ValueError(f"layer {layer.name!r}: {name} is {tuple(value.shape)}, but must be {shape}")
    if known is not None and len(z) > 1:
        raise ValueError(f"layer {layer.name!r}: a mask of known outputs needs a single image, not {len(z)}")
    if layer.is_fixed and known is None:
        return _merged(layer.name, [_fixed(layer, z, limits)], start)
    parts = layer.split_groups()
    count = len(parts)
    masks = [None] * count if known is None else known.chunk(count, 1)
    near = [None] * count if like is None else like.solved
    split = zip(parts, G.chunk(count), dz.chunk(count, 1), z.chunk(count, 1), masks, near, strict=True)
    options = (rcond, precision, limits)
    groups = [_Problem(part, G, dz, z - part.pre_bias(), k, *options, one) for part, G, dz, z, k, one in split]
    between = _weights_before_gradients if len(z) > 1 else _iterate
    found = [_weights_alone(group) or between(group) or _gradients_before_weights(group) for group in groups]
    return replace(_merged(layer.name, found, start), like=like)


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
    like: tuple[ReducedSystem, LeastSquares] | None = None

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

    def report(self, rank: int, found: GradientSolution | LeastSquares | None = None, **fields) -> LayerReport:
        """A report on all images, with the singular values of what was found."""
        if found is not None:
            kept, dropped = found.sigma_min_kept, found.sigma_max_dropped
            fields |= {"condition": 1 / kept if kept else math.inf, "sigma_above_cut": kept, "sigma_below_cut": dropped}
        return LayerReport(self.layer.name, self.unknowns, rank=rank, deficit=self.unknowns - rank, **fields)


def _fixed(layer: Layer, z: Tensor, limits: SolverLimits) -> LayerSolution:
    """By the pseudo-inverse of the map of pixels, which acts on every channel alike."""
    count, channels, after, missing = len(z), layer.input_shape[0], layer.after, 0
    if after is not None and not after.injective:
        missing = layer.unknowns - channels * after.rank

    def solve(y: Tensor) -> Tensor:
        return y if after is None else after.solve(y)

    def null() -> Tensor:
        return torch.kron(torch.eye(count * channels, dtype=z.dtype), after.null_basis())

    rank = count * (layer.unknowns - missing)
    report = LayerReport(layer.name, count * layer.unknowns, rank, 0, rank, count * missing)
    held = 0 < missing * layer.unknowns <= limits.max_null_entries
    x, fixed_null = solve(z - layer.pre_bias()), null if held else None
    return LayerSolution(x, report, lambda _, z_change: solve(z_change), fixed_null=fixed_null)


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
    trusted = problem.is_too_large or not factor.condition > allowed
    return _by_weights(problem, factor) if factor.full_rank and trusted else None


def _by_weights(problem: _Problem, factor: SparseFactor | ConjugateGradients, missing: int = 0) -> LayerSolution:
    """Each image by W alone, which leaves `missing` of its unknowns open."""
    solved, residuals, iterations = zip(*(factor.solve(image) for image in problem.z), strict=True)
    x = torch.stack(solved).reshape(-1, *problem.layer.input_shape)
    rank, fields = problem.unknowns - len(x) * missing, {"residual": max(residuals)}
    if not missing:
        fields |= {"condition": factor.condition, "iterations": max(iterations)}
    report = problem.report(rank, rank_weights=rank, **fields)
    return LayerSolution(x, report, lambda _, z: torch.stack([*map(factor.sensitivity, z)]).reshape(x.shape))


def _weights_before_gradients(problem: _Problem) -> LayerSolution | None:
    """W first, where it leaves much less open than the gradients do.

    Where no dense system can hold the open unknowns of a batch, W's minimum-norm solutions are all there is.
    """
    layer, limits, (count, *outputs) = problem.layer, problem.limits, problem.z.shape
    lacking = layer.unknowns - math.prod(outputs)
    few = limits.weights_first_ratio * problem.left_open
    precise = problem.rcond <= MAX_RCOND_WEIGHTS_FIRST or problem.is_too_large
    if count * max(lacking, 1) < few and (precise or lacking > 0):
        weak = weak_subspace(layer, limits.weak_ratio if precise else 0, limits.max_pinv_side)
        if weak is not None and count * len(weak.sigmas) < min(few, limits.max_dense_unknowns_batch):
            if len(weak.sigmas):
                return _reduced(problem, weights_first(layer, problem.G, problem.dz, problem.z, weak))
            return _by_weights(problem, weight_factor(layer, None, limits.max_factor_unknowns))
    if not problem.is_too_large:
        return None
    solver = ConjugateGradients(layer)
    return _by_weights(problem, solver, solver.missing)


def _iterate(problem: _Problem) -> LayerSolution | None:
    """Both kinds of one image's equations together by conjugate gradients; None where a dense system is preferred.

    Where the rank law leaves something open, and no dense system can hold it, the iterations stop early: what they
    find is the solution of minimum norm, roughly, and the report has the law's rank. Without a law the rank is
    estimated from a random vector.
    """
    layer, G, z, known = problem.layer, problem.G, problem.z, problem.known
    if problem.left_open <= problem.limits.iterative_unknowns:
        return None
    laws = layer_laws(layer)
    law = laws.both if problem.dz.any() else laws.weights
    missing = 0 if law is None else layer.unknowns - law
    if missing and not problem.is_too_large:
        return None
    scale = rows_scale(rows_known(z, known), G)
    solver = ConjugateGradients(layer, None if known is None else known[0], scale * problem.dz[0])
    x, residual, iterations = solver.solve(z[0], scale * G, **(ROUGH if missing else {}))
    fields = {"condition": solver.condition, "iterations": iterations}
    if not missing and max(problem.precision, FLOAT64_FLOOR) < residual < MAX_REFINED_RESIDUAL:
        x, left, further = solver.refine(x, z[0], scale * G)
        residual, fields["iterations"] = left * residual, iterations + further
    fields["residual"] = residual
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
    report = problem.report(problem.unknowns, found, rank_gradients=problem.unknowns, residual=found.residual)
    return LayerSolution(found.x0, report, lambda dG, _: found.sensitivity(dG), noise_std=found.noise_std)


def _reduced(problem: _Problem, system: ReducedSystem) -> LayerSolution:
    """Solves for what one kind of equations leaves open."""
    law = None if problem.is_batch or problem.known is not None else layer_laws(problem.layer).both
    most = system.most if law is None else system.A.columns + law - problem.unknowns
    near = None if problem.like is None else system.neighbour(*problem.like)
    options = {"gram_only": problem.is_batch, "most": most, "near": near}
    found = least_squares(system.A, system.b, problem.rcond, system.damping, **options)
    y = found.y[:, None]
    x = (system.x0 + system.spread(y)[:, :, 0]).reshape(-1, *problem.layer.input_shape)
    report = problem.report(
        problem.unknowns - (0 if found.null is None else found.null.shape[1]),
        found,
        rank_weights=system.rank_weights,
        rank_gradients=system.rank_gradients,
        residual=(system.b - system.A.apply(y)[:, 0]).norm().item() / system.size,
    )

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        x0, b = system.change(dG, z_change)
        return (x0 + system.spread(found.invert(system.A.adjoint(b[:, None])))[:, :, 0]).reshape(x.shape)

    return LayerSolution(x, report, sensitivity, ((system, found),))


def _merged(name: str, parts: list[LayerSolution], start: float) -> LayerSolution:
    """The solution of a layer from those of its groups: counts add up, the worst of other values stands for all."""

    def sensitivity(dG: Tensor, z_change: Tensor) -> Tensor:
        changes = zip(parts, dG.chunk(len(parts)), z_change.chunk(len(parts), 1), strict=True)
        return torch.cat([part.sensitivity(*change) for part, *change in changes], 1)

    def over(combine: Callable, *fields: str) -> dict:
        values = {field: [getattr(part.report, field) for part in parts] for field in fields}
        return {field: None if None in v else combine(v) for field, v in values.items()}

    report = LayerReport(
        name,
        **over(sum, "unknowns", "rank_weights", "rank_gradients", "rank", "deficit"),
        **over(max, "iterations", "condition", "sigma_below_cut", "residual"),
        **over(min, "sigma_above_cut"),
        seconds=time.perf_counter() - start,
    )
    return LayerSolution(
        torch.cat([part.x for part in parts], 1), report, sensitivity if len(parts) > 1 else parts[0].sensitivity,
        sum((part.solved for part in parts), ()),
        max((part.noise_std for part in parts if part.noise_std is not None), default=None), parts[0].fixed_null,
    )  # fmt: skip
