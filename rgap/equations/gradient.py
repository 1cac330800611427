"""The gradient equations alone: for every channel c, Σ_b M_b x_bc = vec(G[:, c]), with one matrix for all channels.

M_b is made of the pre-activation gradient of image b (`rgap.equations.blocks`); the images of a batch stand side by
side, [M_1 … M_B], and one factorisation of each block of the stride serves all channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.blocks import StrideBlock, blocks, gradient_matrix, gradient_values
from rgap.linalg import GRAM_RESOLUTION, gram_matrix, svd
from rgap.network.layer import Layer

MIN_SURPLUS_EQUATIONS = 30
"""Surplus equations from which their misfit says how large the noise is, to about an eighth."""


@dataclass(frozen=True)
class GradientSolution:
    """What the gradient equations determine: x_bc = x0_bc + V_b y_c, where ‖sigmas ∘ y_c‖ should be small.

    V holds the null space of [M_1 … M_B] and, where some of it is left to the weight equations anyway, the directions
    of small singular value: noise comes back divided by it.

    Attributes:
        x0: (B, C, H, W).
        V: (B, H·W, k).
        sigmas: Singular values of V's columns, 0 where they are cut off, (k,).
        rank: Of [M_1 … M_B].
        sigma_min_kept, sigma_max_dropped: Relative to the largest singular value; None where none was dropped.
        residual: ‖K x − vec(G)‖ / ‖G‖.
        noise_std: Standard deviation of noise on G's entries, by the misfit of surplus equations; None where there are
            too few.
        sensitivity: How x0 changes with G, (O, C, kh, kw) -> (B, C, H, W).
    """

    x0: Tensor
    V: Tensor
    sigmas: Tensor
    rank: int
    sigma_min_kept: float
    sigma_max_dropped: float | None
    residual: float
    noise_std: float | None
    sensitivity: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Factor:
    """One block of [M_1 … M_B], with its singular values and right singular vectors."""

    block: StrideBlock
    M: Tensor  # (O·t, B·m)
    S: Tensor  # (B·m,), from the largest on, relative to the largest entry of M
    V: Tensor  # (B·m, B·m)
    unit: Tensor  # the largest entry of M

    def solve(self, values: Tensor, rank: int) -> Tensor:
        """M⁺ of right-hand sides (O·t, C), by the `rank` largest singular values."""
        seen = self.V[:, :rank]
        return seen @ ((seen.T @ (self.M.T @ values / self.unit)) / self.S[:rank, None].square() / self.unit)

    def place(self, columns: Tensor, pixels: int) -> Tensor:
        """Vectors over the block's pixels of all images among all pixels: (B·m, k) -> (B, pixels, k)."""
        images, size = len(columns) // len(self.block.pixels), len(self.block.pixels)
        result = columns.new_zeros(images, pixels, columns.shape[1])
        result[:, self.block.pixels] = columns.reshape(images, size, columns.shape[1])
        return result


def solve_gradients(layer: Layer, G: Tensor, dz: Tensor, rcond: float, trusted_ratio: float) -> GradientSolution:
    """Solves the gradient equations of all images, block by block of the stride.

    Args:
        layer: The layer, without groups.
        G: Gradient of the mean loss by the weight, (O, C, kh, kw).
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).
        rcond: Singular values below rcond times the largest count as zero.
        trusted_ratio: Directions below this share of the largest are left to W, too; those of a single image only
            where it is not determined.
    """
    if len(dz) == 1 and layer.is_dense and dz.any():
        return _solve_column(G, dz.flatten())
    pixels, count = math.prod(layer.input_shape[1:]), len(dz)
    factors = [_factor(layer, block, dz, rcond) for block in blocks(layer)]
    largest = max((f.S[0] * f.unit).item() for f in factors)
    ranks = [int((f.S * f.unit > rcond * largest).sum()) for f in factors]

    def on_input(parts: list[Tensor]) -> Tensor:
        placed = sum(f.place(x, pixels) for f, x in zip(factors, parts, strict=True))
        return placed.transpose(1, 2).reshape(count, *layer.input_shape)

    def sensitivity(change: Tensor) -> Tensor:
        values = [gradient_values(layer, f.block, change) for f in factors]
        return on_input([f.solve(v, rank) for f, v, rank in zip(factors, values, ranks, strict=True)])

    parts, missed, surplus = [], 0.0, 0
    for factor, rank in zip(factors, ranks, strict=True):
        values = gradient_values(layer, factor.block, G)
        x = factor.solve(values, rank)
        x = x + factor.solve(values - factor.M @ x, rank)  # what squaring the singular values has cost
        missed += (values - factor.M @ x).square().sum().item()
        surplus += (len(values) - rank) * layer.input_shape[0]
        parts.append(x)
    sigma = torch.cat([f.S * f.unit for f in factors])
    sigma = sigma / largest if largest > 0 else sigma
    kept, dropped = sigma[sigma > rcond], sigma[sigma <= rcond]
    V, sigmas = _open(factors, sigma, (count, pixels), rcond, trusted_ratio)
    size = G.norm().item()
    return GradientSolution(
        on_input(parts),
        V,
        sigmas * largest,
        len(kept),
        kept.min().item() if len(kept) else 0.0,
        dropped.max().item() if len(dropped) else None,
        missed**0.5 / size if size > 0 else 0.0,
        (missed / surplus) ** 0.5 if surplus >= MIN_SURPLUS_EQUATIONS else None,
        sensitivity,
    )


