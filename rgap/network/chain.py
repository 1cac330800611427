"""From an `nn.Module` to the chain of layers that the recursion walks, or to its graph: traced operations, folded."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.arguments import check_image_shape, check_model
from rgap.isolation import isolated
from rgap.models import trained_names
from rgap.network.activations import IDENTITY
from rgap.network.folding import Folder, parameter_copy, scale_and_shift
from rgap.network.forward import select_output
from rgap.network.layer import Chain, Layer
from rgap.network.nodes import Graph, Node
from rgap.network.operations import SUMS, as_module, from_module, is_log_softmax, pooling
from rgap.network.pixel_maps import image_shape_of
from rgap.network.steps import Step
from rgap.network.tracing import trace
from rgap.results import UnsupportedLayerError

__all__ = ["Chain", "Layer", "prepare", "prepare_graph"]


@isolated()
def prepare(model: nn.Module | Chain, image_shape: tuple[int, ...], *, output: str | int | None = None) -> Chain:
    """Makes the chain that `rgap.reconstruct` walks; pass it instead of the model to attack many gradients.

    Args:
        model: A chain of convolutions and linear layers with activations between them, and with the pooling, padding
            and normalisation that `rgap.network.folding` folds into these. A `Chain` is returned as it is.
        image_shape: (C, H, W) of one image; (C, L) and (n,) are taken too.
        output: Name or place of the output that the loss is taken on, where the network gives several; the first tensor
            by default.

    Returns:
        A `Chain` with float64 copies of the weights. It keeps factorisations, which are computed on first use.

    Raises:
        UnsupportedLayerError: If the network is no such chain; the message has the first offending step and the reason.
        ValueError: If the image shape does not fit the network, or a parameter has no values.

    Example:
        >>> import rgap
        >>> chain = rgap.prepare(rgap.models.cnn6(seed=0), image_shape=(3, 32, 32))
        >>> len(chain.layers), chain.layers[0].input_shape
        (7, (3, 32, 32))
    """
    if not isinstance(model, Chain):
        check_model(model)
    image_shape = check_image_shape(image_shape)
    if isinstance(model, Chain):
        if image_shape != model.image_shape:
            raise ValueError(f"image_shape is {image_shape}; the chain was prepared for images {model.image_shape}")
        return model
    if len(image_shape) > 3:
        raise ValueError(f"image_shape is {image_shape}; it must be (channels, height, width) or (channels, length)")
    model = select_output(model, output)
    return chain_of_steps(model, image_shape, trace(model, image_shape))


def chain_of_steps(model: nn.Module, image_shape: tuple[int, ...], traced: Sequence[Step]) -> Chain:
    """The chain of a network that was traced; errors as from `prepare`."""
    steps = [step for step in traced if step.used]
    constants = {step.name for step in steps if step.kind == "constant"}
    main = [step for step in steps if step.kind != "constant"]
    end, dim = main[-1], (*main[-1].arguments, None)[0]
    log_softmax = is_log_softmax(end.module or end.operation, end.options.get("dim", dim))
    names = {id(p): name for name, p in model.named_parameters()}
    folder, previous = Folder(names, trained_names(model), []), None
    for step in main[: -1 if log_softmax else None]:
        sources = tuple(name for name in step.sources if name not in constants)
        if step.kind == "unsupported":
            raise UnsupportedLayerError(f"layer {step.title} cannot be inverted: {step.reason}")
        if previous is not None and sources != (previous,):
            raise UnsupportedLayerError(
                f"layer {step.title} does not follow the one before it: branches and skip connections are not chains"
            )
        previous = step.name
        folder.take(step)
    layers = folder.finish()
    if blind := [layer.name for layer in layers if not _reads_a_pixel(layer)]:
        raise UnsupportedLayerError(f"layer {blind[0]!r} reads only padding: its output is the same for every image")
    _check_parameters(layers, steps, folder.names)
    last = layers[-1]
    if not last.is_dense or last.is_fixed or last.output_scale is not None or folder.order is not None:
        raise UnsupportedLayerError(
            f"the last layer {last.name!r} must be a Linear, with nothing but activations between it and the loss"
        )
    parameters = {name: parameter_copy(p) for name, p in model.named_parameters()}
    return Chain(model, image_shape, tuple(layers), parameters, log_softmax)


def _reads_a_pixel(layer: Layer) -> bool:
    """Whether a convolution's kernel meets its input anywhere, and not only the zeros around."""
    if layer.is_dense or layer.before is not None:
        return True
    ones, kernel = (torch.ones(1, 1, *sides) for sides in (layer.input_shape[1:], layer.weight.shape[2:]))
    met = F.conv2d(F.pad(ones, layer.padding), kernel, stride=layer.stride, dilation=layer.dilation)
    return bool(met.any())


def _check_parameters(layers: list[Layer], steps: list[Step], names: dict[int, str]) -> None:
    """A weight must be used once: a shared one gets the sum of several gradients. Parameters without use have none."""
    if all(layer.is_fixed for layer in layers):
        raise UnsupportedLayerError("the network has no linear layer and so no gradient to attack")
    read = [step.module.parameters() if step.module is not None else [step.value] for step in steps]
    uses = Counter(id(value) for values in read for value in values)
    weights = {name for layer in layers for name in (*layer.weight_names, layer.bias_name) if name}
    for key, name in names.items():
        if uses[key] > 1 and name in weights:
            raise UnsupportedLayerError(f"parameter {name!r} is used by {uses[key]} layers; it must be one")


