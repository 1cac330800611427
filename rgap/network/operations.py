"""The activation or kind of step that a module or function is for the closed form, or why it is none.

A function counts as the module of the same name: `F.leaky_relu(x, 0.2)` is `nn.LeakyReLU(0.2)`.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.network import activations
from rgap.network.activations import IDENTITY, RELU, Activation, clipped, exponential, leaky_relu

RESHAPES = {torch.flatten, "flatten", "view", "reshape", torch.reshape, "contiguous", torch.unsqueeze, "unsqueeze"}
RESHAPES |= {torch.squeeze, "squeeze", "unflatten", torch.unflatten, "expand", "clone", torch.clone, "alias"}
CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"}
SHAPED_AS = {"view_as", "reshape_as", "expand_as", *CASTS}
RESHAPES |= {"requires_grad_", *SHAPED_AS}
ORDERS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "T", "mT", "t", "flip", "roll", "rot90", "getitem"}
ORDERS |= {torch.permute, torch.transpose, torch.movedim, torch.flip, torch.roll, torch.rot90, torch.cat, torch.concat}
ORDERS |= {F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.channel_shuffle, "narrow", torch.narrow}
ORDERS |= {torch.stack}
LINEAR_FUNCTIONS = {F.linear, torch.conv1d, torch.conv2d}
PIXEL_MODULES = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample)
PIXEL_MODULES += (nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd)
PIXEL_MODULES += (nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd)
MEANS = {"mean", torch.mean}
PIXEL_FUNCTIONS = {F.pad, F.interpolate, *MEANS}
POOLING = re.compile(r"(?:adaptive_?)?(avg|max)_?pool[123]d")
SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
AFFINE_FUNCTIONS = SUMS | {operator.sub, operator.mul, operator.truediv, operator.neg, operator.isub, operator.imul}
AFFINE_FUNCTIONS |= {operator.itruediv, torch.sub, torch.mul, torch.div}
AFFINE_FUNCTIONS |= {"sub", "mul", "div", "neg", "sub_", "mul_", "div_", "truediv", "true_divide", torch.neg}
DROPOUTS = {F.dropout, F.dropout2d, torch.dropout}

# special methods by the names of the operators
OPERATORS = {"__rsub__": "sub", "__rdiv__": "truediv", "__rtruediv__": "truediv", "__getitem__": "getitem"}
OPERATORS |= {"__setitem__": "setitem", "__matmul__": "matmul", "__rpow__": "pow"}

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
SELU = exponential("selu", SELU_ALPHA, scale=SELU_SCALE)
RELU6 = clipped("relu6", 0.0, 6.0)
ACTIVATIONS: dict[type, Callable[[Any], Activation]] = {
    nn.Identity: lambda _: IDENTITY,
    nn.ReLU: lambda _: RELU,
    nn.Tanh: lambda _: activations.TANH,
    nn.Sigmoid: lambda _: activations.SIGMOID,
    nn.Softsign: lambda _: activations.SOFTSIGN,
    nn.LogSigmoid: lambda _: activations.LOG_SIGMOID,
    nn.SELU: lambda _: SELU,
    nn.ReLU6: lambda _: RELU6,
    nn.Hardtanh: lambda module: clipped("hardtanh", module.min_val, module.max_val),
    nn.LeakyReLU: lambda module: RELU if module.negative_slope == 0 else leaky_relu(module.negative_slope),
    nn.PReLU: lambda module: prelu(module.weight),
    nn.ELU: lambda module: exponential("elu", module.alpha),
    nn.CELU: lambda module: exponential("celu", module.alpha, 1 / module.alpha),
    nn.Softplus: lambda module: activations.softplus(module.beta, module.threshold),
}
MODULES: dict[Any, type[nn.Module]] = {F.leaky_relu: nn.LeakyReLU}
for _name in ["ReLU", "ReLU6", "ELU", "SELU", "CELU", "Softplus", "Softsign", "LogSigmoid", "Hardtanh"]:
    MODULES[getattr(F, _name.lower())] = getattr(nn, _name)
for _name in ["GELU", "SiLU", "Mish", "Hardswish", "Hardsigmoid"]:  # without an inverse here, but with a reason
    MODULES[getattr(F, _name.lower())] = getattr(nn, _name)
for _name, _kind in {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.items():
    MODULES |= {_name: _kind, f"{_name}_": _kind, getattr(torch, _name): _kind, getattr(F, _name): _kind}

LOST_POSITIONS = "max pooling discards the positions of the maxima"
RANDOM_DROPOUT = "dropout in training mode is random; call model.eval() first"
REASONS = {
    (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd): LOST_POSITIONS,
    nn.modules.batchnorm._BatchNorm: "in training mode it couples the images of a batch; call model.eval() first",
    (nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm): "its statistics depend on the image",
    nn.modules.dropout._DropoutNd: RANDOM_DROPOUT,
    nn.modules.padding._ConstantPadNd: "it pads with a value other than zero",
    nn.modules.conv._ConvTransposeNd: "transposed convolutions are not supported",
    nn.Conv3d: "three-dimensional convolutions are not supported",
    nn.LeakyReLU: "with a negative slope two pre-activations have one value",
    nn.PReLU: "a slope that is not positive makes it lose its negative pre-activations",
    (nn.ELU, nn.CELU): "with an alpha that is not positive it is not one-to-one",
    nn.Softplus: "with a beta that is not positive it is not increasing",
    (nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish): "it is not monotone: two pre-activations have one value",
}


def operation_of(func: Callable) -> Any:
    """The function, or the name where it is a method, operator or property of a tensor."""
    if func.__name__ == "__get__":
        return func.__self__.__name__
    is_method = getattr(Tensor, func.__name__, None) is func or "Tensor" in getattr(func, "__qualname__", "")
    return OPERATORS.get(func.__name__, func.__name__) if is_method else func


def pooling(operation: Any) -> str:
    """What a pooling module or function computes, "avg" or "max"; "" for anything else."""
    name = type(operation).__name__.lower() if isinstance(operation, nn.Module) else getattr(operation, "__name__", "")
    found = POOLING.fullmatch(name)
    return found[1] if found else ""


def from_module(module: nn.Module | None) -> Activation | None:
    """The activation that a module computes, or None if it is no elementwise map with an inverse known here."""
    build = ACTIVATIONS.get(type(module))
    try:
        return None if build is None else build(module)
    except (ValueError, ZeroDivisionError):  # a parameter with which it is not one-to-one
        return None


def prelu(weight: Tensor) -> Activation:
    """LeakyReLU with the slopes of a PReLU: one for all channels, or one each."""
    slopes = weight.detach().to("cpu", torch.float64, copy=True)
    return leaky_relu(slopes[0].item() if (slopes == slopes[0]).all() else slopes[:, None, None])


def as_module(operation: Any, arguments: tuple, options: Mapping[str, Any]) -> nn.Module | None:
    """The module that computes the same as a traced activation function, or None if there is none."""
    options = {key: value for key, value in options.items() if key != "input"}
    try:
        if operation in (F.prelu, torch.prelu):
            (weight,) = (*arguments, *options.values())
            module = nn.PReLU(weight.numel())
            module.weight = nn.Parameter(weight.detach(), requires_grad=False)
            return module
        return MODULES[operation](*arguments, **options) if operation in MODULES else None
    except (TypeError, ValueError):
        return None


def is_log_softmax(operation: Any, dim: int | None) -> bool:
    """Whether a module or function is a logarithmic softmax over the classes of (B, classes)."""
    if isinstance(operation, nn.LogSoftmax):
        dim = operation.dim
    elif operation not in (F.log_softmax, torch.log_softmax, "log_softmax"):
        return False
    return dim in (None, 1, -1)


def functional_layer(operation: Any, arguments: tuple, options: Mapping[str, Any]) -> nn.Module | None:
    """The module that computes the same as a convolution or linear function of two parameters; None for others."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {"bias": None, **dict(zip(names, arguments, strict=False)), **options}
    weight, bias = given.pop("weight"), given.pop("bias")
    del given["input"]
    if not (isinstance(weight, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))):
        return None
    if operation is F.linear:
        module = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    else:
        kind, groups = nn.Conv1d if weight.ndim == 3 else nn.Conv2d, given.get("groups", 1)
        sizes = weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:])
        module = kind(*sizes, bias=bias is not None, device="meta", **given)
    module.weight, module.bias = weight, bias
    return module


