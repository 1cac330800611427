"""Images of a batch peeled off one after the other, far beyond the number of classes (ours).

Behind a ReLU a unit that a single image switches on has that image as its gradient, `G_j / ∂ℓ/∂b_j`; a unit that every
image but one switches on has it too, once the part of those units that all switch on is known (`linear_part`). Such a
candidate goes through the network: its label and ∂ℓ/∂z_1 must lie in the column space of the gradient, and its own
unit's row must have the size that the loss gives it. An image that passes is subtracted, and other units have one image
less. All images found are solved for together before peeling goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgap.network.layer import Layer
from rgap.separation.linear_units import MAX_LINEAR_UNKNOWNS, LinearPart, linear_part
from rgap.separation.pattern_search import PatternSearch
from rgap.separation.separated import Separation
from rgap.separation.shares import MAX_INPUT_ERROR, TOLERATED_STDS, Candidates, ShareState
from rgap.separation.subspaces import Span
from rgap.shared_gradient import SharedGradient

MAX_FACTOR_MISMATCH = 1e-2  # deviation of a candidate's own row from the loss's factor that no error excuses
MIN_FACTOR_MISMATCH = 1e-8  # the same that is allowed at any precision

MAX_ERROR_RATIO = 100.0
"""Ratio of a candidate's predicted error to the smallest one up to which it is accepted in the same step: the next step
may show the same image in a row with less noise."""

MIN_AGREEING = 3  # candidates that must agree on the factor of the loss where the batch size does not confirm it


def peel(
    layers: Sequence[Layer], received: SharedGradient, spans: tuple[Span, Span], loss: str, size: int, seed: int = 0
) -> Separation:
    """The inputs of the first fully connected layer that can be peeled off a batch's gradient.

    Layers are the fully connected ones; LeakyReLU, PReLU or ReLU follows the first, and `spans` are the first two's
    `row_span`s. Where the images themselves agree on another batch size than the one assumed, that is used.
    """
    peeling = Peeling(layers, spans, received, loss, size, seed)
    peeling.run()
    return peeling.separation()


def peel_again(
    layers: Sequence[Layer], received: SharedGradient, spans: tuple[Span, Span], loss: str, inputs: Tensor,
    errors: Tensor,
) -> Separation:  # fmt: skip
    """Inputs (F, n) that were peeled off, with predicted errors (F,), solved once more from other gradients."""
    peeling = Peeling(layers, spans, received, loss, len(inputs), 0)
    peeling.restore(inputs, errors)
    return peeling.separation()


class Peeling:
    """The state of a peeling: what was found, and the factor of the loss."""

    def __init__(self, layers, spans: tuple[Span, Span], received: SharedGradient, loss: str, size: int, seed: int):
        """Takes the fully connected layers, the spans of two gradients, and what `peel` takes."""
        std = received.entry_std[layers[0].weight_name].flatten(1).square().mean(1).sqrt()
        self.state = ShareState(layers, spans[0], std, loss, received.precision)
        self.second = spans[1]
        self.E = torch.linalg.qr(layers[1].weight.flatten(1).T @ spans[1].U)[0]
        self.factor, self.size, self.steps = None, size, 0
        self.generator = torch.Generator().manual_seed(seed)

    def run(self) -> None:
        """Peels until no unit shows a new image, then looks for the patterns of those that are left."""
        while len(self.state.q) < self.state.first.rank and self.step():
            pass
        if len(self.state.q) < self.state.first.rank and self.E.shape[1] <= MAX_LINEAR_UNKNOWNS:
            left = PatternSearch(
                self.state, self.E, [rows for rows, *_ in self.views()] or [self.state.rows], self.generator
            ).run()
            if left is not None:
                self.accept(left, together=True)
                self.state.refit()

    def restore(self, inputs: Tensor, errors: Tensor) -> None:
        """Takes inputs (F, n) with predicted errors (F,) as found, and solves for all of them together."""
        state, units = self.state, torch.zeros(len(inputs), dtype=torch.int64)
        x = inputs if state.last is None else torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        q, one = x @ state.first.V, torch.ones_like(errors)
        errors = torch.where(errors > 0, errors, errors.amax())  # those that a search found are as free to move
        tested = state.test(Candidates(q, units, one, one, errors / self.error_factor))
        scale = ((tested.dz @ state.first.U / state.first.S) * q).sum(1, keepdim=True)
        error = errors / self.error_factor
        for found in zip(q, tested.dz / scale, error, tested.rounding, torch.zeros_like(error), strict=True):
            state.add(*found)
        state.refit()

    @property
    def error_factor(self) -> float:
        """Predicted error of an input's entries, for a standard deviation of 1 of its coordinates."""
        width = len(self.state.first.V) - (self.state.last is not None)
        return TOLERATED_STDS * (self.state.first.rank / width) ** 0.5

    def separation(self) -> Separation:
        """The images found, with their true size where there is a bias."""
        state, first = self.state, self.state.first
        x, scale = state.q @ first.V.T, state.q.new_ones(len(state.q), 1)
        if state.last is not None:
            x, scale = x[:, :-1], x[:, -1:]
        dz = state.dz * scale
        sines = (dz - dz @ first.U @ first.U.T).norm(dim=1) / dz.norm(dim=1)
        residuals = torch.stack([(scale[:, 0] - 1).abs(), sines], 1)
        found = (x / scale, dz, residuals, first, self.second, 0, self.steps)
        mixed = state.mixture * found[0].square().mean(1).sqrt()
        return Separation(*found, torch.maximum(self.error_factor * state.error, mixed), len(dz), self.factor)

    def step(self) -> int:
        """Tests every unit once; the number of new images."""
        state, before = self.state, len(self.state.q)
        self.steps += 1
        for rows, noise, gain in self.views():
            self.accept(self.suggested(rows, noise, gain))
        if len(state.q) > before:
            state.refit(self.E, self.linear(state.rows, state.rows_noise))
        return len(state.q) - before

    def views(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows (h, r) of which some are one image, their noise (h,), and the gain with which a row shows its image.

        Units that one image switches on, and, less their linear part, those that it alone leaves out; behind LeakyReLU
        both need that.
        """
        state, rows, noise = self.state, self.state.rows, self.state.rows_noise
        found = [] if state.down.any() else [(rows, noise, state.up)]
        linear = self.linear(rows, noise)
        if linear is not None:
            for slope, other in ((state.up, state.down), (state.down, state.up)):
                if slope.any():
                    spread = (noise.square() + (slope * linear.noise).square()).sqrt()
                    found.append((rows - slope[:, None] * linear.rows, spread, other - slope))
        return found

    def linear(self, rows: Tensor, noise: Tensor) -> LinearPart | None:
        """What the rows would be without kinks, where enough units show it."""
        order = self.likely_on()
        if order is None:
            return None
        if not self.state.down.any():
            slope = self.state.up
            found = linear_part(slope[:, None] * self.E, rows, noise, order, self.generator)
        else:  # where all images switch a unit off, its row is linear too
            half = len(order) // 2
            ends = torch.stack([order[:half], order.flip(0)[:half]], 1).flatten()
            slope = self.state.up.clone()
            slope[order[half:]] = self.state.down[order[half:]]
            found = linear_part(slope[:, None] * self.E, rows, noise, ends, self.generator)
        return None if found is None else LinearPart(found.rows / slope[:, None], found.noise / slope)

    def likely_on(self) -> Tensor | None:
        """Units in the order in which all remaining images are likely to switch them on; None where nothing shows it.

        Images have a direction in common. The images found show it, or the units that no image switches on.
        """
        state = self.state
        if len(state.q) > 1:
            z = state.q @ state.Z.T
            z = z / z.norm(dim=1, keepdim=True)
            return (z.mean(0) / z.std(0).clamp(min=1e-300)).argsort(descending=True)
        unit = state.Z / state.Z.norm(dim=1, keepdim=True)
        silent = state.all_rows.norm(dim=1) <= TOLERATED_STDS * state.noise * state.first.rank**0.5
        if not silent.any():
            return None
        return (-(unit @ unit[silent].sum(0))).argsort(descending=True)

    def suggested(self, rows: Tensor, noise: Tensor, gain: Tensor) -> Candidates:
        """The rows that are above their noise as inputs."""
        state = self.state
        q, own = state.scaled(rows)
        error = noise / own.abs()
        good = (error * state.first.rank**0.5 <= MAX_INPUT_ERROR * q.norm(dim=1)) & torch.isfinite(q).all(1)
        unit = good.nonzero().flatten()
        return Candidates(q[unit], unit, own[unit], gain[unit], error[unit])

    def accept(self, candidates: Candidates, *, together: bool = False) -> None:
        """Adds the candidates that pass all tests, the most precise first; all of them if they were found together."""
        state = self.state
        candidates = candidates.at(~state.is_known(candidates.q))
        if not len(candidates.q):
            return
        tested = state.test(candidates)
        passes, allowed = tested.sine <= tested.allowed, tested.allowed
        if state.last is not None:
            known = self.factor or self.common_factor(tested.factor[passes])
            if known is None:
                return
            allowed = TOLERATED_STDS * (candidates.error * state.last.norm() + tested.blur + tested.rounding)
            allowed = (allowed + MIN_FACTOR_MISMATCH).clamp(max=MAX_FACTOR_MISMATCH)
            passes &= (tested.factor / known - 1).abs() <= allowed
            self.factor = known
        precise = candidates.error[passes].min().item() * MAX_ERROR_RATIO if passes.any() else 0.0
        for place in candidates.error.argsort().tolist():
            if candidates.error[place] > precise and not together:
                break
            if passes[place] and not state.is_known(candidates.q[place : place + 1]).any():
                factor = tested.factor[place] if state.last is None else self.factor
                dz, error = factor * tested.dz[place], candidates.error[place]
                state.add(candidates.q[place], dz, error, tested.rounding[place], allowed[place])

    def common_factor(self, factors: Tensor) -> float | None:
        """The factor on which most candidates agree, 1/B for a mean loss; None where too few do."""
        factors = factors[(factors > 0) & torch.isfinite(factors)]
        if not len(factors):
            return None
        agree = (factors[:, None] / factors - 1).abs() <= 1e-4
        best = int(agree.sum(1).argmax())
        common = factors[agree[best]].median().item()
        if abs(common * self.size - 1) > MAX_FACTOR_MISMATCH and int(agree[best].sum()) < MIN_AGREEING:
            return None
        return common