def prepare_graph(model: nn.Module, image_shape: tuple[int, int, int], traced: Sequence[Step] | None = None) -> Graph:
    """Makes the graph of a network in eval mode; for an analysis of `traced` steps without copies of the parameters.

    Errors are those of `trace`.
    """
    steps = [step for step in traced or trace(model, image_shape) if step.used]
    builder = _GraphBuilder(model, {s.name for s in steps if s.kind == "constant"}, steps, copies=not traced)
    for step in steps:
        if step.kind != "constant" and step.output_shape:
            builder.take(step)
    parameters = {} if traced else {name: parameter_copy(p) for name, p in model.named_parameters()}
    return Graph(model, tuple(image_shape), builder.nodes, parameters)


class _GraphBuilder:
    """Takes the traced steps of a graph one by one; `alias` has the node that holds a step's output."""

    def __init__(self, model: nn.Module, constants: set[str], steps: list[Step], copies: bool):
        """Starts without nodes."""
        names, trained = {id(p): name for name, p in model.named_parameters()}, trained_names(model)
        self.names, self.folder = names, partial(Folder, names, trained, copies=copies)
        modules = [step.module for step in steps if step.module is not None]
        self.uses = Counter(id(p) for module in modules for p in module.parameters())
        self.constants, self.nodes, self.alias = constants, {}, {}
        self.readers = Counter(source for step in steps for source in step.sources)

    def take(self, step: Step) -> None:
        """Adds the step, or folds it into the node that it reads."""
        sources = tuple(self.alias[name] for name in step.sources if name not in self.constants)
        try:
            node = self._node(step, sources)
        except (UnsupportedLayerError, ValueError) as error:
            node = self._opaque(step, sources, str(error))
        if node is not None:
            self.nodes[node.name] = node
        self.alias[step.name] = sources[0] if node is None else node.name

    def _opaque(self, step: Step, sources: tuple[str, ...], reason: str) -> Node:
        try:
            shape = image_shape_of(step.output_shape)
        except ValueError:
            shape = (1, 1, 1)
        return Node(step.name, "opaque", sources, shape, step.path, reason=reason)

    def _node(self, step: Step, sources: tuple[str, ...]) -> Node | None:
        shape = image_shape_of(step.output_shape)
        made = Node(step.name, step.kind, sources, shape, step.path)
        if step.kind == "input":
            return replace(made, kind="image")
        if step.kind == "reshape":
            return None if shape == self.nodes[sources[0]].shape else made
        if step.kind == "activation":
            found = from_module(step.module or as_module(step.operation, step.arguments, step.options))
            return None if found is IDENTITY else replace(made, activation=found)
        if step.kind == "linear":
            return self._linear(step, made)
        if step.kind == "affine":
            return self._affine(step, made)
        if step.kind == "pixels":
            layer = self.folder([])
            layer.take(step)
            return replace(made, kind="layer", layer=layer.finish()[0])
        plain = not step.arguments or (len(step.arguments) == 1 and isinstance(step.arguments[0], Tensor | None))
        if len(sources) == 2 and step.operation in SUMS and plain and not step.options:
            shapes = {self.nodes[source].shape for source in sources}
            if shapes == {shape}:
                return replace(made, kind="addition")
            return self._opaque(step, sources, f"it adds tensors of shapes {sorted(shapes)}")
        if len(sources) == 1 and pooling(step.module or step.operation) == "max":
            return self._max_pooling(step, made)
        return self._opaque(step, sources, step.reason or "it joins branches in another way than by adding them")

    def _linear(self, step: Step, made: Node) -> Node:
        folder = self.folder([])
        folder.take(step)
        layer, bias = folder.finish()[0], step.module.bias
        if any(self.uses[id(p)] > 1 for p in step.module.parameters()):
            return self._opaque(step, made.sources, "its weight serves several layers, which share one gradient")
        return replace(made, kind="layer", layer=layer, total=None if bias is None else layer.bias_name)

    def _affine(self, step: Step, made: Node) -> Node | None:
        before = self.nodes[made.sources[0]]
        alone = self.readers[step.sources[0]] == 1 and before.has_weight
        if alone:
            folder = self.folder([before.layer])
            folder.take(step)
            if (layer := folder.layers[-1]).activation is IDENTITY:
                factor = layer.output_scale
                total = before.total
                if total is not None:
                    factor = 1 / factor  # the bias stands before the scale: its gradient is Σ scale · δz
                bias = getattr(step.module, "bias", None)
                if isinstance(step.module, nn.modules.batchnorm._BatchNorm) and bias is not None:
                    total, factor = self.names[id(bias)], None
                self.nodes[before.name] = replace(before, layer=layer, total=total, total_factor=factor)
                return None
        scale, shift = scale_and_shift(step)
        shape = image_shape_of(step.input_shape)
        if lost := int((scale == 0).sum()):
            return self._opaque(step, made.sources, f"it multiplies {lost} of {scale.numel()} entries by zero")
        return replace(made, scale=scale.reshape(shape), shift=shift.reshape(shape))

    def _max_pooling(self, step: Step, made: Node) -> Node:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        if step.module is not None:
            given = {name: getattr(step.module, name, None) for name in names}
        else:
            given = dict(zip(names, step.arguments, strict=False)) | dict(step.options)
        defaults = {"stride": given.get("kernel_size"), "padding": 0, "dilation": 1, "ceil_mode": False}
        values = [defaults.get(n) if given.get(n) is None else given[n] for n in names]
        if values[0] is None or len(step.input_shape) != 3:
            return self._opaque(step, made.sources, step.reason)
        zeros = torch.zeros(1, *step.input_shape)
        if tuple(F.max_pool2d(zeros, *values).shape[1:]) != made.shape:
            return self._opaque(step, made.sources, step.reason)
        return replace(made, kind="max pooling", pool=tuple(copy.copy(values)))
