"""Inputs from their ∂ℓ/∂z_1, where the second layer's gradient holds fewer dimensions than there are images (ours).

Images that switch the same units of the second layer, and more images than units that switch, leave G_2 with a lower
rank than G_1; single hidden vectors are then not in its row space. But every ∂ℓ/∂z_1 = D_s W_2ᵀ δ, with δ in the column
space of G_2, is in the column space of G_1 all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.separation.subspaces import null_of_rows


def inputs_from_gradients(
    Z: Tensor, H: Tensor, slopes: Tensor, duals: Tensor, tolerance: float, gap_ratio: float
) -> tuple[Tensor, list[int], float]:
    """Inputs from their activation patterns and ∂ℓ/∂z_1, where only sums of hidden vectors are in the range of H.

    An input q_j is annihilated by the duals of all others that are known: q_j = N_j a_j. That Σ_j D_j Z N_j a_j is in
    the range of H is one smallest principal angle for all j; it has as many solutions as there are more inputs than H
    lacks dimensions, and each gives the same q_j, up to its size. Where all duals are known, N_j is q_j itself.

    Args:
        Z: Pre-activations per coordinate of the row space of G_1, (h, R).
        H: Orthonormal basis of the row space of G_2, (h, r).
        slopes: Of every unit for each of the J inputs, (J, h).
        duals: G_1⁺ᵀ ∂ℓ/∂z_1 in coordinates, (K, R), first those of the J inputs, then those of the others known.
        tolerance: Largest sine of an angle that counts as 0.
        gap_ratio: The same in units of the next angle's.

    Returns:
        q (J', R), unit length, which of the J they belong to, and the largest sine of the solutions.
    """
    count, rank = len(slopes), Z.shape[1]
    duals = duals / duals.norm(dim=1, keepdim=True)
    spaces = [null_of_rows(torch.cat([duals[:j], duals[j + 1 :]])) for j in range(count)]
    if len(duals) == rank:
        return torch.stack([N[:, 0] for N in spaces]), list(range(count)), 0.0
    factors = [torch.linalg.qr(D[:, None] * (Z @ N)) for D, N in zip(slopes, spaces, strict=True)]
    Q, R = torch.linalg.qr(torch.cat([factor[0] for factor in factors], 1))
    _, sines, directions = torch.linalg.svd(Q - H @ (H.T @ Q), full_matrices=False)
    solutions = int((sines <= tolerance).sum())
    if not solutions or solutions == len(sines) or sines[-solutions] > gap_ratio * sines[-solutions - 1]:
        return Z.new_zeros(0, rank), [], 1.0
    a = torch.linalg.lstsq(R, directions[-solutions:].T, driver="gelsd").solution
    found, which = [], []
    for j, part in enumerate(a.reshape(count, -1, solutions)):
        left, sizes, _ = torch.linalg.svd(part, full_matrices=False)
        if sizes[0] > 1e-3 and (solutions == 1 or sizes[1] <= 0.05 * sizes[0]):
            solution = torch.linalg.lstsq(factors[j][1], left[:, :1], driver="gelsd").solution[:, 0]
            found.append(spaces[j] @ solution)
            which.append(j)
    q = torch.stack([Z.new_zeros(rank), *found])[1:]
    return q / q.norm(dim=1, keepdim=True), which, sines[-solutions].item()


def extend_basis(H: Tensor, hidden: Tensor, limit: int) -> Tensor:
    """The orthonormal basis H (h, r), with at most `limit` of the directions of `hidden` (J, h) that it lacks."""
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    left, sizes, _ = torch.linalg.svd(hidden.T - H @ (H.T @ hidden.T), full_matrices=False)
    return torch.linalg.qr(torch.cat([H, left[:, sizes > 1e-3 * sizes[0]][:, :limit]], 1))[0]
