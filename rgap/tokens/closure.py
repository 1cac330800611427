"""What the layers above add to patches that are short of equations: Gauss–Newton on the rest of the gradient (ours).

Where the width does not exceed the number of patches, ΔᵀP = ∂ℓ/∂E leaves P = P₀ + N C open with few unknowns C. The
gradients of attention, layer norms and the layers behind them are smooth functions of E C, and many more than it has
entries. What E maps to nothing, or to a multiple of the ones, which layer norm takes away, stays open: a patch must
have fewer entries than a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_UNKNOWNS = 256  # most entries of C that are looked for: every step takes as many gradients
EQUATIONS_PER_UNKNOWN = 16  # entries of the gradient that are drawn for each unknown
MAX_STEPS = 20  # steps of Gauss–Newton; near the solution the digits double with each
MAX_HALVINGS = 4  # times a step is halved that would make the residual larger
MIN_GAIN = 0.95  # ratio of residuals, after and before a step, from which no further one is made
DIFFERENCE_STEP = 1e-6  # step of the difference quotients, in pixel units
MIN_SIGMA_RATIO = 1e-5  # smallest over largest singular value of the Jacobian from which no entry of C is mere rounding


@dataclass(frozen=True)
class Closed:
    """Patches with their open part determined."""

    patches: Tensor  # (T, n)
    error: float  # predicted root-mean-square error of their entries, by the residual of the worst tensor
    equations: int  # entries of the gradient that were used
    steps: int  # steps of Gauss–Newton


def close_by_gradient(
    gradients: Callable[[Tensor], Mapping[str, Tensor]], shared: Mapping[str, Tensor], patches: Tensor, null: Tensor
) -> Closed | None:
    """Determines C of P = P₀ + N C, with P₀ (T, n) the patches and N (T, d) orthonormal, from the whole gradient.

    `gradients` gives the gradient of the image of patches (T, n) by parameter name, `shared` has those that are more
    than rounding. None where there are too many unknowns, or some have no effect.
    """
    unknowns = null.shape[1] * patches.shape[1]
    if unknowns > MAX_UNKNOWNS:
        return None
    generator = torch.Generator().manual_seed(0)
    each = -(-EQUATIONS_PER_UNKNOWN * unknowns // len(shared))
    drawn = {name: torch.randperm(g.numel(), generator=generator)[:each] for name, g in shared.items()}
    sizes = {name: g.square().mean().sqrt() for name, g in shared.items()}

    def miss(P: Tensor) -> list[Tensor]:
        mine = gradients(P)
        return [((mine[n] - shared[n]) / sizes[n]).flatten()[entries] for n, entries in drawn.items()]

    steps_of_C = DIFFERENCE_STEP * torch.eye(unknowns, dtype=null.dtype).reshape(-1, null.shape[1], patches.shape[1])
    now, steps, spread = miss(patches), 0, torch.inf
    while steps < MAX_STEPS:
        base = torch.cat(now)
        J = torch.stack([(torch.cat(miss(patches + null @ C)) - base) / DIFFERENCE_STEP for C in steps_of_C], 1)
        sigmas = torch.linalg.svdvals(J)
        if not sigmas[-1] > MIN_SIGMA_RATIO * sigmas[0]:
            return None
        move = null @ torch.linalg.lstsq(J, -base).solution.reshape(null.shape[1], -1)
        for _ in range(MAX_HALVINGS + 1):
            after = miss(patches + move)
            gain = (torch.cat(after).norm() / base.norm()).item()
            if gain < 1:
                break
            move = move / 2
        if not gain < 1:
            break
        patches, now, steps = patches + move, after, steps + 1
        spread = sigmas.pow(-2).sum().item()
        if gain > MIN_GAIN:
            break
    worst = max(part.square().mean().sqrt().item() for part in now)
    return Closed(patches, worst * (spread / patches.numel()) ** 0.5, len(torch.cat(now)), steps)
