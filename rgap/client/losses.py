"""The losses that a client trains on, by name."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

LOSSES = ("logistic", "cross_entropy", "mse")
"""Names of the losses."""

LOSS_OUTPUTS = {"logistic": "(B, 1)", "cross_entropy": "(B, classes), classes ≥ 2", "mse": "(B, classes)"}


def loss_value(loss: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a batch.

    Args:
        loss: "logistic": log(1 + e^{−y f}), y = 2·label − 1, for one output; "cross_entropy": softmax cross-entropy;
            "mse": squared error, mean over all elements, against the one-hot label, or y = ±1 for one output.
        outputs: (B, classes).
        labels: (B,), int64; 0 or 1 for one output, else the index of the class.

    Raises:
        ValueError: If the loss is unknown, or does not fit the outputs or the labels.
    """
    check_loss(loss)
    if outputs.ndim != 2 or not outputs_fit(loss, outputs.shape[1]):
        raise ValueError(
            f"the {loss} loss takes outputs {LOSS_OUTPUTS[loss]}, and the network gives {tuple(outputs.shape)}"
        )
    classes = max(outputs.shape[1], 2)
    if ((labels < 0) | (labels >= classes)).any():
        hint = "; load_images(..., classes=2) maps them to two" if classes == 2 else ""
        raise ValueError(
            f"labels of the {loss} loss are 0 {'or 1' if classes == 2 else f'to {classes - 1}'}, and "
            f"{sorted(set(labels.tolist()))} were given{hint}"
        )
    if loss == "cross_entropy":
        return F.cross_entropy(outputs, labels)
    y = (2 * labels - 1).to(outputs.dtype)[:, None]
    if loss == "logistic":
        return F.softplus(-y * outputs).mean()
    return F.mse_loss(outputs, y if outputs.shape[1] == 1 else F.one_hot(labels, classes).to(outputs.dtype))


def outputs_fit(loss: str, outputs: int) -> bool:
    """Whether a network with so many outputs can have this loss."""
    return outputs == 1 if loss == "logistic" else outputs >= (2 if loss == "cross_entropy" else 1)


def check_loss(loss: str) -> None:
    """Refuses an unknown loss by name."""
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
