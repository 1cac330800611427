"""The losses that a client trains on, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.arguments import check_count, check_number, check_targets, check_tensor

LOSSES = ("logistic", "cross_entropy", "mse")  # by name

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
