"""The gradient equations of all layers that read one tensor, and the same equations read for δz where the input is known.

K(δz) x = vec(G) and N(x) δz = vec(G) are one product. Stacked, a convolution and the projection beside it determine
more pixels than either; read for δz, the equations decide activation bits that a threshold leaves in doubt (ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.gradient import blocks, gradient_matrix, gradient_values
from rgap.linalg import gram_matrix
from rgap.network.layer import Layer

MIN_GRAM_RATIO = 1e-12
"""Smallest eigenvalue of NᵀN, relative to the largest, that counts when N(x) δz = vec(G) is solved."""


@dataclass(frozen=True)
class StackedSolution:
    """The input that several layers' gradient equations determine.

    Attributes:
        x: (C, H, W).
        rank: Rank of the equations, of `unknowns`.
        unknowns: C·H·W.
        condition: Largest over smallest singular value kept.
        above, below: Smallest singular value kept and largest dropped, relative to the largest; None without one.
        residual: ‖K x − vec(G)‖ / ‖vec(G)‖.
        surplus: Equations beyond the rank.
        error: Standard deviation of the entries at each pixel, by the residual's noise, (H, W); 0 without surplus.
    """

    x: Tensor
    rank: int
    unknowns: int
    condition: float
    above: float
    below: float | None
    residual: float
    surplus: int
    error: Tensor

    @property
    def determined(self) -> bool:
        """Whether every entry is."""
        return self.rank == self.unknowns


def solve_stacked(layers: list[Layer], gradients: list[Tensor], dzs: list[Tensor], rcond: float) -> StackedSolution:
    """Solves K_i(δz_i) x = vec(G_i) of several layers without groups for their common input.

    `gradients` are those by the layers' weights, (O_i, C, kh, kw), `dzs` (O_i, H′, W′). Each layer's equations are
    weighted by the size of its gradient, to which its noise is in proportion.
    """
    C, H, W = layers[0].input_shape
    parts = _parts(layers, gradients, dzs, H * W)
    factors = [(pixels, M, right, *torch.linalg.eigh(gram_matrix(M))) for pixels, M, right in parts]
    largest = max(values[-1].clamp(min=0).item() for *_, values, _ in factors) ** 0.5
    x, spread = torch.zeros(C, H * W, dtype=torch.float64), torch.zeros(H * W, dtype=torch.float64)
    missed = size = 0.0
    rank, equations, kept, dropped = 0, 0, [], []
    for pixels, M, right, values, V in factors:
        S = values.clamp(min=0).sqrt()
        seen = S > rcond * largest
        inverse = V[:, seen] / S[seen].square()
        y = inverse @ (V[:, seen].T @ (M.T @ right))
        y = y + inverse @ (V[:, seen].T @ (M.T @ (right - M @ y)))
        x[:, pixels] = y.T
        missed += (right - M @ y).square().sum().item()
        size += right.square().sum().item()
        spread[pixels] = (V[:, seen] / S[seen]).square().sum(1)
        rank, equations = rank + int(seen.sum()), equations + len(M)
        kept.append(S[seen])
        dropped.append(S[~seen])
    kept, dropped = torch.cat(kept), torch.cat(dropped)
    surplus = C * (equations - rank)
    std = (missed / surplus) ** 0.5 if surplus > 0 else 0.0
    least = kept.min().item() if len(kept) else 0.0
    return StackedSolution(
        x.reshape(C, H, W),
        C * rank,
        C * H * W,
        largest / least if least else float("inf"),
        least / largest if largest else 0.0,
        dropped.max().item() / largest if len(dropped) and largest else None,
        (missed / size) ** 0.5 if size else 0.0,
        surplus,
        std * spread.sqrt().reshape(H, W),
    )


def _parts(layers, gradients, dzs, pixels: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(pixels, rows of M, right-hand sides) of each set of pixels that has equations of its own."""
    found: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for layer, G, dz in zip(layers, gradients, dzs, strict=True):
        weight = 1 / G.norm().clamp(min=1e-300) * G.numel() ** 0.5
        for block in blocks(layer):
            rows = gradient_matrix(layer, block, dz), gradient_values(layer, block, G)
            found.setdefault(tuple(block.pixels.tolist()), []).append(tuple(weight * part for part in rows))
    if sum(map(len, found)) > len(set().union(*found)):  # sets that overlap: one system on all pixels
        whole = []
        for places, rows in found.items():
            for M, right in rows:
                wide = M.new_zeros(len(M), pixels)
                wide[:, list(places)] = M
                whole.append((wide, right))
        found = {tuple(range(pixels)): whole}
    return [
        (torch.tensor(places), *(torch.cat(part) for part in zip(*rows, strict=True))) for places, rows in found.items()
    ]


def solve_delta(layer: Layer, G: Tensor, x: Tensor) -> Tensor | None:
    """δz (O, H′, W′) from N(x) δz = vec(G), None where these equations do not determine it."""
    if layer.before is not None or layer.after is not None or layer.groups > 1:
        return None
    C, (taps, positions) = layer.input_shape[0], layer.tap_pixels().shape
    if C * taps < positions:
        return None
    padded = F.pad(x.flatten(1), (0, 1))  # index −1 is the padding
    N = padded[:, layer.tap_pixels()].reshape(C * taps, positions)
    values, V = torch.linalg.eigh(gram_matrix(N))
    if values[0] <= MIN_GRAM_RATIO * values[-1]:
        return None
    right = G.reshape(len(G), C * taps).T
    dz = (V / values) @ (V.T @ (N.T @ right))
    dz = dz + (V / values) @ (V.T @ (N.T @ (right - N @ dz)))
    return dz.T.reshape(layer.output_shape)
