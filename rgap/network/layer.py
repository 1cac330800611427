"""A network as a chain of linear layers W x + b, each with the activation that follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.network.activations import IDENTITY, Activation
from rgap.network.pixel_maps import PixelMap


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution with the activation that follows it; a linear layer is a convolution of a 1×1 image.

    Everything between two activations is one layer: W x = after(conv(before(x))) and z = W x + `pre_bias()`. Batch
    normalisation after a convolution is multiplied into its weight. Without a convolution between two activations the
    layer is fixed: W is pooling or padding alone, or the identity, and no gradient belongs to it.

    Attributes:
        name: Path of the module in the model.
        weight: (O, C/groups, kh, kw), float64; ones for a fixed layer.
        bias: (O,), float64, or None.
        input_shape: (C, H, W).
        output_shape: (O, H′, W′).
        feature_shape: Shape of the input as the model has it, e.g. (n,) for a linear layer.
        stride, dilation: (vertical, horizontal).
        padding: Zeros added (left, right, top, bottom), as `F.pad` takes them.
        groups: Independent groups of channels.
        activation: The elementwise map after the layer.
        weight_name, bias_name: Names among `model.named_parameters()`; "" and None for a fixed layer.
        before, after: Pixel maps applied before and after the convolution, or None.
        output_scale: Factor of each output channel, (O,): `weight` is the module's weight times this; None for 1.
        shift: Constant added after everything else, shaped as the output; None for 0.
        is_fixed: Whether the layer has no weight of its own, and so no gradient constraints.
        cache: Results that depend on the model alone, kept for the next attack.
        is_frozen: Whether the client does not train its weight, and so shares no gradient of it.
        columns: Where entries change places before a linear layer: for each column of `weight` that of the module's.
        weight_terms: Of a weight that is computed from other parameters, their names and factors, whose products with
            the shared gradients sum up to the weight's.
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
    before: PixelMap | None = None
    after: PixelMap | None = None
    output_scale: Tensor | None = None
    shift: Tensor | None = None
    is_fixed: bool = False
    cache: dict[str, Any] = field(default_factory=dict, repr=False)
    is_frozen: bool = False
    columns: Tensor | None = None
    weight_terms: tuple[tuple[str, Tensor], ...] = ()

    @property
    def unknowns(self) -> int:
        """Entries of the input."""
        return math.prod(self.input_shape)

    @property
    def is_dense(self) -> bool:
        """Whether the layer is a matrix on a vector (a linear layer, or a 1×1 convolution of one pixel)."""
        plain = self.before is None and self.after is None and self.groups == 1 and not any(self.padding)
        return plain and self.input_shape[1:] == self.output_shape[1:] == self.weight.shape[2:] == (1, 1)

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the parameters behind its weight."""
        return tuple(name for name, _ in self.weight_terms) or (self.weight_name,)

    @property
    def pixels_in(self) -> tuple[int, int]:
        """Input size of the convolution, before zero padding."""
        return self.input_shape[1:] if self.before is None else self.before.shape

    @property
    def pixels_out(self) -> tuple[int, int]:
        """Output size of the convolution."""
        return self.output_shape[1:] if self.after is None else self.after.inputs

    @property
    def _pads(self) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """`padding` as zeros to be added first, and zeros that torch's convolution adds on both sides alike."""
        left, right, top, bottom = self.padding
        return ((0, 0, 0, 0), (top, left)) if 0 <= left == right and 0 <= top == bottom else (self.padding, (0, 0))

    def apply(self, x: Tensor) -> Tensor:
        """W x without the bias: (..., C, H, W) -> (..., O, H′, W′)."""
        if self.is_dense:
            return (x.flatten(-3) @ self.weight.flatten(1).T)[..., None, None]
        batch = x.reshape(-1, *self.input_shape)
        if self.before is not None:
            batch = self.before.apply(batch)
        if not self.is_fixed:
            around, both = self._pads
            batch = F.pad(batch, around) if any(around) else batch
            batch = F.conv2d(batch, self.weight, None, self.stride, both, self.dilation, self.groups)
        if self.after is not None:
            batch = self.after.apply(batch)
        return batch.reshape(*x.shape[:-3], *self.output_shape)

    def adjoint(self, dz: Tensor) -> Tensor:
        """Wᵀ δz: (..., O, H′, W′) -> (..., C, H, W)."""
        if self.is_dense:
            return (dz.flatten(-3) @ self.weight.flatten(1))[..., None, None]
        batch = self.conv_gradient(dz.reshape(-1, *self.output_shape))
        if not self.is_fixed:
            ((left, right, top, bottom), both), (height, width) = self._pads, self.pixels_in
            padded = (len(batch), self.input_shape[0], height + top + bottom, width + left + right)
            options = self.stride, both, self.dilation, self.groups
            batch = torch.nn.grad.conv2d_input(padded, self.weight, batch, *options)
            batch = batch[..., top : top + height, left : left + width]
        if self.before is not None:
            batch = self.before.adjoint(batch)
        return batch.reshape(*dz.shape[:-3], *self.input_shape)

    def conv_gradient(self, dz: Tensor) -> Tensor:
        """Gradient of the loss by the convolution's own output: (..., O, H′, W′) -> (..., O, *pixels_out)."""
        return dz if self.after is None else self.after.adjoint(dz)

    def weight_gradient(self, x: Tensor, dz: Tensor) -> Tensor:
        """K x: the gradient of the weight for an input (C, H, W) and a δz (O, H′, W′), shaped as the weight."""
        if self.is_dense:
            return (dz.flatten()[:, None] * x.flatten())[..., None, None]
        x, dz = x.reshape(1, *self.input_shape), self.conv_gradient(dz)[None]
        (around, both), x = self._pads, x if self.before is None else self.before.apply(x)
        x, options = F.pad(x, around) if any(around) else x, (self.stride, both, self.dilation, self.groups)
        return torch.nn.grad.conv2d_weight(x, self.weight.shape, dz, *options)

    def rest_of_gradient(self, G: Tensor, x: Tensor, dz: Tensor) -> Tensor:
        """G − K x, with the arguments of `weight_gradient`; of a dense layer without K x itself."""
        if self.is_dense:
            return torch.addr(G.flatten(1), dz.flatten(), x.flatten(), alpha=-1).reshape(G.shape)
        return G - self.weight_gradient(x, dz)

    def pre_bias(self) -> Tensor | float:
        """What is added to W x, in a shape that broadcasts to z, or 0."""
        bias = 0.0 if self.bias is None else self.bias[:, None, None]
        if self.after is not None and self.bias is not None:
            bias = self.after.apply(bias.expand(-1, *self.after.inputs))
        return bias if self.shift is None else bias + self.shift

    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """∂ℓ/∂`weight`, shaped as it, from the shared gradients by parameter name."""
        if self.weight_terms:
            G = sum(factor * gradients[name] for name, factor in self.weight_terms)
        else:
            G = gradients[self.weight_name]
        return self._as_weight(G)

    def gradient_std(self, stds: Mapping[str, Tensor]) -> Tensor:
        """Standard deviation of the entries of `gradient`, from that of the shared gradients' by parameter name."""
        if not self.weight_terms:
            return self._as_weight(stds[self.weight_name]).abs()
        squares = sum((factor * stds[name]).square() for name, factor in self.weight_terms)
        return self._as_weight(squares.sqrt()).abs()

    def _as_weight(self, G: Tensor) -> Tensor:
        G = G if self.columns is None else G[:, self.columns]
        G = G.reshape(self.weight.shape)
        return G if self.output_scale is None else G / self.output_scale[:, None, None, None]

    def split_groups(self) -> list[Layer]:
        """The layer as independent layers without groups, one for each group of channels; made once."""
        return [self] if self.groups == 1 else self.cached("groups", self._split)

    def _split(self) -> list[Layer]:
        tensors = (self.weight, self.bias, self.shift)
        parts = [[None] * self.groups if t is None else t.chunk(self.groups) for t in tensors]
        inputs, outputs = ((shape[0] // self.groups, *shape[1:]) for shape in (self.input_shape, self.output_shape))
        own = {"input_shape": inputs, "output_shape": outputs, "groups": 1}
        return [replace(self, weight=w, bias=b, shift=s, cache={}, **own) for w, b, s in zip(*parts, strict=True)]

    def tap_pixels(self) -> Tensor:
        """The pixel that each tap reads at each output position, −1 in padding, (kh·kw, positions); made once."""
        return self.cached("tap_pixels", lambda: torch.from_numpy(self._tap_pixels()))

    def _tap_pixels(self) -> np.ndarray:
        left, _, top, _ = self.padding
        taps, pads = self.weight.shape[2:], (top, left)
        axes = zip(self.dilation, taps, self.stride, self.pixels_out, pads, strict=True)
        rows, columns = (d * np.arange(k)[:, None] + s * np.arange(n) - pad for d, k, s, n, pad in axes)
        (height, width), rows, columns = self.pixels_in, rows[:, None, :, None], columns[:, None]
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        return np.where(inside, rows * width + columns, -1).reshape(math.prod(taps), -1)

    def cached(self, key: str, build: Callable[[], Any]) -> Any:
        """`build()`, computed on first use; it must depend on the model alone, never on a gradient."""
        if key not in self.cache:
            self.cache[key] = build()
        return self.cache[key]


@dataclass(frozen=True, eq=False)
class Chain:
    """A network as a chain of layers. What depends on the model alone is computed once and kept between attacks.

    Attributes:
        model: The module it was made from.
        image_shape: (C, H, W).
        layers: From the image to the output; the last is dense.
        parameters: Parameter name -> float64 copy, in the order of `model.named_parameters()`.
        log_softmax: Whether a logarithmic softmax follows, which a cross-entropy does not notice.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    parameters: dict[str, Tensor] = field(repr=False)
    log_softmax: bool = False

    @property
    def homogeneous(self) -> bool:
        """Whether f(a x) = a f(x) for every a > 0: no biases, and homogeneous activations."""
        constant = any(layer.bias is not None or layer.shift is not None for layer in self.layers)
        return not constant and all(layer.activation.homogeneous for layer in self.layers)

    @property
    def leaves_brightness_open(self) -> bool:
        """Whether every factor of the gradient has an image of a brightness of its own, and no equation decides."""
        return self.homogeneous and self.layers[-1].output_shape[0] <= 2

    @property
    def averages_away(self) -> bool:
        """Whether an activation's whole map becomes one pixel: no equation of the layers above gives it back."""
        pooled = [layer for layer in self.layers if layer.is_fixed and layer.after is not None]
        return any(math.prod(layer.output_shape[1:]) == 1 < math.prod(layer.input_shape[1:]) for layer in pooled)

    def layer_inputs(self, images: Tensor) -> dict[str, Tensor]:
        """The input of every layer for given images (B, C, H, W): the ground truth of an evaluation.

        Returns:
            Layer name -> float64 (B, *feature_shape), from the image to the head.
        """
        x, inputs = images.to(torch.float64), {}
        for layer in self.layers:
            x = x.reshape(len(images), *layer.input_shape)
            inputs[layer.name] = x.reshape(len(images), *layer.feature_shape)
            x = layer.activation.forward(layer.apply(x) + layer.pre_bias())
        return inputs
