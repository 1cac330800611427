"""Checks of arguments, one function for each kind; every public function uses them, and each names the argument.

A check returns the value in the form that the library computes with, or raises a ValueError: what was given, what is
needed, and where it helps, what to do.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

MAX_IMAGE_ENTRIES = 10**8  # most entries of one image; a larger one is refused before memory is asked for
MAX_SQUARED_NUMBER = 1e150  # largest number whose square is finite
MAX_TEXT_LENGTH = 80  # characters of a refused value that a message shows
MAX_ENTRIES_SHOWN = 8  # entries of a refused tensor that a message shows
SEED_RANGE = (-(2**63), 2**64)  # seeds that torch's generators take, the second excluded
VALUE_FORMATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # those with arithmetic


def shown(value: object) -> str:
    """A value on one line, short enough for a message."""
    if isinstance(value, Tensor):
        plain = not _no_plain_values(value) and value.numel() <= MAX_ENTRIES_SHOWN
        return str(value.tolist()) if plain else f"a tensor of shape {_shape(value)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[:MAX_TEXT_LENGTH]}…"


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def _items(value: object) -> tuple:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()


def check_number(
    name: str, value: object, high: float = math.inf, *, open_low: bool = False, closed: bool = False
) -> float:
    """A real number from 0, itself only where not `open_low`, to below `high`, or up to it where `closed`."""
    real = isinstance(value, Real) and not isinstance(value, bool | np.bool_)
    if real and (value > 0 if open_low else value >= 0) and (value <= high if closed else value < high):
        return float(value)
    least = f"{'above' if open_low else 'at least'} 0"
    most = "finite" if high == math.inf else f"{'at most' if closed else 'below'} {high:g}"
    raise ValueError(f"{name} is {shown(value)}; it must be {'' if real else 'a number '}{least} and {most}")


def check_count(name: str, value: object, least: int = 1, hint: str = "") -> int:
    """A whole number of at least `least`; `hint` ends the message."""
    if _is_whole(value) and least <= value < 2**63:
        return int(value)
    raise ValueError(f"{name} is {shown(value)}; it must be an integer of at least {least}{hint}")


def check_seed(value: object) -> int:
    """A seed that torch's generators take."""
    low, end = SEED_RANGE
    if _is_whole(value) and low <= value < end:
        return int(value)
    raise ValueError(f"seed is {shown(value)}; it must be an integer of at most 64 bits")


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """One of several names."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name} is {shown(value)}; it must be one of {', '.join(choices)}")


def check_device(value: torch.device | str | None) -> torch.device | None:
    """A device of this machine that holds values, or None."""
    if value is None:
        return None
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except Exception as error:  # torch raises errors of several classes, AssertionError among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device is {shown(value)}; it cannot be used here: {reason}") from error
    if device.type == "meta":
        raise ValueError("device is 'meta', which holds no values; give cpu or cuda")
    return device


def check_dtype(value: object, choices: Sequence[torch.dtype]) -> torch.dtype:
    """One of several floating-point formats."""
    if isinstance(value, torch.dtype) and value in choices:
        return value
    raise ValueError(f"dtype is {shown(value)}; it must be {' or '.join(map(str, choices))}")


def check_image_shape(value: object) -> tuple[int, ...]:
    """The shape of one image, every side at least 1."""
    if value is None:
        raise ValueError("image_shape is missing; give (channels, height, width), or a Chain from rgap.prepare")
    sides = _items(value)
    if not sides or not all(_is_whole(n) and n >= 1 for n in sides):
        shapes = "(channels, height, width), or (features,) of a table, each at least 1"
        raise ValueError(f"image_shape is {shown(value)}; it must be {shapes}")
    if math.prod(map(int, sides)) > MAX_IMAGE_ENTRIES:
        raise ValueError(f"image_shape is {shown(value)}; more than {MAX_IMAGE_ENTRIES:.0e} entries for one image")
    return tuple(map(int, sides))


def check_pixel_range(value: object) -> tuple[float, float]:
    """The smallest and the largest value of a pixel; they may be infinite."""
    limits = _items(value)
    numbers = len(limits) == 2 and all(isinstance(v, Real) and not isinstance(v, bool) for v in limits)
    if numbers and limits[0] < limits[1]:
        return float(limits[0]), float(limits[1])
    raise ValueError(f"pixel_range is {shown(value)}; give (smallest, largest), two numbers")


def check_labels(value: object, count: int | None = None, name: str = "labels") -> Tensor:
    """Labels, int64 (B,), from integers in a list, an array or a tensor; `count` is their number where it is known."""
    need = "give an integer for each image" + ("" if count is None else f", {count} in all")
    refusal = ValueError(f"{name} are {shown(value)}; {need}")
    if isinstance(value, Tensor):
        labels = check_tensor(name, value)
    elif isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        try:
            array = np.asarray(value)
        except ValueError:  # rows of different lengths
            raise refusal from None
        if array.dtype.kind not in "biu" and array.size:
            raise refusal
        if array.dtype.kind == "u" and array.size and array.max() >= 2**63:
            raise refusal
        labels = torch.from_numpy(array.astype(np.int64))
    else:
        raise refusal
    if labels.is_floating_point():
        raise ValueError(f"{name} are {shown(labels)}, {labels.dtype}; they must be integers")
    if labels.ndim != 1 or (count is not None and len(labels) != count):
        raise ValueError(f"{name} are {shown(labels)}, of shape {tuple(labels.shape)}; {need}")
    return labels.detach().to(torch.int64)


def check_targets(value: object, count: int | None = None) -> Tensor:
    """Labels as `check_labels` takes them, or real-valued targets of squared error, floating-point (B, outputs)."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        with contextlib.suppress(ValueError, TypeError):  # what is no array of numbers is refused as labels
            value = np.asarray(value)
    given = isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind == "f")
    targets = check_tensor("labels", value) if given else None
    if targets is None or not targets.is_floating_point() or targets.ndim != 2:
        return check_labels(value, count)
    if not targets.shape[1] or (count is not None and len(targets) != count):
        need = "(B, outputs)" if count is None else f"({count}, outputs)"
        raise ValueError(f"labels are real-valued, of shape {tuple(targets.shape)}; such targets are {need}")
    if not all_finite(targets):
        raise ValueError("labels hold NaN or infinity; real-valued targets must be finite")
    return targets.detach()


