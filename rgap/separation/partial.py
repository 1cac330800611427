"""What the second layer's gradient lacks, the first one's makes up for: inputs from their shares ∂ℓ/∂z_1 (ours).

Images that switch the same units of the second layer, and more images than units that switch, leave G_2 with fewer
dimensions than there are images; single hidden vectors are then not in its row space. But every ∂ℓ/∂z_1 = D_s W_2ᵀ δ,
δ in the column space of G_2, is in the column space of G_1 all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.separation.subspaces import meet, null_of_rows

TURNS = 30
"""Steps of the fixed point over ∂ℓ/∂z_1; it takes about four."""


def fit_share(
    signs: Tensor, E: Tensor, U: Tensor, slopes: tuple[Tensor, Tensor], tolerance: float
) -> tuple[Tensor, Tensor, float, float]:
    """Turns signs until D_s E b, for the best b, lies as near to the range of U as it gets.

    For given signs it is a smallest principal angle. Its two vectors, u in the range of U and v = E b, tell for every
    unit whether u = up·v or u = down·v is nearer, where the sign of the unit itself is not known well. Units that can
    hardly tell, with v near 0, are left as they are.

    Args:
        signs: Which units are positive, (h,).
        E: W_2ᵀ times a basis of the column space of G_2, (h, r).
        U: Orthonormal basis of the column space of G_1, (h, R).
        slopes: The activation's for positive and for negative z, (h,) each.
        tolerance: Smallest difference, relative to the size of u, that turns a unit.

    Returns:
        The signs, b, the sine of the angle, and that of the next one.
    """
    seen, (up, down) = [], slopes
    for _ in range(TURNS):
        D = torch.where(signs, up, down)
        b, miss, following = meet(D[:, None] * E, U)
        v = E @ b
        u = U @ (U.T @ (D * v))
        nearer = (u - down * v).abs() - (u - up * v).abs()
        turned = torch.where(nearer.abs() > tolerance * u.square().mean().sqrt(), nearer > 0, signs)
        if turned.equal(signs) or any(turned.equal(s) for s in seen):
            break
        seen.append(signs)
        signs = turned
    return signs, b, miss, following


def inputs_of_shares(
    Z: Tensor, H: Tensor, slopes: Tensor, duals: Tensor, tolerance: float, distinct: float
) -> tuple[Tensor, list[int], float]:
    """Inputs from their signs and shares, where each hidden vector alone is not in the range of H but sums of them are.

    An input q_j is annihilated by the shares of all others that are known: q_j = N_j a_j. Σ_j D_j Z N_j a_j in the
    range of H is one smallest principal angle for all j; it has as many solutions as there are more inputs than H
    lacks dimensions, and each gives the same q_j, up to its size. Where all shares are known, N_j is q_j itself.

    Args:
        Z: Pre-activations per coordinate of the row space, (h, R).
        H: Orthonormal basis of the row space of G_2, (h, r).
        slopes: Of every unit for each of the J inputs, (J, h).
        duals: G_1⁺ᵀ ∂ℓ/∂z_1 in coordinates, (K, R), first those of the J inputs, then those of the others known.
        tolerance: Largest sine of an angle that counts as 0.
        distinct: The same in units of the next angle.

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
    if not solutions or solutions == len(sines) or sines[-solutions] > distinct * sines[-solutions - 1]:
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


def extended(H: Tensor, hidden: Tensor, limit: int) -> Tensor:
    """The basis H (h, r), with the directions of `hidden` (J, h) that it lacks, `limit` at most."""
    hidden = hidden / hidden.norm(dim=1, keepdim=True)
    left, sizes, _ = torch.linalg.svd(hidden.T - H @ (H.T @ hidden.T), full_matrices=False)
    return torch.linalg.qr(torch.cat([H, left[:, sizes > 1e-3 * sizes[0]][:, :limit]], 1))[0]


def share_outside(rows: Tensor, hidden: Tensor) -> float:
    """Which share, by norm, of the rows (h, r) is outside the span of the hidden vectors (B, h)."""
    Q = torch.linalg.qr(hidden.T)[0]
    return ((rows - Q @ (Q.T @ rows)).norm() / rows.norm()).item()
