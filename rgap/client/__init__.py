"""What the client does: its loss and gradient, the defences that it may apply, files, updates and training."""

from rgap.client.defences import clip_and_noise, epsilon, gaussian_noise, prune, quantise
from rgap.client.files import load_gradients, save_gradients
from rgap.client.gradients import client_gradients, gradients_of, unflatten
from rgap.client.losses import (
    LOSS_OUTPUTS,
    LOSSES,
    check_label,
    check_loss,
    check_smoothing,
    loss_value,
    outputs_fit,
)
from rgap.client.updates import LocalTraining, UpdateGradients, gradients_from_update, mean_gradients

__all__ = [
    "LOSSES", "LOSS_OUTPUTS", "LocalTraining", "UpdateGradients", "check_label", "check_loss", "check_smoothing",
    "client_gradients", "clip_and_noise", "epsilon", "gaussian_noise", "gradients_from_update", "gradients_of",
    "load_gradients", "loss_value", "mean_gradients", "outputs_fit", "prune", "quantise", "save_gradients",
    "unflatten",
]  # fmt: skip
