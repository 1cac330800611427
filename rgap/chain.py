"""From an `nn.Module` to the chain of linear layers and activations that the recursion walks.

`prepare` turns the traced steps into a `Chain`, or refuses with the path of the first step that stands in the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.activations import IDENTITY, Activation, from_module
from rgap.results import UnsupportedLayerError
from rgap.tracing import Step, trace

__all__ = ["Chain", "Layer", "prepare", "trace"]


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer with the activation that follows it; a convolution, or a linear layer as one on a 1×1 image.

    Attributes:
        name: Path of the module in the model.
        weight: (O, C/groups, kh, kw), float64.
        bias: (O,), float64, or None.
        input_shape: (C, H, W).
        output_shape: (O, H′, W′).
        feature_shape: Shape of the input as the model has it, e.g. (n,) for a linear layer.
        stride, dilation: (vertical, horizontal).
        padding: Zeros added (left, right, top, bottom), as `F.pad` takes them.
        groups: Independent groups of channels.
        activation: The elementwise map after the layer.
        weight_name, bias_name: Names among `model.named_parameters()`.
        cache: What was computed from the model alone, kept for the next attack.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    input_shape: tuple[int, int, int]
    output_shape: tuple[int, int, int]
    feature_shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation = IDENTITY
    weight_name: str = ""
    bias_name: str | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def unknowns(self) -> int:
        """Entries of the input."""
        return math.prod(self.input_shape)

    @property
    def is_dense(self) -> bool:
        """Whether the layer is a matrix on a vector (a linear layer, or a 1×1 convolution of one pixel)."""
        return self.input_shape[1:] == self.output_shape[1:] == self.weight.shape[2:] == (1, 1) and self.groups == 1

    def apply(self, x: Tensor) -> Tensor:
        """W x without the bias: (..., C, H, W) -> (..., O, H′, W′)."""
        if self.is_dense:
            return (x.flatten(-3) @ self.weight.flatten(1).T)[..., None, None]
        batch = x.reshape(-1, *self.input_shape)
        z = F.conv2d(F.pad(batch, self.padding), self.weight, None, self.stride, 0, self.dilation, self.groups)
        return z.reshape(*x.shape[:-3], *self.output_shape)

    def adjoint(self, dz: Tensor) -> Tensor:
        """Wᵀ δz: (..., O, H′, W′) -> (..., C, H, W)."""
        if self.is_dense:
            return (dz.flatten(-3) @ self.weight.flatten(1))[..., None, None]
        left, right, top, bottom = self.padding
        channels, height, width = self.input_shape
        batch = dz.reshape(-1, *self.output_shape)
        padded = (len(batch), channels, height + top + bottom, width + left + right)
        x = torch.nn.grad.conv2d_input(padded, self.weight, batch, self.stride, 0, self.dilation, self.groups)
        return x[..., top : top + height, left : left + width].reshape(*dz.shape[:-3], *self.input_shape)

    def pre_bias(self) -> Tensor | float:
        """The bias in a shape that adds to z, or 0."""
        return 0.0 if self.bias is None else self.bias[:, None, None]

    def cached(self, key: str, build: Callable[[], Any]) -> Any:
        """`build()`, computed on first use. It may depend on the model alone, never on a gradient."""
        if key not in self.cache:
            self.cache[key] = build()
        return self.cache[key]


@dataclass(frozen=True, eq=False)
class Chain:
    """A network as a chain of layers, with what depends on the model alone kept between attacks.

    Attributes:
        model: The module it was made from.
        image_shape: (C, H, W).
        layers: From the image to the output; the last is dense.
        parameters: Parameter name -> float64 copy, in the order of `model.named_parameters()`.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    parameters: dict[str, Tensor] = field(repr=False)

    @property
    def homogeneous(self) -> bool:
        """Whether f(a x) = a f(x) for every a > 0: no biases, and homogeneous activations."""
        return all(layer.bias is None and layer.activation.homogeneous for layer in self.layers)

    def layer_inputs(self, images: Tensor) -> dict[str, Tensor]:
        """The input of every layer for given images, float64: the truth that an evaluation compares with.

        Args:
            images: (B, C, H, W).

        Returns:
            Layer name -> (B, *feature_shape), from the image to the head.
        """
        x, inputs = images.to(torch.float64), {}
        for layer in self.layers:
            x = x.reshape(len(images), *layer.input_shape)
            inputs[layer.name] = x.reshape(len(images), *layer.feature_shape)
            x = layer.activation.forward(layer.apply(x) + layer.pre_bias())
        return inputs


