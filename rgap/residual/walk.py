"""From a cut down through a network's blocks: inputs by gradient equations, activation bits by division.

Below the cut every tensor's δ is known as soon as the activation bits above it are: a layer that reads a tensor x and
has δz gives K(δz) x = vec(G); all readers' equations are solved together (Zhu & Blaschko's gradient constraints, 2021,
through branches: ours). With x known, N(x) δz = vec(G) gives δz once more: divided by the δ that came from above it
shows the bits, so that a wrong one is found before the next layer is touched. The walk ends where the equations of a
tensor lack rank, or contradict each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rgap.linalg import rms
from rgap.network.activations import RELU
from rgap.network.graph import Graph
from rgap.residual.stacked import StackedSolution, solve_changes, solve_stacked
from rgap.results import LayerReport
from rgap.shared_gradient import FLOAT64_FLOOR

MAX_BIT_ROUNDS = 5
"""Times that the bits of one layer are corrected."""

ZERO_ERRORS = 6.0
"""Standard deviations up to which a ReLU's output counts as zero until division decides."""

ZERO_MARGIN = 1.5
"""The same in units of the largest negative output, which is an error."""

MAX_ZERO_GAP = 8.0
"""Times the larger of both limits within which the widest gap (by ratio) between outputs and zeros is looked for."""

DOUBT_RATIO = 10.0
"""Times that limit up to which an output is in doubt, so that division may change its bit."""

SAFE_BIT_RATIO = 6.0
"""Size of a bit's effect, in units of the division's typical error, from which the division decides it."""

WRONG_FILTER_RATIO = 10.0
"""Residual of a filter's equations, over the median of all filters, from which bits of it may be wrong: all its zeros
are in doubt then."""

MAX_TRUSTED_CONDITION = 300.0
"""Condition of a tensor's equations above which it may be imprecise."""

MAX_TRUSTED_ERROR = 1e-9
"""Relative error of a tensor above which it is, then."""

MAX_RESIDUAL_FACTOR = 1e3
"""Residual of a layer's equations, in units of the gradient's precision, above which they contradict each other."""

MIN_RESIDUAL_LIMIT = 1e-9
"""The same limit where the precision is that of float64."""


@dataclass(frozen=True)
class Known:
    """What is known of a tensor (C, H, W): its entries where `mask` is true, or all where it is None.

    Elsewhere, behind a ReLU that is off, the entries are at most `value`.
    """

    value: Tensor
    mask: Tensor | None = None
    error: Tensor | None = None  # standard deviation of the entries, broadcast to them


