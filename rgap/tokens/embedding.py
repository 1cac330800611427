"""Which layer embeds the patches of an image, and which learned parameter is added to each of its tokens.

The network runs once, only as far as that addition, and is recognised by what it computes, not by its class: the first
convolution or linear layer that reads the image is the patch embedding, and the adjoint of the addition, applied to
numbered entries, shows which entry of the position embedding each output is added to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rgap.models import trained_names
from rgap.results import UnsupportedLayerError

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}  # names of the functions that add a position embedding
ATTENTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward", "softmax"}  # functions of a transformer
MAX_ADDITIONS = 8  # additions after the patch embedding among which the position embedding is looked for
MAX_NORMALISATION = 10_000  # entries up to which a tensor may be the input's normalisation, computed in float64


@dataclass(frozen=True)
class PatchEmbedding:
    """A patch embedding z_t = E p_t + b with a learned position embedding q_t added to every token.

    Every entry of a patch reads one pixel: entry = shift + scale · pixel, with what normalises the image in them.
    """

    model: nn.Module  # the network
    name: str  # path of the layer that embeds the patches
    weight_name: str  # parameter name of E, (D, n) when flattened
    bias_name: str | None  # parameter name of b, None without bias
    position_name: str  # parameter name of the position embedding
    position_entries: Tensor  # (T, D), for every feature of every patch its place in the flattened position embedding
    image_shape: tuple[int, ...]  # (C, H, W)
    pixels: Tensor  # (T, n), for every entry of every patch its pixel's place in the flattened image
    shift: Tensor  # (T, n)
    scale: Tensor  # (T, n); 0 where the entry reads padding

    def patches(self, image: Tensor) -> Tensor:
        """The patches (T, n) of an image (1, C, H, W)."""
        return self.shift + self.scale * image.flatten()[self.pixels]

    def image(self, patches: Tensor) -> Tensor:
        """The image (1, C, H, W) whose patches are nearest to those given, (T, n), by least squares."""
        return (self._gathered(self.scale * (patches - self.shift)) / self.readings).reshape(1, *self.image_shape)

    @property
    def readings(self) -> Tensor:
        """Sum of the squared scales with which each pixel is read, (C·H·W,); 0 where none reads it."""
        return self._gathered(self.scale.square())

    def _gathered(self, entries: Tensor) -> Tensor:
        return entries.new_zeros(math.prod(self.image_shape)).index_add(0, self.pixels.flatten(), entries.flatten())


def recognise(model: nn.Module, image_shape: tuple[int, int, int]) -> PatchEmbedding | None:
    """Finds a network's patch embedding and the learned position embedding that is added to its output.

    One forward pass on zeros runs as far as the addition. None where the network is no transformer on patches; an
    UnsupportedLayerError, with the parameter and the reason, where it is one whose position gradients do not give the
    tokens' gradients.
    """
    watch = _run(model, image_shape, torch.zeros(1, *image_shape))
    if watch.embedding is None or not (watch.attention or watch.position):
        return None
    names = {id(value): name for name, value in watch.values.items()}
    weight_name, bias_name = names[id(watch.embedding.weight)], names.get(id(watch.embedding.bias))
    name = weight_name.rpartition(".")[0]
    if reason := _why_not(name, weight_name, watch):
        raise UnsupportedLayerError(reason)
    pixels = _pixels(model, tuple(image_shape), name)
    found = PatchEmbedding(model, name, weight_name, bias_name, *watch.position, tuple(image_shape), *pixels)
    if unread := int((found.readings == 0).sum()):
        shape = f"{unread} of the pixels of {tuple(image_shape)}; give an image_shape that its patches cover"
        raise UnsupportedLayerError(f"{name!r} reads no patch with {shape}")
    return found


@dataclass(frozen=True)
class _Embedding:
    """The first call that applies a weight to the image."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    unfold: Callable[[Tensor], Tensor] | None  # input -> (T, n); None where the call is of a kind without patches
    tokens: Callable[[Tensor], Tensor]  # output -> (T, D)


class _FoundError(Exception):
    """Ends a forward pass that has shown what was looked for."""


class _Watch(TorchFunctionMode):
    """Watches a forward pass for the patch embedding and for the addition of a parameter to its output."""

    def __init__(self, values: dict[str, Tensor], trainable: set[str], only_patches: bool):
        """Watches a network with those parameters and buffers."""
        super().__init__()
        self.values, self.trainable, self.only_patches = values, trainable, only_patches
        self.embedding: _Embedding | None = None
        self.position: tuple[str, Tensor] | None = None
        self.output, self.frozen, self.attention, self.additions = None, None, False, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Runs the function as it is; of the patch embedding's output the graph begins anew."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.embedding is None:
            self.embedding = _embedding(func, args, kwargs, self.values)
            if self.embedding is None:
                return func(*args, **kwargs)
            if self.only_patches:
                raise _FoundError
            self.output = func(*args, **kwargs).detach().requires_grad_()
            return self.output.clone()
        result = func(*args, **kwargs)
        self.attention |= name in ATTENTIONS and result[0].ndim > 1
        if name in ADDITIONS and result.requires_grad:
            self.additions += 1
            self.position = self._position(result) if self.additions <= MAX_ADDITIONS else None
            if self.position or (self.attention and self.additions > MAX_ADDITIONS):
                raise _FoundError
        return result

    def _position(self, total: Tensor) -> tuple[str, Tensor] | None:
        """The parameter that is added to all tokens, and its place at each; None where the sum is another one."""
        numbers = torch.arange(1, total.numel() + 1, dtype=total.dtype).reshape(total.shape)
        leaves = [self.output, *self.values.values()]
        places, counts = (
            torch.autograd.grad(total, leaves, cotangent, retain_graph=True, allow_unused=True)
            for cotangent in (numbers, torch.ones_like(total))
        )
        if places[0] is None or not (counts[0] == 1).all() or len(places[0].unique()) < places[0].numel():
            return None
        token_places = self.embedding.tokens(places[0]).long()
        for name, place, count in zip(self.values, places[1:], counts[1:], strict=True):
            if place is None or not ((count == 0) | (count == 1)).all():
                continue
            entry_at = torch.full((total.numel() + 1,), -1)
            entry_at[place.flatten().long()] = torch.arange(place.numel())
            entry_at[0] = -1
            if (entries := entry_at[token_places]).min() < 0:
                continue
            if name in self.trainable:
                return name, entries
            self.frozen = name
        return None


