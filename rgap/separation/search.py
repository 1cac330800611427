"""Two consecutive fully connected layers: the inputs of the first, one by one, from gradients summed over a batch.

A batch of B has G_1 = Δ_1ᵀ X and G_2 = Δ_2ᵀ H, H = σ(X W_1ᵀ): every input x lies in the row space of G_1 and every
hidden vector σ(W_1 x) in that of G_2, and almost no other vector satisfies both. Everything in this module is ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rgap.equations.rank_laws import SPARE_UNITS
from rgap.network.layer import Layer
from rgap.separation.angles import different_patterns, settled_patterns
from rgap.separation.separated import Separation
from rgap.separation.state import ANGLE_GAP_RATIO, PartialInput, SearchState
from rgap.separation.subspaces import Span, inputs_from_gradients, null_of_rows, row_span

MAX_FAILED_STARTS = 60  # starts in a row without a new input, or a new ∂ℓ/∂z_1 of one, after which the search ends
STARTS_AT_ONCE = 6  # starts that are iterated together
MAX_STEPS = 40  # steps of the fixed point from one start; it takes about ten
ROWS_AT_ONCE = 60  # rows of the gradients from which starts are made together, where many images are left
NEAREST_ROWS = 20  # how many of them are nearest to a single image; the others come from anywhere
CANDIDATES_A_START = 4  # rows that are looked at for each start: those that resemble an earlier one start nothing new
MAX_ROW_STEPS = 20  # steps from such a start; those that lead to an image take about eight
MAX_FAILED_ROUNDS = 4  # rounds of such starts in a row without a new input, after which they end
MAX_ROW_SINE = 3e-3  # sine of the angle with which such a start may end and be tested; others end above 6e-3


def separate(
    first: Layer, second: Layer, gradients: Mapping[str, Tensor], *, precision: float = 1e-14, seed: int = 0,
    spans: tuple[Span, Span] | None = None, near: Tensor | None = None, known: Separation | None = None,
    by_rows: bool = False,
) -> Separation:  # fmt: skip
    """Separates the inputs of a fully connected layer from the gradients of it and the next one.

    Write x = V_x q and s for the signs of z = W_1 x. The hidden vector D_s z, with D_s the slopes that the signs
    choose, must lie in the row space of G_2. For given s that is a smallest principal angle between two subspaces,
    whose direction gives new signs, and so on until they no longer change. Starts are random. The same signs give
    ∂ℓ/∂z_1 = D_s W_2ᵀ ∂ℓ/∂z_2, which must lie in the column space of G_1: a second, independent test. It also allows
    *deflation*: with u = ∂ℓ/∂z_1 of one input, all others satisfy uᵀ G_1⁺ x = 0 (Wedderburn's rank reduction), so that
    the next start searches among the others only, and little more than B starts are needed.

    Where the second gradient has a lower rank than the first, single hidden vectors are not in its row space. Then the
    second test comes first: ∂ℓ/∂z_1 are collected, and the inputs follow from them (`inputs_from_gradients`).

    The first layer must have `SPARE_UNITS` more outputs than the ranks of both gradients together. Every input that is
    returned has passed both tests, or, where it follows from its ∂ℓ/∂z_1, the second one and that of the signs of all
    its units.

    Gradients, by parameter name, have entries of relative error `precision`. `spans` are the layers' `row_span`s where
    they are known already. The patterns of inputs `near` (F, n) are tried in place of random starts; with `by_rows`
    rows of both gradients come before random starts: of many images they mix few. Inputs `known` are found already:
    the search is among the others. Raises UnsupportedLayerError if the activation between the layers is linear or not
    homogeneous.
    """
    spans = spans or tuple(row_span(layer, gradients, precision) for layer in (first, second))
    search = Search(first, second, spans, precision)
    for one in zip(known.inputs, known.dz, known.residuals, known.errors, strict=True) if known else ():
        search.add_known(*one)
    generator = torch.Generator().manual_seed(seed)
    starts, failed, whole = 0, 0, False
    if by_rows and search.has_tests and not search.lacking:
        starts = search.run_rows(generator)
    if near is not None:
        search.accept(search.patterns(near))
        if search.partial:
            search.resolve_partial()
    while near is None and search.unknown > 0 and failed < MAX_FAILED_STARTS and search.has_tests:
        count = min(STARTS_AT_ONCE, search.unknown, MAX_FAILED_STARTS - failed)
        before = search.known
        search.run_starts(count, generator, whole=whole)
        starts += count
        progress = search.known > before
        if progress and search.partial:
            search.resolve_partial()
        failed = 0 if progress else failed + count
        whole = failed > 0 and not whole  # where deflated starts find nothing, alternate with starts among all
    found = (search.inputs, search.dz, search.residuals, search.first, search.second, starts, search.steps)
    errors = search.errors
    if (
        known and known.peeled and search.lacking
    ):  # only deflated spaces were searched, which carry the errors of the inputs known
        errors = torch.cat([known.errors, errors[len(known.inputs) :].clamp(min=known.errors.max().item())])
    return Separation(*found, errors, *((known.peeled, known.factor) if known else ()))


class Search(SearchState):
    """The fixed point, and the tests of the activation patterns that it finds."""

    def run_starts(self, count: int, generator: torch.Generator, *, whole: bool) -> None:
        """Iterates random starts, among the inputs not yet found, or among all of them (`whole`)."""
        Z, H = (torch.linalg.qr(self.Z)[0], self.H) if whole else self.left()
        start = torch.randn(count, Z.shape[1], generator=generator, dtype=Z.dtype)
        signs, _ = self.iterate(Z, H, start @ Z.T > 0)
        if not whole and len(self.q) and not self.lacking:
            # deflated spaces carry the errors of the inputs found; the whole ones do not
            signs, _ = self.iterate(torch.linalg.qr(self.Z)[0], self.H, signs)
        self.accept(signs)

    def left(self) -> tuple[Tensor, Tensor]:
        """Orthonormal bases of the pre-activations (h, R − F), and of the hidden vectors, of all inputs not found."""
        rest, H = null_of_rows(torch.cat([self.dual, self.partial_duals()])), self.H
        if self.second.rank == self.first.rank:
            H = H @ null_of_rows(self.dual_next)
        return torch.linalg.qr(self.Z @ rest)[0], H

    def run_rows(self, generator: torch.Generator) -> int:
        """Iterates rows of both gradients until some rounds find nothing; the number of starts."""
        count = failed = 0
        while self.unknown > 0 and failed < MAX_FAILED_ROUNDS:
            patterns, (Z, H), before = self.row_patterns(), self.left(), self.known
            anywhere = torch.randperm(len(patterns), generator=generator)
            rows = torch.cat([patterns[:NEAREST_ROWS], patterns[anywhere[: CANDIDATES_A_START * ROWS_AT_ONCE]]])
            picked = different_patterns(rows)[:ROWS_AT_ONCE]
            signs, sines = self.iterate(Z, H, picked, MAX_ROW_STEPS)
            self.accept(signs[sines <= MAX_ROW_SINE].unique(dim=0))
            count, failed = count + len(picked), 0 if self.known > before else failed + 1
        return count

    def row_patterns(self) -> Tensor:
        """Signs (N, units) that rows of the gradients have, less the inputs found: they mix few images.

        A row is oriented so that the unit it belongs to is on. First come the rows of the first gradient, in the order
        of their hidden vectors' angles to the range of H: one that a single image switches on is that image.
        """
        rows = self.first.U * self.first.S - self.dz.T @ self.q
        z = rows @ self.Z.T
        z *= z[:, : len(rows)].diagonal().sign()[:, None]
        on, size = z > 0, z.norm(dim=1)
        a = torch.where(on, self.up, self.down) * z
        near = (a @ self.H).norm(dim=1) / a.norm(dim=1).clamp(min=1e-300)
        order = near.argsort(descending=True)
        order = order[size[order] > self.tolerance * size.amax()]
        hidden = self.hidden(self.q) @ self.H
        next_dz = self.dual_next * self.second.S
        next_dz = next_dz / (self.dual_next * hidden).sum(1, keepdim=True)
        a = (self.second.U @ (torch.diag(self.second.S) - next_dz.T @ hidden)) @ self.H.T
        size = a.norm(dim=1)
        return torch.cat([on[order], (a * a.sum(1, keepdim=True).sign() > 0)[size > self.tolerance * size.amax()]])

    def patterns(self, inputs: Tensor) -> Tensor:
        """Signs of the units of known inputs (F, n), (F, units)."""
        q = inputs @ self.first.V[: inputs.shape[1]]
        if self.has_constant:
            q = q + self.first.V[-1]
        return q @ self.Z.T > 0

    def iterate(self, Z: Tensor, H: Tensor, signs: Tensor, steps: int = MAX_STEPS) -> tuple[Tensor, Tensor]:
        """`settled_patterns` of the network's slopes; counts the steps."""
        signs, sines, taken = settled_patterns(Z, H, (self.up, self.down), signs, steps)
        self.steps += taken
        return signs, sines

    def accept(self, signs: Tensor) -> None:
        """Adds the inputs with signs (S, units) that are new and pass both tests.

        Of those that pass the second one alone, ∂ℓ/∂z_1 is kept.
        """
        forth = self.forward(signs)
        new = ~self.is_known(forth[0])
        first, forth = signs[new], tuple(each[new] for each in forth)
        signs, b, misses, right = self.backward(first)
        turned = right & (signs != first).any(1)
        for each, again in zip(forth, self.forward(signs[turned]), strict=True):
            each[turned] = again
        for s in torch.nonzero(right).flatten().tolist():
            self._accept_one(signs[s], b[s], misses[s].item(), tuple(each[s : s + 1] for each in forth))

    def _accept_one(self, signs: Tensor, b: Tensor, miss_back: float, found: tuple[Tensor, ...]) -> None:
        """Adds the input with these signs (units,), whose ∂ℓ/∂z_1 = D_s E b has passed, if `forward`'s has, too."""
        dz = torch.where(signs, self.up, self.down)[: len(self.E)] * (self.E @ b)
        undetermined = self.undetermined_signs(dz)
        if undetermined.any() and (oriented := self.oriented(found[0][0], signs, undetermined)) is not None:
            signs = torch.where(undetermined, self.Z @ oriented > 0, signs)
            found = self.forward(signs[None])
        q, miss, following = found
        if self.is_known(q)[0]:
            return
        q = self.oriented(q[0], signs, undetermined)
        if self.passes(miss, following)[0] and q is not None:
            self.dual_next = torch.cat([self.dual_next, b[None] / self.second.S])
            self.add(q, signs, dz, (miss.item(), miss_back))
        elif self.second.rank < self.first.rank:
            self.keep_partial(signs, dz, miss_back)

    def keep_partial(self, signs: Tensor, dz: Tensor, residual: float) -> None:
        """Keeps a new ∂ℓ/∂z_1 that has passed its test, for its hidden vector may lie outside G_2's row space."""
        known = torch.cat([self.dz, *(one.dz[None] for one in self.partial)])
        if not (known @ dz > (1 - 1e-6) * known.norm(dim=1) * dz.norm()).any():
            self.partial.append(PartialInput(signs, dz / dz.norm(), residual))

    def resolve_partial(self) -> None:
        """Completes the partial inputs where there are enough of them; see `inputs_from_gradients`."""
        partial, complete = self.partial, self.known == self.first.rank
        count = len(partial) if complete else self.lacking + 1  # more would be less independent
        columns = count * (self.first.rank - self.known + 1)
        if len(partial) < count or self.H.shape[1] + columns + SPARE_UNITS > len(self.E):
            return
        duals = torch.cat([self.partial_duals().roll(count, 0), self.dual])
        taken = partial[-count:]
        slopes = torch.stack([torch.where(one.signs, self.up, self.down) for one in taken])
        undetermined = [self.undetermined_signs(one.dz) for one in taken]
        sure = ~torch.stack(undetermined).any(0)
        H = torch.linalg.qr(self.H[sure])[0]
        options = (self.tolerance, ANGLE_GAP_RATIO)
        q, which, miss, error = inputs_from_gradients(self.Z[sure], H, slopes[:, sure], duals, *options)
        turned = {j: self.oriented(q_j, taken[j].signs, undetermined[j]) for q_j, j in zip(q, which, strict=True)}
        right = {j: q_j for j, q_j in turned.items() if q_j is not None}
        if complete:
            miss = self.row_space_residual(torch.stack(list(right.values()))) if len(right) == len(partial) else 1.0
            error = miss
        if not right or miss > self.tolerance:
            return
        self.partial = []
        for j, q_j in right.items():
            signs = torch.where(undetermined[j], self.Z @ q_j > 0, taken[j].signs)
            self.add(q_j, signs, taken[j].dz, (miss, taken[j].residual), error)
        hidden = self.hidden(torch.stack(list(right.values())))
        hidden = (hidden / hidden.norm(dim=1, keepdim=True)).T
        left, sizes, _ = torch.linalg.svd(hidden - self.H @ (self.H.T @ hidden), full_matrices=False)
        new = left[:, sizes > 1e-3 * sizes[0]][:, : self.lacking]  # hidden vectors outside the range of H extend it
        self.H = torch.linalg.qr(torch.cat([self.H, new], 1))[0]
        for j, one in enumerate(taken + partial[:-count]):
            if j not in right:
                self.accept(one.signs[None])
