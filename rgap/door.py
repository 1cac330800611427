"""Checks at the door of `rgap.reconstruct`: what was given, what is needed, before any work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rgap.chain import Chain, prepare
from rgap.client import check_loss
from rgap.results import UnsupportedLayerError


def checked_chain(model: nn.Module | Chain, image_shape: tuple[int, ...] | None) -> Chain:
    """The prepared network, or a refusal."""
    if isinstance(model, Chain):
        return model if image_shape is None else prepare(model, image_shape)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; give an nn.Module or a Chain from rgap.prepare")
    if image_shape is None:
        raise ValueError("image_shape is missing; give (channels, height, width), or a Chain from rgap.prepare")
    return prepare(model, image_shape)


def check_arguments(chain: Chain, loss, batch_size, pixel_range, rcond, noise_std) -> None:
    """Refuses what is out of range, by name."""
    check_loss(loss)
    if loss != "logistic":
        raise ValueError(f"the gradient of the {loss} loss cannot be inverted yet; the logistic loss can")
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size}; give a positive integer, or None to find it from the gradient")
    limits = tuple(pixel_range) if isinstance(pixel_range, Sequence) else ()
    if len(limits) != 2 or not limits[0] < limits[1]:
        raise ValueError(f"pixel_range is {pixel_range}; give (smallest, largest)")
    if rcond is not None and not 0 <= rcond < 1:
        raise ValueError(f"rcond is {rcond}; it must be at least 0 and below 1")
    if noise_std is not None and not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std is {noise_std}; it must be at least 0 and finite")
    head = chain.layers[-1]
    if (outputs := head.output_shape[0]) != 1:
        raise UnsupportedLayerError(f"the last layer {head.name!r} has {outputs} outputs; the logistic loss takes 1")


def checked_labels(labels: Tensor | Sequence[int] | None) -> int | None:
    """The label that was given for a single image, or None."""
    if labels is None:
        return None
    values = torch.as_tensor(labels)
    if values.numel() == 0:
        raise ValueError("labels are empty; give one for the image, or None")
    if values.shape != (1,) or values.is_floating_point() or values.item() not in (0, 1):
        raise ValueError(f"labels are {values.tolist()}; a single image of the logistic loss takes [0] or [1]")
    return int(values.item())
