"""Smallest principal angles between ranges, and the activation patterns that they lead to (ours).

The a for which A a is nearest to the range of an orthonormal V is an eigenvector of k×k matrices, a fifth of the cost
of orthonormal bases of tall ones. A step or two with the residual of A itself restore the digits that squaring costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_FLOOR = 1e-14  # share of its trace that is added to a Gram matrix, so that a Cholesky factor exists
MIN_RESOLVED_SINE = 1e-3  # sine of the second angle from which squares of cosines resolve it
ANGLE_REFINEMENTS = 2  # steps with the residual of A; one suffices where its columns are not nearly dependent
INVERSE_STEPS = 3  # between two changes of signs; more hardly find more patterns
SAME_COSINE = 0.99  # cosine between two starts' directions, or patterns, above which they lead to the same


def nearest_directions(gram: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Principal angles from Gram matrices AᵀA (S, k, k) and VᵀA (S, l, k).

    Gives the principal directions as columns (S, k, k) with A a of unit length, the last nearest to the range of V, and
    the squares (S, k) of their cosines, ascending.
    """
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-280)
    floor = GRAM_FLOOR * trace[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
    L = torch.linalg.cholesky(gram + floor)
    T = torch.linalg.solve_triangular(L, inside.mT, upper=False)
    squares, turn = torch.linalg.eigh(T @ T.mT)
    return torch.linalg.solve_triangular(L.mT, turn, upper=True), squares


def smallest_principal_angles(d: Tensor, Z: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each d (S, h) the a (k,) whose unit vector A a, A = diag(d) Z, is nearest to the range of V.

    Z is (h, k), every A of full column rank, V (h, l) orthonormal. Gives the a (S, k), and the sines (S,) of the
    smallest principal angle between the two ranges and of the next one (1 for k = 1).
    """
    basis, squares = nearest_directions(*sloped_grams(d, Z, V))
    a, others, sines = basis[:, :, -1], basis[:, :, :-1], (1 - squares).clamp(min=0).sqrt()
    following = sines[:, -2].clone() if sines.shape[1] > 1 else torch.ones(len(d), dtype=d.dtype)
    for step in range(ANGLE_REFINEMENTS + 1):
        seen = d * (a @ Z.T)
        size = seen.norm(dim=1, keepdim=True)
        a, seen = a / size, seen / size
        rest = seen - seen @ V @ V.T
        if step < ANGLE_REFINEMENTS:
            outside = rest - rest @ V @ V.T  # the first projection's rounding would be divided by the sines' squares
            back = ((d * outside) @ Z)[:, None] @ others / sines[:, None, :-1].square()
            a = a - (others @ back.mT)[:, :, 0]
    nearest = rest.norm(dim=1)
    for s in torch.nonzero(~(following >= MIN_RESOLVED_SINE)).flatten().tolist():
        a[s], nearest[s], following[s] = _by_orthonormal_bases(d[s, :, None] * Z, V)
    return a, nearest, following


def _by_orthonormal_bases(A: Tensor, V: Tensor) -> tuple[Tensor, float, float]:
    """The same to full precision where several angles are small."""
    Q, R = torch.linalg.qr(A)
    _, sines, directions = torch.linalg.svd(Q - V @ (V.T @ Q), full_matrices=False)
    nearest = Q @ directions[-1]
    sine = (nearest - V @ (V.T @ nearest)).norm().item()
    a = torch.linalg.lstsq(R, directions[-1][:, None], driver="gelsd").solution[:, 0]
    return a, sine, sines[-2].item() if len(sines) > 1 else 1.0


def sloped_grams(d: Tensor, Z: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """AᵀA (S, k, k) and VᵀA (S, l, k) of A = diag(d) Z for d (S, h), Z (h, k) and V (h, l)."""
    k, rows = Z.shape[1], torch.cat([Z, V], 1).T.contiguous()
    Z, products = rows[:k].clone(), d.new_empty(len(d), len(rows), k)
    for s in range(len(d)):  # one at a time, A stays in the cache
        torch.mul(Z, d[s], out=rows[:k])
        torch.mm(rows, rows[:k].T, out=products[s])
    return products[:, :k], products[:, k:]


def settled_patterns(
    Z: Tensor, H: Tensor, slopes: tuple[Tensor, Tensor], signs: Tensor, steps: int
) -> tuple[Tensor, Tensor, int]:
    """Replaces signs (S, h) by those of the vector D_s Z q nearest to the range of H, until they are stable.

    Z (h, k) and H (h, l) are orthonormal; D_s has the slopes (h,) for positive and negative entries. Each q is
    approached by inverse iteration from the one before, for the signs that it gives need no more. Gives the signs, the
    sines (S,) of the last angles, 1 of a start that met another, which goes on alone, and the steps taken.
    """
    live, sines, taken = torch.arange(len(signs)), Z.new_ones(len(signs)), 0
    q = torch.where(signs, 1.0, -1.0).to(Z.dtype) @ Z
    for _ in range(steps):
        q, sines[live] = _nearer(q, *sloped_grams(torch.where(signs[live], *slopes), Z, H))
        z = q @ Z.T
        turned = z > 0
        against = (turned == signs[live]).sum(1) * 2 < signs.shape[1]
        turned[against] = z[against] < 0
        goes_on = (turned != signs[live]).any(1)
        signs, taken = signs.index_put((live,), turned), taken + len(live)
        met = ((q @ q.T).abs() > SAME_COSINE).tril(-1).any(1)
        sines[live[met]] = 1.0
        live, q = live[goes_on & ~met], q[goes_on & ~met]
        if not len(live):
            break
    return signs, sines, taken


def _nearer(q: Tensor, gram: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors q (S, k) with A q nearer to the range of V, and the sines (S,), from AᵀA and VᵀA."""
    outside, q = gram - inside.mT @ inside, q[:, :, None]
    floor = GRAM_FLOOR * gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-280)
    L = torch.linalg.cholesky(outside + floor[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype))
    for _ in range(INVERSE_STEPS):
        q = torch.cholesky_solve(gram @ q, L)
        q = q / q.norm(dim=1, keepdim=True)
    squares = (q.mT @ outside @ q) / (q.mT @ gram @ q)
    return q[:, :, 0], squares[:, 0, 0].clamp(min=0).sqrt()


def different_patterns(signs: Tensor) -> Tensor:
    """Those of the signs (S, h) that are not almost an earlier one."""
    sides = signs.to(torch.float32) - 0.5
    return signs[~(4 * sides @ sides.T > SAME_COSINE * signs.shape[1]).tril(-1).any(1)]
