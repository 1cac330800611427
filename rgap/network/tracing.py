"""Every operation of a network with its shapes, its kind, and the reason where it cannot be inverted."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rgap.arguments import check_image_shape
from rgap.isolation import TRACING
from rgap.network.operations import RESHAPES, kind_of_function, kind_of_module
from rgap.results import UnsupportedLayerError


@dataclass(frozen=True)
class Step:
    """One operation of the traced network.

    Attributes:
        path: Path of the module in the model, or the name of the traced function.
        kind: "input", "linear", "activation", "affine" (entry by entry), "pixels" (a linear map of pixels, the same for
            every channel), "reshape", "constant" (does not depend on the image) or "unsupported".
        module: The module, None for a function.
        sources: Names of the steps whose outputs it reads.
        name: Its name in the graph.
        input_shape: Shape of its first input without the batch dimension; () where that is no tensor.
        output_shape: Shape of its output without the batch dimension; () where that is no tensor.
        reason: Why it cannot be inverted; empty where it can.
        operation: The function or the name of the method that a function step calls; None for a module.
        call: A function step as a function of one tensor, its other arguments as traced; None for a module, and where
            it reads several tensors that depend on the image.
        arguments, options: Positional arguments of a function step after the first, and its keyword arguments.
        value: Value of a constant.
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
    arguments: tuple = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None

    @property
    def title(self) -> str:
        """Path and type, for messages."""
        return repr(self.path) if self.module is None else f"{self.path!r} ({type(self.module).__name__})"


def trace(model: nn.Module, image_shape: tuple[int, ...]) -> list[Step]:
    """Lists every operation of a network with its shapes, from one run on zeros, in the order of execution.

    Args:
        model: Any module that `torch.fx` can trace.
        image_shape: Shape of one image without the batch dimension, e.g. (C, H, W), (C, L) or (n,).

    Raises:
        UnsupportedLayerError: If the module cannot be traced.
        ValueError: If the image shape does not fit; the message names the layer at which it fails.
    """
    shape = check_image_shape(image_shape)
    root = model if list(model.children()) else nn.Sequential(model)
    try:
        with TRACING:
            graph = _Tracer().trace(root)
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(model).__name__} cannot be traced by torch.fx ({error}); its forward must not branch on data"
        ) from error
    # The copy shares the parameters and owns its buffers, so that running it in eval mode changes nothing.
    run = _Run(fx.GraphModule(copy.deepcopy(root, {id(p): p for p in root.parameters()}).eval(), graph))
    run.on_image(shape)
    modules = dict(root.named_modules())
    return [_step(node, modules, run) for node in graph.nodes if node.op != "output"]


class _Tracer(fx.Tracer):
    """A tracer that leaves other threads alone: meanwhile every forward pass of the program comes by here."""

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.thread = threading.get_ident()
        return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Run(fx.Interpreter):
    """Runs the graph once on zeros; keeps every output's shape, and the values that do not depend on the image."""

    def on_image(self, shape: tuple[int, ...]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.constants: dict[str, Any] = {}
        parameter = next(self.module.parameters(), torch.zeros(()))
        image = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
                self.run(image)
        except Exception as error:
            place = f"{'layer' if self.node.op == 'call_module' else 'operation'} {str(self.node.target)!r}"
            reason = str(error).splitlines()[0]
            raise ValueError(f"image_shape {shape} does not fit the network at {place}: {reason}") from error

    def run_node(self, node: fx.Node) -> Any:
        self.node = node
        result = super().run_node(node)
        if isinstance(result, Tensor) and node.op != "output":
            self.shapes[node.name] = tuple(result.shape[1:])
        if node.op not in ("placeholder", "output") and all(n.name in self.constants for n in node.all_input_nodes):
            self.constants[node.name] = result
        return result


def _step(node: fx.Node, modules: dict[str, nn.Module], run: _Run) -> Step:
    module = modules[node.target] if node.op == "call_module" else None
    path = str(node.target) if node.op == "call_module" else node.name
    sources = tuple(source.name for source in node.all_input_nodes if source.name in run.shapes)
    input_shape = run.shapes[sources[0]] if sources else ()
    output_shape = run.shapes.get(node.name, ())
    is_function = node.op in ("call_function", "call_method")
    call = _call(node, run.constants) if is_function else None
    arguments, options = _filled(node, run.constants) if is_function else ((), {})
    kind, reason = "unsupported", ""
    if node.op == "placeholder":
        kind = "input"
    elif node.name in run.constants:
        kind = "constant"
    elif module is not None:
        kind, reason = kind_of_module(module)
    elif node.name not in run.shapes or (node.target in RESHAPES and math.prod(input_shape) == math.prod(output_shape)):
        kind = "reshape"
    else:
        kind, reason = kind_of_function(node.target, call, arguments[1:], options)
    operation, value = node.target if is_function else None, run.constants.get(node.name)
    what = (path, kind, module, sources, node.name, input_shape, output_shape, reason, operation, call)
    return Step(*what, arguments[1:], options, value)


def _filled(node: fx.Node, constants: dict[str, Any], x: Tensor | None = None) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a function step, constants by their values and what depends on the image by x."""
    arguments, options = fx.map_arg((node.args, node.kwargs), lambda source: constants.get(source.name, x))
    return arguments, dict(options)


def _call(node: fx.Node, constants: dict[str, Any]) -> Callable[[Tensor], Any] | None:
    """A function step as a function of the tensor that depends on the image."""
    if len([source for source in node.all_input_nodes if source.name not in constants]) != 1:
        return None

    def call(x: Tensor) -> Any:
        arguments, options = _filled(node, constants, x)
        if node.op == "call_method":
            return getattr(arguments[0], node.target)(*arguments[1:], **options)
        return node.target(*arguments, **options)

    return call
