"""A module's forward pass as users bring it: wrappers taken off, one tensor of its outputs, any precision.

Wrappers (`DataParallel`, `DistributedDataParallel`, `torch.compile`) compute what the module inside them computes, with
its parameters in its order.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

WRAPPED_AS = {nn.DataParallel: "module", nn.parallel.DistributedDataParallel: "module"}
"""Wrapper -> the attribute that holds its module; that of `torch.compile` is found by its attribute."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside all wrappers; the module itself where there is none."""
    while True:
        inner = next((getattr(model, name) for kind, name in WRAPPED_AS.items() if isinstance(model, kind)), None)
        inner = vars(model).get("_modules", {}).get("_orig_mod") if inner is None else inner
        if inner is None:
            break
        model = inner
    if getattr(model, "_compiled_call_impl", None) is not None:  # model.compile(), in place
        model = copy.copy(model)
        model._compiled_call_impl = None
    return model


def select_output(model: nn.Module, output: str | int | None) -> nn.Module:
    """The module with one of its outputs, by name or place, as its only one; it shares all parameters and buffers."""
    model = unwrap(model)
    if output is None:
        return model
    selected = copy.copy(model)
    selected._forward_hooks = copy.copy(model._forward_hooks)
    selected.register_forward_hook(lambda _, __, outputs: _selected(outputs, output))
    return selected


def _selected(outputs, output: str | int) -> Tensor:
    if isinstance(output, int):
        found = (
            outputs[output] if isinstance(outputs, tuple | list) and -len(outputs) <= output < len(outputs) else None
        )
    else:
        found = outputs.get(output) if isinstance(outputs, Mapping) else getattr(outputs, output, None)
    if not isinstance(found, Tensor):
        has = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(f"the network has no output {output!r} that is a tensor; its outputs: {has}")
    return found


def first_tensor(outputs) -> Tensor | None:
    """The first tensor of a network's outputs: a tensor, or a tuple, mapping or record of outputs; None without any."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    elif dataclasses.is_dataclass(outputs):
        outputs = [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    elif not isinstance(outputs, tuple | list):
        outputs = ()
    return next((found for found in map(first_tensor, outputs) if found is not None), None)


def outputs_of(model: nn.Module, values: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """The network's first output (B, …) with these parameters and buffers, by the model's own names, in their dtype."""
    own, given = (next(iter(v), images).dtype for v in (model.parameters(), values.values()))
    inner = unwrap(model)
    if inner is not model:  # both list their parameters and buffers in the same order
        named = zip(_names(model), _names(inner), strict=True)
        renamed = {theirs: values[name] for name, theirs in named if name in values}
        model, values = inner, renamed
    with _CastsTo(given) if own != given else nullcontext():
        found = first_tensor(torch.func.functional_call(model, values, images))
    if found is None:
        raise ValueError(f"{type(model).__name__} gives no tensor")
    return found


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()] + [name for name, _ in model.named_buffers()]


class _CastsTo(TorchFunctionMode):
    """Casts to a floating-point format in `forward` (`x.float()`, `x.to(torch.float32)`) go to another one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs the function, a cast with the other format."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("float", "double", "half", "bfloat16") and len(args) == 1:
            return args[0].to(self.dtype)
        if name in ("to", "type"):
            args = (args[0], *(self.dtype if isinstance(a, torch.dtype) and a in FLOATS else a for a in args[1:]))
            kwargs = {k: self.dtype if isinstance(v, torch.dtype) and v in FLOATS else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
