"""Traced steps folded into layers: all that stands between two activations becomes one linear layer.

Average pooling right behind a convolution makes one linear map with it, and so does batch normalisation; padding
belongs to the convolution that reads it. What has no convolution to be folded into becomes a fixed layer, one without
gradient: pooling behind an activation, or the normalisation of the image. Affine maps behind an activation join it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.network.activations import IDENTITY, Activation, affine, compose
from rgap.network.layer import Layer
from rgap.network.operations import as_module, from_module
from rgap.network.pixel_maps import PixelMap, image_shape_of, pixel_map
from rgap.network.tracing import Step
from rgap.results import UnsupportedLayerError


@dataclass
class Folder:
    """Takes the steps of a chain one after the other.

    Attributes:
        names: id of a parameter -> its name.
        layers: What was folded so far.
        pad: A fixed layer that loses nothing, for the next convolution to take in.
    """

    names: dict[int, str]
    layers: list[Layer]
    pad: Layer | None = None

    def take(self, step: Step) -> None:
        """Folds one more step.

        Raises:
            UnsupportedLayerError: If it cannot be folded; the message has its path and the reason.
        """
        if step.kind == "linear":
            self._linear(step)
        elif step.kind == "activation":
            module = step.module or as_module(step.operation, step.arguments, step.options)
            activation = from_module(module)
            if activation is not IDENTITY:
                self._elementwise(step, activation)
        elif step.kind == "affine":
            self._affine(step)
        elif step.kind == "pixels":
            self._pixels(step)

    def finish(self) -> list[Layer]:
        """All layers."""
        if self.pad is not None:
            self.layers.append(self.pad)
            self.pad = None
        return self.layers

    def _linear(self, step: Step) -> None:
        layer = linear_layer(step, self.names)
        pad, self.pad = self.pad, None
        if pad is not None and pad.output_shape == layer.input_shape:
            zeros = pad.after.zero_padding()
            padding = tuple(a + b for a, b in zip(layer.padding, zeros, strict=True)) if zeros else layer.padding
            before = layer.before
            if layer.before is not None or zeros is None:
                padding, before = layer.padding, pad.after if layer.before is None else layer.before.after(pad.after)
            layer = replace(
                layer,
                padding=padding,
                before=before,
                input_shape=pad.input_shape,
                feature_shape=pad.feature_shape,
            )
        elif pad is not None:
            self.layers.append(pad)
        self.layers.append(layer)

    def _elementwise(self, step: Step, activation: Activation) -> None:
        last = self._last(step)
        self.layers[-1] = replace(last, activation=compose(last.activation, activation))

    def _affine(self, step: Step) -> None:
        scale, shift = _scale_and_shift(step)
        if lost := int((scale == 0).sum()):
            raise UnsupportedLayerError(f"layer {step.title} multiplies {lost} of {scale.numel()} entries by zero")
        last = self._last(step)
        scale, shift = scale.reshape(last.output_shape), shift.reshape(last.output_shape)
        per_channel = scale[:, 0, 0]
        if last.activation is IDENTITY and not last.is_fixed and (scale == per_channel[:, None, None]).all():
            total = per_channel if last.output_scale is None else per_channel * last.output_scale
            self.layers[-1] = replace(
                last,
                weight=last.weight * per_channel[:, None, None, None],
                bias=None if last.bias is None else last.bias * per_channel,
                output_scale=total,
                shift=shift if last.shift is None else last.shift * scale + shift,
            )
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
        """The layer before, or one that does nothing to the image."""
        if not self.finish():
            shape = image_shape_of(step.input_shape)
            self.layers.append(_fixed_layer(self._name(step), step.input_shape, shape, None))
        return self.layers[-1]

    def _name(self, step: Step) -> str:
        """The path, or the name in the graph where a module is used again."""
        return step.name if any(layer.name == step.path for layer in self.layers) else step.path


def linear_layer(step: Step, names: dict[int, str]) -> Layer:
    """The layer of a convolution or a linear layer alone."""
    module = step.module
    assert module is not None  # a step of kind "linear" always has one
    weight = parameter_copy(module.weight)
    bias = None if module.bias is None else parameter_copy(module.bias)
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
    if len(step.input_shape) != len(module.kernel_size) + 1:
        raise UnsupportedLayerError(
            f"layer {step.title} gets an input of shape {step.input_shape}; it takes channels and "
            f"{len(module.kernel_size)} axes of pixels"
        )
    one = (1,) * (2 - len(module.kernel_size))  # a row of pixels is an image of height 1
    flat = tuple(module._reversed_padding_repeated_twice)
    before, padding = None, (*flat, 0, 0)[:4]
    if module.padding_mode != "zeros" and any(flat):
        mode = module.padding_mode
        before = pixel_map(lambda x: F.pad(x, flat, mode=mode), step.input_shape[0], step.input_shape[1:])
        padding = (0, 0, 0, 0)
    return Layer(
        weight=weight.reshape(*weight.shape[:2], *one, *weight.shape[2:]),
        input_shape=image_shape_of(step.input_shape),
        output_shape=image_shape_of(step.output_shape),
        stride=one + module.stride,
        padding=padding,
        dilation=one + module.dilation,
        groups=module.groups,
        before=before,
        **common,
    )


def parameter_copy(parameter: Tensor) -> Tensor:
    """Its value as it is now: training the model on leaves a chain as it was."""
    return parameter.detach().to("cpu", torch.float64, copy=True)


def _fixed_layer(name: str, shape: tuple[int, ...], output_shape: tuple, after: PixelMap | None) -> Layer:
    weight, channels = torch.ones(shape[0], 1, 1, 1, dtype=torch.float64), shape[0]
    shapes = (image_shape_of(shape), output_shape, shape)
    return Layer(name, weight, None, *shapes, groups=channels, after=after, is_fixed=True)


def _scale_and_shift(step: Step) -> tuple[Tensor, Tensor]:
    """Of a step that is scale·x + shift entry by entry, each shaped as its input."""
    call = step.call or copy.deepcopy(step.module).double().cpu().eval()
    zero = torch.zeros(1, *step.input_shape, dtype=torch.float64)
    with torch.no_grad():
        shift, one, two = (call(zero + value).to(torch.float64) for value in (0.0, 1.0, 2.0))
    scale = one - shift
    if one.shape != zero.shape or not torch.allclose(two, shift + 2 * scale, rtol=1e-9, atol=1e-9):
        raise UnsupportedLayerError(f"layer {step.title} is not one factor and one summand for every entry")
    return scale[0], shift[0]


def parameters_read(step: Step) -> list[int]:
    """Ids of the parameters that a step reads."""
    if step.module is not None:
        return [id(p) for p in step.module.parameters()]
    return [id(step.value)] if isinstance(step.value, nn.Parameter) else []
