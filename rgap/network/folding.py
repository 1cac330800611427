"""Traced steps folded into layers: everything between two activations becomes one linear layer.

A convolution takes in the padding before it and the average pooling and batch normalisation right after it. Where there
is no convolution to fold into (pooling after an activation, normalisation of the image) the step becomes a fixed layer,
one without gradient. Affine maps after an activation join the activation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.network.activations import IDENTITY, Activation, affine, compose
from rgap.network.layer import Layer
from rgap.network.operations import as_module, from_module
from rgap.network.parametrised import current_weight, weight_terms
from rgap.network.pixel_maps import PixelMap, image_shape_of, pixel_map
from rgap.network.steps import Step, entry_order
from rgap.results import UnsupportedLayerError


@dataclass
class Folder:
    """Folds the steps of a chain into `layers`, one after the other.

    `names` has the name of a parameter by its id, `trained` those that a client trains; `pad` is an injective fixed
    layer that the next convolution takes in, `order` the entry of the last layer's output at each place, where entries
    have changed places since. Without `copies` the layers share the network's parameters: their shapes alone count.
    """

    names: dict[int, str]
    trained: Sequence[str]
    layers: list[Layer]
    pad: Layer | None = None
    order: Tensor | None = None
    copies: bool = True

    def take(self, step: Step) -> None:
        """Folds one more step; raises an UnsupportedLayerError with its path and the reason where it cannot."""
        if step.kind == "linear":
            self._linear(step)
        elif step.kind == "activation":
            activation = from_module(step.module or as_module(step.operation, step.arguments, step.options))
            if activation is not IDENTITY:
                self._elementwise(step, activation)
        elif step.kind == "affine":
            self._affine(step)
        elif step.kind == "pixels":
            self._refuse_order(step)
            self._pixels(step)
        elif step.kind == "order":
            order = entry_order(step)
            self.order = order if self.order is None else self.order[order]

    def finish(self) -> list[Layer]:
        """All layers."""
        if self.pad is not None:
            self.layers.append(self.pad)
            self.pad = None
        return self.layers

    def _refuse_order(self, step: Step) -> None:
        """Refuses entries that have changed places, unless back again; only a linear layer takes them in."""
        if self.order is not None and not self.order.equal(torch.arange(len(self.order))):
            raise UnsupportedLayerError(
                f"layer {step.title}: entries change places (permute, flip) before it, which only a Linear takes in"
            )
        self.order = None

    def _linear(self, step: Step) -> None:
        if not isinstance(step.module, nn.Linear):
            self._refuse_order(step)
        layer = self._named_layer(step)
        if self.order is not None:
            columns, self.order = self.order.argsort(), None
            layer = replace(layer, weight=layer.weight[:, columns], columns=columns)
        pad, self.pad = self.pad, None
        if pad is not None and pad.output_shape == layer.input_shape:
            shapes = {"input_shape": pad.input_shape, "feature_shape": pad.feature_shape}
            if layer.before is None and (zeros := pad.after.zero_padding()):
                padding = tuple(a + b for a, b in zip(layer.padding, zeros, strict=True))
                layer = replace(layer, padding=padding, **shapes)
            else:
                before = pad.after if layer.before is None else layer.before.after(pad.after)
                layer = replace(layer, before=before, **shapes)
        elif pad is not None:
            self.layers.append(pad)
        self.layers.append(layer)

    def _named_layer(self, step: Step) -> Layer:
        """The layer of a convolution or a linear layer, with copies of its parameters and their names."""
        module, shape = step.module, step.input_shape
        if isinstance(module, nn.Linear) and len(shape) != 1:
            raise UnsupportedLayerError(f"layer {step.title} gets an input of shape {shape}; put a Flatten before it")
        if not isinstance(module, nn.Linear) and len(shape) != len(module.kernel_size) + 1:
            takes = f"it takes channels and {len(module.kernel_size)} axes of pixels"
            raise UnsupportedLayerError(f"layer {step.title} gets an input of shape {shape}; {takes}")
        layer = linear_layer(module, shape, step.output_shape)
        terms = weight_terms(module, step.title, self.names)
        name = terms[0][0] if terms else self.names[id(module.weight)]
        parameters = {
            "weight": parameter_copy(layer.weight) if self.copies else layer.weight.detach(),
            "weight_name": name,
            "weight_terms": terms,
            "is_frozen": name not in self.trained,
        }
        if module.bias is not None:
            if id(module.bias) not in self.names:
                raise UnsupportedLayerError(f"the bias of layer {step.title} is no parameter of the network")
            parameters |= {"bias": parameter_copy(module.bias), "bias_name": self.names[id(module.bias)]}
        if getattr(module, "padding_mode", "zeros") != "zeros" and any(layer.padding):
            flat, mode = tuple(module._reversed_padding_repeated_twice), module.padding_mode
            before = pixel_map(lambda x: F.pad(x, flat, mode=mode), shape[0], shape[1:])
            return replace(layer, name=step.path, padding=(0, 0, 0, 0), before=before, **parameters)
        return replace(layer, name=step.path, **parameters)

    def _elementwise(self, step: Step, activation: Activation) -> None:
        if isinstance(activation.negative_slope, Tensor) or not self.finish():
            self._refuse_order(step)
        last = self._last(step)
        self.layers[-1] = replace(last, activation=compose(last.activation, activation))

    def _affine(self, step: Step) -> None:
        scale, shift = scale_and_shift(step)
        if lost := int((scale == 0).sum()):
            raise UnsupportedLayerError(f"layer {step.title} multiplies {lost} of {scale.numel()} entries by zero")
        if not self.finish():
            self._refuse_order(step)
        if self.order is not None:
            back = self.order.argsort()
            scale, shift = scale.flatten()[back], shift.flatten()[back]
        last = self._last(step)
        scale, shift = scale.reshape(last.output_shape), shift.reshape(last.output_shape)
        per_channel = scale[:, 0, 0]
        if last.activation is IDENTITY and not last.is_fixed and (scale == per_channel[:, None, None]).all():
            weight = last.weight * per_channel[:, None, None, None] if self.copies else last.weight
            bias = None if last.bias is None else last.bias * per_channel
            total = per_channel if last.output_scale is None else per_channel * last.output_scale
            shift = shift if last.shift is None else last.shift * scale + shift
            self.layers[-1] = replace(last, weight=weight, bias=bias, output_scale=total, shift=shift)
        else:
            self._elementwise(step, affine(scale, shift))

    def _pixels(self, step: Step) -> None:
        found = None
        if len(step.input_shape) in (2, 3):
            call = step.call or copy.deepcopy(step.module).double().eval()
            found = pixel_map(call, step.input_shape[0], step.input_shape[1:])
        if found is None:
            raise UnsupportedLayerError(f"layer {step.title} cannot be inverted: it is no linear map of pixels by axes")
        shape_in, shape_out = image_shape_of(step.input_shape), image_shape_of(step.output_shape)
        last = self.layers[-1] if self.layers and self.pad is None else None
        joins = last is not None and last.activation is IDENTITY and last.output_shape == shape_in
        if self.pad is not None and self.pad.output_shape == shape_in:
            fixed = replace(self.pad, output_shape=shape_out, after=found.after(self.pad.after))
        elif joins and (last.is_fixed or not found.injective):
            after = found.after(last.after)
            shift = None if last.shift is None else found.apply(last.shift)
            self.layers[-1] = replace(last, output_shape=shape_out, after=after, shift=shift)
            return
        else:
            self.finish()
            fixed = _fixed_layer(self._name(step), step.input_shape, shape_out, found)
        self.pad = fixed if fixed.after.injective else None
        if self.pad is None:
            self.layers.append(fixed)

    def _last(self, step: Step) -> Layer:
        """The layer before, or an identity layer on the image."""
        if not self.finish():
            shape = image_shape_of(step.input_shape)
            self.layers.append(_fixed_layer(self._name(step), step.input_shape, shape, None))
        return self.layers[-1]

    def _name(self, step: Step) -> str:
        """Its path, or its name in the graph where the module was used before."""
        return step.name if any(layer.name == step.path for layer in self.layers) else step.path


def linear_layer(module: nn.Module, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> Layer:
    """The linear part of a `Linear`, `Conv1d` or `Conv2d`, with its zero padding, sharing the module's weight.

    Shapes are without the batch dimension; on (…, n) a `Linear` is a 1×1 convolution over the positions.
    """
    weight = current_weight(module)
    if isinstance(module, nn.Linear):
        positions = math.prod(input_shape[:-1])
        shapes = (weight.shape[1], positions, 1), (weight.shape[0], positions, 1)
        return Layer("", weight[..., None, None], None, *shapes, input_shape)
    one = (1,) * (2 - len(module.kernel_size))  # a row of pixels is an image of height 1
    weight = weight.reshape(*weight.shape[:2], *one, *weight.shape[2:])
    shapes = image_shape_of(input_shape), image_shape_of(output_shape), input_shape
    padding = (*module._reversed_padding_repeated_twice, 0, 0)[:4]
    return Layer("", weight, None, *shapes, one + module.stride, padding, one + module.dilation, module.groups)


def parameter_copy(parameter: Tensor) -> Tensor:
    """A float64 copy, which later training of the model does not change."""
    return parameter.detach().to("cpu", torch.float64, copy=True)


def _fixed_layer(name: str, shape: tuple[int, ...], output_shape: tuple, after: PixelMap | None) -> Layer:
    weight, shapes = torch.ones(shape[0], 1, 1, 1, dtype=torch.float64), (image_shape_of(shape), output_shape, shape)
    return Layer(name, weight, None, *shapes, groups=shape[0], after=after, is_fixed=True)


def scale_and_shift(step: Step) -> tuple[Tensor, Tensor]:
    """Scale and shift of a step x -> scale·x + shift, each shaped as x."""
    call = step.call or copy.deepcopy(step.module).double().cpu().eval()
    zero = torch.zeros(1, *step.input_shape, dtype=torch.float64)
    with torch.no_grad():
        shift, one, two = (call(zero + value).to(torch.float64) for value in (0.0, 1.0, 2.0))
    scale = one - shift
    if one.shape != zero.shape or not torch.allclose(two, shift + 2 * scale, rtol=1e-9, atol=1e-9):
        raise UnsupportedLayerError(f"layer {step.title} is not a scale and a shift of every entry")
    return scale[0], shift[0]
