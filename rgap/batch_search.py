"""The search for the inputs of a fully connected layer: fixed point, two tests, deflation. Everything here is ours."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rgap.batch_spans import Span, meet, null_of_rows
from rgap.chain import Layer
from rgap.results import UnsupportedLayerError

STEPS = 40
"""Steps of one fixed point; it takes about ten."""

DISTINCT = 1e-3
"""Sine of the angle, in units of the next one, up to which a direction is accepted: about its error. Where two images
switch the same units every mixture of them fits, and the next angle is as small."""

DOUBTFUL = 8
"""Units next to 0 that are turned, one after the other, where an input's ∂ℓ/∂z_1 does not fit."""

SPARE = 4
"""Units that the first layer must have beyond the two ranks: with none to spare every mixture passes both tests."""


def slopes(layer: Layer) -> tuple[Tensor, Tensor]:
    """Slopes (h,) of the layer's activation for positive and for negative z.

    Raises:
        UnsupportedLayerError: If it is no pair of half-lines through 0, or a single line.
    """
    if not layer.activation.homogeneous:
        raise UnsupportedLayerError(
            f"layer {layer.name!r}: inputs of a batch are separated through LeakyReLU, PReLU or ReLU, "
            f"and its activation is {layer.activation.name}"
        )
    one = torch.ones(layer.output_shape, dtype=torch.float64)
    up, down = layer.activation.forward(one).flatten(), -layer.activation.forward(-one).flatten()
    if torch.equal(up, down):
        raise UnsupportedLayerError(
            f"layer {layer.name!r} has no activation that bends: any mixture of the batch has the same gradient"
        )
    return up, down


