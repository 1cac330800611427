"""A network as a graph: convolutions and linear layers with what folds into them, activations, additions, pooling.

A chain is the graph without branches. What is neither (attention, normalisation by the image's own statistics) is an
opaque node with its reason: harmless above the place where an attack enters, in its way below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.network.activations import Activation
from rgap.network.layer import Layer
from rgap.network.pixel_maps import PixelMap
from rgap.results import UnsupportedLayerError


@dataclass(frozen=True, eq=False)
class Node:
    """One tensor of the network and the operation that makes it; every tensor is (C, H, W), a vector (n, 1, 1)."""

    name: str  # its name in the traced graph, the last of those that were folded into it
    # "image", "layer" (W x + b), "affine" (entry by entry), "activation", "addition", "reshape", "max pooling" or
    # "opaque"
    kind: str
    sources: tuple[str, ...]  # names of the nodes that it reads
    shape: tuple[int, int, int]  # (C, H, W) of its output
    path: str  # path of the module, or the name of the traced function
    layer: Layer | None = None  # of a layer: the convolution with batch norm and padding folded in, without activation
    # of a layer: name of the parameter whose gradient is Σ_p δz, a bias's or a batch norm's, times a factor; None where
    # there is none
    total: str | None = None
    total_factor: Tensor | None = None  # that factor of each channel, (O,), None for 1
    activation: Activation | None = None  # of an activation
    scale: Tensor | None = None  # of an affine node, shaped as its output
    shift: Tensor | None = None
    pool: tuple = ()  # of max pooling: kernel, stride, padding, dilation and ceil mode
    reason: str = ""  # why an opaque node cannot be passed

    @property
    def has_weight(self) -> bool:
        """Whether a weight's gradient belongs to the node."""
        return self.layer is not None and not self.layer.is_fixed

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """The output for its sources' values."""
        if self.kind == "layer":
            return self.layer.apply(inputs[0]) + self.layer.pre_bias()
        if self.kind == "activation":
            return self.activation.forward(inputs[0])
        if self.kind == "affine":
            return self.scale * inputs[0] + self.shift
        if self.kind == "max pooling":
            return F.max_pool2d(inputs[0][None], *self.pool)[0]
        return self.push(inputs, None)

    def slope(self, x: Tensor) -> Tensor | None:
        """What its derivative at an input depends on: σ′(x), or the places of the maxima."""
        if self.kind == "activation":
            return self.activation.derivative(x)
        if self.kind == "max pooling":
            return F.max_pool2d(x[None], *self.pool, return_indices=True)[1][0]
        return None

    def push(self, inputs: list[Tensor], slope: Tensor | None) -> Tensor:
        """Its derivative applied to changes of its sources."""
        x = inputs[0]
        if self.kind == "layer":
            return self.layer.apply(x)
        if self.kind == "activation":
            return slope * x
        if self.kind == "affine":
            return self.scale * x
        if self.kind == "max pooling":
            return x.flatten(1).gather(1, slope.flatten(1)).reshape(self.shape)
        if self.kind == "addition":
            return sum(inputs)
        if self.kind == "reshape":
            return x.reshape(self.shape)
        raise UnsupportedLayerError(f"layer {self.path!r} cannot be passed: {self.reason}")

    def pull(self, delta: Tensor, slope: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
        """The adjoint: from the gradient by its output to that by a source of that shape."""
        if self.kind == "layer":
            return self.layer.adjoint(delta)
        if self.kind == "activation":
            return slope * delta
        if self.kind == "affine":
            return self.scale * delta
        if self.kind == "max pooling":
            flat = delta.new_zeros(shape).flatten(1)
            return flat.scatter_add_(1, slope.flatten(1), delta.flatten(1)).reshape(shape)
        if self.kind in ("addition", "reshape"):
            return delta.reshape(shape)
        raise UnsupportedLayerError(f"layer {self.path!r} cannot be passed: {self.reason}")


@dataclass(frozen=True, eq=False)
class Graph:
    """A network as a graph."""

    model: nn.Module  # the module it was made from
    image_shape: tuple[int, int, int]  # (C, H, W)
    nodes: dict[str, Node]  # name -> node, in the order of execution, float64
    # parameter name -> float64 copy, in the order of `model.named_parameters()`
    parameters: dict[str, Tensor] = field(repr=False)

    @cached_property
    def image(self) -> str:
        """Name of the node that is the image."""
        return next(name for name, node in self.nodes.items() if node.kind == "image")

    @cached_property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """Name -> names of the nodes that read it, in the order of execution."""
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, node in self.nodes.items():
            for source in node.sources:
                found[source].append(name)
        return {name: tuple(readers) for name, readers in found.items()}

    def below(self, names: Iterable[str], given: Iterable[str] = ()) -> list[str]:
        """The nodes and everything they depend on, in the order of execution, down to those given."""
        wanted = set(names)
        for name in reversed(self.nodes):
            if name in wanted and name not in given:
                wanted.update(self.nodes[name].sources)
        return [name for name in self.nodes if name in wanted]

    def articulates(self, name: str) -> bool:
        """Whether everything that the image does to the output goes through this node: no branch passes it by."""
        inside = set(self.below([name]))
        return all(set(self.consumers[n]) <= inside for n in inside - {name})

    def forward(self, values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """The values of those nodes and of all that they depend on, from given values of some, such as the image."""
        found = dict(values)
        for name in self.below(names, values):
            if name not in found:
                node = self.nodes[name]
                found[name] = node.forward([found[source] for source in node.sources])
        return found

    def slopes(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """What the derivatives at these values depend on, by node."""
        return {n: self.nodes[n].slope(values[self.nodes[n].sources[0]]) for n in values if self.nodes[n].sources}

    def push(self, slopes: Mapping[str, Tensor | None], change: Tensor, names: list[str]) -> dict[str, Tensor]:
        """The change of the nodes `names` (as `below` lists them) with the image's."""
        found = {self.image: change}
        for name in names:
            node = self.nodes[name]
            if node.sources:
                found[name] = node.push([found[source] for source in node.sources], slopes[name])
        return found

    def pull(
        self, slopes: Mapping[str, Tensor | None], seeds: Mapping[str, Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """The gradient by each of the nodes `names`, where `seeds` are added."""
        found = dict(seeds)
        for name in reversed(names):
            node = self.nodes[name]
            for source in node.sources if name in found else ():
                part = node.pull(found[name], slopes.get(name), self.nodes[source].shape)
                found[source] = found[source] + part if source in found else part
        return found

    def to(self, dtype: torch.dtype) -> Graph:
        """The graph in another precision."""
        return replace(self, nodes={name: _cast(node, dtype) for name, node in self.nodes.items()})


def _cast(node: Node, dtype: torch.dtype) -> Node:
    def cast(value: Tensor | PixelMap | None):
        if isinstance(value, PixelMap):
            return PixelMap(value.rows.to(dtype), value.columns.to(dtype))
        return None if value is None else value.to(dtype)

    layer = node.layer
    if layer is not None:
        names = ("weight", "bias", "shift", "before", "after", "output_scale")
        layer = replace(layer, cache={}, **{name: cast(getattr(layer, name)) for name in names})
    return replace(node, layer=layer, scale=cast(node.scale), shift=cast(node.shift))
