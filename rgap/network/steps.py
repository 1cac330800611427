"""One operation of a traced network, with its shapes, its kind, and the reason where it cannot be inverted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgap.network.operations import CASTS, ORDERS, RESHAPES, kind_of_function

RANDOM = {"rand", "randn", "rand_like", "randn_like", "randint", "randperm", "bernoulli", "normal", "multinomial"}
RANDOM |= {"bernoulli_", "normal_", "uniform_", "poisson", "rrelu", "alpha_dropout", "feature_dropout"}
"""Names of functions that draw random numbers."""


@dataclass(frozen=True)
class Step:
    """One operation of the traced network."""

    path: str  # path of the module in the model, or the name of the traced function
    # "input", "linear", "activation", "affine" (entry by entry), "pixels" (a linear map of pixels, the same for every
    # channel), "reshape", "order" (entries change places), "constant" (does not depend on the image) or "unsupported"
    kind: str
    module: nn.Module | None  # the module, None for a function
    sources: tuple[str, ...]  # names of the steps whose outputs it reads
    name: str  # its name, each of its own
    input_shape: tuple[int, ...]  # shape of its first input without the batch dimension
    output_shape: tuple[int, ...]  # shape of its output, of several the first, without the batch dimension
    reason: str = ""  # why it cannot be inverted; empty where it can
    operation: Any = None  # the function or the name of the method that a function step calls; None for a module
    # a function step as a function of one tensor, its other arguments as traced; None for a module, and where it reads
    # several tensors that depend on the image
    call: Callable[[Tensor], Any] | None = None
    arguments: tuple = ()  # positional arguments of a function step after the first, and its keyword arguments
    options: Mapping[str, Any] = field(default_factory=dict)
    value: Any = None  # value of a constant
    used: bool = True  # whether the network's first output rests on it

    @property
    def title(self) -> str:
        """Path and type, for messages."""
        return repr(self.path) if self.module is None else f"{self.path!r} ({type(self.module).__name__})"


def label_of(operation: Any) -> str:
    """The name of a traced function or method."""
    return operation if isinstance(operation, str) else operation.__name__


def step_kind(step: Step, result: Any) -> tuple[str, str]:
    """The kind of a recorded function, and the reason where it is not supported."""
    label = label_of(step.operation)
    if label in RANDOM:
        return "unsupported", f"{label} draws random numbers"
    if not isinstance(result, Tensor):
        return "unsupported", f"the operation {label!r} gives several tensors"
    if step.operation in CASTS and result.dtype not in (torch.float32, torch.float64):
        return "unsupported", f"it rounds to {str(result.dtype).removeprefix('torch.')}"
    same = math.prod(step.input_shape) == math.prod(step.output_shape)
    if step.operation in RESHAPES and same:
        return "reshape", ""
    if step.call is not None and same and (step.operation in ORDERS):
        order = entry_order(step)
        if order is not None:
            return ("reshape" if order.equal(torch.arange(len(order))) else "order"), ""
    return kind_of_function(step.operation, step.call, step.arguments, step.options)


def entry_order(step: Step) -> Tensor | None:
    """The entry of a step's input at each place of its output, flattened; None where it is no change of places."""
    entries = torch.arange(math.prod(step.input_shape), dtype=torch.float64)
    run = step.call or step.module
    try:
        moved = run(entries.reshape(1, *step.input_shape))
    except (IndexError, RuntimeError):  # a tensor of windows, heads or tokens, whose first dimension is no batch
        return None
    order = moved.flatten().long()
    return order if moved.shape == (1, *step.output_shape) and order.sort().values.equal(entries.long()) else None
