"""The losses that a client trains on, by name, and the gradient that it shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rgap.arguments import check_count, check_model, check_number, check_targets, check_tensor
from rgap.isolation import for_autograd, isolated
from rgap.models import trained_names
from rgap.network.forward import outputs_of, select_output
from rgap.results import GradientMismatchError

LOSSES = ("logistic", "cross_entropy", "mse")
"""Names of the losses."""

LOSS_OUTPUTS = {"logistic": "(B, 1)", "cross_entropy": "(B, classes), classes ≥ 2", "mse": "(B, classes)"}


def loss_value(
    loss: str, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """The mean loss of a batch.

    Args:
        loss: "logistic": log(1 + e^{−y f}), y = 2·label − 1, for one output; "cross_entropy": softmax cross-entropy;
            "mse": squared error, mean over all elements, against the one-hot label, or y = ±1 for one output, or
            against real-valued targets.
        outputs: (B, classes).
        labels: (B,), int64; 0 or 1 for one output, else the index of the class. Of "mse" also real-valued targets,
            floating-point (B, outputs).
        label_smoothing: ε of smoothed labels (1 − ε) onehot + ε / classes; "cross_entropy" only.
        weights: Factor of each image's loss before the mean, (B,), as class weights are; None for 1.

    Raises:
        ValueError: If the loss is unknown, or does not fit the outputs or the labels, or labels are smoothed of another
            loss than "cross_entropy".

    Example:
        >>> import torch
        >>> from rgap.client import loss_value
        >>> round(loss_value("logistic", torch.zeros(1, 1), torch.tensor([1])).item(), 4)
        0.6931
    """
    check_loss(loss)
    outputs = check_tensor("outputs", outputs)
    if not outputs.is_floating_point():
        raise ValueError(f"outputs are {outputs.dtype}; they must be floating-point")
    labels = check_targets(labels, len(outputs) if outputs.ndim else None)
    if outputs.ndim != 2 or not outputs_fit(loss, outputs.shape[1]):
        raise ValueError(
            f"the {loss} loss takes outputs {LOSS_OUTPUTS[loss]}, and the network gives {tuple(outputs.shape)}"
        )
    check_smoothing(loss, label_smoothing)
    kept = {} if weights is None else {"reduction": "none"}
    if labels.is_floating_point():
        values = _regression_loss(loss, outputs, labels.to(outputs), **kept)
    else:
        values = _class_loss(loss, outputs, labels, label_smoothing, **kept)
    if weights is not None:
        values = values.reshape(len(outputs), -1) * weights.to(outputs)[:, None]
    return values.mean()


def _regression_loss(loss: str, outputs: Tensor, targets: Tensor, **kept) -> Tensor:
    """Squared error against real-valued targets (B, outputs)."""
    if loss != "mse" or targets.shape != outputs.shape:
        raise ValueError(
            f"labels are real-valued, of shape {tuple(targets.shape)}, as targets of the mse loss are that have the "
            f"outputs' shape {tuple(outputs.shape)}; the loss is {loss}, and other labels are integers"
        )
    return F.mse_loss(outputs, targets, **kept)


def _class_loss(loss: str, outputs: Tensor, labels: Tensor, label_smoothing: float, **kept) -> Tensor:
    """A loss against labels, int64 (B,)."""
    classes = max(outputs.shape[1], 2)
    if ((labels < 0) | (labels >= classes)).any():
        hint = "; load_images(..., classes=2) maps them to two" if classes == 2 else ""
        raise ValueError(
            f"labels of the {loss} loss are 0 {'or 1' if classes == 2 else f'to {classes - 1}'}, and "
            f"{sorted(set(labels.tolist()))} were given{hint}"
        )
    y = (2 * labels - 1).to(outputs.dtype)[:, None]
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, labels, label_smoothing=label_smoothing, **kept)
    if loss == "logistic":
        return F.softplus(-y * outputs)
    target = y if outputs.shape[1] == 1 else F.one_hot(labels, classes).to(outputs.dtype)
    return F.mse_loss(outputs, target, **kept)


def check_smoothing(loss: str, label_smoothing: float | None) -> None:
    """Refuses a label smoothing outside [0, 1), or of another loss than cross-entropy.

    Example:
        >>> from rgap.client import check_smoothing
        >>> check_smoothing("mse", 0.1)
        Traceback (most recent call last):
            ...
        ValueError: label_smoothing is 0.1; only cross_entropy has it, and the loss is mse
    """
    if label_smoothing is None or check_number("label_smoothing", label_smoothing, high=1) == 0:
        return
    if loss != "cross_entropy":
        raise ValueError(f"label_smoothing is {label_smoothing}; only cross_entropy has it, and the loss is {loss}")


def outputs_fit(loss: str, outputs: int) -> bool:
    """Whether a network with this number of outputs can have this loss.

    Example:
        >>> from rgap.client import outputs_fit
        >>> outputs_fit("logistic", 1), outputs_fit("cross_entropy", 1)
        (True, False)
    """
    check_loss(loss)
    check_count("outputs", outputs, 0)
    return outputs == 1 if loss == "logistic" else outputs >= (2 if loss == "cross_entropy" else 1)


def check_label(labels: Tensor | Sequence | None, loss: str, outputs: int) -> int | Tensor | None:
    """The label that was given for a single image, or its real-valued target (outputs,), or None.

    Labels of a network with one output are 0 and 1.

    Example:
        >>> from rgap.client import check_label
        >>> check_label([3], "cross_entropy", outputs=10)
        3
    """
    if labels is None:
        return None
    values, classes = check_targets(labels, 1), max(outputs, 2)
    if values.is_floating_point():
        if loss != "mse" or values.shape[1] != outputs:
            have = f"labels are real-valued, of shape {tuple(values.shape)}"
            raise ValueError(f"{have}; only the mse loss has such targets, here of shape (1, {outputs})")
        return values[0].to("cpu", torch.float64)
    if not 0 <= values.item() < classes:
        takes = "[0] or [1]" if classes == 2 else f"[0] to [{classes - 1}]"
        raise ValueError(f"labels are {values.tolist()}; a single image of the {loss} loss takes {takes}")
    return int(values.item())


def check_loss(loss: str) -> None:
    """Refuses an unknown loss by name.

    Example:
        >>> from rgap.client import check_loss
        >>> check_loss("hinge")
        Traceback (most recent call last):
            ...
        ValueError: unknown loss 'hinge'; known: logistic, cross_entropy, mse
    """
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")


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
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    loss: str,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
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
    values = {name: for_autograd(p).requires_grad_() for name, p in parameters.items()}
    some = next(iter(values.values()))
    buffers = {n: b.to(some.dtype if b.is_floating_point() else b.dtype, copy=True) for n, b in model.named_buffers()}
    with torch.enable_grad():
        try:
            outputs = outputs_of(model, {**values, **buffers}, for_autograd(images.to(some)))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"images of shape {tuple(images.shape)} do not pass the network: {reason}") from error
        options = {"label_smoothing": label_smoothing, "weights": weights}
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
