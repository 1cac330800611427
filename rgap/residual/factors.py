"""Both factors of a convolution's gradient, δz and shifted inputs: one from its row space, then each from the other.

The row space of a split holds one matrix whose columns are shifts of one image: the first eigenvector of a product of
two projections. From one factor follows the other by least squares, and both at once refine each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigvalsh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, cg, eigsh
from torch import Tensor

DENSE_UNKNOWNS = 600  # unknowns up to which the operator is formed and decomposed
LANCZOS_VECTORS = 60  # vectors that Lanczos keeps
LANCZOS_RESTARTS = 25  # restarts after which other eigenvalues lie too close to 1
VECTOR_TOLERANCE = 1e-10  # residual of the first eigenvector
CG_TOLERANCE = 1e-4  # relative residual of the normal equations of a step in both factors
CG_STEPS = 600  # steps after which an ill-conditioned system is given up
RELATIVE_RIDGE = 1e-13  # of the preconditioner, relative to its trace: an input whose δz vanish has none of its own
POLISHING_STEPS = 3  # Gauss–Newton steps at most
POLISHING_GAIN = 0.1  # share of the misfit that a step must leave at most for another one to follow


class Shifts(NamedTuple):
    """The matrix found, as its pixels, and how alone it stands."""

    pixels: Tensor  # (C, pixels), of norm 1
    missed: float  # 1 − the largest eigenvalue: 0 where the row space holds such a matrix
    gap: float  # 1 − the second largest: 0 where it holds several


class ShiftSpace:
    """Matrices (N, taps·C) in the span of N orthonormal rows against those that are shifts of C channels."""

    def __init__(self, V: Tensor, table: np.ndarray, pixels: int):
        """V is (N, taps, C); `table` (taps, N) names the pixel that a row reads by a tap, −1 in the padding."""
        self.V, self.channels, self.count = V.flatten(1), V.shape[2], pixels
        reads = torch.from_numpy(table)
        self.index = torch.where(reads >= 0, reads, pixels)
        times = torch.bincount(self.index.flatten(), minlength=pixels + 1)[:pixels]
        self.weight = times.clamp(min=1).to(V.dtype).rsqrt()[:, None]

    def collect(self, L: Tensor) -> Tensor:
        """Pixels of L V, (N, N) -> (pixels, C): their sums over what reads them, with the weight of a unit vector."""
        parts = (L @ self.V).reshape(len(L), -1, self.channels)
        out = parts.new_zeros(self.count + 1, self.channels)
        for tap, index in enumerate(self.index):
            out.index_add_(0, index, parts[:, tap])
        return out[:-1] * self.weight

    def spread(self, x: Tensor) -> Tensor:
        """The adjoint of `collect`."""
        x = torch.cat([x * self.weight, x.new_zeros(1, self.channels)])
        return x[self.index.T].flatten(1) @ self.V.T

    def solve(self) -> Shifts | None:
        """The two largest eigenvalues of the smaller of the two products; None where Lanczos does not find them."""
        N, pixels = len(self.V), (self.count, self.channels)
        by_rows = N * N <= self.count * self.channels
        if by_rows:
            shape, product = (N, N), lambda L: self.spread(self.collect(L))
        else:
            shape, product = pixels, lambda x: self.collect(self.spread(x))
        found = _largest_two(product, shape)
        if found is None:
            return None
        values, vector = found
        x = (self.collect(vector) if by_rows else vector) * self.weight
        return Shifts(x.T / x.norm(), 1 - values[-1], 1 - values[-2] if len(values) > 1 else 1.0)


def _largest_two(product: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> tuple[np.ndarray, Tensor] | None:
    size = shape[0] * shape[1]

    def apply(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(v).reshape(shape)).flatten().numpy()

    if size <= DENSE_UNKNOWNS:
        values, vectors = np.linalg.eigh(np.stack([apply(unit) for unit in np.eye(size)]))
        return values[-2:], torch.from_numpy(vectors[:, -1].copy()).reshape(shape)
    steps = itertools.count()
    start = np.random.default_rng(0).standard_normal(size)
    options = {"ncv": LANCZOS_VECTORS, "maxiter": LANCZOS_RESTARTS, "tol": VECTOR_TOLERANCE}
    operator = LinearOperator((size, size), matvec=lambda v: (next(steps), apply(v))[1], dtype=float)
    try:
        (value,), vectors = eigsh(operator, 1, which="LA", v0=start, **options)
    except ArpackNoConvergence:
        return None
    vector = vectors[:, 0].copy()
    second = _largest(lambda v: apply(v) - value * vector * (vector @ v), np.roll(start, 1), next(steps) // 2)
    return np.array([second, value]), torch.from_numpy(vector).reshape(shape)


def _largest(apply: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int) -> float:
    """The largest eigenvalue, from below, by so many steps of Lanczos without restarts, whose vectors are not kept.

    Steps that sufficed to find an eigenvalue of 1 from a random start would show another one.
    """
    v, before, b = start / np.linalg.norm(start), np.zeros_like(start), 0.0
    diagonal, beside = [], []
    for _ in range(steps):
        w = apply(v) - b * before
        diagonal.append(w @ v)
        w -= diagonal[-1] * v
        b = np.linalg.norm(w)
        beside.append(b)
        v, before = w / b, v
    return float(eigvalsh_tridiagonal(diagonal, beside[:-1])[-1])


class Factors:
    """G = δz [shifts of x], with δz (O, P), x (C, H, W) and all taps (C·k², P) of x.

    The geometry is a layer's: kernel, stride and dilation (vertical, horizontal), padding (left, right, top, bottom).
    """

    def __init__(self, image: tuple[int, int], kernel, stride, padding, dilation):
        """For inputs of that size (H, W)."""
        self.image, self.padding = image, padding
        self.window = {"kernel_size": kernel, "stride": stride, "dilation": dilation}
        self.padded = (image[0] + padding[2] + padding[3], image[1] + padding[0] + padding[1])

    @property
    def outputs(self) -> tuple[int, int]:
        """Size (H′, W′) of the output."""
        window = zip(*self.window.values(), self.padded, strict=True)
        return tuple((n - step * (k - 1) - 1) // stride + 1 for k, stride, step, n in window)

    def taps(self, x: Tensor) -> Tensor:
        """All taps of x, (C, H, W) -> (C·k², P)."""
        return F.unfold(F.pad(x, self.padding)[None], **self.window)[0]

    def untap(self, Y: Tensor) -> Tensor:
        """The adjoint of `taps`."""
        left, _, top, _ = self.padding
        x = F.fold(Y[None], self.padded, **self.window)[0]
        return x[:, top : top + self.image[0], left : left + self.image[1]]

    def solve_dz(self, G: Tensor, x: Tensor) -> Tensor:
        """The δz (O, P) that fit G (O, C·k²) best."""
        return torch.linalg.lstsq(self.taps(x), G.T, driver="gelsd").solution.T

    def solve_x(self, G: Tensor, dz: Tensor) -> Tensor:
        """The input (C, H, W) that fits G best."""
        right = self.untap(G.T @ dz).flatten(1)  # (C, pixels)
        return torch.linalg.lstsq(self._gram(dz), right.T, driver="gelsd").solution.T.reshape(-1, *self.image)

    def step(self, E: Tensor, x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor] | None:
        """The changes of x and δz that reduce a misfit E (O, C·k²) of G to first order; None where CG fails.

        δz is eliminated: what it can absorb is the span of the taps of x, Q. The direction (x, −δz) stays at zero.
        """
        A = self.taps(x)
        Q, R = torch.linalg.qr(A)
        gram = dz.T @ dz

        def apply(v: np.ndarray) -> np.ndarray:
            Y = self.taps(torch.from_numpy(v).reshape(x.shape))
            return self.untap(_without(Q, Y) @ gram).flatten().numpy()

        H = self._gram(dz)
        H.diagonal().add_(RELATIVE_RIDGE * H.trace())
        factor = torch.linalg.cholesky(H)

        def precondition(v: np.ndarray) -> np.ndarray:
            return torch.cholesky_solve(torch.from_numpy(v).reshape(len(x), -1).T, factor).T.flatten().numpy()

        right = self.untap(_without(Q, E.T) @ dz).flatten().numpy()
        square = (x.numel(), x.numel())
        solution, failed = cg(
            LinearOperator(square, matvec=apply, dtype=float), right, rtol=CG_TOLERANCE, maxiter=CG_STEPS,
            M=LinearOperator(square, matvec=precondition, dtype=float),
        )  # fmt: skip
        if failed:
            return None
        dx = torch.from_numpy(solution).reshape(x.shape)
        rest = E.T - self.taps(dx) @ dz.T
        return dx, torch.linalg.solve_triangular(R, Q.T @ rest, upper=True).T

    def polish(self, G: Tensor, x: Tensor, dz: Tensor) -> tuple[Tensor, Tensor] | None:
        """Gauss–Newton on both factors, while it helps; None where it fails."""
        missed = self.misfit(G, x, dz)
        for _ in range(POLISHING_STEPS):
            change = self.step(missed, x, dz)
            if change is None:
                return None
            nearer = (x + change[0], dz + change[1])
            left = self.misfit(G, *nearer)
            gain, before = left.norm().item(), missed.norm().item()
            if gain < before:
                (x, dz), missed = nearer, left
            if gain > POLISHING_GAIN * before:
                break
        return x, dz

    def misfit(self, G: Tensor, x: Tensor, dz: Tensor) -> Tensor:
        """What G (O, C·k²) has beyond the product."""
        return G - dz @ self.taps(x).T

    def _gram(self, dz: Tensor) -> Tensor:
        """Σ_t Sₜᵀ δzᵀδz Sₜ, (pixels, pixels)."""
        count = math.prod(self.image)
        shifts = self.taps(torch.eye(count, dtype=dz.dtype).reshape(count, *self.image))  # (pixels·k², P)
        return self.untap(shifts @ (dz.T @ dz)).flatten(1)


def _without(Q: Tensor, Y: Tensor) -> Tensor:
    return Y - Q @ (Q.T @ Y)