def _run(model: nn.Module, image_shape: tuple[int, ...], image: Tensor, only_patches: bool = False) -> _Watch:
    """One forward pass under a `_Watch`, with every parameter and buffer a leaf of its own."""
    buffers = dict(model.named_buffers())
    tensors = {**buffers, **dict(model.named_parameters())}
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    values = {}
    for name, t in tensors.items():
        dtype = torch.float64 if only_patches and t.numel() <= MAX_NORMALISATION else wide
        value = t.detach().to("cpu", dtype if t.is_floating_point() else t.dtype, copy=name in buffers)
        statistics = name in buffers and t.ndim < 2  # such as batch norm's, which may not require gradients
        values[name] = value.requires_grad_(t.is_floating_point() and not statistics)
    leaves = {name: value for name, value in values.items() if value.requires_grad}
    watch = _Watch(leaves, set(trained_names(model)), only_patches)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), watch:
            torch.func.functional_call(model, values, image if only_patches else image.to(wide))
    except _FoundError:
        pass
    except Exception as error:
        what, reason = f"image_shape {tuple(image_shape)}", str(error).partition("\n")[0]
        raise ValueError(f"{what} does not fit {type(model).__name__}: {reason}") from error
    return watch


def _embedding(func, args, kwargs, values: dict[str, Tensor]) -> _Embedding | None:
    """What a call embeds, where it is a convolution or linear map by a parameter; None for any other call."""
    if func not in (F.linear, torch.conv1d, torch.conv2d, torch.conv3d):
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    call = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, **kwargs}
    call.update(zip(names, args, strict=False))
    weight, x = call["weight"], call["input"]
    if not any(weight is value for value in values.values()):
        return None
    if func is F.linear:
        return _Embedding(x, weight, call["bias"], lambda u: u.reshape(-1, u.shape[-1]), lambda o: o.flatten(0, -2))
    plain = func is torch.conv2d and call["groups"] == 1 and not isinstance(call["padding"], str)
    options = {key: call[key] for key in ("stride", "padding", "dilation")}
    kernel = tuple(weight.shape[2:])
    return _Embedding(
        x, weight, call["bias"],
        (lambda u: F.unfold(u.reshape(1, *u.shape[-3:]), kernel, **options)[0].T) if plain else None,
        lambda o: o.reshape(weight.shape[0], -1).T,
    )  # fmt: skip


def _pixels(model: nn.Module, image_shape: tuple[int, ...], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The pixel that every entry of the patches reads, and its shift and scale, by images of numbered pixels."""

    def patches(values: Tensor) -> Tensor:
        found = _run(model, image_shape, values.double().reshape(1, *image_shape), only_patches=True).embedding
        return found.unfold(found.input.detach()).double()

    count = math.prod(image_shape)
    random = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = patches(torch.zeros(count))
    scale = patches(torch.ones(count)) - shift
    places = (patches(torch.arange(count)) - shift) / torch.where(scale == 0, 1.0, scale)
    pixels = places.round().long().clamp(0, count - 1)
    if not torch.allclose(patches(random), shift + scale * random[pixels], rtol=1e-6, atol=1e-6):
        raise UnsupportedLayerError(
            f"{name!r} embeds no patches of the image: what stands before it mixes pixels or is not affine"
        )
    return pixels, shift, scale


def _why_not(name: str, weight_name: str, watch: _Watch) -> str:
    """The reason for which the tokens' gradients are not shared; empty where they are."""
    if watch.embedding.unfold is None:
        return f"{name!r} embeds patches by a convolution that is grouped, padded by name, or not two-dimensional"
    if watch.position is None and watch.frozen:
        return (
            f"the position embedding {watch.frozen!r} is not trained (a buffer, or frozen): its gradient, which is "
            "that of every token, is not shared"
        )
    if watch.position is None:
        return (
            f"to the patches that {name!r} embeds no learned position embedding is added, one entry to each: sin-cos, "
            "rotary, relative or resized positions share no gradient of single tokens, and positions that are scaled "
            "or added behind another layer (a layer norm, a second linear layer, dropout in training) another one"
        )
    if weight_name not in watch.trainable:
        return f"the patch embedding {weight_name!r} is not trained: its gradient is not shared"
    return ""
