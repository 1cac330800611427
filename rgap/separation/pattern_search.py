"""Activation patterns of the images that no single unit shows, from the column space of what is left (ours).

Behind few outputs every ∂ℓ/∂z_1 is D_s E c: k numbers c, and a slope a unit, which its image's sign s chooses. It lies
in the column space U of the gradient that is left, so that every unit has either u_j = up·v_j or u_j = down·v_j with
v = E c. For given signs the nearest pair of u and v is a smallest principal angle between two subspaces, and the pair
gives new signs, until they no longer change. Starts are the rows of the gradient, which are mixtures of few images, and
random inputs. Patterns alone determine no image; but where those of all that are left are known, the images follow
from the gradient by least squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.separation.angles import nearest_directions
from rgap.separation.shares import MAX_SHARE_SINE, MIN_SHARE_SINE, TOLERATED_STDS, Candidates, ShareState
from rgap.separation.subspaces import null_of_rows

MAX_FAILED_ROUNDS = 4  # rounds of starts in a row without a new pattern, after which the search ends
STARTS_A_ROUND = 120  # starts that are iterated together
MAX_PATTERN_STEPS = 25  # steps from one start; it takes about ten
SMOOTHED_STEPS = 6  # first steps; then, every other round, signs are those of the nearest input
MARGIN_STEPS = 3  # steps of the fit of an input to a pattern, in which units that have the right sign do not count
MAX_NEW_SHARES = 0.999  # cosine of the angle to a known ∂ℓ/∂z_1 above which a pattern is the same
MIN_NEXT_RATIO = 10.0  # smallest ratio of the next principal angle's sine to a pattern's: below it mixtures fit as well


class PatternSearch:
    """The patterns found among the images that are left, by their ∂ℓ/∂z_1 of unit length."""

    def __init__(self, state: ShareState, E: Tensor, rows: list[Tensor], generator: torch.Generator):
        """Takes the images found, a basis E (h, k) of all ∂ℓ/∂a_1, and gradients (h, r) whose rows are good starts."""
        self.state, self.E, self.rows = state, E, rows
        self.U = state.first.U @ null_of_rows(state.q / state.first.S)
        self.dz = E.new_zeros(0, len(E))
        self.generator = generator

    def run(self) -> Candidates | None:
        """The inputs that are left, or None where not every pattern was found."""
        failed, count = 0, 0
        while len(self.dz) < self.U.shape[1] and failed < MAX_FAILED_ROUNDS:
            before = len(self.dz)
            duals = torch.cat([self.dz @ self.state.first.U / self.state.first.S, self.state.dual])
            rest = null_of_rows(duals / duals.norm(dim=1, keepdim=True))
            Z = torch.linalg.qr(self.state.Z @ rest)[0]
            for signs in self.starts(rest, Z, count):
                self.collect(self.iterate(signs, Z if count % 2 else None))
            count += 1
            failed = 0 if len(self.dz) > before else failed + 1
        return self.inputs() if len(self.dz) == self.U.shape[1] else None

    def starts(self, rest: Tensor, Z: Tensor, count: int) -> list[Tensor]:
        """Signs (S, h) to start from: of rows in the first two rounds, later of random inputs and rows."""
        from_rows = torch.cat([(rows @ rest @ rest.T) for rows in self.rows])
        if self.state.last is not None:
            from_rows = from_rows * (torch.cat(self.rows) @ self.state.last).sign()[:, None]
        from_rows = from_rows[from_rows.norm(dim=1) > 0] @ self.state.Z.T > 0
        if count < 2:
            return list(from_rows.split(STARTS_A_ROUND))
        half = from_rows[torch.randperm(len(from_rows), generator=self.generator)[: STARTS_A_ROUND // 2]]
        random = torch.randn(STARTS_A_ROUND // 2, Z.shape[1], generator=self.generator, dtype=Z.dtype) @ Z.T > 0
        return [torch.cat([half, random])]

    def iterate(self, signs: Tensor, smooth: Tensor | None) -> Tensor:
        """Signs that no longer change; the first are smoothed by the range of pre-activations (h, m), orthonormal."""
        live = torch.arange(len(signs))
        for step in range(MAX_PATTERN_STEPS):
            turned = self.nearest(signs[live])[0]
            if smooth is not None and step < SMOOTHED_STEPS:
                turned = _smoothed(turned, smooth)
            changed = (turned != signs[live]).any(1)
            signs[live] = turned
            if smooth is None or step >= SMOOTHED_STEPS:
                live = live[changed]
            if not len(live):
                break
        return signs

    def nearest(self, signs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For signs (S, h): those that the nearest u and v give, D_s v, its sine to the range of U, and the next."""
        slope = torch.where(signs, self.state.up, self.state.down)
        DE = slope[:, :, None] * self.E
        inside = self.U.T @ DE
        directions, values = nearest_directions(DE.mT @ DE, inside)
        c = directions[:, :, -1:]
        v = c[:, :, 0] @ self.E.T
        dz = slope * v
        u = (inside @ c)[:, :, 0] @ self.U.T
        turned = (u - self.state.up * v).abs() < (u - self.state.down * v).abs()
        sine = (dz - dz @ self.U @ self.U.T).norm(dim=1) / dz.norm(dim=1).clamp(min=1e-300)
        following = (1 - values[:, -2]).clamp(min=0).sqrt() if values.shape[1] > 1 else torch.ones_like(sine)
        return turned, dz / dz.norm(dim=1, keepdim=True), sine, following

    def collect(self, signs: Tensor) -> None:
        """Keeps the new ∂ℓ/∂z_1 among these patterns."""
        state = self.state
        _, dz, sine, following = self.nearest(signs.unique(dim=0))
        weak = (dz @ state.first.U / state.first.S).norm(dim=1)
        allowed = (TOLERATED_STDS * state.noise.norm() * weak + MIN_SHARE_SINE).clamp(max=MAX_SHARE_SINE)
        for place in ((sine <= allowed) & (MIN_NEXT_RATIO * sine < following)).nonzero().flatten().tolist():
            if len(self.dz) < self.U.shape[1] and not ((self.dz @ dz[place]).abs() > MAX_NEW_SHARES).any():
                self.dz = torch.cat([self.dz, dz[place : place + 1]])

    def inputs(self) -> Candidates:
        """The inputs whose ∂ℓ/∂z_1 are known, by least squares."""
        state, noise = self.state, self.state.rows_noise
        weighted = (self.dz / noise).T
        inverse = torch.linalg.pinv(weighted, rtol=1e-13)
        rows = inverse @ (state.rows / noise[:, None])
        q, own = state.scaled(rows)
        unit = self.dz.abs().argmax(1)
        largest = self.dz.gather(1, unit[:, None])[:, 0]
        slope = torch.where((q @ state.Z.T).gather(1, unit[:, None])[:, 0] > 0, state.up[unit], state.down[unit])
        return Candidates(q, unit, own * largest, slope, inverse.norm(dim=1) / own.abs())


def _smoothed(signs: Tensor, Z: Tensor) -> Tensor:
    """The signs (S, h) of the vectors in the range of Z, orthonormal, nearest to these signs' side."""
    side = 2.0 * signs.to(Z.dtype) - 1
    target = side
    for _ in range(MARGIN_STEPS):
        fitted = target @ Z @ Z.T
        target = torch.where(side * fitted > 1, fitted, side)
    return fitted > 0
