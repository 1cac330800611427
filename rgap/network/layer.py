"""One linear layer of a chain, as W x + b and the activation that follows, with what the model puts around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.network.activations import IDENTITY, Activation
from rgap.network.pixel_maps import PixelMap


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer with the activation that follows it; a convolution, or a linear layer as one on a 1×1 image.

    What stands between two activations is one layer: W x = after(conv(before(x))), and z = W x + `pre_bias()`. Batch
    normalisation behind a convolution is part of its weight here. Where no convolution stands between two activations
    the layer is fixed: W is a pooling or padding alone, or the identity, and there is no gradient.

    Attributes:
        name: Path of the module in the model.
        weight: (O, C/groups, kh, kw), float64; ones of a fixed layer.
        bias: (O,), float64, or None.
        input_shape: (C, H, W).
        output_shape: (O, H′, W′).
        feature_shape: Shape of the input as the model has it, e.g. (n,) for a linear layer.
        stride, dilation: (vertical, horizontal).
        padding: Zeros added (left, right, top, bottom), as `F.pad` takes them.
        groups: Independent groups of channels.
        activation: The elementwise map after the layer.
        weight_name, bias_name: Names among `model.named_parameters()`; "" and None of a fixed layer.
        before, after: Maps of pixels before and behind the convolution, None where there are none.
        output_scale: What the model multiplies each output channel by, (O,): the weight here is that of the module
            times this. None for 1.
        shift: What the model adds behind it all, shaped as the output; None for 0.
        is_fixed: Whether the layer has no weight of its own, and so no gradient constraints.
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
    before: PixelMap | None = None
    after: PixelMap | None = None
    output_scale: Tensor | None = None
    shift: Tensor | None = None
    is_fixed: bool = False
    cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def unknowns(self) -> int:
        """Entries of the input."""
        return math.prod(self.input_shape)

    @property
    def is_dense(self) -> bool:
        """Whether the layer is a matrix on a vector (a linear layer, or a 1×1 convolution of one pixel)."""
        plain = self.before is None and self.after is None and self.groups == 1
        return plain and self.input_shape[1:] == self.output_shape[1:] == self.weight.shape[2:] == (1, 1)

    @property
    def pixels_in(self) -> tuple[int, int]:
        """Pixels that the convolution reads, before zero padding."""
        return self.input_shape[1:] if self.before is None else self.before.shape

    @property
    def pixels_out(self) -> tuple[int, int]:
        """Pixels that the convolution writes."""
        return self.output_shape[1:] if self.after is None else self.after.inputs

    def apply(self, x: Tensor) -> Tensor:
        """W x without the bias: (..., C, H, W) -> (..., O, H′, W′)."""
        if self.is_dense:
            return (x.flatten(-3) @ self.weight.flatten(1).T)[..., None, None]
        batch = x.reshape(-1, *self.input_shape)
        if self.before is not None:
            batch = self.before.apply(batch)
        if not self.is_fixed:
            batch = F.pad(batch, self.padding)
            batch = F.conv2d(batch, self.weight, None, self.stride, 0, self.dilation, self.groups)
        if self.after is not None:
            batch = self.after.apply(batch)
        return batch.reshape(*x.shape[:-3], *self.output_shape)

    def adjoint(self, dz: Tensor) -> Tensor:
        """Wᵀ δz: (..., O, H′, W′) -> (..., C, H, W)."""
        if self.is_dense:
            return (dz.flatten(-3) @ self.weight.flatten(1))[..., None, None]
        batch = self.conv_gradient(dz.reshape(-1, *self.output_shape))
        if not self.is_fixed:
            left, right, top, bottom = self.padding
            height, width = self.pixels_in
            padded = (len(batch), self.input_shape[0], height + top + bottom, width + left + right)
            batch = torch.nn.grad.conv2d_input(padded, self.weight, batch, self.stride, 0, self.dilation, self.groups)
            batch = batch[..., top : top + height, left : left + width]
        if self.before is not None:
            batch = self.before.adjoint(batch)
        return batch.reshape(*dz.shape[:-3], *self.input_shape)

    def conv_gradient(self, dz: Tensor) -> Tensor:
        """∂ℓ by the convolution's own output: (..., O, H′, W′) -> (..., O, *pixels_out)."""
        return dz if self.after is None else self.after.adjoint(dz)

    def weight_gradient(self, x: Tensor, dz: Tensor) -> Tensor:
        """K x: the gradient of the weight for an input (C, H, W) and a δz (O, H′, W′), shaped as the weight."""
        if self.is_dense:
            return (dz.flatten()[:, None] * x.flatten())[..., None, None]
        x, dz = x.reshape(1, *self.input_shape), self.conv_gradient(dz)[None]
        padded = F.pad(x if self.before is None else self.before.apply(x), self.padding)
        shape = self.weight.shape
        return torch.nn.grad.conv2d_weight(padded, shape, dz, self.stride, 0, self.dilation, self.groups)

    def pre_bias(self) -> Tensor | float:
        """What is added to W x, in a shape that adds to z, or 0."""
        bias = 0.0 if self.bias is None else self.bias[:, None, None]
        if self.after is not None and self.bias is not None:
            bias = self.after.apply(bias.expand(-1, *self.after.inputs))
        return bias if self.shift is None else bias + self.shift

    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """∂ℓ/∂`weight`, shaped as it, from the shared gradients by parameter name."""
        G = gradients[self.weight_name].reshape(self.weight.shape)
        return G if self.output_scale is None else G / self.output_scale[:, None, None, None]

    def cached(self, key: str, build: Callable[[], Any]) -> Any:
        """`build()`, computed on first use. It may depend on the model alone, never on a gradient."""
        if key not in self.cache:
            self.cache[key] = build()
        return self.cache[key]
