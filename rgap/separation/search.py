"""The search for the inputs of a fully connected layer: fixed point, two tests, deflation. Everything here is ours."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.equations.rank_laws import SPARE_UNITS
from rgap.separation.partial import extended, fit_share, inputs_of_shares, share_outside
from rgap.separation.state import DISTINCT, SearchState
from rgap.separation.subspaces import meet, null_of_rows

STEPS = 40
"""Steps of one fixed point; it takes about ten."""


class Search(SearchState):
    """The fixed point, and what becomes of the signs that it finds."""

    def look(self, count: int, generator: torch.Generator, *, whole: bool) -> None:
        """One round of starts, among the inputs that are left, or among all of them (`whole`)."""
        rest = (
            torch.eye(self.first.rank, dtype=self.Z.dtype)
            if whole
            else null_of_rows(torch.cat([self.dual, self.shares_of_halves()]))
        )
        rest_next = torch.eye(self.H.shape[1], dtype=self.Z.dtype)
        if not whole and self.second.rank == self.first.rank:
            rest_next = null_of_rows(self.dual_next)
        Z = torch.linalg.qr(self.Z @ rest)[0]
        start = torch.randn(count, Z.shape[1], generator=generator, dtype=Z.dtype)
        signs = self.iterate(Z, self.H @ rest_next, start @ Z.T > 0)
        if (
            not whole and self.found and not self.lacking
        ):  # deflation carries the errors of what was found; the whole spaces do not
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
        """Adds the input with these signs if it passes both tests and is new; keeps ∂ℓ/∂z_1 if it passes the second."""
        if self.is_known(self.forward(signs)[0]):
            return
        signs, b, miss_back = self.backward(signs)
        if b is None:
            return
        dz = torch.where(signs, self.up, self.down)[: len(self.E)] * (self.E @ b)
        q, miss, following = self.forward(signs)
        unsure = self.unsure(dz)
        if unsure.any() and (oriented := self.turned(q, signs, unsure)) is not None:
            signs = torch.where(unsure, self.Z @ oriented > 0, signs)
            q, miss, following = self.forward(signs)
        if self.is_known(q):
            return
        q = self.turned(q, signs, unsure)
        if self.passes(miss, following) and q is not None:
            self.dual_next = torch.cat([self.dual_next, b[None] / self.second.S])
            self.add(q, signs, dz, (miss, miss_back))
        elif self.second.rank < self.first.rank:
            self.keep_half(signs, dz, miss_back)

    def forward(self, signs: Tensor) -> tuple[Tensor, float, float]:
        """The coordinates q whose D_s Z q is nearest to the row space of G_2, the sine of the angle, and the next."""
        return meet(torch.where(signs, self.up, self.down)[:, None] * self.Z, self.H)

    def keep_half(self, signs: Tensor, dz: Tensor, miss: float) -> None:
        """Keeps an input's share that passes its test, for G_2 may not hold its hidden vector, unless it is known."""
        known = torch.cat([self.dz, *(half[1][None] for half in self.halves)])
        if (known @ dz > (1 - 1e-6) * known.norm(dim=1) * dz.norm()).any():
            return
        self.halves.append((signs, dz / dz.norm(), miss))

    def settle(self) -> None:
        """Finds the inputs that belong to the shares kept, where these are enough; see `inputs_of_shares`."""
        halves, known = self.halves, self.found + len(self.halves)
        count = len(halves) if known == self.first.rank else self.lacking + 1  # more would be less independent
        columns = count * (self.first.rank - known + 1)
        if len(halves) < count or self.H.shape[1] + columns + SPARE_UNITS > len(self.E):
            return
        duals = torch.cat([self.shares_of_halves().roll(count, 0), self.dual])
        taken = halves[-count:]
        slopes = torch.stack([torch.where(signs, self.up, self.down) for signs, *_ in taken])
        sure = ~torch.stack([self.unsure(dz) for _, dz, _ in taken]).any(0)
        H = torch.linalg.qr(self.H[sure])[0]
        q, which, miss = inputs_of_shares(self.Z[sure], H, slopes[:, sure], duals, self.tolerance, DISTINCT)
        right = {j: self.turned(q_j, taken[j][0], self.unsure(taken[j][1])) for q_j, j in zip(q, which, strict=True)}
        right = {j: q_j for j, q_j in right.items() if q_j is not None}
        if known == self.first.rank:
            miss = self.misses_rows(torch.stack(list(right.values()))) if len(right) == len(halves) else 1.0
        if not right or miss > self.tolerance:
            return
        self.halves = []
        for j, q_j in right.items():
            signs, dz, miss_back = taken[j]
            signs = torch.where(self.unsure(dz), self.Z @ q_j > 0, signs)
            self.add(q_j, signs, dz, (miss, miss_back))
        self.H = extended(self.H, self.hidden(torch.stack(list(right.values()))), self.lacking)
        for j, (signs, *_) in enumerate(taken + halves[:-count]):
            if j not in right:
                self.accept(signs)

    def misses_rows(self, q: Tensor) -> float:
        """How much of G_2 is outside the span of the hidden vectors of these inputs and of those found."""
        return share_outside(self.second.V[: len(self.Z)] * self.second.S, self.hidden(torch.cat([q, self.q])))

    def backward(self, signs: Tensor) -> tuple[Tensor, Tensor | None, float]:
        """∂ℓ/∂z_1 = D_s E b for these signs or some near them; b is None where it is not in the column space of G_1."""
        count = len(self.E)
        bend = self.up[:count], self.down[:count]
        mine, b, miss, following = fit_share(signs[:count], self.E, self.first.U, bend, self.tolerance)
        return torch.cat([mine, signs[count:]]), b if self.passes(miss, following) else None, miss
