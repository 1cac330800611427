"""Singular decompositions, Gram matrices, orthonormal bases and norms."""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import Tensor

from rgap.isolation import accelerator

WIDE_RATIO = 8  # columns over rows from which a Gram matrix is made without use of its symmetry
MIN_ON_ACCELERATOR = 256  # unknowns from which a system is worth the way to an accelerator and back
SKETCH_SIZE = 24  # columns of a random sketch at first, beyond the rank that is expected
SKETCH_SURPLUS = 12  # columns that it must have beyond the singular values that count
WELL_CONDITIONED = 0.03  # least pivot ratio of a Gram matrix whose columns come out orthonormal at once


def accelerator_for(unknowns: int) -> torch.device | None:
    """Where a system of so many unknowns is solved, None for here."""
    return accelerator.get() if unknowns >= MIN_ON_ACCELERATOR else None


def svd(A: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Singular decomposition A = U diag(S) Vh, by a second LAPACK driver where MKL's fast one does not converge."""
    try:
        return torch.linalg.svd(A, full_matrices=full_matrices)
    except torch.linalg.LinAlgError:
        factors = scipy.linalg.svd(A.numpy(), full_matrices=full_matrices, lapack_driver="gesvd")
        return tuple(torch.from_numpy(f) for f in factors)


def leading_svd(A: Tensor, cut: float, rank: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of A with every singular value above cut · σ_max, and some below: of low rank in a few products.

    A random sketch (Halko, Martinsson & Tropp 2011, with a power iteration) has room for an expected `rank` and is
    enlarged until it holds them all; the largest value below the cut may come out some per cent too small. The whole
    decomposition where that is cheaper.
    """
    generator, size = torch.Generator().manual_seed(0), rank + SKETCH_SIZE
    while 4 * size < min(A.shape):
        Q = A @ torch.randn(A.shape[1], size, generator=generator, dtype=A.dtype)
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ torch.linalg.qr(Q)[0])[0])[0]
        U, S, Vh = svd(Q.T @ A)
        if S[-SKETCH_SURPLUS] <= cut * S[0]:
            return Q @ U, S, Vh
        size *= 4
    return svd(A)


def gram_matrix(A: Tensor) -> Tensor:
    """AᵀA at half the multiplications of a product, for it is symmetric: (m, k) -> (k, k)."""
    if not A.numel():
        return A.new_zeros(A.shape[1], A.shape[1])
    if (device := accelerator_for(A.shape[1])) is not None:
        there = A.to(device)
        return (there.T @ there).to(A.device)
    if WIDE_RATIO * len(A) < A.shape[1]:  # mirroring would cost more than it saves
        return A.T @ A
    syrk = scipy.linalg.blas.dsyrk if A.dtype == torch.float64 else scipy.linalg.blas.ssyrk
    upper = torch.from_numpy(syrk(1.0, A.T.numpy())).triu()
    return upper + upper.triu(1).T


def orthonormal(A: Tensor, times: int = 2) -> Tensor:
    """Orthonormal columns with the span of A's, by Cholesky factors of Gram matrices; QR where A is ill-conditioned.

    A second time makes good what an A that is not `WELL_CONDITIONED` has lost.
    """
    for _ in range(times if A.shape[1] else 0):
        factor, failed = torch.linalg.cholesky_ex(gram_matrix(A))
        if failed:
            return torch.linalg.qr(A)[0]
        A = torch.linalg.solve_triangular(factor.T, A, upper=True, left=False)
        low, high = torch.aminmax(factor.diagonal())
        if low > WELL_CONDITIONED * high:
            break
    return A


def largest_entry(g: Tensor) -> float:
    """The largest absolute value, NaN where an entry is, 0 without entries; several times as fast as `abs().max()`."""
    return max(end.abs().item() for end in torch.aminmax(g)) if g.numel() else 0.0


def norm(g: Tensor) -> float:
    """The root of the sum of squares, which neither underflow nor overflow."""
    size = g.norm().item()
    if 1e-140 < size < 1e140:
        return size
    unit = largest_entry(g)
    return unit * (g / unit).norm().item() if 0 < unit < math.inf else unit


def distance(a: Tensor, b: Tensor) -> float:
    """`norm(a - b)`, mostly without the difference."""
    size = torch.dist(a, b).item()
    return size if 1e-140 < size < 1e140 else norm(a - b)


def rms(g: Tensor) -> Tensor:
    """Root mean square."""
    return g.new_tensor(norm(g) / g.numel() ** 0.5)
