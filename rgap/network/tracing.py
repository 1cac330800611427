"""Every operation of a network with its shapes, its kind, and the reason where it cannot be inverted.

The network runs once, as it is, on an image of zeros, and what it calls is recorded (a mode of this thread alone; no
class is patched). So shapes are numbers, and whatever Python does with them works; what may not happen is a decision on
the values of the image, which another image might decide otherwise.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import linecache
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from rgap.arguments import check_image_shape
from rgap.network.forward import first_tensor, unwrap
from rgap.network.operations import LINEAR_FUNCTIONS, SHAPED_AS, functional_layer, kind_of_module, operation_of
from rgap.network.steps import RANDOM, Step, label_of, step_kind
from rgap.results import UnsupportedLayerError

METADATA = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "type"}
METADATA |= {"is_complex", "__len__", "element_size", "storage_offset", "get_device", "is_same_size", "data_ptr"}
"""Names of functions that describe a tensor, but do not read its values."""

OWN_CODE = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def trace(model: nn.Module, image_shape: tuple[int, ...]) -> list[Step]:
    """Lists every operation of a network with its shapes, from one run on zeros, in the order of execution.

    The model gives a tensor, or a tuple, mapping or record of which the first tensor is taken; the shape is that of one
    image without the batch dimension, e.g. (C, H, W), (C, L) or (n,). Raises an UnsupportedLayerError if `forward`
    needs more than the image, decides on values of the image, or hides what it computes, and a ValueError if the shape
    does not fit; the message has the layer or the line.
    """
    shape = check_image_shape(image_shape)
    model = unwrap(model)
    wanted = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    if missing := [p.name for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]:
        raise UnsupportedLayerError(f"the forward of {type(model).__name__} needs more than the image: {missing}")
    root = model if list(model.children()) else nn.Sequential(model)
    recorder = _Recorder(root)
    image = recorder.image(shape, wanted[0].name if wanted and root is model else "input")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), recorder:  # dropout draws from the global generator
            output = first_tensor(recorder.root(image))
    except _BranchError as error:
        raise UnsupportedLayerError(
            f"{type(model).__name__} decides on values of the image{_users_line(error)}: its forward must not branch "
            "on data, nor read single values"
        ) from error
    except Exception as error:
        place = f" at {recorder.place}" if recorder.place else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        line = _users_line(error)
        raise ValueError(f"image_shape {shape} does not fit the network{place}: {reason}{line}") from error
    if output is None:
        raise UnsupportedLayerError(f"{type(model).__name__} gives no tensor")
    if id(output) not in recorder.names:
        hides = "hides what it computes: its output comes from no operation seen"
        raise UnsupportedLayerError(f"{type(model).__name__} {hides}")
    return recorder.finished(recorder.names[id(output)])


class _BranchError(Exception):
    """The values of the image were asked for."""


def _users_line(error: BaseException) -> str:
    """The last line of an error's way that is neither torch's nor this library's, in parentheses."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(OWN_CODE)]
    if not frames or not linecache.getline(frames[-1].filename, frames[-1].lineno):
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})"


