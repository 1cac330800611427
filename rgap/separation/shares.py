"""What images that were found contribute to the gradients of a batch, and what is left of them (ours).

With x = V q in the row space of the first fully connected layer's gradient, [G, ∂ℓ/∂b] = Σ_b δ_b (x_b, 1)ᵀ has the
coordinates R = Σ_b δ_b q_bᵀ: one row a unit, and δ_bj ≠ 0 only where image b switches unit j on. An image's *share* of
it, δ_b q_bᵀ, follows from the image, its label and one number common to all, the factor of the mean loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rgap.client import loss_value
from rgap.network.layer import Layer
from rgap.separation.angles import nearest_directions
from rgap.separation.linear_units import LinearPart
from rgap.separation.scales import output_jacobians
from rgap.separation.state import slopes
from rgap.separation.subspaces import Span

MAX_SHARE_SINE = 1e-2
"""Sine of the angle between a share and the column space of the gradient from which no precision excuses it; mixtures
of images miss by 0.05 and more."""

MIN_SHARE_SINE = 1e-9  # the same up to which a share lies in the column space at any precision
MAX_INPUT_ERROR = 2e-3  # predicted error of an input, relative to its size, up to which it is accepted
TOLERATED_STDS = 10.0  # multiple of a predicted error up to which a test counts as passed
MAX_ROUNDED_ZERO = 1e-13  # singular value, over the largest, up to which one below the cut may be rounding
JOINT_REFITS = 3  # turns of a joint solution for all inputs found
MAX_BATCH_OF_CANDIDATES = 128  # candidates that are tested together, to bound the memory


class Candidates(NamedTuple):
    """Inputs that single units suggest."""

    q: Tensor  # (N, r)
    unit: Tensor  # (N,), int64
    own: Tensor  # coefficient of q in that unit's row, (N,)
    gain: Tensor  # by which the unit multiplies ∂ℓ/∂a_j to give that coefficient, (N,)
    error: Tensor  # predicted standard deviation of q's entries, (N,)

    def at(self, which: Tensor) -> Candidates:
        """Those at these places."""
        return Candidates(*(field[which] for field in self))


class Tested(NamedTuple):
    """What the network makes of candidates."""

    dz: Tensor  # ∂ℓ/∂z_1 of the image's own loss, with the best label, (N, h)
    sine: Tensor  # of its angle to the column space, (N,)
    allowed: Tensor  # sine that the errors explain, (N,)
    factor: Tensor  # of the loss, by which the unit's own row is explained, (N,)
    blur: Tensor  # relative error of dz from the input's error, (N,)
    rounding: Tensor  # relative error of dz from the client's own arithmetic, (N,)


class ShareState:
    """Images found with their shares, in coordinates of the row space of the first gradient."""

    def __init__(self, layers: Sequence[Layer], first: Span, row_noise: Tensor, loss: str, precision: float):
        """Takes the fully connected layers, the span of the first one's gradient, and the noise of its rows (h,)."""
        self.layers, self.first, self.loss, self.precision = layers, first, loss, precision
        n = layers[0].weight.flatten(1).shape[1]
        self.W, self.last = layers[0].weight.flatten(1) @ first.V[:n], first.V[n] if len(first.V) > n else None
        self.Z = self.W if self.last is None else self.W + layers[0].bias[:, None] * self.last
        self.up, self.down = slopes(layers[0])
        self.all_rows = first.U * first.S
        rounding = torch.finfo(row_noise.dtype).eps * first.S[0].item() / self.all_rows.numel() ** 0.5  # of the span
        if first.below_cut > MAX_ROUNDED_ZERO:  # noise, whether or not it was declared
            rounding = max(rounding, first.below_cut * first.S[0].item() / (len(first.U) ** 0.5 + n**0.5))
        self.noise = row_noise.clamp(min=rounding)
        self.q, self.dz = self.Z.new_zeros(0, first.rank), self.Z.new_zeros(0, len(self.Z))
        self.error, self.blur, self.mixture = (self.Z.new_zeros(0) for _ in range(3))

    @property
    def rows(self) -> Tensor:
        """What is left of every unit's gradient, (h, r)."""
        return self.all_rows - self.dz.T @ self.q

    @property
    def rows_noise(self) -> Tensor:
        """Standard deviation of the entries of what is left, (h,)."""
        return (self.model_noise.square() + self.dz.T.square() @ self.error.square()).sqrt()

    @property
    def model_noise(self) -> Tensor:
        """The same for exact inputs: the gradient's noise, and the rounding of shares by the client."""
        rounding = (self.blur * self.q.norm(dim=1)).square() / self.first.rank
        return (self.noise.square() + self.dz.T.square() @ rounding).sqrt()

    @property
    def dual(self) -> Tensor:
        """Vectors with which the inputs found have the product 1, and all other images' 0, (F, r)."""
        dual = self.dz @ self.first.U / self.first.S
        return dual / (dual * self.q).sum(1, keepdim=True)

    def scaled(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (N, r) as inputs of their true length, and the factors (N,) taken out; without bias of length 1."""
        own = rows @ self.last if self.last is not None else rows.norm(dim=1)
        return rows / own[:, None], own

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Signs of z_1 (N, h), ∂f/∂a_1 (N, C, h) and f (N, C) of inputs."""
        _, jacobians, f = output_jacobians(self.layers, q, self.W)
        return q @ self.Z.T > 0, jacobians[1] @ self.layers[1].weight.flatten(1), f

    def test(self, candidates: Candidates) -> Tested:
        """How far candidates fail to have a share of the gradient; see `Tested`."""
        parts = [self._test(candidates.at(which)) for which in _chunks(len(candidates.q))]
        return Tested(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _test(self, one: Candidates) -> Tested:
        U, everyone = self.first.U, torch.arange(len(one.q))
        signs, jacobian, f = self.forward(one.q)
        slope = torch.where(signs, self.up, self.down)
        if self.last is not None:
            c = output_gradients_of_labels(self.loss, f)  # (N, labels, C)
        else:  # of unknown length: the best ∂ℓ/∂f
            mine = slope[:, None] * jacobian
            c = nearest_directions(mine @ mine.mT, U.T @ mine.mT)[0][:, None, :, -1]
        back = c @ jacobian
        shares = slope[:, None] * back
        missed = (shares - (shares @ U) @ U.T).norm(dim=2) / shares.norm(dim=2).clamp(min=1e-300)
        sine, label = missed.min(1)
        dz, back = shares[everyone, label], back[everyone, label]
        c = c[everyone, label]
        size = c.norm(dim=1).clamp(min=1e-300)
        curvature = _curvature(self.loss, f, label)
        if self.last is None:  # ∂ℓ/∂f is free
            curvature = torch.zeros_like(curvature)
        changed = curvature @ ((slope[:, None] * jacobian) @ self.Z)  # of ∂ℓ/∂f by q
        blur = one.error * changed.flatten(1).norm(dim=1) / size
        rounding = self.precision * (1 + f.abs().amax(1) * curvature.flatten(1).norm(dim=1) / size + 1 / size)
        weak = ((dz / dz.norm(dim=1, keepdim=True).clamp(min=1e-300)) @ U / self.first.S).norm(dim=1)
        allowed = TOLERATED_STDS * (self.noise.norm() * weak + blur + rounding) + MIN_SHARE_SINE
        factor = one.own / (one.gain * back[everyone, one.unit])
        return Tested(dz, sine, allowed.clamp(max=MAX_SHARE_SINE), factor, blur, rounding)

    def is_known(self, q: Tensor) -> Tensor:
        """Whether inputs (N, r) are mostly one that was found, (N,)."""
        size = q @ self.last if self.last is not None else q.norm(dim=1)
        return ((self.dual @ q.T).abs() > 0.5 * size.abs()).any(0)

    def add(self, q: Tensor, dz: Tensor, error: Tensor, blur: Tensor, mixture: Tensor) -> None:
        """Adds an input (r,) with its ∂ℓ/∂z_1 (h,) in the mean loss, its entries' error and the relative one of dz.

        `mixture` is the share of other images that the tests may have overlooked.
        """
        self.q, self.dz = torch.cat([self.q, q[None]]), torch.cat([self.dz, dz[None]])
        rounding = torch.finfo(q.dtype).eps * q.norm() / len(q) ** 0.5
        self.error = torch.cat([self.error, torch.maximum(error, rounding)[None]])
        self.blur, self.mixture = torch.cat([self.blur, blur[None]]), torch.cat([self.mixture, mixture[None]])

    def refit(self, E: Tensor | None = None, linear: LinearPart | None = None) -> None:
        """Solves for all inputs found together, in the rows that they explain: errors of subtracted shares vanish.

        A row is explained where nothing is left of it, or what is left is its part of the `linear` rows, E (h, k) times
        one matrix. Rows that miss by more than their noise count for less in the next turn. Inputs that these rows
        hardly determine stay as they are: they were found with a known error, which is an equation too.
        """
        root, count = self.first.rank**0.5, len(self.q)
        if not count:
            return
        left, noise, width = self.rows, self.rows_noise, 0 if linear is None else E.shape[1]
        explained = left.norm(dim=1) <= TOLERATED_STDS * noise * root
        L = left.new_zeros(len(left), width)
        for slope in (self.up, self.down) if linear is not None else ():
            spread = (noise.square() + (slope * linear.noise).square()).sqrt() * root
            fits = (left - slope[:, None] * linear.rows).norm(dim=1) <= TOLERATED_STDS * spread
            fits &= ~explained & (slope != 0)
            L[fits], explained = slope[fits, None] * E[fits], explained | fits
        size = self.dz.norm(dim=1)
        A = torch.cat([(self.dz / size[:, None]).T, L], 1)[explained]
        prior = torch.cat([torch.diag(1 / (size * self.error)), L.new_zeros(count, width)], 1)
        left, noise = left[explained], self.model_noise[explained]
        for _ in range(JOINT_REFITS):
            Q, R = torch.linalg.qr(torch.cat([A / noise[:, None], prior]))
            if not R.diagonal().all():
                return
            step = torch.linalg.solve_triangular(R, Q[: len(A)].T @ (left / noise[:, None]), upper=True)
            noise = torch.maximum(self.model_noise[explained], (left - A @ step).norm(dim=1) / root)
        inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True)
        self.q, self.error = self.q + step[:count] / size[:, None], inverse[:count].norm(dim=1) / size


def output_gradients_of_labels(loss: str, f: Tensor) -> Tensor:
    """∂ℓ/∂f of each output f (N, C) alone for every label, (N, labels, C)."""
    count, outputs = f.shape
    labels = torch.arange(max(outputs, 2)).repeat(count)
    every = f.repeat_interleave(max(outputs, 2), 0)
    c = torch.func.grad(lambda f: len(f) * loss_value(loss, f, labels))(every)
    return c.reshape(count, -1, outputs)


def _curvature(loss: str, f: Tensor, labels: Tensor) -> Tensor:
    """∂²ℓ/∂f² of each output f (N, C) alone, (N, C, C)."""
    gradient = torch.func.grad(lambda f: len(f) * loss_value(loss, f, labels))
    units = torch.eye(f.shape[1], dtype=f.dtype)
    return torch.stack([torch.func.jvp(gradient, (f,), (unit.expand_as(f).clone(),))[1] for unit in units], 2)


def _chunks(count: int) -> tuple[Tensor, ...]:
    return torch.arange(count).split(MAX_BATCH_OF_CANDIDATES)
