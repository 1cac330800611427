"""Row and column spaces of a gradient that mixes a batch, their numerical rank, and where two subspaces meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.network.layer import Layer


@dataclass(frozen=True)
class Span:
    """A gradient G, or [G, ∂ℓ/∂b] with a bias, as U diag(S) Vᵀ, cut at its numerical rank.

    Attributes:
        U: Orthonormal basis of the column space, (outputs, rank).
        S: Singular values, (rank,).
        V: Orthonormal basis of the row space, (inputs, rank); with a bias the last row is that of the constant 1.
        above_cut: Smallest singular value kept, relative to the largest.
        below_cut: Largest one dropped, relative to the largest; 0 where none is left.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    above_cut: float
    below_cut: float

    @property
    def rank(self) -> int:
        """Singular values above the cut."""
        return len(self.S)

    @property
    def is_full(self) -> bool:
        """Whether the rank is the largest that the gradient's shape allows."""
        return self.rank == min(len(self.U), len(self.V))


def row_span(layer: Layer, gradients: Mapping[str, Tensor], precision: float) -> Span:
    """The spaces of one fully connected layer's gradient.

    Rounding leaves singular values of about a tenth of `precision` relative to the largest; what is above `precision`
    counts.

    Args:
        layer: A fully connected layer.
        gradients: Parameter name -> gradient, float64.
        precision: Relative error of the gradients' entries.
    """
    G = gradients[layer.weight_name].flatten(1)
    if layer.bias_name is not None:
        G = torch.cat([G, gradients[layer.bias_name][:, None]], 1)
    U, S, Vt = torch.linalg.svd(G, full_matrices=False)
    relative = S / S[0].clamp(min=torch.finfo(S.dtype).tiny)
    rank = int((relative > max(precision, 1e-14)).sum())
    above = relative[rank - 1].item() if rank else 0.0
    below = relative[rank].item() if rank < len(S) else 0.0
    return Span(U[:, :rank], S[:rank], Vt[:rank].T, above, below)


def meet(A: Tensor, V: Tensor) -> tuple[Tensor, float, float]:
    """The vector A a, of unit length, that lies closest to the range of V.

    Args:
        A: (m, k), of full column rank.
        V: (m, l), orthonormal.

    Returns:
        a (k,), the sine of the smallest principal angle between the two ranges, and that of the next one (1 for k = 1).
    """
    Q, R = torch.linalg.qr(A)
    _, sines, directions = torch.linalg.svd(Q - V @ (V.T @ Q), full_matrices=False)
    nearest = Q @ directions[-1]
    sine = (nearest - V @ (V.T @ nearest)).norm().item()
    a = torch.linalg.lstsq(R, directions[-1][:, None], driver="gelsd").solution[:, 0]
    return a, sine, sines[-2].item() if len(sines) > 1 else 1.0


def null_of_rows(rows: Tensor) -> Tensor:
    """Orthonormal basis (n, n − k) of what k independent rows (k, n) annihilate."""
    return torch.linalg.qr(rows.T, mode="complete")[0][:, len(rows) :]
