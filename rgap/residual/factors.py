"""A convolution's gradient as a product of δz and shifted inputs: least squares in either, and in both at once."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

CG_TOLERANCE = 1e-4  # relative residual of the normal equations of a step in both factors
CG_STEPS = 600  # steps after which an ill-conditioned system is given up
RELATIVE_RIDGE = 1e-13  # of the preconditioner, relative to its trace: an input whose δz vanish has none of its own
POLISHING_STEPS = 3  # Gauss–Newton steps at most
POLISHING_GAIN = 0.1  # share of the misfit that a step must leave at most for another one to follow


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
