"""What the gradient constraints (I ⊗ M) x = vec(G) say alone: one factorisation of M for every channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.constraints import blocks, gradient_matrix, gradient_values
from rgap.dense import svd
from rgap.layer import Layer

TRUSTED = 0.02
"""Directions of M whose singular value is below this share of the largest are shared with the weight constraints."""

ENOUGH = 30
"""Surplus equations from which their misfit says how large the noise is, to about an eighth."""


@dataclass(frozen=True)
class GradientSolution:
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
    noise_std: float | None  # of the gradient's entries, by what M leaves of them; None where it leaves nothing
    respond: Callable[[Tensor], Tensor]  # how x0 changes with G, (O, C, kh, kw) -> (H·W, C)


def solve_gradients(layer: Layer, G: Tensor, dz: Tensor, rcond: float) -> GradientSolution:
    """Solves (I ⊗ M) x = vec(G) block by block; the cutoff is relative to M's largest singular value."""
    pixels, channels = math.prod(layer.input_shape[1:]), layer.input_shape[0]
    systems = []
    for block in blocks(layer):
        M = gradient_matrix(layer, block, dz)
        systems.append((block.pixels, gradient_values(layer, block, G), *svd(M, full_matrices=M.shape[0] < M.shape[1])))
    largest = max(S[0].item() for _, _, _, S, _ in systems)
    ranks = [int((S > rcond * largest).sum()) for _, _, _, S, _ in systems]

    def respond(change: Tensor) -> Tensor:
        x = change.new_zeros(pixels, channels)
        for block, (places, _, U, S, Vh), rank in zip(blocks(layer), systems, ranks, strict=True):
            values = gradient_values(layer, block, change)
            x[places] = Vh[:rank].T @ ((U[:, :rank].T @ values) / S[:rank, None])
        return x

    x0, missed, surplus = respond(G), 0.0, 0
    untouched = torch.ones(pixels, dtype=torch.bool)
    bases, sigmas = [], []
    for (places, values, U, S, Vh), rank in zip(systems, ranks, strict=True):
        rest = values - U[:, :rank] @ (U[:, :rank].T @ values)
        missed += rest.square().sum().item()
        surplus += (len(values) - rank) * channels
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
    return GradientSolution(
        x0,
        V,
        weights,
        len(kept),
        kept.min().item() if len(kept) else 0.0,
        dropped.max().item() if len(dropped) else None,
        missed**0.5 / size if size > 0 else 0.0,
        (missed / surplus) ** 0.5 if surplus >= ENOUGH else None,
        respond,
    )


def _rows(values: Tensor, rows: Tensor, size: int) -> Tensor:
    result = values.new_zeros(size, values.shape[1])
    result[rows] = values
    return result
