"""What training does to the attack."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.client.training import training
from rgap.metrics import psnr_db
from rgap.network.chain import prepare


def trained_attacks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    victims: Tensor,
    victim_labels: Tensor,
    loss: str = "logistic",
    *,
    epochs: int = 3,
    seed: int = 0,
    dtype: str = "float32",
    **options,
) -> pd.DataFrame:
    """Trains a network, and attacks every victim after each epoch.

    Args:
        model: Where training starts.
        images: What it is trained on, (N, C, H, W) in [0, 1].
        labels: (N,).
        victims: What is attacked, each alone, (M, C, H, W).
        victim_labels: (M,), given to the client, never to the attack.
        loss: A name in `rgap.client.LOSSES`.
        epochs: Passes over the images.
        seed: Of their order.
        dtype: Name of the torch dtype in which the client computes the gradient.
        **options: For `rgap.client.training.training`.

    Returns:
        A row for each epoch (0 is before training) and victim: epoch, loss (mean over the images), image,
        gradient_norm (over all parameters), condition (largest of a layer's system), verdict, label_found, twins
        (consistent candidates inside the pixel range), psnr_db, psnr_best_db (of the candidate closest to the truth).
    """
    rows = []
    states = training(model, images, labels, loss, epochs=epochs, seed=seed, **options)
    for epoch, (mean_loss, trained) in enumerate(states):
        client = trained.to(getattr(torch, dtype))
        chain = prepare(client, tuple(victims.shape[1:]))
        for i, (victim, label) in enumerate(zip(victims.split(1), victim_labels.split(1), strict=True)):
            gradients = client_gradients(client, victim, label, loss)
            result = reconstruct(chain, gradients, loss=loss)
            quality = [psnr_db(c.images, victim.to(c.images)).item() for c in result.candidates]
            rows.append({"epoch": epoch, "loss": mean_loss, "image": i})
            rows[-1] |= {"gradient_norm": sum(g.double().square().sum().item() for g in gradients) ** 0.5}
            rows[-1] |= {"condition": max(r.condition for r in result.layers if r.condition is not None)}
            rows[-1] |= {"verdict": result.verdict, "label_found": bool(result.labels[0] == label)}
            rows[-1] |= {"twins": sum(c.in_pixel_range for c in result.candidates)}
            rows[-1] |= {"psnr_db": quality[0], "psnr_best_db": max(quality)}
    return pd.DataFrame(rows)