def check_tensor(name: str, value: object, error: type[ValueError] = ValueError, *, finite: bool = False) -> Tensor:
    """A dense tensor with values, on any device, integers among them; a numpy array of numbers is turned into one.

    `finite` refuses NaN and infinity.
    """
    if isinstance(value, np.ndarray | np.generic):
        try:
            value = torch.from_numpy(np.array(value))
        except TypeError:  # objects, texts
            raise error(f"{name} is {shown(value)}; it must be a tensor of numbers") from None
    if not isinstance(value, Tensor):
        raise error(f"{name} is a {type(value).__name__}; it must be a tensor of numbers")
    if trouble := _no_plain_values(value):
        raise error(f"{name} is {trouble}")
    if finite and value.is_floating_point() and value.numel() and not all_finite(value):
        raise error(f"{name} holds NaN or infinity")
    return value


def _no_plain_values(value: Tensor) -> str:
    """What keeps a tensor from being computed with, and what to do; empty where nothing does."""
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_nested:
        return "a nested tensor; it must be a dense tensor with values, one shape for all"
    if value.is_quantized:
        return f"quantised ({kind}); it must be a dense tensor with values: call .dequantize()"
    if value.layout != torch.strided:
        return f"{value.layout}; it must be a dense tensor with values: call .to_dense()"
    if value.is_meta:
        return "on the meta device; it must be a dense tensor with values"
    if value.is_complex():
        return f"{kind}; it must be real"
    if value.is_floating_point() and value.dtype not in VALUE_FORMATS:
        return f"{kind}, a format without arithmetic; convert it to float32, and give the rounding as noise_std"
    return ""


def all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite; the extremes show it in a fraction of the time."""
    return value.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(value.detach()))


def _shape(value: Tensor) -> tuple[int, ...] | str:
    return "unequal rows" if value.is_nested else tuple(value.shape)


def check_model(value: object, wrong_type: type[Exception] = ValueError) -> nn.Module:
    """A network whose parameters and buffers have values, all finite, and whose layers have a width."""
    if isinstance(value, type):
        raise wrong_type(f"model is the class {value.__name__}; give an instance of it, {value.__name__}(…)")
    if not isinstance(value, nn.Module):
        hint = "; rgap.models.load_model finds one by its name" if isinstance(value, str) else ""
        raise wrong_type(f"model is a {type(value).__name__}; give an nn.Module or a Chain from rgap.prepare{hint}")
    for name, parameter in [*value.named_parameters(), *value.named_buffers()]:
        if is_lazy(parameter):
            raise ValueError(f"model has lazy modules: {name!r} has no shape yet; run the network on an image first")
        if parameter.is_meta:
            raise ValueError(f"model's {name!r} is on the meta device, which holds no values; load the weights")
        if isinstance(parameter, nn.Parameter) and parameter.numel() == 0:
            raise ValueError(f"model's {name!r} has shape {tuple(parameter.shape)}: a layer of zero width is no layer")
        if trouble := _no_plain_values(parameter):
            raise ValueError(f"model's {name!r} is {trouble}")
        if parameter.is_floating_point() and not all_finite(parameter):
            raise ValueError(f"model's {name!r} holds NaN or infinity; no gradient follows from such weights")
    return value


def check_path(value: object) -> Path:
    """A path, `~` expanded."""
    if isinstance(value, str | os.PathLike) and str(value):
        return Path(value).expanduser()
    raise ValueError(f"path is {shown(value)}; give the path of a file")