def _solve_column(G: Tensor, column: Tensor) -> GradientSolution:
    """A linear layer's for one image, whose M is the one column δz: x = Gᵀ δz / ‖δz‖²."""
    unit = column.abs().max()  # squares of the smallest gradients underflow
    weights = column / unit / (column / unit).square().sum() / unit

    def sensitivity(change: Tensor) -> Tensor:
        return (weights[None] @ change.flatten(1))[:, :, None, None]

    x0, size = sensitivity(G), G.norm().item()
    missed = torch.addr(G.flatten(1), column, x0.flatten(), alpha=-1).norm().item()
    none, surplus = column[:0], (len(G) - 1) * x0.numel()
    noise = missed / surplus**0.5 if surplus >= MIN_SURPLUS_EQUATIONS else None
    residual = missed / size if size > 0 else 0.0
    return GradientSolution(x0, none.reshape(1, 1, 0), none, 1, 1.0, None, residual, noise, sensitivity)


def _factor(layer: Layer, block: StrideBlock, dz: Tensor, rcond: float) -> _Factor:
    """By the eigenvectors of MᵀM, which hold σ down to 1e-8 of the largest, or of M itself below that.

    M of a batch may have many more columns than rows: a decomposition of M itself is quicker then, too.
    """
    M = torch.cat([gradient_matrix(layer, block, image) for image in dz], 1)
    wide = M.shape[0] < M.shape[1]
    unit = M.abs().max()
    unit = unit if unit > 0 else torch.ones_like(unit)  # squares of the smallest gradients underflow
    if rcond < GRAM_RESOLUTION or (len(dz) > 1 and wide):
        _, S, Vh = svd(M / unit, full_matrices=wide)
        return _Factor(block, M, F.pad(S, (0, len(Vh) - len(S))), Vh.T, unit)
    values, V = torch.linalg.eigh(gram_matrix(M / unit))
    return _Factor(block, M, values.clamp(min=0).sqrt().flip(0), V.flip(1), unit)


def _open(
    factors: list[_Factor], sigma: Tensor, shape: tuple[int, int], rcond: float, trusted_ratio: float
) -> tuple[Tensor, Tensor]:
    """Basis (B, H·W, k) of what is left to the weight equations, and its singular values, 0 below the cutoff.

    Pixels that no tap reads belong to it. Where one image is determined, nothing does, however small a singular value.
    """
    count, pixels = shape
    full = len(sigma) == count * pixels and bool((sigma > rcond).all())
    alone = full and (count == 1 or bool(sigma.min() > trusted_ratio))
    left = sigma <= (0.0 if alone else max(rcond, trusted_ratio))
    unread = torch.ones(pixels, dtype=torch.bool)
    bases, start = [], 0
    for factor in factors:
        unread[factor.block.pixels] = False
        bases.append(factor.place(factor.V[:, left[start : start + len(factor.S)]], pixels))
        start += len(factor.S)
    image, pixel = (torch.eye(n, dtype=sigma.dtype) for n in shape)
    alone = image[:, None, :, None] * pixel[:, None, unread]
    seen = torch.where(sigma > rcond, sigma, 0.0)[left]
    V = torch.cat([*bases, alone.flatten(2)], 2)
    return V, F.pad(seen, (0, V.shape[2] - len(seen)))
