"""One layer's input, for all images at once, from its weight equations and its gradient equations."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from rgap.equations.joint import solve_joint
from rgap.equations.single import solve_image
from rgap.equations.solution import DEFAULT_LIMITS, LayerSolution, SolverLimits, merged_report
from rgap.network.layer import Layer


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
    for name, value in (("dz", dz), ("z", z)) if known is None else (("dz", dz), ("z", z), ("known", known)):
        if value.shape != (len(z), *layer.output_shape):
            raise ValueError(
                f"layer {layer.name!r}: {name} is {tuple(value.shape)}, but must be {(len(z), *layer.output_shape)}"
            )
    if known is not None and len(z) > 1:
        raise ValueError(f"layer {layer.name!r}: a mask of known outputs needs a single image, not {len(z)}")
    images = {"rcond": rcond, "precision": precision, "limits": limits}
    if len(z) == 1:
        s = solve_image(layer, G, dz[0], z[0], known=None if known is None else known[0], **images)
        return LayerSolution(
            s.x[None], s.report, s.null_basis, s.weak_basis, s.weak_gain,
            lambda dG, change: s.sensitivity(dG, change[0])[None], s.noise_std, (None,) * layer.groups,
        )  # fmt: skip
    if layer.is_fixed:
        solved = [solve_image(layer, G, *one, **images) for one in zip(dz, z, strict=True)]
        report = merged_report(layer.name, [s.report for s in solved], time.perf_counter() - start)
        null = None if solved[0].null_basis is None else torch.block_diag(*(s.null_basis for s in solved))
        none = z.new_zeros(len(z) * layer.unknowns, 0)

        def sensitivity(dG: Tensor, change: Tensor) -> Tensor:
            return torch.stack([s.sensitivity(dG, one) for s, one in zip(solved, change, strict=True)])

        return LayerSolution(torch.stack([s.x for s in solved]), report, null, none, none[0], sensitivity)
    s = solve_joint(layer, G, dz, z, rcond=rcond, limits=limits)
    none = z.new_zeros(len(z) * layer.unknowns, 0)
    return LayerSolution(s.x, s.report, s.null_basis(), none, none[0], s.sensitivity, None, s.systems)
