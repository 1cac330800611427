"""Notebook 10: small networks of the kinds that others publish attacks on, each recovered or told by law."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.common import progress, seeded
from rgap.experiments.real_networks import RECOVERED_DB
from rgap.metrics import psnr_db
from rgap.network.chain import prepare

MIDDLE: dict[str, Callable[[], nn.Module]] = {
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
}
"""Activations between the layers; one of them, or none, stands at the end too."""

MAX_SECONDS = 20.0  # processor seconds that a decision may take
MAX_HOPELESS_SECONDS = 1.0  # the same where a layer is short of rank

FIRST_SAMPLED, SAMPLED_SIDE, SAMPLED_LOSSES = 1000, 24, ("cross_entropy", "mse")
"""Number of the first sampled network, side of its images, and losses in turn."""

NARROW_SHARE = 0.25  # share of the convolutions that may have as few as 2 channels; the others have 12 to 16


def small_network(number: int, size: int = 32, classes: int = 10) -> tuple[nn.Sequential, str]:
    """The network of that number, which decides everything, for images (3, size, size), float64.

    It has 2 to 4 convolutions, kernels 3 to 5, strides 1 and 2, channels 2 to 16, and a linear layer; three quarters
    have an activation at the end. Returns also a description, such as "3→16 4/2, 16→12 3/1 Tanh, Sigmoid".
    """
    rng, name = np.random.default_rng([number, 20]), list(MIDDLE)[number % 3]
    end = [None, *MIDDLE][(number // 3) % 4]
    modules, parts, channels, side = [], [], 3, size
    with seeded(number):
        for _ in range(int(rng.integers(2, 5))):
            kernel, stride = int(rng.integers(3, 6)), int(rng.integers(1, 3))
            outputs = int(rng.integers(2 if rng.random() < NARROW_SHARE else 12, 17))
            modules += [nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=number % 2 == 0), MIDDLE[name]()]
            parts.append(f"{channels}→{outputs} {kernel}/{stride}")
            channels, side = outputs, (side + 2 * (kernel // 2) - kernel) // stride + 1
        modules += [nn.Flatten(), nn.Linear(channels * side * side, classes, bias=number % 2 == 0)]
        modules += [MIDDLE[end]()] if end else []
    bias = "bias" if number % 2 == 0 else "no bias"
    return nn.Sequential(*modules).double(), f"{', '.join(parts)}; {name}; {end or 'nothing'} at the end; {bias}"


def attack_small_networks(
    images: Tensor, labels: Tensor, count: int, loss: str = "cross_entropy", *, first: int = 0
) -> pd.DataFrame:
    """Attacks one network after the other from float64 gradients, each with the next of the images (N, 3, H, H).

    Virtual constraints, which may close what a layer lacks, and take up to minutes, are left out. Returns number,
    network, last (the activation at the end), verdict, psnr_db, deficit (unknowns that the layers lack, by law or
    number), seconds (of the processor, with the network's preparation) and told, whether the network is recovered at 60
    dB and certified, or its verdict is that a layer is short of rank.
    """
    rows = []
    for number in progress(range(first, first + count), "networks"):
        network, description = small_network(number, images.shape[-1])
        image, label = images[[number % len(images)]].double(), labels[[number % len(images)]]
        gradients = client_gradients(network, image, label, loss)
        begin = time.process_time()
        chain = prepare(network, tuple(image.shape[1:]))
        result = reconstruct(chain, gradients, loss=loss, virtual_constraints=False)
        row = {"number": number, "network": description, "verdict": result.verdict}
        row |= {"psnr_db": psnr_db(result.images, image).item(), "deficit": sum(r.deficit or 0 for r in result.layers)}
        rows.append(row | {"seconds": time.process_time() - begin})
    table = pd.DataFrame(rows)
    recovered = (table["verdict"] == "exact") & (table["psnr_db"] >= RECOVERED_DB)
    short = (table["verdict"] == "rank-deficient") & (table["deficit"] > 0)
    return table.assign(told=recovered | short)


def sample_small(count: int = 100, seed: int = 0) -> pd.DataFrame:
    """Small networks beyond those of the notebook, attacked with random images under two losses in turn.

    Columns: case, trouble (the loss), verdict, psnr_db, seconds, ok and why: a network neither recovered nor told short
    of rank, a decision above `MAX_SECONDS`, or one of the hopeless above `MAX_HOPELESS_SECONDS` is not ok.
    """
    first, rows = FIRST_SAMPLED + seed * count, []
    images = torch.rand(4, 3, SAMPLED_SIDE, SAMPLED_SIDE, generator=torch.Generator().manual_seed(seed))
    for number in range(first, first + count):
        loss = SAMPLED_LOSSES[number % len(SAMPLED_LOSSES)]
        table = attack_small_networks(images, torch.arange(4), 1, loss, first=number)
        (row,) = table.to_dict("records")
        allowed = MAX_SECONDS if row["verdict"] != "rank-deficient" else MAX_HOPELESS_SECONDS
        why = "" if row["told"] else "neither recovered nor told short of rank"
        why = why or (f"decided after {row['seconds']:.1f} s" if row["seconds"] > allowed else "")
        row = {"case": row["network"], "trouble": loss, **row}
        rows.append({**row, "ok": not why, "why": why})
    return pd.DataFrame(rows).drop(columns=["network", "told"])