def prepare(model: nn.Module | Chain, image_shape: tuple[int, ...]) -> Chain:
    """Makes the chain that `rgap.reconstruct` walks; give it in place of the model to attack many gradients.

    Args:
        model: A network that is a chain of convolutions and linear layers with invertible activations between.
        image_shape: (C, H, W) of one image.

    Returns:
        A `Chain` with float64 copies of the weights. Factorisations are made on first use and kept in it.

    Raises:
        UnsupportedLayerError: If a module stands in the way; the message has its path and the reason.
        ValueError: If the image shape does not fit the network.
    """
    if isinstance(model, Chain):
        if tuple(image_shape) != model.image_shape:
            raise ValueError(f"the chain was prepared for images {model.image_shape}, not {tuple(image_shape)}")
        return model
    steps = trace(model, image_shape)
    names = {id(p): name for name, p in model.named_parameters()}
    layers: list[Layer] = []
    previous = None
    for step in steps:
        if step.kind == "unsupported":
            raise UnsupportedLayerError(f"layer {step.title} cannot be inverted: {step.reason}")
        if step.kind == "reshape" and not step.output_shape:
            continue  # a size that is read, no tensor
        if previous is not None and step.sources != (previous,):
            raise UnsupportedLayerError(
                f"layer {step.title} does not follow the one before it: branches and skip connections are not chains"
            )
        previous = step.name
        if step.kind == "linear":
            layers.append(_layer(step, names))
        elif step.kind == "activation":
            layers = _with_activation(layers, step)
    _check_parameters(layers, names)
    if not layers[-1].is_dense or layers[-1].activation is not IDENTITY:
        raise UnsupportedLayerError(
            f"the last layer {layers[-1].name!r} must be a Linear with nothing after it: "
            "the loss is taken on its output"
        )
    parameters = {name: _copy(p) for name, p in model.named_parameters()}
    return Chain(model, tuple(image_shape), tuple(layers), parameters)


def _layer(step: Step, names: dict[int, str]) -> Layer:
    module = step.module
    assert module is not None  # a step of kind "linear" always has one
    weight = _copy(module.weight)
    bias = None if module.bias is None else _copy(module.bias)
    common = {
        "name": step.path,
        "bias": bias,
        "feature_shape": step.input_shape,
        "weight_name": names[id(module.weight)],
        "bias_name": None if bias is None else names[id(module.bias)],
    }
    if isinstance(module, nn.Linear):
        if len(step.input_shape) != 1:
            raise UnsupportedLayerError(
                f"layer {step.path!r} (Linear) gets an input of shape {step.input_shape}; put a Flatten before it"
            )
        outputs, inputs = weight.shape
        return Layer(weight=weight[..., None, None], input_shape=(inputs, 1, 1), output_shape=(outputs, 1, 1), **common)
    return Layer(
        weight=weight,
        input_shape=step.input_shape,
        output_shape=step.output_shape,
        stride=module.stride,
        padding=tuple(module._reversed_padding_repeated_twice),
        dilation=module.dilation,
        groups=module.groups,
        **common,
    )


def _copy(parameter: Tensor) -> Tensor:
    """Its value as it is now: training the model on leaves a chain as it was."""
    return parameter.detach().to("cpu", torch.float64, copy=True)


def _with_activation(layers: list[Layer], step: Step) -> list[Layer]:
    """The list with the activation attached to its last layer."""
    activation = from_module(step.module)
    if activation is IDENTITY:
        return layers
    if not layers or layers[-1].activation is not IDENTITY:
        where = "before the first layer" if not layers else f"after another activation of layer {layers[-1].name!r}"
        raise UnsupportedLayerError(f"layer {step.title} stands {where}; one per linear layer is known")
    last = layers[-1]
    return [*layers[:-1], replace(last, activation=activation)]


def _check_parameters(layers: list[Layer], names: dict[int, str]) -> None:
    """Every parameter must belong to exactly one layer: else a gradient mixes several places, or none."""
    if not layers:
        raise UnsupportedLayerError("the network has no linear layer and so no gradient to attack")
    used = [name for layer in layers for name in (layer.weight_name, layer.bias_name) if name is not None]
    for name in names.values():
        if used.count(name) != 1:
            raise UnsupportedLayerError(f"parameter {name!r} is used by {used.count(name)} layers; it must be one")
