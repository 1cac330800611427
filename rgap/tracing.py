"""Every operation of a network, with its shapes, and what cannot be inverted marked as such."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgap.activations import from_module
from rgap.results import UnsupportedLayerError

RESHAPES = {torch.flatten, "flatten", "view", "reshape", torch.reshape, "contiguous"}
REASONS = {
    nn.modules.pooling._MaxPoolNd: "max pooling forgets where each maximum stood",
    nn.ReLU: "ReLU forgets its negative pre-activations",
    nn.modules.batchnorm._BatchNorm: "batch normalisation is not part of the closed form yet",
    nn.modules.pooling._AvgPoolNd: "average pooling is not part of the closed form yet",
    nn.modules.dropout._DropoutNd: "dropout in training mode is random; call model.eval() first",
}


@dataclass(frozen=True)
class Step:
    """One operation of the traced network.

    Attributes:
        path: Path of the module in the model, or the name of the traced function.
        kind: "input", "linear", "activation", "reshape" or "unsupported".
        module: The module, None for a function.
        sources: Names of the steps that it reads.
        name: Its own name in the graph.
        input_shape: Shape of its first input without the batch dimension; () where that is no tensor.
        output_shape: Shape of its output without the batch dimension; () where that is no tensor.
        reason: Why it cannot be inverted; empty where it can.
        operation: What a function step calls, a function or a method's name; None for a module.
        call: A function step on another tensor, its other arguments as traced; None for a module, and where it reads
            several tensors.
    """

    path: str
    kind: str
    module: nn.Module | None
    sources: tuple[str, ...]
    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    reason: str = ""
    operation: Any = None
    call: Callable[[Tensor], Any] | None = None

    @property
    def title(self) -> str:
        """Path and type, for messages."""
        return repr(self.path) if self.module is None else f"{self.path!r} ({type(self.module).__name__})"


def trace(model: nn.Module, image_shape: tuple[int, ...], any_shape: bool = False) -> list[Step]:
    """Lists every operation of a network with its shapes; runs nothing on real data.

    Args:
        model: Any module that `torch.fx` can trace.
        image_shape: (C, H, W) of one image.
        any_shape: Whether other shapes are taken too, e.g. (C, L) or (n,).

    Returns:
        The steps in the order of execution.

    Raises:
        UnsupportedLayerError: If the module cannot be traced.
        ValueError: If the image shape does not fit; the message names the layer at which it fails.
    """
    shape = _checked_shape(image_shape, any_shape)
    tracer = fx.Tracer()
    root = model if list(model.children()) else nn.Sequential(model)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); its forward must not branch on data"
        ) from error
    shapes = _Shapes(fx.GraphModule(_eval_copy(root), graph)).shapes_for(shape)
    modules = dict(root.named_modules())
    return [_step(node, modules, shapes) for node in graph.nodes if node.op != "output"]


class _Shapes(fx.Interpreter):
    """Runs the graph once on an image of zeros and keeps every output's shape."""

    def shapes_for(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        self.shapes: dict[str, tuple[int, ...]] = {}
        parameter = next(self.module.parameters(), torch.zeros(()))
        image = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad():
                self.run(image)
        except Exception as error:
            place = f"{'layer' if self.node.op == 'call_module' else 'operation'} {str(self.node.target)!r}"
            reason = str(error).splitlines()[0]
            raise ValueError(f"image_shape {shape} does not fit the network at {place}: {reason}") from error
        return self.shapes

    def run_node(self, node: fx.Node) -> Any:
        self.node = node
        result = super().run_node(node)
        if isinstance(result, Tensor) and node.op != "output":
            self.shapes[node.name] = tuple(result.shape[1:])
        return result


def _eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares the parameters and owns its buffers, so that running it changes nothing."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()


def _checked_shape(image_shape: tuple[int, ...], any_shape: bool) -> tuple[int, ...]:
    shape = tuple(image_shape) if isinstance(image_shape, Sequence) else ()
    if not shape or (len(shape) != 3 and not any_shape) or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"image_shape is {image_shape}; it must be (channels, height, width), each at least 1")
    return shape


def _step(node: fx.Node, modules: dict[str, nn.Module], shapes: dict[str, tuple[int, ...]]) -> Step:
    module = modules[node.target] if node.op == "call_module" else None
    path = str(node.target) if node.op == "call_module" else node.name
    sources = tuple(source.name for source in node.all_input_nodes if source.name in shapes)
    input_shape = shapes[sources[0]] if sources else ()
    output_shape = shapes.get(node.name, ())
    kind, reason = "unsupported", ""
    if node.op == "placeholder":
        kind = "input"
    elif module is not None:
        kind, reason = _kind(module)
    elif node.name not in shapes or (node.target in RESHAPES and math.prod(input_shape) == math.prod(output_shape)):
        kind = "reshape"
    else:
        reason = f"the operation {node.target!r} is not a module that the closed form knows"
    operation = node.target if node.op in ("call_function", "call_method") else None
    return Step(path, kind, module, sources, node.name, input_shape, output_shape, reason, operation, _call(node))


def _call(node: fx.Node) -> Callable[[Tensor], Any] | None:
    """A function step as a function of its tensor alone."""
    if node.op not in ("call_function", "call_method") or node.all_input_nodes != list(node.args[:1]):
        return None
    rest, options = node.args[1:], node.kwargs
    if node.op == "call_method":
        return lambda x: getattr(x, node.target)(*rest, **options)
    return lambda x: node.target(x, *rest, **options)


def _kind(module: nn.Module) -> tuple[str, str]:
    """The kind of a module, and the reason where it is not supported."""
    if isinstance(module, nn.Linear):
        return "linear", ""
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            return "unsupported", f"padding mode {module.padding_mode!r}; only zero padding is known"
        return "linear", ""
    if isinstance(module, nn.Flatten) or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
        return "reshape", ""
    if from_module(module) is not None:
        return "activation", ""
    for kind, reason in REASONS.items():
        if isinstance(module, kind):
            return "unsupported", reason
    return "unsupported", f"{type(module).__name__} has no closed-form inverse here"
