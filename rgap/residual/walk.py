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
from rgap.network.nodes import Graph
from rgap.residual.bits import DOUBT_RATIO, MAX_BIT_ROUNDS, Known, activation_above, decide, zero_limit
from rgap.residual.stacked import StackedSolution, close_by_outputs, solve_stacked
from rgap.results import LayerReport

MAX_TRUSTED_CONDITION = 300.0  # condition of a tensor's equations above which it may be imprecise
MAX_TRUSTED_ERROR = 1e-9  # relative error of a tensor above which it is, then
MAX_RESIDUAL_FACTOR = 1e3  # residual of equations, over the gradient's precision, from which they are contradictory
MIN_RESIDUAL_LIMIT = 1e-9  # the same limit where the precision is that of float64


@dataclass
class Walk:
    """Where a walk has got to."""

    graph: Graph  # the network
    gradients: Mapping[str, Tensor]  # parameter name -> shared gradient, float64
    top: str  # the node at which the walk began
    precision: float  # relative error of the gradients
    rcond: float  # relative cutoff of singular values
    absent: tuple[str, ...] = ()  # names of gradients of which nothing is known
    values: dict[str, Known] = field(default_factory=dict)  # node name -> what is known of it
    deltas: dict[str, Tensor] = field(default_factory=dict)  # node name -> gradient of the loss by it
    slopes: dict[str, Tensor] = field(default_factory=dict)  # name of an activation -> σ′ at its input
    reports: list[LayerReport] = field(default_factory=list)  # one for each tensor that was solved for
    decided: set[str] = field(default_factory=set)  # activations whose bits division has confirmed
    imprecise: set[str] = field(default_factory=set)  # tensors whose equations amplified their errors
    frontier: str = ""  # the tensor at which it ended; "" where that is below the image
    why: str = ""  # why it ended there
    contradicted: bool = False  # whether its equations contradict each other there

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
                    doubt = DOUBT_RATIO * zero_limit(above, self.precision)
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
            self.deltas[name] = sum(self.pulled(reader, name) for reader in self.graph.consumers[name])

    def pulled(self, reader: str, name: str) -> Tensor:
        """The part of the gradient by a tensor that comes through one of its consumers."""
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
            self.slopes[name] = (known.value > zero_limit(known, self.precision)).to(known.value)
        else:
            self.slopes[name] = activation.derivative(activation.invert(known.value, self.precision)[0])

    def _solve(self, name: str, started: float) -> None:
        """Solves for a tensor, with the bits above it corrected by division until none changes."""
        readers, corrected = self.readers(name), 0
        for _ in range(MAX_BIT_ROUNDS):
            found = self._equations(name, readers)
            if found is None or not found.determined:
                break
            changed = decide(self, name, found.x, found.kept)
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
        self.decided.update(act for reader in readers if (act := activation_above(self.graph, reader)))
        return None

    def _trusted(self, name: str) -> str:
        """Where to end instead of at a tensor that is open: above, if what was found there is imprecise.

        Equations of the tensor above are then better than what they gave, and the bits that it has decided.
        """
        act = next(
            (above for n in self.readers(name) if (above := activation_above(self.graph, n)) in self.imprecise), None
        )
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
        gradients, deltas = [self.gradient(r) for r in readers], [self.deltas[r] for r in readers]
        found = solve_stacked(layers, gradients, deltas, self.rcond)
        if not found.determined:
            known = [(layer, k) for r, layer in zip(readers, layers, strict=True) if (k := self.known(r)) is not None]
            outputs = [(layer, k.value - layer.pre_bias(), k.everywhere) for layer, k in known]
            found = (close_by_outputs(found, layers, gradients, deltas, outputs) if known else None) or found
        return found

    def _report(self, name: str, readers: list[str], found: StackedSolution, corrected: int, seconds: float) -> None:
        path = " + ".join(self.graph.nodes[reader].path for reader in readers)
        self.reports.append(LayerReport(
            path, found.unknowns, rank_gradients=found.rank, rank=found.rank, deficit=found.unknowns - found.rank,
            iterations=corrected, condition=found.condition, sigma_above_cut=found.above, sigma_below_cut=found.below,
            residual=found.residual, predicted_error=rms(found.error).item(), seconds=seconds,
        ))  # fmt: skip
