"""The gradient that a client shares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rgap.client.losses import loss_value


def client_gradients(model: nn.Module, images: Tensor, labels: Tensor, loss: str = "logistic") -> list[Tensor]:
    """The gradient that a client shares: of the mean loss of its batch, by every parameter.

    Args:
        model: The network, used as it is (mode and dtype); the gradients have its parameters' dtype.
        images: (B, C, H, W), in [0, 1].
        labels: (B,), int64.
        loss: A name in `LOSSES`.

    Returns:
        One tensor for each parameter, in the order of `model.parameters()`.

    Raises:
        ValueError: If the batch is empty, images and labels differ in number, labels are out of range, or the loss is
            unknown.
    """
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if len(images) == 0:
        raise ValueError("the batch is empty; give at least one image")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, and {len(images)} images need ({len(images)},)")
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}; they must be integers")
    return list(gradients_of(model, dict(model.named_parameters()), images, labels, loss).values())


def gradients_of(
    model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor, loss: str
) -> dict[str, Tensor]:
    """Gradients of the mean loss at given parameter values, leaving the model and its `.grad`s untouched.

    Args:
        model: The network.
        parameters: Parameter name -> value at which to differentiate; their dtype is computed in.
        images: (B, C, H, W).
        labels: (B,), int64.
        loss: A name in `LOSSES`.

    Returns:
        Parameter name -> gradient.
    """
    values = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    some = next(iter(values.values()))
    buffers = {n: b.to(some.dtype if b.is_floating_point() else b.dtype, copy=True) for n, b in model.named_buffers()}
    with torch.enable_grad():
        outputs = torch.func.functional_call(model, {**buffers, **values}, images.to(some))
        value = loss_value(loss, outputs, labels.to(some.device))
    return dict(zip(values, torch.autograd.grad(value, list(values.values()), materialize_grads=True), strict=True))
