"""The gradient that a client shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn

from rgap.arguments import check_model, check_targets, check_tensor
from rgap.client.losses import check_loss, loss_value
from rgap.isolation import for_autograd, isolated
from rgap.models import trained_names
from rgap.network.forward import outputs_of, select_output
from rgap.results import GradientMismatchError


def client_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: str = "logistic",
    *,
    output: str | int | None = None,
    label_smoothing: float = 0.0,
) -> list[Tensor]:
    """The gradient that a client shares: of the mean loss of its batch, by every parameter.

    Args:
        model: The network, used in the mode and dtype that it has; the gradients have its parameters' dtype.
        images: (B, C, H, W), in [0, 1].
        labels: (B,), int64, or real-valued targets (B, outputs), as in `loss_value`.
        loss: A name in `LOSSES`.
        output: Name or place of the output that the loss is taken on, where the network gives several; the first tensor
            by default.
        label_smoothing: ε of smoothed labels, as in `loss_value`.

    Returns:
        One tensor for each parameter, in the order of `model.parameters()`; zeros for a parameter that is frozen
        (`requires_grad=False`), unless all are.

    Raises:
        ValueError: If the batch is empty, images and labels differ in number, labels are out of range, or the loss is
            unknown.

    Example:
        >>> import rgap
        >>> model = rgap.models.cnn6(seed=0)
        >>> images, labels = rgap.data.load_images("embedded", count=1, classes=2)
        >>> gradients = rgap.client_gradients(model, images, labels)
        >>> [tuple(gradient.shape) for gradient in gradients[:2]]
        [(12, 3, 4, 4), (36, 12, 3, 3)]
    """
    check_model(model)
    images = check_tensor("images", images, finite=True)
    if images.ndim == 0 or len(images) == 0:
        raise ValueError("images are an empty batch; give at least one image, (B, C, H, W)")
    labels = check_targets(labels, len(images))
    model = select_output(model, output)
    options = {"label_smoothing": label_smoothing}
    gradients = gradients_of(model, dict(model.named_parameters()), images, labels, loss, **options)
    trained = trained_names(model)
    return [g if name in trained else torch.zeros_like(g) for name, g in gradients.items()]


@isolated(one_thread=False)
def gradients_of(
    model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor, loss: str, *,
    label_smoothing: float = 0.0, weights: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of the mean loss, by parameter name, at given parameter values and in their dtype.

    The model and its `.grad`s are left untouched; images (B, C, H, W), labels (B,) int64, `loss` as in `LOSSES`,
    label smoothing and weights as in `loss_value`.

    Example:
        >>> import torch
        >>> from rgap import client
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.ones(1, 2), torch.tensor([1])
        >>> zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> client.gradients_of(model, zeros, x, y, "logistic")["weight"].tolist()
        [[-0.5, -0.5]]
    """
    check_model(model)
    check_loss(loss)
    images, labels = check_tensor("images", images), check_targets(labels)
    if not parameters or set(parameters) - set(dict(model.named_parameters())):
        raise ValueError(f"model has parameters {list(dict(model.named_parameters()))}, not {list(parameters)}")
    return loss_gradients(model, parameters, images, labels, loss, label_smoothing=label_smoothing, weights=weights)


def loss_gradients(
    model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor, loss: str, **options
) -> dict[str, Tensor]:
    """The same of a model, parameters, images and labels that have been checked."""
    values = {name: for_autograd(p).requires_grad_() for name, p in parameters.items()}
    some = next(iter(values.values()))
    buffers = {n: b.to(some.dtype if b.is_floating_point() else b.dtype, copy=True) for n, b in model.named_buffers()}
    with torch.enable_grad():
        try:
            outputs = outputs_of(model, {**values, **buffers}, for_autograd(images.to(some)))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"images of shape {tuple(images.shape)} do not pass the network: {reason}") from error
        value = loss_value(loss, outputs, labels.to(some.device), **options)
    return dict(zip(values, torch.autograd.grad(value, list(values.values()), materialize_grads=True), strict=True))


def unflatten(model: nn.Module, vector: Tensor) -> list[Tensor | None]:
    """One vector of all gradients as a list with a tensor for each parameter, in the order of `model.parameters()`.

    The inverse of `torch.nn.utils.parameters_to_vector`. A vector of the trained parameters alone gives None for those
    that are frozen.

    Args:
        model: The network.
        vector: (n,), n entries of all parameters, or of all trained ones.

    Raises:
        GradientMismatchError: If it is no vector, or of another length.

    Example:
        >>> import torch
        >>> from rgap.client import unflatten
        >>> [tuple(part.shape) for part in unflatten(torch.nn.Linear(3, 2), torch.arange(8.0))]
        [(2, 3), (2,)]
    """
    named, vector = dict(check_model(model).named_parameters()), check_tensor("vector", vector, GradientMismatchError)
    for chosen in (list(named), trained_names(model)):
        sizes = [named[name].numel() for name in chosen]
        if vector.ndim == 1 and len(vector) == sum(sizes):
            parts = dict(zip(chosen, vector.split(sizes), strict=True))
            return [parts[name].reshape(p.shape) if name in parts else None for name, p in named.items()]
    entries = sum(p.numel() for p in named.values())
    raise GradientMismatchError(f"vector has shape {tuple(vector.shape)}; the parameters have {entries} entries")


def named_tensors(given: Mapping | Iterable, what: str, *, frozen: bool = False) -> dict[str | int, Tensor | None]:
    """Name, or place in a list, of every tensor; refuses whatever is neither a mapping nor a list of tensors.

    With `frozen`, None stands for a parameter that the client does not train.
    """
    if isinstance(given, Tensor | str | bytes | Set) or not isinstance(given, Iterable):
        kind = type(given).__name__
        raise GradientMismatchError(f"{what}: a {kind}; give a list or a mapping with a tensor for each parameter")
    named = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
    return {
        name: None if frozen and value is None else check_tensor(f"{what}: {name!r}", value, GradientMismatchError)
        for name, value in named.items()
    }
