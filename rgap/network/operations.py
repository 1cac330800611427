"""What modules and functions are to the closed form: which activation, which kind of step, or why none.

A function counts as the module of the same name: `F.leaky_relu(x, 0.2)` is `nn.LeakyReLU(0.2)`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.network.activations import (
    IDENTITY,
    LOG_SIGMOID,
    RELU,
    SIGMOID,
    SOFTSIGN,
    TANH,
    Activation,
    clipped,
    exponential,
    leaky_relu,
    softplus,
)

RESHAPES = {torch.flatten, "flatten", "view", "reshape", torch.reshape, "contiguous", torch.unsqueeze, "unsqueeze"}
RESHAPES |= {torch.squeeze, "squeeze", "unflatten", torch.unflatten}
RESHAPING = (nn.Flatten, nn.Unflatten)
PIXEL_MODULES = (
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.Upsample,
)
PIXEL_FUNCTIONS = {F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.pad, F.interpolate}
PIXEL_FUNCTIONS |= {"mean", torch.mean}
AFFINE_FUNCTIONS = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.iadd}
AFFINE_FUNCTIONS |= {operator.isub, operator.imul, operator.itruediv, torch.add, torch.sub, torch.mul, torch.div}
AFFINE_FUNCTIONS |= {"add", "sub", "mul", "div", "neg", "add_", "sub_", "mul_", "div_"}

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
CONSTANTS: dict[type, Activation] = {
    nn.Identity: IDENTITY,
    nn.ReLU: RELU,
    nn.Tanh: TANH,
    nn.Sigmoid: SIGMOID,
    nn.Softsign: SOFTSIGN,
    nn.LogSigmoid: LOG_SIGMOID,
    nn.SELU: exponential("selu", SELU_ALPHA, scale=SELU_SCALE),
    nn.ReLU6: clipped("relu6", 0.0, 6.0),
}
MODULES: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    F.relu6: nn.ReLU6,
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.selu: nn.SELU,
    F.celu: nn.CELU,
    F.softplus: nn.Softplus,
    F.softsign: nn.Softsign,
    F.logsigmoid: nn.LogSigmoid,
    F.hardtanh: nn.Hardtanh,
}
for _name, _kind in {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}.items():
    MODULES |= {_name: _kind, f"{_name}_": _kind, getattr(torch, _name): _kind, getattr(F, _name): _kind}

COUPLES = "in training mode batch normalisation couples the images of a batch; call model.eval() first"
REASONS = {
    nn.modules.pooling._MaxPoolNd: "max pooling forgets where each maximum stood",
    nn.modules.pooling._AdaptiveMaxPoolNd: "max pooling forgets where each maximum stood",
    nn.modules.batchnorm._BatchNorm: COUPLES,
    nn.modules.instancenorm._InstanceNorm: "its statistics depend on the image",
    nn.LayerNorm: "its statistics depend on the image",
    nn.GroupNorm: "its statistics depend on the image",
    nn.modules.dropout._DropoutNd: "dropout in training mode is random; call model.eval() first",
    nn.modules.padding._ConstantPadNd: "it pads with a value other than zero",
    nn.modules.conv._ConvTransposeNd: "transposed convolutions are not known",
    nn.Conv3d: "convolutions in three dimensions are not known",
    nn.LeakyReLU: "a negative slope makes two pre-activations of one value",
    nn.PReLU: "a slope that is not positive makes it forget its negative pre-activations",
    nn.GELU: "it is not monotone: two pre-activations have one value",
    nn.SiLU: "it is not monotone: two pre-activations have one value",
    nn.Mish: "it is not monotone: two pre-activations have one value",
    nn.Hardswish: "it is not monotone: two pre-activations have one value",
}
MAX_POOLING = {F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d}


def from_module(module: nn.Module | None) -> Activation | None:
    """The activation that a module computes, or None where it is no elementwise map with an inverse known here."""
    try:
        if isinstance(module, nn.LeakyReLU):
            return RELU if module.negative_slope == 0 else leaky_relu(module.negative_slope)
        if isinstance(module, nn.PReLU):
            return prelu(module.weight)
        if isinstance(module, nn.ELU | nn.CELU):
            rate = 1.0 if isinstance(module, nn.ELU) else 1 / module.alpha
            return exponential(type(module).__name__.lower(), module.alpha, rate)
        if isinstance(module, nn.Softplus):
            return softplus(module.beta, module.threshold)
        if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
            return clipped("hardtanh", module.min_val, module.max_val)
    except (ValueError, ZeroDivisionError):
        return None
    return CONSTANTS.get(type(module))


def prelu(weight: Tensor) -> Activation:
    """LeakyReLU with the slopes of a PReLU: one for all, or one a channel.

    Raises:
        ValueError: If a slope is not positive.
    """
    slopes = weight.detach().to("cpu", torch.float64, copy=True)
    if (slopes == slopes[0]).all():
        return leaky_relu(slopes[0].item())
    return leaky_relu(slopes[:, None, None])


def as_module(operation: Any, arguments: tuple, options: Mapping[str, Any]) -> nn.Module | None:
    """The module that computes what a traced function computes, or None where there is none."""
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


def kind_of_module(module: nn.Module) -> tuple[str, str]:
    """The kind of a module, and the reason where it is not supported."""
    if isinstance(module, nn.Linear):
        return "linear", ""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        pointwise = module.groups == module.in_channels == module.out_channels and set(module.kernel_size) == {1}
        plain = set(module.stride) == {1} and module.padding in ("same", "valid", 0, (0,), (0, 0))
        return "affine" if pointwise and plain else "linear", ""
    if isinstance(module, RESHAPING) or (isinstance(module, nn.modules.dropout._DropoutNd) and not module.training):
        return "reshape", ""
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.training:
        known = module.running_mean is not None
        return ("affine", "") if known else ("unsupported", "it keeps no running statistics, and couples a batch")
    if isinstance(module, PIXEL_MODULES) and not getattr(module, "value", 0):
        return "pixels", ""
    if from_module(module) is not None:
        return "activation", ""
    for kind, reason in REASONS.items():
        if isinstance(module, kind):
            return "unsupported", reason
    return "unsupported", f"{type(module).__name__} has no closed-form inverse here"


def kind_of_function(operation: Any, call: Callable | None, arguments: tuple, options: Mapping) -> tuple[str, str]:
    """The kind of a traced function of one tensor, and the reason where it is not supported."""
    if operation in MAX_POOLING:
        return "unsupported", REASONS[nn.modules.pooling._MaxPoolNd]
    if operation in (F.dropout, F.dropout2d, torch.dropout):
        given = inspect.signature(F.dropout).bind(None, *arguments, **options)
        given.apply_defaults()
        active = options.get("train", given.arguments["training"])
        return ("unsupported", REASONS[nn.modules.dropout._DropoutNd]) if active else ("reshape", "")
    if operation in (F.prelu, torch.prelu) or operation in MODULES:
        module = as_module(operation, arguments, options)
        if from_module(module) is not None:
            return "activation", ""
        return "unsupported", f"the operation {operation!r} has no closed-form inverse with these arguments"
    if call is not None and operation in PIXEL_FUNCTIONS:
        return "pixels", ""
    if call is not None and operation in AFFINE_FUNCTIONS:
        return "affine", ""
    return "unsupported", f"the operation {operation!r} is not one that the closed form knows"