@dataclass
class Walk:
    """Where a walk has got to.

    Attributes:
        graph: The network.
        gradients: Parameter name -> shared gradient, float64.
        top: The node at which the walk began.
        precision: Relative error of the gradients.
        rcond: Relative cutoff of singular values.
        absent: Names of gradients of which nothing is known.
        values: Node name -> what is known of it.
        deltas: Node name -> gradient of the loss by it.
        slopes: Name of an activation -> σ′ at its input.
        reports: One for each tensor that was solved for.
        decided: Activations whose bits division has confirmed.
        imprecise: Tensors whose equations amplified their errors.
        frontier: The tensor at which it ended; "" where that is below the image.
        why: Why it ended there.
        contradicted: Whether its equations contradict each other there.
    """

    graph: Graph
    gradients: Mapping[str, Tensor]
    top: str
    precision: float
    rcond: float
    absent: tuple[str, ...] = ()
    values: dict[str, Known] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    decided: set[str] = field(default_factory=set)
    imprecise: set[str] = field(default_factory=set)
    frontier: str = ""
    why: str = ""
    contradicted: bool = False

    @property
    def residual_limit(self) -> float:
        """Relative residual of equations up to which the gradient's own errors explain it."""
        return max(MIN_RESIDUAL_LIMIT, MAX_RESIDUAL_FACTOR * self.precision)

    def readers(self, name: str) -> list[str]:
        """The layers that read a tensor and whose weight's gradient was shared."""
        nodes = [self.graph.nodes[reader] for reader in self.graph.consumers[name]]
        return [node.name for node in nodes if node.has_weight and node.layer.weight_name not in self.absent]

    def gradient(self, name: str) -> Tensor:
        """The shared gradient by a layer's (folded) weight."""
        return self.graph.nodes[name].layer.gradient(self.gradients)

    def known(self, name: str) -> Known | None:
        """What is known of a tensor: solved for, computed from its sources, or read off its consumers."""
        found = self.values.get(name) or self.computed(name)
        if found is None:
            found = next(self._from_consumers(name), None)
        return found

    def computed(self, name: str) -> Known | None:
        """A tensor from what it is computed from, None where that is not known entirely."""
        found, node = self.values.get(name), self.graph.nodes[name]
        if found is not None or not node.sources:
            return found if found is not None and found.mask is None else None
        inputs = [self.computed(source) for source in node.sources]
        return None if None in inputs else Known(node.forward([known.value for known in inputs]))

    def _from_consumers(self, name: str) -> Iterator[Known]:
        for reader in self.graph.consumers[name]:
            node, above = self.graph.nodes[reader], self.values.get(reader)
            if node.kind == "activation" and above is not None and reader in self.slopes and above.mask is None:
                if node.activation is not RELU:
                    yield Known(node.activation.inverse(above.value))
                else:
                    doubt = DOUBT_RATIO * self._zero(above)
                    yield Known(torch.maximum(above.value, doubt), above.value > doubt)
            elif node.kind == "affine" and (above := self.known(reader)) is not None and above.mask is None:
                yield Known((above.value - node.shift) / node.scale)
            elif node.kind == "reshape" and (above := self.known(reader)) is not None and above.mask is None:
                yield Known(above.value.reshape(self.graph.nodes[name].shape))
            elif node.kind == "addition" and reader in self.deltas:
                (other,) = (source for source in node.sources if source != name)
                total, rest = next(self._from_consumers(reader), None), self.computed(other)
                if total is not None and rest is not None:
                    yield Known(total.value - rest.value, total.mask)

    def run(self) -> Walk:
        """Walks down until a tensor is not determined."""
        for name in reversed(self.graph.below([self.top])):
            node = self.graph.nodes[name]
            started = time.perf_counter()
            if name not in self.values and any(self.graph.nodes[n].has_weight for n in self.graph.consumers[name]):
                self._solve(name, started)
            if self.frontier:
                break
            self.find_delta(name)
            if node.kind == "max pooling":
                self._stop(name, "max pooling discards the positions of the maxima")
                break
            if node.kind == "activation":
                self._find_slope(name)
        return self

    def find_delta(self, name: str) -> None:
        """The gradient by a tensor, from those by its consumers."""
        if name not in self.deltas and name != self.graph.image:
            self.deltas[name] = sum(self._pulled(reader, name) for reader in self.graph.consumers[name])

    def _pulled(self, reader: str, name: str) -> Tensor:
        node = self.graph.nodes[reader]
        return node.pull(self.deltas[reader], self.slopes.get(reader), self.graph.nodes[name].shape)

    def _stop(self, name: str, why: str) -> None:
        self.frontier, self.why = name, why

    def _find_slope(self, name: str) -> None:
        """σ′ at an activation's input, from its output."""
        activation, known = self.graph.nodes[name].activation, self.known(name)
        if known is None or known.mask is not None:
            return self._stop(name, "no layer's equations determine the activation's output")
        if activation is RELU:
            self.slopes[name] = (known.value > self._zero(known)).to(known.value)
        else:
            self.slopes[name] = activation.derivative(activation.invert(known.value, self.precision)[0])

    def _zero(self, known: Known) -> Tensor:
        """The size up to which a ReLU's output may be zero: what is below zero is error, and zeros err by as much."""
        error = self.precision * rms(known.value) if known.error is None else known.error
        error = error.clamp(min=FLOAT64_FLOOR * rms(known.value))
        sizes = (known.value / error).flatten()
        least = max(ZERO_ERRORS, ZERO_MARGIN * -sizes.min().item())
        near = sizes[(sizes > least) & (sizes < MAX_ZERO_GAP * least)].sort().values
        edges = torch.cat([sizes.new_tensor([least]), near, sizes.new_tensor([MAX_ZERO_GAP * least])])
        gap = int((edges[1:] / edges[:-1]).argmax())
        return error * (edges[gap] * edges[gap + 1]).sqrt()

    def _solve(self, name: str, started: float) -> None:
        """Solves for a tensor, with the bits above it corrected by division until none changes."""
        readers, corrected = self.readers(name), 0
        for _ in range(MAX_BIT_ROUNDS):
            found = self._equations(name, readers)
            if found is None or not found.determined:
                break
            changed = self.decide(name, found.x)
            corrected += changed
            if not changed:
                break
        if found is None:
            return self._stop(name, "a layer that reads it has groups, or none shares a gradient")
        self._report(name, readers, found, corrected, time.perf_counter() - started)
        if not found.determined:
            whole = self.known(name)
            if whole is not None and whole.mask is None:
                self.values[name] = whole
                return None
            lack = found.unknowns - found.rank
            why = f"the gradient equations of {' and '.join(readers)} lack {lack} of {found.unknowns}"
            return self._stop(self._trusted(name), why)
        if found.residual > self.residual_limit:
            self.contradicted = True
            miss = f"missed by {found.residual:.2g}; {self.residual_limit:.2g} is allowed"
            return self._stop(name, f"the equations of {' and '.join(readers)} contradict each other, {miss}")
        self.values[name] = Known(found.x, error=found.error)
        if found.condition > MAX_TRUSTED_CONDITION and rms(found.error) > MAX_TRUSTED_ERROR * rms(found.x):
            self.imprecise.add(name)
        self.decided.update(act for reader in readers if (act := self.activation_above(reader)))
        return None

    def _trusted(self, name: str) -> str:
        """Where to end instead of at a tensor that is open: above, if what was found there is imprecise.

        Equations of the tensor above are then better than what they gave, and the bits that it has decided.
        """
        act = next((above for n in self.readers(name) if (above := self.activation_above(n)) in self.imprecise), None)
        if act is None:
            return name
        for inside in self.graph.below([act])[:-1]:
            self.deltas.pop(inside, None)
        del self.values[act], self.slopes[act]
        return act

    def _equations(self, name: str, readers: list[str]) -> StackedSolution | None:
        layers = [self.graph.nodes[reader].layer for reader in readers]
        if not layers or any(layer.groups > 1 for layer in layers):
            return None
        return solve_stacked(layers, [self.gradient(r) for r in readers], [self.deltas[r] for r in readers], self.rcond)

    def _report(self, name: str, readers: list[str], found: StackedSolution, corrected: int, seconds: float) -> None:
        path = " + ".join(self.graph.nodes[reader].path for reader in readers)
        self.reports.append(LayerReport(
            path, found.unknowns, rank_gradients=found.rank, rank=found.rank, deficit=found.unknowns - found.rank,
            iterations=corrected, condition=found.condition, sigma_above_cut=found.above, sigma_below_cut=found.below,
            residual=found.residual, predicted_error=rms(found.error).item(), seconds=seconds,
        ))  # fmt: skip

    def activation_above(self, reader: str) -> str | None:
        """The activation whose bits decide a layer's δz: right behind it, or behind the addition that it enters."""
        above = self.graph.consumers[reader]
        if len(above) == 1 and self.graph.nodes[above[0]].kind == "addition":
            above = self.graph.consumers[above[0]]
        return above[0] if len(above) == 1 and self.graph.nodes[above[0]].kind == "activation" else None

    def decide(self, name: str, x: Tensor) -> int:
        """Corrects the bits in doubt above all layers that read a tensor, given the tensor; how many changed."""
        return sum(self._decide(reader, x) for reader in self.readers(name))

    def _decide(self, reader: str, x: Tensor) -> int:
        act = self.activation_above(reader)
        if act is None or act not in self.slopes or act in self.decided:
            return 0
        known, layer, G = self.values[act], self.graph.nodes[reader].layer, self.gradient(reader)
        limit = self._zero(known)
        small = known.value < DOUBT_RATIO * limit
        missed = (layer.weight_gradient(x, self.deltas[reader]) - G).flatten(1).norm(dim=1)
        wrong = missed > WRONG_FILTER_RATIO * missed.median()
        return self.correct_bits(reader, x, small & ((known.value > limit / DOUBT_RATIO) | wrong[:, None, None]))

    def correct_bits(self, reader: str, x: Tensor, doubt: Tensor) -> int:
        """Corrects bits of the activation above a layer by division, given the layer's input and where to doubt them.

        δz / δ, with δz by the layer's own gradient and δ from above, is the slope on one side or the other.
        """
        act, node = self.activation_above(reader), self.graph.nodes[reader]
        activation = self.graph.nodes[act].activation
        slope = 0.0 if activation is RELU else activation.negative_slope
        if slope is None or not doubt.any():
            return 0
        missed = self.gradient(reader) - node.layer.weight_gradient(x, self.deltas[reader])
        solved = solve_changes(node.layer, missed, x, doubt)
        if solved is None:
            return 0
        above, bits = self.deltas[act], self.slopes[act]
        one = bits * above + solved[0] > above * (1 + slope) / 2
        one = torch.where(above > 0, one, ~one)
        wanted = torch.where(one, torch.ones_like(bits), slope * torch.ones_like(bits))
        changes = doubt & (wanted != bits) & ((1 - slope) * above.abs() > SAFE_BIT_RATIO * solved[1])
        if changes.any():
            self.slopes[act] = bits.where(~changes, wanted)
            source = self.graph.nodes[act].sources[0]
            self.deltas[source] = self._pulled(act, source)
            if self.graph.nodes[source].kind == "addition":
                for branch in self.graph.nodes[source].sources:
                    if branch in self.deltas and self.graph.consumers[branch] == (source,):
                        self.deltas[branch] = self.deltas[source]
        return int(changes.sum())
