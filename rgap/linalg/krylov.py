"""Lanczos and conjugate gradients: extreme eigenvalues and least squares of matrices that need not be formed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from scipy.linalg.lapack import dsterf
from torch import Tensor

LANCZOS_RTOL = 0.01  # relative gain of a Lanczos step below which the largest eigenvalue counts as found


def largest_eigenvalue(multiply: Callable[[Tensor], Tensor], size: int, steps: int = 30) -> float:
    """Of a positive semidefinite matrix v -> A v, from below: Lanczos until a step gains less than `LANCZOS_RTOL`."""
    v = torch.randn(size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    v, before, diagonal, beside, found = v / np.linalg.norm(v), np.zeros_like(v), [], [0.0], 0.0
    for _ in range(min(steps, size)):
        w = multiply(torch.from_numpy(v)).numpy()
        diagonal.append(float(v[:, 0] @ w[:, 0]))
        last, found = found, dsterf(diagonal, beside[1:])[0][-1] if beside[1:] else diagonal[0]
        w = w - diagonal[-1] * v - beside[-1] * before
        beside.append(float(np.linalg.norm(w)))
        if not found * (1 - LANCZOS_RTOL) > last or not beside[-1] > 1e-12 * found:
            break
        v, before = w / beside[-1], v
    return float(found)


@dataclass(frozen=True)
class Iterated:
    """What conjugate gradients found."""

    x: Tensor  # in the shape of Aᵀ b
    residual: float  # ‖A x − b‖ / ‖b‖, 0 for b = 0
    iterations: int
    condition: float  # of A, by the iterations' Ritz values; NaN where there were none


def conjugate_gradients(
    apply: Callable[[Tensor], list[Tensor]], adjoint: Callable[[list[Tensor]], Tensor], b: list[Tensor], *,
    tolerance: float = 1e-12, max_iterations: int = 20_000, done: Callable[[Tensor], bool] = lambda x: False,
    normal: Tensor | None = None,
) -> Iterated:  # fmt: skip
    """The minimum-norm least-squares solution of A x = b by conjugate gradients on the normal equations (CGLS).

    A x and b are lists of tensors. The iterations end where the norm of the normal equations' residual has fallen to
    `tolerance` of what it was, or `done` is true of x. A `normal` right side Aᵀ b that is
    known more precisely than b is used in its place; the residual is then no number.
    """

    def square(vectors: list[Tensor]) -> float:
        return sum(torch.dot(v.flatten(), v.flatten()).item() for v in vectors)

    rest = [v.clone() for v in b]
    s = adjoint(rest) if normal is None else normal.clone()
    x, p = torch.zeros_like(s), s.clone()
    size = first = square([s])
    alphas, betas = [], []
    while len(alphas) < max_iterations and size > tolerance**2 * first:
        q = apply(p)
        alpha = size / max(square(q), torch.finfo(x.dtype).tiny)
        x.add_(p, alpha=alpha)
        if normal is None:
            for r, change in zip(rest, q, strict=True):
                r.sub_(change, alpha=alpha)
        if done(x):
            break
        s = adjoint(rest) if normal is None else s.sub_(adjoint(q), alpha=alpha)
        size, previous = square([s]), size
        p.mul_(size / previous).add_(s)
        alphas.append(alpha)
        betas.append(size / previous)
    total = square(b)
    residual = (square(rest) / total) ** 0.5 if total > 0 else 0.0
    return Iterated(x, residual, len(alphas), _ritz_condition(np.array(alphas), np.array(betas)))


def _ritz_condition(a: np.ndarray, b: np.ndarray) -> float:
    """Condition number that the Lanczos matrix of a CG run shows, from its step lengths."""
    if not len(a):
        return float("nan")
    diagonal = 1 / a + np.concatenate([[0.0], b[:-1] / a[:-1]])
    values = eigvalsh_tridiagonal(diagonal, np.sqrt(b[:-1]) / a[:-1]) if len(a) > 1 else diagonal
    return float(np.sqrt(values.max() / max(values.min(), np.finfo(float).tiny)))