class _Recorder(TorchFunctionMode):
    """Records the calls of a copy of the network, which shares its parameters and owns its buffers.

    Modules of torch are single steps, and in eval mode; others keep theirs, which their functions may read. `names` has
    the name of the step that made a tensor by its id, `place` what is being run, for messages.
    """

    def __init__(self, root: nn.Module):
        """Copies the network and marks the modules that are single steps."""
        super().__init__()
        memo: dict[int, Any] = {id(p): p for p in root.parameters()}
        for module in root.modules():  # the weight under a weight norm, which cannot be copied
            memo |= {id(t): t.detach() for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf}
        self.root = copy.deepcopy(root, memo)
        self.originals = dict(zip(map(id, self.root.modules()), root.named_modules(), strict=True))
        self.attributes = {id(t): name for name, t in (*self.root.named_parameters(), *self.root.named_buffers())}
        for module in [*self.root.modules()]:
            unwrapped = {name: unwrap(child) for name, child in module._modules.items() if child is not None}
            module._modules.update(unwrapped)
        for module in self.root.modules():
            of_torch = type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
            if of_torch and not isinstance(module, nn.Sequential):
                module.eval()
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave, with_kwargs=True)
        self.steps: list[Step] = []
        self.names: dict[int, str] = {}
        self.constants: set[str] = set()
        self.taken: set[str] = set()
        self.inside: nn.Module | None = None
        self.place = ""

    def image(self, shape: tuple[int, ...], name: str) -> Tensor:
        """An image of zeros as the first step."""
        parameter = next(self.root.parameters(), torch.zeros(()))
        image, name = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device), self._name(name)
        self._add(Step(name, "input", None, (), name, (), shape), image)
        return image

    def finished(self, output: str) -> list[Step]:
        """All steps, modules with their kinds, and marked by whether the output rests on them."""
        sources, used, waiting = {step.name: step.sources for step in self.steps}, set(), [output]
        while waiting:
            if (name := waiting.pop()) not in used:
                used.add(name)
                waiting += sources[name]
        kinds = {s.name: kind_of_module(s.module) for s in self.steps if s.module is not None and not s.kind}
        each = [(step, *kinds.get(step.name, (step.kind, step.reason))) for step in self.steps]
        return [replace(step, kind=kind, reason=reason, used=step.name in used) for step, kind, reason in each]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs a function, and records it unless it is part of a module that is a single step."""
        kwargs = kwargs or {}
        if self.inside is not None:
            return func(*args, **kwargs)
        operation = operation_of(func)
        tensors = _tensors((args, kwargs))
        reads = any(self.names.get(id(t), "") not in {"", *self.constants} for t in tensors)
        self.place = f"operation {label_of(operation)!r}"
        result = func(*args, **kwargs)
        self.place = ""
        made = args[0] if operation == "setitem" else result
        if _tensors(made):
            self._record(operation, func, args, kwargs, tensors, made)
        elif reads and not (func.__name__ == "__get__" or func.__name__ in METADATA):
            raise _BranchError
        return result

    def _enter(self, module: nn.Module, _) -> None:
        if self.inside is None:
            self.inside, self.place = module, f"layer {self.originals[id(module)][0]!r}"

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        if self.inside is not module:
            return
        self.inside, self.place = None, ""
        (path, original), tensors = self.originals[id(module)], _tensors((args, kwargs))
        sources = self._sources(tensors)
        if not all(source in self.constants for source in sources):
            name, shapes = self._name(path.replace(".", "_")), (_shape(tensors), _shape(_tensors(result)))
            self._add(Step(path, "", original, sources, name, *shapes), result)
        elif sources:
            self._constant(path.replace(".", "_"), sources, result)

    def _record(self, operation: Any, func: Callable, args, kwargs, tensors: list[Tensor], result: Any) -> None:
        label = label_of(operation)
        module = functional_layer(operation, args, kwargs) if operation in LINEAR_FUNCTIONS else None
        alone = module is not None or operation in SHAPED_AS  # the others are parameters, or give shape and format only
        sources = self._sources(tensors[:1] if alone else tensors)
        depends = {source for source in sources if source not in self.constants}
        if not depends and label not in RANDOM:
            if sources:
                self._constant(label, sources, result)
            return
        name, call = self._name(label), None
        images = [t for t in tensors if self.names.get(id(t)) in depends]
        if len(depends) == 1:
            before, place = set(map(id, images)), torch.empty(0)  # where the tensor was, which is not kept
            kept = _mapped((args, kwargs), lambda t: place if id(t) in before else t)

            def call(x: Tensor, kept=kept, place=place) -> Any:
                given, options = _mapped(kept, lambda t: x if t is place else t)
                return func(*given, **options)

        shapes = _shape(images), _shape([first_tensor(result)])
        arguments, options = _mapped((args[1:], kwargs), lambda t: None if self.names.get(id(t)) in depends else t)
        step = Step(name, "linear", module, sources, name, *shapes)
        if module is None:
            step = replace(step, operation=operation, call=call, arguments=arguments, options=options)
            kind, reason = step_kind(step, result)
            step = replace(step, kind=kind, reason=reason)
        self._add(step, result)

    def _constant(self, label: str, sources: tuple[str, ...], value: Any) -> None:
        name = self._name(label)
        self.constants.add(name)
        path, shape = label.removeprefix("@"), _shape(_tensors(value))
        self._add(Step(path, "constant", None, sources, name, (), shape, value=value), value)

    def _add(self, step: Step, made: Any) -> None:
        self.steps.append(step)
        for t in _tensors(made):  # an id is that of one object only while it lives, and large networks must be let go
            self.names[id(t)] = step.name
            weakref.finalize(t, self.names.pop, id(t), None)

    def _sources(self, tensors: list[Tensor]) -> tuple[str, ...]:
        """Names of the steps that made these tensors; a parameter or buffer is a new step wherever it is read."""
        for t in tensors:
            if path := self.attributes.get(id(t)):
                self._constant(f"@{path}", (), t)
        return tuple(dict.fromkeys(self.names[id(t)] for t in tensors if id(t) in self.names))

    def _name(self, wish: str) -> str:
        """The wish, or with the first free number behind it."""
        wish = wish.strip("_") or "call"
        numbered = (f"{wish}_{i}" for i in itertools.count(1))
        name = next(name for name in itertools.chain([wish], numbered) if name not in self.taken)
        self.taken.add(name)
        return name


def _tensors(arguments: Any) -> list[Tensor]:
    """Every tensor in nested arguments, in order."""
    found: list[Tensor] = []
    _mapped(arguments, lambda t: found.append(t))
    return found


def _mapped(arguments: Any, change: Callable[[Tensor], Any]) -> Any:
    """Nested arguments with every tensor changed."""
    return map_aggregate(arguments, lambda value: change(value) if isinstance(value, Tensor) else value)


def _shape(tensors: list[Tensor]) -> tuple[int, ...]:
    """Shape of the first without the batch dimension."""
    return tuple(tensors[0].shape[1:]) if tensors else ()
