"""Whether the optimisers are sound: they must succeed where they are known to work."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import torch
from torch import Tensor, nn

from rgap import models
from rgap.baselines import dlg, inverting_gradients
from rgap.client import client_gradients
from rgap.experiments.sweeps.methods import one_thread
from rgap.experiments.sweeps.parallel import run_each
from rgap.metrics import psnr_db


def wide_lenet(seed: int = 0) -> nn.Module:
    """LeNet with sigmoids and weights uniform in ±0.5, as Deep Leakage from Gradients was shown on, ten classes."""
    model = models.lenet(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
    return model


def small_convnet(seed: int = 0) -> nn.Module:
    """Three 3×3 convolutions of 16 channels with biases and ELU (strides 1, 2, 2) and a linear layer, ten classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules: list[nn.Module] = []
        for inputs, stride in ((3, 1), (16, 2), (16, 2)):
            modules += [nn.Conv2d(inputs, 16, 3, stride, 1), nn.ELU()]
        return nn.Sequential(*modules, nn.Flatten(), nn.Linear(1024, 10)).eval()


SETTINGS: dict[str, tuple[Callable[[int], nn.Module], Callable]] = {
    "DLG": (wide_lenet, dlg),
    "Inverting Gradients": (small_convnet, inverting_gradients),
}
"""Method -> the network on which it is known to work, and the attack."""


def soundness(
    images: Tensor, labels: Tensor, steps: Mapping[str, int], jobs: int = 1
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Each optimiser on its own network, a new seed for every image; the label is inferred.

    Args:
        images: (N, 3, 32, 32).
        labels: (N,), of ten classes.
        steps: Method -> steps; the methods that are tried.
        jobs: Processes on this machine.

    Returns:
        One row a run (method, image, psnr_db, label_found, verdict), and method -> the images found.
    """
    keys = [(method, i) for method in steps for i in range(len(images))]
    calls = [(method, images[i : i + 1], labels[i : i + 1], i, steps[method]) for method, i in keys]
    done = run_each(_run, calls, jobs, title="soundness")
    rows = [{"method": method, "image": i} | row for (method, i), (row, _) in zip(keys, done, strict=True)]
    found = {m: torch.cat([x for (method, _), (_, x) in zip(keys, done, strict=True) if method == m]) for m in steps}
    return pd.DataFrame(rows), found


def _run(method: str, image: Tensor, label: Tensor, seed: int, steps: int):
    make, attack = SETTINGS[method]
    with one_thread():
        model = make(seed)
        gradients = client_gradients(model, image, label, loss="cross_entropy")
        result = attack(model, gradients, tuple(image.shape[1:]), "cross_entropy", steps=steps, seed=seed)
    row = {"psnr_db": psnr_db(result.images, image).item(), "label_found": bool(result.labels[0] == label[0])}
    return row | {"verdict": result.verdict}, result.images
