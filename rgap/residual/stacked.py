"""The gradient equations of all layers that read one tensor, and the same equations read for δz, the input known.

K(δz) x = vec(G) and N(x) δz = vec(G) are one product. Stacked, a convolution and the projection beside it determine
more pixels than either; read for δz, the equations decide activation bits that a threshold leaves in doubt (ours).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.equations.gradient import blocks, gradient_matrix, gradient_values
from rgap.linalg import gram_matrix
from rgap.network.layer import Layer

MIN_GRAM_RATIO = 1e-12  # ridge over the largest entry of NᵀN in N(x) δz = vec(G): dead pixels are columns of 0
MAX_CLOSED_ENTRIES = 20_000_000  # entries of a basis of what is open up to which the layers' outputs may close it
MIN_CLOSING_RATIO = 1e-3  # smallest over largest singular value from which outputs determine what is open


@dataclass(frozen=True)
class StackedSolution:
    """The input that several layers' gradient equations determine."""

    x: Tensor  # (C, H, W)
    rank: int  # rank of the equations, of `unknowns`
    unknowns: int  # C·H·W
    condition: float  # largest over smallest singular value kept
    above: float  # smallest singular value kept and largest dropped, relative to the largest; None without one
    below: float | None
    residual: float  # ‖K x − vec(G)‖ / ‖vec(G)‖
    surplus: int  # equations beyond the rank
    error: Tensor  # standard deviation of the entries at each pixel, by the residual's noise, (H, W); 0 without surplus
    # for each layer and filter, the share of an error in its δz that the residual shows: x absorbs the rest
    kept: list[Tensor]
    # sets of pixels, with an orthonormal basis (pixels, lack) of what each channel has open there
    null: list[tuple[Tensor, Tensor]]

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
    factors = [(*part, *torch.linalg.eigh(gram_matrix(part[1]))) for part in parts]
    largest = max(values[-1].clamp(min=0).item() for *_, values, _ in factors) ** 0.5
    x, spread = torch.zeros(C, H * W, dtype=torch.float64), torch.zeros(H * W, dtype=torch.float64)
    missed = size = 0.0
    rank, equations, kept, dropped = 0, 0, [], []
    filters, null = [len(dz) for dz in dzs], []
    rows, absorbed = torch.zeros(2, sum(filters), dtype=torch.float64)
    for pixels, M, right, owners, values, V in factors:
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
        rows.index_add_(0, owners, torch.ones(len(M), dtype=torch.float64))
        absorbed.index_add_(0, owners, (M @ (V[:, seen] / S[seen])).square().sum(1))
        kept.append(S[seen])
        dropped.append(S[~seen])
        if not seen.all():
            null.append((pixels, V[:, ~seen]))
    kept, dropped = torch.cat(kept), torch.cat(dropped)
    surplus = C * (equations - rank)
    std = (missed / surplus) ** 0.5 if surplus > 0 else 0.0
    least = kept.min().item() if len(kept) else 0.0
    return StackedSolution(
        x.reshape(C, H, W), C * rank, C * H * W,
        condition=largest / least if least else float("inf"),
        above=least / largest if largest else 0.0,
        below=dropped.max().item() / largest if len(dropped) and largest else None,
        residual=(missed / size) ** 0.5 if size else 0.0,
        surplus=surplus, error=std * spread.sqrt().reshape(H, W),
        kept=list((1 - absorbed / rows.clamp(min=1)).split(filters)), null=null,
    )  # fmt: skip


