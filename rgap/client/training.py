"""Plain training for a few epochs, so that trained weights can be attacked, too."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rgap.arguments import check_choice, check_count, check_labels, check_model, check_number, check_seed, check_tensor
from rgap.artifact.progress import progress
from rgap.client.losses import check_loss, loss_value

OPTIMISERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def training(
    model: nn.Module, images: Tensor, labels: Tensor, loss: str = "logistic", *, epochs: int = 3, seed: int = 0,
    optimiser: str = "adam", learning_rate: float = 1e-3, batch_size: int = 32,
) -> Iterator[tuple[float, nn.Module]]:  # fmt: skip
    """Trains a copy of a model and yields its state before the first epoch and after each.

    Images (N, C, H, W) in [0, 1], labels (N,) int64, `loss` a name in `LOSSES`, `optimiser` "adam" or "sgd"; the seed
    decides the order of the images. Each state is the mean loss over the images and a copy of the network, both in eval
    mode. Refuses to go on once the loss is no longer finite.
    """
    check_loss(loss)
    check_model(model)
    check_choice("optimiser", optimiser, OPTIMISERS)
    epochs, batch_size = check_count("epochs", epochs, 0), check_count("batch_size", batch_size)
    learning_rate = check_number("learning_rate", learning_rate, open_low=True)
    images, labels = check_tensor("images", images, finite=True), check_labels(labels)
    if images.ndim == 0 or len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"images are {tuple(images.shape)} and labels {len(labels)}; give as many of each, at least one"
        )
    images = images.to(next(model.parameters(), images))
    student = copy.deepcopy(model)
    steps = OPTIMISERS[optimiser](student.parameters(), learning_rate)
    generator = torch.Generator().manual_seed(check_seed(seed))
    total = epochs * math.ceil(len(images) / batch_size)
    with progress(title="training", total=total) as bar:
        yield _state(student, images, labels, loss, 0)
        for epoch in range(1, epochs + 1):
            student.train()
            for batch in torch.randperm(len(images), generator=generator).split(batch_size):
                steps.zero_grad()
                loss_value(loss, student(images[batch]), labels[batch]).backward()
                steps.step()
                bar.update()
            yield _state(student, images, labels, loss, epoch)


def _state(student: nn.Module, images: Tensor, labels: Tensor, loss: str, epoch: int) -> tuple[float, nn.Module]:
    now = copy.deepcopy(student).eval()
    with torch.no_grad():
        batches = zip(images.split(256), labels.split(256), strict=True)
        value = sum(len(y) * loss_value(loss, now(x), y).item() for x, y in batches) / len(images)
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} after epoch {epoch}; take a smaller learning_rate")
    return value, now
