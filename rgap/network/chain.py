"""From an `nn.Module` to the chain of linear layers and activations that the recursion walks.

`prepare` turns the traced steps into a `Chain`, or refuses with the path of the first step that stands in the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rgap.network.activations import IDENTITY
from rgap.network.folding import Folder, parameter_copy, parameters_read
from rgap.network.layer import Layer
from rgap.network.tracing import Step, trace
from rgap.results import UnsupportedLayerError

__all__ = ["Chain", "Layer", "prepare", "trace"]


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
        constant = any(layer.bias is not None or layer.shift is not None for layer in self.layers)
        return not constant and all(layer.activation.homogeneous for layer in self.layers)

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
        model: A network that is a chain of convolutions and linear layers with activations between, and of what
            `rgap.network.folding` folds into these.
        image_shape: (C, H, W) of one image; (C, L) and (n,) are taken too.

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
    if isinstance(image_shape, Sequence) and len(image_shape) > 3:
        raise ValueError(f"image_shape is {image_shape}; it must be (channels, height, width) or (channels, length)")
    steps = trace(model, image_shape, any_shape=True)
    constants = {step.name for step in steps if step.kind == "constant"}
    folder, previous = Folder({id(p): name for name, p in model.named_parameters()}, []), None
    for step in steps:
        if step.kind == "constant" or (step.kind == "reshape" and not step.output_shape):
            continue  # a size that is read, no tensor
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
    _check_parameters(layers, steps, folder.names)
    last = layers[-1]
    if not last.is_dense or last.is_fixed or last.activation is not IDENTITY or last.output_scale is not None:
        raise UnsupportedLayerError(
            f"the last layer {last.name!r} must be a Linear with nothing after it: the loss is taken on its output"
        )
    parameters = {name: parameter_copy(p) for name, p in model.named_parameters()}
    return Chain(model, tuple(image_shape), tuple(layers), parameters)


def _check_parameters(layers: list[Layer], steps: list[Step], names: dict[int, str]) -> None:
    """Every weight must belong to exactly one layer, and no parameter to none: else a gradient mixes several places."""
    if all(layer.is_fixed for layer in layers):
        raise UnsupportedLayerError("the network has no linear layer and so no gradient to attack")
    uses = Counter(key for step in steps for key in parameters_read(step))
    weights = {name for layer in layers for name in (layer.weight_name, layer.bias_name) if name}
    for key, name in names.items():
        if uses[key] == 0 or (uses[key] > 1 and name in weights):
            raise UnsupportedLayerError(f"parameter {name!r} is used by {uses[key]} layers; it must be one")
