"""What a search has found so far of the inputs of a fully connected layer, and the tests that it must pass (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.equations.rank_laws import SPARE_UNITS
from rgap.network.layer import Layer
from rgap.results import UnsupportedLayerError
from rgap.separation.subspaces import Span

DISTINCT = 1e-3
"""Sine of the angle, in units of the next one, up to which a direction is accepted: about its error. Where two images
switch the same units every mixture of them fits, and the next angle is as small."""

DOUBTFUL = 8
"""Units next to 0 whose signs may differ from those of an input that was computed from the others."""


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


class SearchState:
    """Inputs, in coordinates of the row and column spaces, and halves: inputs of which only the share is known."""

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
        self.halves: list[tuple[Tensor, Tensor, float]] = []  # signs, ∂ℓ/∂z_1 and the angle by which it misses
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
    def half_found(self) -> int:
        """Inputs of which only signs and ∂ℓ/∂z_1 are known."""
        return len(self.halves)

    @property
    def lacking(self) -> int:
        """Dimensions that the row space of the second gradient lacks to hold every hidden vector."""
        return self.first.rank - self.H.shape[1]

    @property
    def has_tests(self) -> bool:
        """Whether the first layer has units enough for the two tests to mean anything."""
        return self.first.rank + self.second.rank + SPARE_UNITS <= len(self.E)

    def shares_of_halves(self) -> Tensor:
        """G_1⁺ᵀ ∂ℓ/∂z_1 of the inputs of which only that is known, in coordinates."""
        return (
            torch.stack([self.dz.new_zeros(len(self.E)), *(dz for _, dz, _ in self.halves)])[1:]
            @ self.first.U
            / self.first.S
        )

    def hidden(self, q: Tensor) -> Tensor:
        """Hidden vectors of inputs, (F, h)."""
        z = q @ self.Z.T
        return torch.where(z > 0, self.up, self.down) * z

    def is_known(self, q: Tensor) -> bool:
        """Whether most of q is an input that was found: its share times q is ‖q‖ for it, and 0 for every other one."""
        return bool(((self.dual @ q).abs() * self.q.norm(dim=1) > 0.5 * q.norm()).any())

    def unsure(self, dz: Tensor) -> Tensor:
        """Units whose signs a share does not tell, because it is almost 0 there."""
        bend = (self.up - self.down)[: len(dz)].abs()
        small = dz.abs() * bend <= 2 * self.tolerance * dz.square().mean().sqrt()
        return torch.cat([small, small.new_zeros(len(self.Z) - len(dz))])

    def turned(self, q: Tensor, signs: Tensor, unsure: Tensor) -> Tensor | None:
        """±q, scaled, whichever has these signs; None if more than a few units that are not unsure have others."""
        z = self.Z @ q
        if ((z > 0) == signs).sum() * 2 < len(signs):
            q, z = -q, -z
        wrong = ((z > 0) != signs) & ~unsure
        if wrong.sum() > DOUBTFUL or (z[wrong].abs() > self.tolerance * z.square().mean().sqrt()).any():
            return None
        return q / (self.first.V[-1] @ q if self.has_constant else q.norm())

    def passes(self, sine: float, following: float) -> bool:
        """Whether an angle is 0 up to the gradient's precision, and the only such one."""
        return sine <= self.tolerance and sine <= DISTINCT * following

    def add(self, q: Tensor, signs: Tensor, dz: Tensor, residuals: tuple[float, float]) -> None:
        """Adds an input with its share, scaled so that the shares of all add up to the gradient."""
        dual = (self.first.U.T @ dz) / self.first.S
        size = dual @ q
        self.inputs = torch.cat([self.inputs, self.across(q, signs)[None]])
        self.q = torch.cat([self.q, q[None]])
        self.dual = torch.cat([self.dual, dual[None] / size])
        self.dz = torch.cat([self.dz, dz[None] / size])
        self.residuals = torch.cat([self.residuals, q.new_tensor([residuals])])

    def across(self, q: Tensor, signs: Tensor) -> Tensor:
        """The input V q, moved by less than its error to the side of 0 that was found for each unit."""
        x, z = self.first.V @ q, self.Z @ q
        x = x[:-1] if self.has_constant else x
        for unit in torch.nonzero((z > 0) != signs).flatten().tolist():
            w = self.W[unit]
            x = x - (1 + 1e-6) * z[unit] / w.square().sum() * w
        return x