class Search:
    """The fixed point, with what has been found so far in coordinates of the row and column spaces."""

    def __init__(self, first: Layer, second: Layer, spans: tuple[Span, Span], precision: float):
        """Takes the spaces of both layers' gradients; see `separate` for the arguments."""
        self.up, self.down = slopes(first)
        self.tolerance = min(max(1e-8, 1e4 * precision), 1e-2)
        self.has_constant = first.bias is not None
        self.first, self.second = spans
        W, W_next = first.weight.flatten(1), second.weight.flatten(1)
        self.W, self.inputs = W, W.new_zeros(0, W.shape[1])
        Z = W @ self.first.V[: W.shape[1]]
        H = self.second.V[: len(W)]
        if self.has_constant:
            Z = Z + first.bias[:, None] * self.first.V[-1]
            if second.bias is not None:  # the constant of the next layer is one more unit, always on
                Z, H = torch.cat([Z, self.first.V[-1:]]), self.second.V
                one = self.up.new_ones(1)
                self.up, self.down = torch.cat([self.up, one]), torch.cat([self.down, one])
        elif second.bias is not None:
            H = torch.linalg.qr(H)[0]
        self.Z, self.H = Z, H
        self.E = W_next.T @ self.second.U
        rank, rank_next = self.first.rank, self.second.rank
        self.q, self.dual = Z.new_zeros(0, rank), Z.new_zeros(0, rank)
        self.dual_next = Z.new_zeros(0, rank_next)
        self.dz, self.residuals = Z.new_zeros(0, len(W)), Z.new_zeros(0, 2)
        self.steps = 0

    @property
    def found(self) -> int:
        """Inputs found so far."""
        return len(self.q)

    @property
    def missing(self) -> int:
        """Inputs that the first gradient holds and that are not found yet."""
        return self.first.rank - self.found

    @property
    def has_tests(self) -> bool:
        """Whether the first layer has units enough for the two tests to mean anything."""
        return self.first.rank + self.second.rank + SPARE <= len(self.E)

    def look(self, count: int, generator: torch.Generator, *, whole: bool) -> None:
        """One round of starts, among the inputs that are left, or among all of them (`whole`)."""
        rest = torch.eye(self.first.rank, dtype=self.Z.dtype) if whole else null_of_rows(self.dual)
        rest_next = torch.eye(self.second.rank, dtype=self.Z.dtype)
        if not whole and self.second.rank == self.first.rank:
            rest_next = null_of_rows(self.dual_next)
        Z = torch.linalg.qr(self.Z @ rest)[0]
        start = torch.randn(count, Z.shape[1], generator=generator, dtype=Z.dtype)
        signs = self.iterate(Z, self.H @ rest_next, start @ Z.T > 0)
        if not whole and self.found:  # deflation carries the errors of what was found; the whole spaces do not
            signs = self.iterate(torch.linalg.qr(self.Z)[0], self.H, signs)
        for s in signs:
            self.accept(s)

    def iterate(self, Z: Tensor, H: Tensor, signs: Tensor) -> Tensor:
        """Turns signs (S, h) into those of the vector D_s Z q nearest to the range of H, until they stay."""
        live = torch.arange(len(signs))
        floor = 1e-13 * torch.eye(Z.shape[1], dtype=Z.dtype)
        for _ in range(STEPS):
            DZ = torch.where(signs[live], self.up, self.down)[:, :, None] * Z
            N, P = DZ.mT @ DZ, H.T @ DZ
            trace = N.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-30)
            L = torch.linalg.cholesky(N + floor * trace)
            T = torch.linalg.solve_triangular(L, P.mT, upper=False)
            y = torch.linalg.eigh(T @ T.mT)[1][:, :, -1:]
            z = torch.linalg.solve_triangular(L.mT, y, upper=True)[:, :, 0] @ Z.T
            turned = z > 0
            against = (turned == signs[live]).sum(1) * 2 < signs.shape[1]
            turned[against] = z[against] < 0
            stays = (turned == signs[live]).all(1)
            signs = signs.index_put((live,), turned)
            self.steps += len(live)
            live = live[~stays]
            if not len(live):
                break
        return signs

    def accept(self, signs: Tensor) -> None:
        """Adds the input with these signs if it passes both tests and is new."""
        q, miss, following = meet(torch.where(signs, self.up, self.down)[:, None] * self.Z, self.H)
        share = (self.dual @ q).abs() * self.q.norm(dim=1)  # ‖q‖ for an input that is there, 0 for every other one
        if not self.passes(miss, following) or (share > 0.5 * q.norm()).any():
            return
        z = self.Z @ q
        if ((z > 0) == signs).sum() * 2 < len(signs):
            q, z = -q, -z
        q, z = (t / (self.first.V[-1] @ q if self.has_constant else q.norm()) for t in (q, z))
        signs, dz, b, miss_back = self.backward(z, signs)
        if b is None:
            return
        dual = (self.first.U.T @ dz) / self.first.S
        size = dual @ q
        self.inputs = torch.cat([self.inputs, self.across(q, z, signs)[None]])
        self.q = torch.cat([self.q, q[None]])
        self.dual = torch.cat([self.dual, dual[None] / size])
        self.dual_next = torch.cat([self.dual_next, b[None] / self.second.S])
        self.dz = torch.cat([self.dz, dz[None] / size])
        self.residuals = torch.cat([self.residuals, q.new_tensor([[miss, miss_back]])])

    def passes(self, sine: float, following: float) -> bool:
        """Whether an angle is 0 up to the gradient's precision, and the only such one."""
        return sine <= self.tolerance and sine <= DISTINCT * following

    def backward(self, z: Tensor, signs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        """∂ℓ/∂z_1 for these signs, or None where it is not in the column space of G_1.

        A unit that is almost 0 may have had the other sign on the client's machine; hidden vectors do not show it, but
        ∂ℓ/∂z_1 does: such units are turned where that makes it fit.
        """
        doubtful = iter(z[: len(self.E)].abs().argsort()[:DOUBTFUL].tolist())
        best, tried = (math.inf, None, None), signs
        while True:
            D = torch.where(tried, self.up, self.down)[: len(self.E), None]
            b, miss, following = meet(D * self.E, self.first.U)
            if miss < best[0]:
                best, signs = (miss, (D * self.E) @ b, b), tried
            if self.passes(miss, following):
                return signs, best[1], best[2], miss
            if (unit := next(doubtful, None)) is None:
                return signs, None, None, miss
            tried = signs.clone()
            tried[unit] = ~tried[unit]

    def across(self, q: Tensor, z: Tensor, signs: Tensor) -> Tensor:
        """The input V q, moved by less than its error to the side of 0 that was found for each unit."""
        x = self.first.V @ q
        x = x[:-1] if self.has_constant else x
        for unit in torch.nonzero((z > 0) != signs).flatten().tolist():
            w = self.W[unit]
            x = x - (1 + 1e-6) * z[unit] / w.square().sum() * w
        return x
