"""What the gradient constraints (I ⊗ M) x = vec(G) say alone: one factorisation of M for every channel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.blocks import StrideBlock, blocks, gradient_matrix, gradient_values
from rgap.linalg import RESOLUTION, gram_matrix, svd
from rgap.network.layer import Layer

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
    sensitivity: Callable[[Tensor], Tensor]  # how x0 changes with G, (O, C, kh, kw) -> (H·W, C)


@dataclass(frozen=True)
class _Factor:
    """One block of M, with its singular values and right singular vectors."""

    block: StrideBlock
    M: Tensor  # (O·t, m)
    S: Tensor  # (m,), from the largest on, relative to the largest entry of M
    V: Tensor  # (m, m)
    unit: Tensor  # the largest entry of M

    def solve(self, values: Tensor, rank: int) -> Tensor:
        """M⁺ of right-hand sides (O·t, C), from so many of its directions."""
        seen = self.V[:, :rank]
        return seen @ ((seen.T @ (self.M.T @ values / self.unit)) / self.S[:rank, None].square() / self.unit)


def solve_gradients(layer: Layer, G: Tensor, dz: Tensor, rcond: float, trusted_ratio: float = 0.02) -> GradientSolution:
    """Solves (I ⊗ M) x = vec(G) block by block; the cutoff is relative to M's largest singular value."""
    if layer.is_dense and dz.any():
        return _solve_column(G, dz.flatten())
    pixels, channels = math.prod(layer.input_shape[1:]), layer.input_shape[0]
    factors = [_factor(layer, block, dz, rcond) for block in blocks(layer)]
    largest = max((f.S[0] * f.unit).item() for f in factors)
    ranks = [int((f.S * f.unit > rcond * largest).sum()) for f in factors]

    def sensitivity(change: Tensor) -> Tensor:
        x = change.new_zeros(pixels, channels)
        for factor, rank in zip(factors, ranks, strict=True):
            x[factor.block.pixels] = factor.solve(gradient_values(layer, factor.block, change), rank)
        return x

    x0, missed, surplus = G.new_zeros(pixels, channels), 0.0, 0
    untouched = torch.ones(pixels, dtype=torch.bool)
    for factor, rank in zip(factors, ranks, strict=True):
        values = gradient_values(layer, factor.block, G)
        x = factor.solve(values, rank)
        x = x + factor.solve(values - factor.M @ x, rank)  # what squaring the singular values has cost
        missed += (values - factor.M @ x).square().sum().item()
        surplus += (len(values) - rank) * channels
        x0[factor.block.pixels], untouched[factor.block.pixels] = x, False
    sigma = torch.cat([f.S * f.unit for f in factors])
    sigma = sigma / largest if largest > 0 else sigma
    kept, dropped = sigma[sigma > rcond], sigma[sigma <= rcond]
    V, weights = _open(factors, sigma, untouched, rcond, trusted_ratio)
    size = G.norm().item()
    return GradientSolution(
        x0,
        V,
        weights * largest,
        len(kept),
        kept.min().item() if len(kept) else 0.0,
        dropped.max().item() if len(dropped) else None,
        missed**0.5 / size if size > 0 else 0.0,
        (missed / surplus) ** 0.5 if surplus >= ENOUGH else None,
        sensitivity,
    )


def _solve_column(G: Tensor, column: Tensor) -> GradientSolution:
    """A linear layer's, whose M is the one column δz: x = Gᵀ δz / ‖δz‖²."""
    unit = column.abs().max()  # squares of the smallest gradients underflow
    weights = column / unit / (column / unit).square().sum() / unit

    def sensitivity(change: Tensor) -> Tensor:
        return weights[None] @ change.flatten(1)

    x0, size = sensitivity(G), G.norm().item()
    missed = torch.addr(G.flatten(1), column, x0[0], alpha=-1).norm().item()
    none, surplus = column[:0], (len(G) - 1) * x0.numel()
    noise = missed / surplus**0.5 if surplus >= ENOUGH else None
    return GradientSolution(x0, none[None], none, 1, 1.0, None, missed / size if size > 0 else 0.0, noise, sensitivity)


def _factor(layer: Layer, block: StrideBlock, dz: Tensor, rcond: float) -> _Factor:
    """By the eigenvectors of MᵀM, which hold σ down to 1e-8 of the largest, or of M itself below that."""
    M = gradient_matrix(layer, block, dz)
    unit = M.abs().max()
    unit = unit if unit > 0 else torch.ones_like(unit)  # squares of the smallest gradients underflow
    if rcond < RESOLUTION:
        _, S, Vh = svd(M / unit, full_matrices=M.shape[0] < M.shape[1])
        return _Factor(block, M, F.pad(S, (0, len(Vh) - len(S))), Vh.T, unit)
    values, V = torch.linalg.eigh(gram_matrix(M / unit))
    return _Factor(block, M, values.clamp(min=0).sqrt().flip(0), V.flip(1), unit)


def _open(
    factors: list[_Factor], sigma: Tensor, untouched: Tensor, rcond: float, trusted: float
) -> tuple[Tensor, Tensor]:
    """Basis of the pixels that M leaves open or sees too dimly, and its singular values there, 0 below the cutoff."""
    full = len(sigma) == len(untouched) and bool((sigma > rcond).all())
    left = sigma <= (0.0 if full else max(rcond, trusted))
    unread = torch.eye(len(untouched), dtype=sigma.dtype)[:, untouched]
    bases, start = [], 0
    for factor in factors:
        columns = factor.V[:, left[start : start + len(factor.S)]]
        basis = sigma.new_zeros(len(untouched), columns.shape[1])
        basis[factor.block.pixels] = columns
        bases.append(basis)
        start += len(factor.S)
    seen = torch.where(sigma > rcond, sigma, 0.0)[left]
    return torch.cat([*bases, unread], 1), F.pad(seen, (0, unread.shape[1]))
