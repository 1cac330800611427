"""Activation bits of a walk: read off outputs, left in doubt near zero, and corrected by division.

With a layer's input x known, N(x) δz = vec(G) gives the δz of its own gradient; divided by the δ that comes from above
it is the slope of the activation, on one side or the other (ours).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rgap.linalg import rms
from rgap.network.activations import RELU, widest_gap
from rgap.network.layer import Layer
from rgap.network.nodes import Graph
from rgap.residual.stacked import solve_changes
from rgap.shared_gradient import FLOAT64_FLOOR

if TYPE_CHECKING:
    from rgap.residual.walk import Walk

MAX_BIT_ROUNDS = 20  # times that the bits of one layer are corrected
ZERO_ERRORS = 6.0  # standard deviations up to which a ReLU's output counts as zero until division decides
ZERO_MARGIN = 1.5  # the same in units of the largest negative output, which is an error
MAX_ZERO_GAP = 8.0  # times the larger of both limits within which the widest gap (by ratio) above zero is looked for
DOUBT_RATIO = 10.0  # times that limit up to which an output is in doubt, so that division may change its bit
SAFE_BIT_RATIO = 6.0  # size of a bit's effect, over the division's typical error, from which the division decides it
LEADING_SHARE = 0.5  # residual of a filter's equations, over the largest, from which its bits are corrected first
MIN_KEPT = 0.01  # smallest share of an error in δz from which it is extrapolated


@dataclass(frozen=True)
class Known:
    """What is known of a tensor (C, H, W): its entries where `mask` is true, or all where it is None.

    Elsewhere, behind a ReLU that is off, the entries are at most `value`.
    """

    value: Tensor
    mask: Tensor | None = None
    error: Tensor | None = None  # standard deviation of the entries, broadcast to them

    @property
    def everywhere(self) -> Tensor:
        """The mask, true where the tensor is known entirely."""
        return torch.ones_like(self.value, dtype=torch.bool) if self.mask is None else self.mask


def zero_limit(known: Known, precision: float) -> Tensor:
    """The size up to which a ReLU's output may be zero: what is below zero is error, and zeros err by as much."""
    error = precision * rms(known.value) if known.error is None else known.error
    error = error.clamp(min=FLOAT64_FLOOR * rms(known.value))
    sizes = (known.value / error).flatten()
    least = max(ZERO_ERRORS, ZERO_MARGIN * -sizes.min().item())
    return error * widest_gap(sizes, least, MAX_ZERO_GAP * least)


def activation_above(graph: Graph, reader: str) -> str | None:
    """The activation whose bits decide a layer's δz: right behind it, or behind the addition that it enters."""
    above = graph.consumers[reader]
    if len(above) == 1 and graph.nodes[above[0]].kind == "addition":
        above = graph.consumers[above[0]]
    return above[0] if len(above) == 1 and graph.nodes[above[0]].kind == "activation" else None


def decide(walk: Walk, name: str, x: Tensor, kept: Iterable[Tensor] = ()) -> int:
    """Corrects the bits in doubt above all layers that read a tensor, given the tensor; how many changed.

    `kept` is the share of an error in each filter's δz that x has not absorbed.
    """
    return sum(_decide(walk, *each, x) for each in zip_longest(walk.readers(name), kept, fillvalue=torch.ones(1)))


def _decide(walk: Walk, reader: str, kept: Tensor, x: Tensor) -> int:
    """One wrong bit disturbs x, and by x the other filters: those with the largest residual come first.

    A bit far below the doubt, for which a unit's output was read as zero, is the one that explains most of them.
    """
    act = activation_above(walk.graph, reader)
    if act is None or act not in walk.slopes or act in walk.decided:
        return 0
    known, layer, kept = walk.values[act], walk.graph.nodes[reader].layer, kept[:, None, None]
    limit = zero_limit(known, walk.precision)
    small = known.value < DOUBT_RATIO * limit
    doubt = small & (known.value > limit / DOUBT_RATIO)
    missed = walk.gradient(reader) - layer.weight_gradient(x, walk.deltas[reader])
    sizes = missed.flatten(1).norm(dim=1)
    leading = (sizes >= LEADING_SHARE * sizes.max())[:, None, None]
    gains = _gains(layer, missed, x) * (1 - 2 * walk.slopes[act]) * walk.deltas[act].sign()
    gains = torch.where(small & leading, gains, -torch.inf)
    best = gains == gains.amax((1, 2), keepdim=True)
    return (
        correct_bits(walk, reader, x, doubt & leading, kept)
        or correct_bits(walk, reader, x, best & (gains > 0), kept)
        or correct_bits(walk, reader, x, doubt)
    )


