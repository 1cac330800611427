"""Notebook 03: mini-batches through fully connected networks: how many images come back, how well, at what cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap.artifact.progress import progress
from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.common import (
    MIN_CERTIFIED_PSNR_DB,
    SAME_IMAGE_COSINE,
    attack_batches,
    certified,
    choice,
    directions,
)
from rgap.experiments.drawing import finish, lines, mark
from rgap.metrics import psnr_db
from rgap.models import LEAKY_SLOPE
from rgap.network.layer import Chain
from rgap.results import Reconstruction


def combination(
    model: nn.Module | Chain, gradients: Sequence[Tensor] | Mapping[str, Tensor],
    image_shape: tuple[int, int, int] | None = None, loss: str = "logistic", **options,
) -> Reconstruction:  # fmt: skip
    """Plain R-GAP on a batch's gradient, treated as that of a single image (Zhu & Blaschko 2021).

    Arguments are those of `rgap.reconstruct`. Its one image is a linear combination of the batch's; the verdict is
    usually "inconsistent".
    """
    return reconstruct(
        model, gradients, image_shape, loss, batch_size=1, virtual_constraints=False, **options, gradient_scale=1.0
    )


def width_table(
    make_model: Callable[[int, tuple[int, ...]], nn.Module], images: Tensor, labels: Tensor, widths: Sequence[int],
    seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """One batch (B, C, H, W) against networks with more and more units in the first hidden layer.

    `make_model` takes a seed and hidden widths, of which the second stays 100. Returns width, found, false, certified,
    cosine, mse, psnr_db, label_share, parameters, megabytes (of the float64 arrays that the attack works on at once:
    weights, gradients and the factors of the first gradient), seconds.
    """
    rows = []
    for width in progress(widths, "widths"):
        model = make_model(seed, (width, 100))
        table, _ = attack_batches(lambda _, m=model: m, images, labels, [len(images)], [seed])
        count = sum(p.numel() for p in model.parameters())
        pixels = images[0].numel()
        factors = min(width, pixels) * (width + pixels)
        rows.append({"width": width, "parameters": count, "megabytes": 8 * (2 * count + factors) / 1e6})
        rows[-1] |= table.drop(columns=["batch", "seed"]).iloc[0].to_dict()
    return pd.DataFrame(rows)


def sample_batches(count: int, seed: int = 0) -> pd.DataFrame:
    """Random fully connected networks and batches, within the limits of the method and beyond them.

    Widths, depth, slopes, biases, classes, precision and batch size are drawn; some batches have equal images, an image
    of zeros, or a batch size that is given wrongly. Columns: case, verdict, psnr_db (the smallest over the images), ok
    and why: a false certificate, or a returned image that is not in the batch, is not ok.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_attack_random_batch(generator) for _ in progress(range(count), "batches")])


def _attack_random_batch(generator: torch.Generator) -> dict:
    pick = partial(choice, generator)

    def between(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    widths = (between(24, 160), between(4, 40))
    bias, dtype, trouble = pick(True, False), pick("float32", "float64"), pick("", "", "", "equal", "zeros", "size")
    slope, batch = pick(LEAKY_SLOPE, 0.01, 0.6), between(2, min(24, widths[1] + 4))
    shape = (1, 8, 8)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((64, *widths, 1)):
        linear = nn.Linear(inputs, outputs, bias=bias)
        with torch.no_grad():
            for p in linear.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / inputs**0.5)
        layers += [linear, nn.LeakyReLU(slope)]
    model = nn.Sequential(*layers[:-1]).to(getattr(torch, dtype))
    images = torch.rand(batch, *shape, generator=generator)
    labels = torch.randint(2, (batch,), generator=generator)
    if trouble == "equal":
        images[1], labels[1] = images[0], labels[0]
    elif trouble == "zeros":
        images[0] = 0
    given = max(2, batch + pick(-2, -1, 1, 3)) if trouble == "size" else batch
    case = f"{widths[0]}-{widths[1]} {'bias' if bias else 'no bias'} slope {slope:g} {dtype} B={batch} given={given}"
    case += f" {trouble}" if trouble in ("equal", "zeros") else ""
    result = reconstruct(model, client_gradients(model, images, labels), shape, batch_size=given, gradient_scale=1.0)
    return {"case": case, "verdict": result.verdict, **_checked(result, images)}


def _checked(result: Reconstruction, images: Tensor) -> dict:
    """Whether everything returned is of the batch, and everything certified is right."""
    distance = torch.cdist(result.images.flatten(1), images.double().flatten(1))
    cosine = directions(result.images).flatten(1) @ directions(images).flatten(1).T
    cosine[distance < 1e-3] = 1.0  # an image of zeros has no direction
    nearest = cosine.argmax(1)
    quality = psnr_db(result.images, images[nearest])
    false = int((cosine < SAME_IMAGE_COSINE).all(1).sum())
    wrong = int((certified(result) & (quality < MIN_CERTIFIED_PSNR_DB)).sum())
    complaints = [f"{false} returned images are not in the batch"] if false else []
    complaints += [f"{wrong} wrong images are certified"] if wrong else []
    if result.verdict == "exact" and len(set(nearest.tolist())) < len(images):
        complaints.append("an incomplete batch is certified")
    why = "; ".join(complaints)
    return {"psnr_db": min(quality.tolist(), default=float("nan")), "ok": not why, "why": why}


def plot_seconds(runs: pd.DataFrame, limit: int) -> Figure:
    """Seconds of an attack against the batch size: medians over seeds, and bands from the smallest to the largest.

    The limit is the second layer's number of outputs: the largest batch that its gradient can separate.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    lines(axis, runs, "batch", "seconds")
    mark(axis, limit, f"second layer's width, {limit}", ha="right")
    axis.set(xlabel="images in the batch, B", ylabel="seconds", ylim=(0, None))
    return finish(figure)
