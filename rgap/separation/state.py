"""State of a search for a fully connected layer's inputs, and the two tests that each input must pass (ours)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rgap.equations.rank_laws import SPARE_UNITS
from rgap.network.layer import Layer
from rgap.results import UnsupportedLayerError
from rgap.separation.angles import smallest_principal_angles
from rgap.separation.subspaces import Span

ANGLE_GAP_RATIO = 1e-3
"""Sine of the angle, in units of the next one, up to which a direction is accepted: about its error. Where two images
have the same activation pattern every mixture of them fits, and the next angle is as small."""

MAX_CONTRADICTING_SIGNS = 8  # units close to 0 with another sign than by the input from all other units
MAX_SIGN_STEPS = 30  # steps of the fixed point over the signs of one ∂ℓ/∂z_1; it takes about four


class PartialInput(NamedTuple):
    """An input of which only the activation pattern and ∂ℓ/∂z_1 are known."""

    signs: Tensor  # which units are positive, (units,)
    dz: Tensor  # of unit length, (h,)
    residual: float  # sine of the angle between dz and the column space of G_1


def slopes(layer: Layer) -> tuple[Tensor, Tensor]:
    """Slopes (h,) of the activation for positive and for negative z; refused if it is linear or not homogeneous."""
    if not layer.activation.homogeneous:
        raise UnsupportedLayerError(
            f"layer {layer.name!r}: inputs of a batch are separated through LeakyReLU, PReLU or ReLU, "
            f"and its activation is {layer.activation.name}"
        )
    one = torch.ones(layer.output_shape, dtype=torch.float64)
    up, down = layer.activation.forward(one).flatten(), -layer.activation.forward(-one).flatten()
    if torch.equal(up, down):
        raise UnsupportedLayerError(
            f"layer {layer.name!r} has a linear activation: any mixture of the batch has the same gradient"
        )
    return up, down


class SearchState:
    """Inputs found, in coordinates q of the row space of G_1, x = V q, and partial inputs.

    `signs` are those of the layer's h units and, where both layers have biases, of one more that is always positive:
    the constant that the next layer's bias multiplies.
    """

    def __init__(self, first: Layer, second: Layer, spans: tuple[Span, Span], precision: float):
        """Takes two layers and the spaces of their gradients; see `separate`."""
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
            if second.bias is not None:
                Z, H = torch.cat([Z, self.first.V[-1:]]), self.second.V
                one = self.up.new_ones(1)
                self.up, self.down = torch.cat([self.up, one]), torch.cat([self.down, one])
        elif second.bias is not None:
            H = torch.linalg.qr(H)[0]
        self.Z, self.H = Z, H  # pre-activations per coordinate, and a basis of the space of hidden vectors
        self.E = W_next.T @ self.second.U
        rank, rank_next = self.first.rank, self.second.rank
        self.q, self.dual = Z.new_zeros(0, rank), Z.new_zeros(0, rank)
        self.dual_next = Z.new_zeros(0, rank_next)
        self.dz, self.residuals, self.errors = Z.new_zeros(0, len(W)), Z.new_zeros(0, 2), Z.new_zeros(0)
        self.partial: list[PartialInput] = []
        self.steps = 0

    @property
    def known(self) -> int:
        """Inputs found so far, partial ones among them."""
        return len(self.q) + len(self.partial)

    @property
    def unknown(self) -> int:
        """Inputs in the first gradient that are not known even in part."""
        return self.first.rank - self.known

    @property
    def lacking(self) -> int:
        """Dimensions missing from the row space of the second gradient to contain every hidden vector."""
        return self.first.rank - self.H.shape[1]

    @property
    def has_tests(self) -> bool:
        """Whether the first layer has enough units for both tests to mean anything."""
        return self.first.rank + self.second.rank + SPARE_UNITS <= len(self.E)

    def partial_duals(self) -> Tensor:
        """G_1⁺ᵀ ∂ℓ/∂z_1 of the partial inputs, in coordinates, (J, R)."""
        dz = torch.stack([self.dz.new_zeros(len(self.E)), *(one.dz for one in self.partial)])[1:]
        return dz @ self.first.U / self.first.S

    def hidden(self, q: Tensor) -> Tensor:
        """Hidden vectors of inputs, (F, units)."""
        z = q @ self.Z.T
        return torch.where(z > 0, self.up, self.down) * z

    def is_known(self, q: Tensor) -> Tensor:
        """Which q (S, R) are mostly inputs that were found: an input's dual times q is ‖q‖, times any other 0, (S,)."""
        return ((q @ self.dual.T).abs() * self.q.norm(dim=1) > 0.5 * q.norm(dim=1, keepdim=True)).any(1)

    def undetermined_signs(self, dz: Tensor) -> Tensor:
        """Units where a ∂ℓ/∂z_1 is almost 0 and hence does not determine the sign, (units,)."""
        bend = (self.up - self.down)[: len(dz)].abs()
        small = dz.abs() * bend <= 2 * self.tolerance * dz.square().mean().sqrt()
        return torch.cat([small, small.new_zeros(len(self.Z) - len(dz))])

    def oriented(self, q: Tensor, signs: Tensor, undetermined: Tensor) -> Tensor | None:
        """Whichever of q and −q has these signs, scaled; None if more than a few determined units contradict."""
        z = self.Z @ q
        if ((z > 0) == signs).sum() * 2 < len(signs):
            q, z = -q, -z
        wrong = ((z > 0) != signs) & ~undetermined
        if wrong.sum() > MAX_CONTRADICTING_SIGNS or (z[wrong].abs() > self.tolerance * z.square().mean().sqrt()).any():
            return None
        return q / (self.first.V[-1] @ q if self.has_constant else q.norm())

    def passes(self, sine: Tensor, following: Tensor) -> Tensor:
        """Whether an angle is 0 up to the gradient's precision, and the only such one."""
        return (sine <= self.tolerance) & (sine <= ANGLE_GAP_RATIO * following)

    def forward(self, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For signs (S, units) the q (S, R) whose D_s Z q is nearest to the row space of G_2.

        Also the sines (S,) of that angle and of the next.
        """
        return smallest_principal_angles(torch.where(signs, self.up, self.down), self.Z, self.H)

    def backward(self, signs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The signs (S, units) for which D_s E b, with the best b, is nearest to the column space of G_1.

        For given signs that is a smallest principal angle. Its two vectors, u in the column space and v = E b, show for
        every unit whether u = up·v or u = down·v is nearer; units where v is almost 0 keep their sign. Gives the signs,
        the b (S, R_2), the sines (S,), and whether D_s E b is in the column space (S,).
        """
        count, U = len(self.E), self.first.U
        up, down = self.up[:count], self.down[:count]
        mine, live, seen = signs[:, :count].clone(), torch.arange(len(signs)), []
        b, sines, following = self.E.new_zeros(len(signs), self.E.shape[1]), *U.new_ones(2, len(signs))
        for _ in range(MAX_SIGN_STEPS):
            D = torch.where(mine[live], up, down)
            b[live], sines[live], following[live] = smallest_principal_angles(D, self.E, U)
            v = b[live] @ self.E.T
            u = (D * v) @ U @ U.T
            nearer = (u - down * v).abs() - (u - up * v).abs()
            sure = nearer.abs() > self.tolerance * u.square().mean(1, keepdim=True).sqrt()
            turned = torch.where(sure, nearer > 0, mine[live])
            seen.append(mine.clone())
            new = ~torch.stack([(turned == earlier[live]).all(1) for earlier in seen]).any(0)
            live, turned = live[new], turned[new]
            if not len(live):
                break
            mine[live] = turned
        return torch.cat([mine, signs[:, count:]], 1), b, sines, self.passes(sines, following)

    def row_space_residual(self, q: Tensor) -> float:
        """Share of G_2's rows, by norm, outside the span of the hidden vectors of these inputs and those found."""
        rows = self.second.V[: len(self.Z)] * self.second.S
        Q = torch.linalg.qr(self.hidden(torch.cat([q, self.q])).T)[0]
        return ((rows - Q @ (Q.T @ rows)).norm() / rows.norm()).item()

    def add_known(self, x: Tensor, dz: Tensor, residuals: Tensor, error: Tensor) -> None:
        """Adds an input (n,) that was found otherwise, with its ∂ℓ/∂z_1 and root mean square error."""
        q = (torch.cat([x, x.new_ones(1)]) if self.has_constant else x) @ self.first.V
        slope = torch.where(self.Z @ q > 0, self.up, self.down)[: len(dz)]
        b = torch.linalg.lstsq(slope[:, None] * self.E, dz[:, None]).solution[:, 0]
        dual = (self.first.U.T @ dz) / self.first.S
        self.inputs, self.q = torch.cat([self.inputs, x[None]]), torch.cat([self.q, q[None]])
        self.dual, self.dz = torch.cat([self.dual, dual[None] / (dual @ q)]), torch.cat([self.dz, dz[None]])
        self.dual_next = torch.cat([self.dual_next, b[None] / self.second.S])
        self.residuals = torch.cat([self.residuals, residuals[None]])
        self.errors = torch.cat([self.errors, error[None]])

    def add(
        self, q: Tensor, signs: Tensor, dz: Tensor, residuals: tuple[float, float], relative_error: float = 0.0
    ) -> None:
        """Adds an input with its ∂ℓ/∂z_1, which is scaled so that Σ dz_b x_bᵀ over all inputs is the gradient."""
        dual = (self.first.U.T @ dz) / self.first.S
        size, x = dual @ q, self.project_to_pattern(q, signs)
        self.inputs = torch.cat([self.inputs, x[None]])
        self.errors = torch.cat([self.errors, relative_error * x.square().mean().sqrt()[None]])
        self.q = torch.cat([self.q, q[None]])
        self.dual = torch.cat([self.dual, dual[None] / size])
        self.dz = torch.cat([self.dz, dz[None] / size])
        self.residuals = torch.cat([self.residuals, q.new_tensor([residuals])])

    def project_to_pattern(self, q: Tensor, signs: Tensor) -> Tensor:
        """The input V q, moved by less than its error so that every unit has the sign that was found."""
        x, z = self.first.V @ q, self.Z @ q
        x = x[:-1] if self.has_constant else x
        for unit in torch.nonzero((z > 0) != signs).flatten().tolist():
            w = self.W[unit]
            x = x - (1 + 1e-6) * z[unit] / w.square().sum() * w
        return x