def _gains(layer: Layer, missed: Tensor, x: Tensor) -> Tensor:
    """By how much each entry of δz alone would reduce what a layer's gradient equations miss, with its sign."""
    if layer.before is not None or layer.after is not None or layer.groups > 1:
        return torch.zeros(layer.output_shape, dtype=x.dtype)
    one = replace(layer, weight=torch.ones_like(missed[:1]), output_shape=(1, *layer.output_shape[1:]), cache={})
    size = one.apply(x.square()).sqrt()
    return replace(layer, weight=missed, cache={}).apply(x) / size.clamp(min=1e-300)


def correct_bits(walk: Walk, reader: str, x: Tensor, doubt: Tensor, kept: Tensor | float = 1.0) -> int:
    """Corrects bits of the activation above a layer by division, given the layer's input and where to doubt them.

    δz / δ, with δz by the layer's own gradient and δ from above, is the slope on one side or the other. Where x was
    solved from the same equations, they show only the share `kept` of what is wrong.
    """
    graph, act = walk.graph, activation_above(walk.graph, reader)
    node, activation = graph.nodes[reader], graph.nodes[act].activation
    slope = 0.0 if activation is RELU else activation.negative_slope
    if slope is None or not doubt.any():
        return 0
    missed = walk.gradient(reader) - node.layer.weight_gradient(x, walk.deltas[reader])
    solved = solve_changes(node.layer, missed, x, doubt)
    if solved is None:
        return 0
    above, bits = walk.deltas[act], walk.slopes[act]
    change, error = (part / torch.as_tensor(kept).clamp(min=MIN_KEPT) for part in solved)
    one = bits * above + change > above * (1 + slope) / 2
    one = torch.where(above > 0, one, ~one)
    wanted = torch.where(one, torch.ones_like(bits), slope * torch.ones_like(bits))
    changes = doubt & (wanted != bits) & ((1 - slope) * above.abs() > SAFE_BIT_RATIO * error)
    if changes.any():
        walk.slopes[act] = bits.where(~changes, wanted)
        _pull_through(walk, act)
    return int(changes.sum())


def correct_maxima(walk: Walk, reader: str, x: Tensor, values: Tensor, margin: Tensor) -> int:
    """Moves maxima to the second largest entry of their windows by division, where the two differ by rounding.

    For a layer (its input x), the activation right behind it (its output `values`) and the pooling behind that. The
    client's arithmetic may have taken the other of two entries closer than `margin`: its own gradient then has the
    window's δ there.
    """
    graph, act = walk.graph, activation_above(walk.graph, reader)
    pool = next((name for name in graph.consumers[act] if graph.nodes[name].kind == "max pooling"), None)
    if pool is None or len(graph.consumers[act]) > 1 or pool not in walk.deltas:
        return 0
    first, layer = walk.slopes[pool], graph.nodes[reader].layer
    others = values.flatten(1).scatter(1, first.flatten(1), -torch.inf).reshape(values.shape)
    second = graph.nodes[pool].slope(others)

    def at(tensor: Tensor, places: Tensor) -> Tensor:
        return tensor.flatten(1).gather(1, places.flatten(1)).reshape(places.shape)

    close = (at(values, first) - at(values, second) < margin) & (at(values, second) > 0)
    doubt = torch.zeros_like(values, dtype=torch.int).flatten(1)
    for places in (first, second):
        doubt.scatter_add_(1, places.flatten(1), close.flatten(1).int())
    missed = walk.gradient(reader) - layer.weight_gradient(x, walk.deltas[reader])
    solved = solve_changes(layer, missed, x, doubt.reshape(values.shape) > 0) if close.any() else None
    if solved is None:
        return 0
    (change, error), delta = (at(part, second) for part in solved), walk.deltas[pool]
    moved = close & (change * delta > delta.square() / 2) & (delta.abs() > SAFE_BIT_RATIO * error)
    if moved.any():
        walk.slopes[pool] = torch.where(moved, second, first)
        walk.deltas[act] = walk.pulled(pool, act)
        _pull_through(walk, act)
    return int(moved.sum())


def _pull_through(walk: Walk, act: str) -> None:
    """δ below an activation anew, through an addition to the branches that enter nothing else."""
    graph, source = walk.graph, walk.graph.nodes[act].sources[0]
    walk.deltas[source] = walk.pulled(act, source)
    if graph.nodes[source].kind == "addition":
        for branch in graph.nodes[source].sources:
            if branch in walk.deltas and graph.consumers[branch] == (source,):
                walk.deltas[branch] = walk.deltas[source]
