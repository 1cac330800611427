"""Where a network can be entered without anything above: layers whose own gradient gives their input and δz."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.equations.tap_splits import tap_splits
from rgap.network.chain import prepare_graph
from rgap.network.nodes import Graph, Node
from rgap.residual.blind import BlindSolution, solve_blind
from rgap.residual.stacked import solve_changes
from rgap.results import UnsupportedLayerError

MAX_QUICK_POSITIONS = 100  # positions of a map up to which a blind layer takes seconds; larger ones are tried last


@dataclass(frozen=True)
class Cut:
    """A blind layer."""

    layer: str  # name of its node
    last: str  # the last layer of its branch; another one in a bottleneck, whose δz follows from its input and gradient
    top: str  # the node whose gradient that gives: the last layer itself, or the addition that is all that reads it


@dataclass(frozen=True, eq=False)
class ResidualNetwork:
    """A network with branches or pooling that can be entered through blind layers."""

    graph: Graph  # its graph
    cuts: tuple[Cut, ...]  # the layers that are blind by shape and below which nothing is opaque, in the order of trial

    @property
    def model(self) -> nn.Module:
        """The module it was made from."""
        return self.graph.model

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.graph.image_shape


def prepare_residual(model: nn.Module, image_shape: tuple[int, int, int]) -> ResidualNetwork:
    """Finds the blind layers of a network; an UnsupportedLayerError with the reasons where none can be entered."""
    return enter_graph(prepare_graph(model, image_shape))


def enter_graph(graph: Graph) -> ResidualNetwork:
    """The blind layers of a graph, the cheapest first; errors as from `prepare_residual`."""
    cuts, reasons = [], []
    for name, node in graph.nodes.items():
        if node.has_weight and node.layer.weight[0, 0].numel() > 1:
            cut = _cut(graph, name)
            reason = _obstacle(graph, cut)
            if reason:
                reasons.append(f"{node.path!r}: {reason}")
            else:
                cuts.append(cut)
    if not cuts:
        why = "; ".join(reasons[-2:]) or "it has no convolutions of more than one tap"
        raise UnsupportedLayerError(
            f"no convolution of {type(graph.model).__name__} gives its input and output gradient by its own: {why}"
        )
    return ResidualNetwork(graph, tuple(sorted(cuts, key=lambda cut: _cost(graph, cut))))


def _cost(graph: Graph, cut: Cut) -> tuple[int, bool]:
    """Max poolings that a walk from there meets, for none is passed, and whether the layer itself takes long."""
    pools = sum(graph.nodes[name].kind == "max pooling" for name in graph.below([cut.top]))
    return pools, math.prod(graph.nodes[cut.layer].layer.input_shape[1:]) > MAX_QUICK_POSITIONS


def _cut(graph: Graph, name: str) -> Cut:
    """Up from a blind layer through layers that are read by one node each, to where no branch passes by."""
    last = top = name
    while not graph.articulates(top) and len(graph.consumers[top]) == 1:
        (top,) = graph.consumers[top]
        last = top if graph.nodes[top].has_weight else last
    return Cut(name, last, top)


def _obstacle(graph: Graph, cut: Cut) -> str:
    """Why a layer is no place to enter; empty where it is one."""
    node = graph.nodes[cut.layer]
    layer, inside = node.layer, graph.below([cut.top])
    if layer.groups > 1 or layer.before is not None or layer.after is not None:
        return "it has groups, pooling folded into it, or padding other than zeros"
    if opaque := [graph.nodes[n] for n in inside if graph.nodes[n].kind == "opaque"]:
        return f"{opaque[0].path!r} lies below it, and {opaque[0].reason}"
    if not graph.articulates(cut.top):
        return "a branch passes it by, whose gradient it does not give"
    if node.total is None:
        return "it has neither a bias nor a batch norm, whose gradient would fix the scale of its input"
    if not tap_splits(layer.weight.shape[0], layer.weight.shape[1], geometry(node)):
        outputs, channels = layer.weight.shape[:2]
        H, W = layer.input_shape[1:]
        return f"{H}×{W} positions are too many for {channels} channels and {outputs} filters"
    return ""


def geometry(node: Node) -> tuple:
    """For each axis pixels, taps, stride, padding (before, after) and dilation."""
    layer = node.layer
    left, right, above, below = layer.padding
    pads = (above, below), (left, right)
    axes = layer.input_shape[1:], layer.weight.shape[2:], layer.stride, pads, layer.dilation
    return tuple(zip(*axes, strict=True))


def enter(graph: Graph, cut: Cut, gradients: Mapping[str, Tensor], stds: Mapping[str, Tensor]) -> BlindSolution:
    """Solves a blind layer from the shared gradients, whose entries have those standard deviations."""
    node = graph.nodes[cut.layer]
    layer, factor = node.layer, 1.0 if node.total_factor is None else node.total_factor
    return solve_blind(
        layer.gradient(gradients), layer.input_shape[1:], padding=layer.padding, stride=layer.stride,
        dilation=layer.dilation, sum_dz=gradients[node.total] * factor, noise_std=layer.gradient(stds).abs(),
        sum_noise_std=stds[node.total] * abs(factor),
    )  # fmt: skip


def delta_at_top(graph: Graph, cut: Cut, x: Tensor, dz: Tensor, G: Tensor) -> Tensor | None:
    """The gradient by the top node, from the blind layer's input and δz and the gradient G of the last layer.

    None where the last layer is another one and its input does not determine its δz.
    """
    if cut.last == cut.layer:
        return dz
    layer = graph.nodes[cut.last].layer
    source = graph.nodes[cut.last].sources[0]
    value = graph.forward({graph.nodes[cut.layer].sources[0]: x}, [source])[source]
    solved = solve_changes(layer, G, value, torch.ones(layer.output_shape, dtype=torch.bool))
    return None if solved is None else solved[0]