def kind_of_module(module: nn.Module) -> tuple[str, str]:
    """The kind of a module, and the reason where it is not supported."""
    if isinstance(module, nn.Linear):
        return "linear", ""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        pointwise = module.groups == module.in_channels == module.out_channels and set(module.kernel_size) == {1}
        plain = set(module.stride) == {1} and module.padding in ("same", "valid", 0, (0,), (0, 0))
        return "affine" if pointwise and plain else "linear", ""
    if isinstance(module, nn.Flatten | nn.Unflatten) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    ):
        return "reshape", ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.training:
        if module.running_mean is not None:
            return "affine", ""
        return "unsupported", "it keeps no running statistics, so that it couples the images of a batch"
    if isinstance(module, PIXEL_MODULES) and not getattr(module, "value", 0):
        return "pixels", ""
    if from_module(module) is not None:
        return "activation", ""
    reasons = (reason for kinds, reason in REASONS.items() if isinstance(module, kinds))
    return "unsupported", next(reasons, f"{type(module).__name__} has no closed-form inverse here")


def kind_of_function(operation: Any, call: Callable | None, arguments: tuple, options: Mapping) -> tuple[str, str]:
    """The kind of a traced function of one tensor, and the reason where it is not supported."""
    label = operation if isinstance(operation, str) else operation.__name__
    if pooling(operation) == "max":
        return "unsupported", LOST_POSITIONS
    if operation in DROPOUTS:
        given = inspect.signature(F.dropout).bind(None, *arguments, **options)
        given.apply_defaults()
        active = options.get("train", given.arguments["training"])
        return ("unsupported", RANDOM_DROPOUT) if active else ("reshape", "")
    if operation in (F.prelu, torch.prelu) or operation in MODULES:
        if (module := as_module(operation, arguments, options)) is not None:
            return kind_of_module(module)
        return "unsupported", f"the operation {label!r} has no closed-form inverse with these arguments"
    if call is not None and (pooling(operation) or operation in PIXEL_FUNCTIONS):
        return "pixels", ""
    if call is not None and operation in AFFINE_FUNCTIONS:
        return "affine", ""
    if operation in LINEAR_FUNCTIONS:
        return "unsupported", f"the weight of {label!r} is computed; it must be a parameter"
    return "unsupported", f"the operation {label!r} has no closed-form inverse here"