def close_by_outputs(
    found: StackedSolution, layers: list[Layer], gradients: list[Tensor], dzs: list[Tensor],
    outputs: list[tuple[Layer, Tensor, Tensor]],
) -> StackedSolution | None:  # fmt: skip
    """Determines what the gradient equations leave open by W x = z − b, where outputs of the layers are known.

    `found` lacks rank; layers, gradients and dzs are those of `solve_stacked`. `outputs` has layers whose output is
    known, that output less the bias (O, H′, W′), and where it is known. None where too much is open, or the outputs do
    not determine it.
    """
    C, H, W = found.x.shape
    lack = found.unknowns - found.rank
    if lack * found.unknowns > MAX_CLOSED_ENTRIES:
        return None
    basis = torch.zeros(lack // C, H * W, dtype=torch.float64)
    first = 0
    for pixels, V in found.null:
        basis[first : first + V.shape[1], pixels] = V.T
        first += V.shape[1]
    changes = torch.einsum("cd,np->cndp", torch.eye(C, dtype=torch.float64), basis).reshape(lack, C, H, W)
    right = torch.cat([(z - layer.apply(found.x))[mask] for layer, z, mask in outputs])
    if len(right) <= lack:
        return None
    A = torch.cat([layer.apply(changes)[:, mask] for layer, _, mask in outputs], 1).T
    values, V = torch.linalg.eigh(gram_matrix(A))
    if not values[0] > MIN_CLOSING_RATIO**2 * values[-1]:
        return None
    y = V @ ((V.T @ (A.T @ right)) / values)
    y = y + V @ ((V.T @ (A.T @ (right - A @ y))) / values)
    x, missed = found.x + torch.einsum("n,ncij->cij", y, changes), (right - A @ y).norm().item()
    spread = missed / (len(right) - lack) ** 0.5 * ((V / values.sqrt()).square().sum() / found.unknowns).sqrt()
    each = zip(layers, gradients, dzs, strict=True)
    residual = max(((layer.weight_gradient(x, dz) - G).norm() / G.norm()).item() for layer, G, dz in each)
    outside = missed / torch.cat([z[mask] for _, z, mask in outputs]).norm().item()
    return replace(
        found, x=x, rank=found.unknowns, residual=max(residual, outside), null=[],
        error=torch.hypot(found.error * residual / max(found.residual, residual), spread),
        condition=max(found.condition, (values[-1] / values[0]).sqrt().item()),
    )  # fmt: skip


def _parts(layers, gradients, dzs, pixels: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each set of pixels that has equations of its own: the set, the rows of M, right-hand sides, filters."""
    found: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    first = 0
    for layer, G, dz in zip(layers, gradients, dzs, strict=True):
        weight = 1 / G.norm().clamp(min=1e-300) * G.numel() ** 0.5
        for block in blocks(layer):
            M, right = weight * gradient_matrix(layer, block, dz), weight * gradient_values(layer, block, G)
            owners = torch.arange(first, first + len(dz)).repeat_interleave(len(block.taps))
            found.setdefault(tuple(block.pixels.tolist()), []).append((M, right, owners))
        first += len(dz)
    if sum(map(len, found)) > len(set().union(*found)):  # sets that overlap: one system on all pixels
        whole = []
        for places, rows in found.items():
            for M, right, owners in rows:
                wide = M.new_zeros(len(M), pixels)
                wide[:, list(places)] = M
                whole.append((wide, right, owners))
        found = {tuple(range(pixels)): whole}
    return [
        (torch.tensor(places), *(torch.cat(part) for part in zip(*rows, strict=True))) for places, rows in found.items()
    ]


def solve_changes(layer: Layer, missed: Tensor, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor] | None:
    """By how much δz changes at some places if that explains what the layer's gradient equations miss.

    Solves N(x) change = missed, vec(G) − K(δz) x as (O, C, kh, kw), for the places (O, H′, W′) of each filter: a few
    unknowns each. The changes (O, H′, W′) are 0 elsewhere and come with their standard deviations by what remains; None
    where the layer has groups or a pixel map around its convolution, or a filter has more places than equations.
    """
    if layer.before is not None or layer.after is not None or layer.groups > 1:
        return None
    padded, places = F.pad(x.flatten(1), (0, 1)), places.flatten(1)  # index −1 is the padding
    N = padded[:, layer.tap_pixels()].flatten(0, 1)
    changes, errors = torch.zeros_like(places, dtype=x.dtype), torch.zeros_like(places, dtype=x.dtype)
    for filter in places.any(1).nonzero()[:, 0].tolist():
        columns, right = N[:, places[filter]], missed[filter].flatten()
        if columns.shape[1] >= len(right):
            return None
        gram = gram_matrix(columns)
        gram.diagonal().add_(MIN_GRAM_RATIO * gram.diagonal().max().clamp(min=1e-300))
        factor = torch.linalg.cholesky(gram)
        found = torch.cholesky_solve((columns.T @ right)[:, None], factor)[:, 0]
        found = found + torch.cholesky_solve((columns.T @ (right - columns @ found))[:, None], factor)[:, 0]
        std = (right - columns @ found).norm() / (len(right) - len(found)) ** 0.5
        changes[filter, places[filter]] = found
        errors[filter, places[filter]] = std * torch.cholesky_inverse(factor).diagonal().sqrt()
    return changes.reshape(layer.output_shape), errors.reshape(layer.output_shape)
