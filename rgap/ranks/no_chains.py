"""Networks that are not attacked layer by layer from the head: what they give away, by shapes alone.

Vision transformers: every path from a token to the loss passes a layer norm, whose backward pass is orthogonal to the
ones, so that the gradients of T tokens, those of a learned position embedding, have rank min(T, D − 1); each of a
patch's n entries is determined by them alone (`rgap.tokens`). Networks with branches or pooling: the attack enters at a
layer whose own gradient gives its input and δz, walks down as long as the gradient equations of the layers that read a
tensor have full rank, and inverts as a whole what lies below (`rgap.residual`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rgap.equations.gradient import blocks
from rgap.equations.tap_splits import tap_splits
from rgap.network.chain import chain_of_steps, prepare
from rgap.network.nodes import Graph, Node
from rgap.network.steps import Step
from rgap.residual.cut import Cut, enter_graph, geometry
from rgap.residual.reconstruct import CONVERGED_KNOWN
from rgap.results import LayerRank, UnsupportedLayerError
from rgap.tokens.embedding import recognise

BYPASSED = "inside the transformer, which plays no part in it"  # note on the steps that the tokens' gradients bypass
ACTIVE_SHARE = 0.5  # share of a rectified map whose values are known: those of units that are on


def patch_ranks(model: nn.Module, image_shape: tuple[int, ...], batch_size: int) -> list[LayerRank]:
    """The rank of a transformer's patches by law, preceded, where they lack equations, by what may add some.

    Nothing where the gradients do not determine those of single tokens: for a batch they share the sum over its images.
    """
    if batch_size != 1 or len(image_shape) != 3 or not _may_attend(model):
        return []
    try:
        found = None if _is_chain(model, tuple(image_shape)) else recognise(model, tuple(image_shape))
    except ValueError:  # UnsupportedLayerError among them
        found = None
    if found is None:
        return []
    tokens, width = found.position_entries.shape
    entries, rank = found.pixels.shape[1], min(tokens, width - 1)
    patches = LayerRank(
        found.name, "convolution" if model.get_parameter(found.weight_name).ndim > 2 else "linear",
        unknowns=tokens * entries, weight_rows=0, gradient_rows=width * entries, ra_index=(tokens - width) * entries,
        deficit=(tokens - rank) * entries, virtual_constraints=0, law_weights=0, law_gradients=rank * entries,
        law_rank=rank * entries,
        note=f"{tokens} patches of width {width}, by the gradient of {found.position_name!r}, that of every token",
    )  # fmt: skip
    if not patches.deficit:
        return [patches]
    note = "attention and layer norms add equations that no rank counts"
    return [LayerRank(found.position_name, "not analysed", 0, 0, note=note), patches]


def _is_chain(model: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Whether the attack walks a network layer by layer, as it does one of convolutions with an added parameter."""
    try:
        prepare(model, image_shape)
    except UnsupportedLayerError:
        return False
    return True


def _may_attend(model: nn.Module) -> bool:
    """Whether a network has a parameter that is no layer's weight or bias, as a position embedding is."""
    return isinstance(model, nn.Module) and any(
        isinstance(module, nn.Embedding) or set(dict(module.named_parameters(recurse=False))) - {"weight", "bias"}
        for module in model.modules()
    )


@dataclass(frozen=True)
class BlindWalk:
    """How far down an attack gets from a blind layer."""

    entry: str  # path of the blind layer
    solved: tuple[str, ...]  # paths of the layers whose input gradient equations determine, from the entry down
    frontier: str  # paths of the layers that read the tensor at which they lack rank, or max pooling; "" at the image
    rank: int | None  # rank of the gradient equations there; None at the image or at max pooling
    unknowns: int  # entries of that tensor
    known: float  # numbers that are known for every pixel value of the image, for the inversion of what lies below

    @property
    def leaks(self) -> bool:
        """Whether the walk reaches the image, or as much is known below it as the inversion needs."""
        return not self.frontier or self.known >= CONVERGED_KNOWN

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        entered = f"{self.entry!r} is blind: its own gradient gives its input"
        if not self.frontier:
            return f"leaks: {entered}, and equations of full rank lead from there to the image"
        where = f"{entered}; below the input of {self.frontier!r} {self.known:.0f} numbers are known a pixel value"
        if self.leaks:
            return f"leaks: {where}"
        return f"unknown: {where}, fewer than the {CONVERGED_KNOWN:.0f} with which the inversion has converged"


def blind_layers(graph: Graph) -> dict[str, bool]:
    """Path of each convolution of one group -> whether its own gradient gives its input and δz with their scale."""
    return {
        node.path: node.total is not None and bool(tap_splits(*node.layer.weight.shape[:2], geometry(node)))
        for node in graph.nodes.values()
        if node.has_weight and node.layer.groups == 1 and node.layer.before is None and not node.layer.is_dense
    }


def walk_by_law(graph: Graph, traced: Sequence[Step]) -> BlindWalk | None:
    """The walk from the blind layer at which an attack would enter; None without one, and for chains of layers.

    Chains are entered at the head, unless they average a whole map away.
    """
    try:
        if not chain_of_steps(graph.model, graph.image_shape, traced).averages_away:
            return None
    except (UnsupportedLayerError, ValueError):
        pass
    try:
        network = enter_graph(graph)
    except (UnsupportedLayerError, ValueError):
        return None
    return _walk(network.graph, network.cuts[0])


def _walk(graph: Graph, cut: Cut) -> BlindWalk:
    entry, solved = graph.nodes[cut.layer].path, []
    for name in reversed(graph.below([cut.top])):
        node = graph.nodes[name]
        readers = [graph.nodes[reader] for reader in graph.consumers[name] if graph.nodes[reader].has_weight]
        unknowns = math.prod(node.shape)
        if readers and name != graph.nodes[cut.layer].sources[0]:
            rank, paths = _rank(readers, unknowns), " + ".join(reader.path for reader in readers)
            if rank < unknowns:
                return BlindWalk(entry, tuple(solved), paths, rank, unknowns, _known(graph, readers, unknowns))
            solved.append(paths)
        if node.kind == "max pooling":
            return BlindWalk(entry, tuple(solved), node.path, None, unknowns, unknowns / math.prod(graph.image_shape))
    return BlindWalk(entry, tuple(solved), "", None, 0, 1.0)


def _rank(readers: list[Node], unknowns: int) -> int:
    """Rank of the layers' gradient equations together: for each residue of the stride, filters times taps."""
    pixels: dict[tuple[int, ...], int] = {}
    for node in readers:
        if node.layer.groups > 1:
            return 0
        for block in blocks(node.layer):
            places = tuple(block.pixels.tolist())
            pixels[places] = pixels.get(places, 0) + node.layer.weight.shape[0] * len(block.taps)
    channels = readers[0].layer.input_shape[0]
    return min(unknowns, channels * sum(min(rows, len(places)) for places, rows in pixels.items()))


def _known(graph: Graph, readers: list[Node], unknowns: int) -> float:
    """Numbers a pixel value: what is known of the layers' outputs, and their gradient equations."""
    total = 0.0
    for node in readers:
        above = graph.consumers[node.name]
        if len(above) == 1 and graph.nodes[above[0]].kind == "addition":
            above = graph.consumers[above[0]]
        rectified = any(graph.nodes[n].kind == "activation" and not graph.nodes[n].activation.one_to_one for n in above)
        total += math.prod(node.shape) * (ACTIVE_SHARE if rectified else 1.0)
        total += min(node.layer.weight.numel(), unknowns)
    return total / math.prod(graph.image_shape)
