"""Notebook 09: mini-batches through convolutions: predicted limits, and networks within and beyond them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.common import MIN_CERTIFIED_PSNR_DB, certified, choice, progress
from rgap.experiments.drawing import finish, lines, mark, name_lines
from rgap.metrics import match, psnr_db
from rgap.ranks.largest_batch import LargestBatch, largest_batch

SAMPLE_SHAPE = (3, 8, 8)  # shape of the images of the sample
SAMPLE_CLASSES = 12  # outputs of the sample's networks under cross-entropy: enough that convolutions set the limit
MAX_SAMPLE_LIMIT = 6  # networks with a larger predicted limit are left out of the sample


def batch_limits(networks: Mapping[str, nn.Module], image_shape: tuple[int, int, int]) -> pd.DataFrame:
    """Predicts for several networks, name -> network, how many images (C, H, W) behind one gradient come back.

    Returns network, largest_batch, without_virtual_constraints, layer (the one that limits) and reason.
    """
    rows = []
    for name, network in networks.items():
        found = largest_batch(network, image_shape)
        row = {"network": name, "largest_batch": found.batch_size, "without_virtual_constraints": found.alone}
        limit = min((limit for limit in found.limits if limit.limit is not None), key=lambda limit: limit.limit)
        rows.append({**row, "layer": limit.name, "reason": limit.reason})
    return pd.DataFrame(rows)


def sample_conv_batches(count: int = 100, seed: int = 0) -> pd.DataFrame:
    """Random small convolutional networks and batches, within the predicted limit and, every second one, beyond it.

    Columns: case, limit (the predicted largest batch), batch, beyond, verdict, psnr_db (the smallest over the images),
    ok and why: a false certificate is not ok, nor an image that is certified beyond the limit.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = progress(range(count), "batches through convolutions")
    return pd.DataFrame([_attack_random_batch(generator, beyond=number % 2 == 1) for number in numbers])


def _attack_random_batch(generator: torch.Generator, *, beyond: bool) -> dict:
    pick = partial(choice, generator)
    while True:
        network, case, loss = _random_network(generator, pick)
        limit = largest_batch(network, SAMPLE_SHAPE, loss)
        if 0 < limit.batch_size <= MAX_SAMPLE_LIMIT and (not beyond or _set_by_convolution(limit)):
            break
    batch = limit.batch_size + pick(1, 2) if beyond else pick(*range(1, limit.batch_size + 1))
    dtype, trouble = pick("float32", "float64"), pick("", "", "", "equal", "size")
    images = torch.rand(batch, *SAMPLE_SHAPE, generator=generator) ** 2
    labels = torch.randint(2 if loss == "logistic" else SAMPLE_CLASSES, (batch,), generator=generator)
    if trouble == "equal" and batch > 1:
        images[1], labels[1] = images[0], labels[0]
    given = max(1, batch + pick(-1, 1)) if trouble == "size" else batch
    network = network.to(getattr(torch, dtype))
    gradients = client_gradients(network, images.to(getattr(torch, dtype)), labels, loss)
    result = reconstruct(network, gradients, SAMPLE_SHAPE, loss, batch_size=given, gradient_scale=1.0)
    quality = psnr_db(result.images, images[match(result.images, images)])
    wrong, why = int((certified(result) & (quality < MIN_CERTIFIED_PSNR_DB)).sum()), ""
    if wrong:
        why = f"{wrong} wrong images are certified"
    elif result.verdict == "exact" and len(quality) < batch:
        why = "an incomplete batch is certified"
    elif result.verdict == "exact" and batch > limit.batch_size:
        why = f"certified beyond the predicted largest batch of {limit.batch_size}"
    case = f"{case} {dtype} B={batch} given={given} {trouble if trouble == 'equal' else ''}".strip()
    row = {"case": case, "limit": limit.batch_size, "batch": batch, "beyond": beyond, "verdict": result.verdict}
    return {**row, "psnr_db": min(quality.tolist(), default=float("nan")), "ok": not why, "why": why}


def _set_by_convolution(limit: LargestBatch) -> bool:
    """Whether one convolution sets the limit, and all other layers would let two images more through."""
    lowest = sorted(one.limit for one in limit.limits if one.limit is not None)
    return all(one.limit is not None for one in limit.limits) and lowest[1] >= limit.batch_size + 2


def _random_network(generator: torch.Generator, pick: Callable) -> tuple[nn.Module, str, str]:
    """One to three 3×3 convolutions of random width and stride, two or three fully connected layers; text and loss."""
    bias, loss = pick(True, False), pick("cross_entropy", "cross_entropy", "logistic")
    modules: list[nn.Module] = []
    (channels, size, _), case = SAMPLE_SHAPE, []
    for depth in range(pick(1, 2, 2, 3)):
        outputs, stride = pick(*((6, 9, 12, 16) if depth == 0 else (3, 4, 8, 12, 16))), pick(1, 2)
        conv = nn.Conv2d(channels, outputs, 3, stride, 1, bias=bias)
        modules += [conv, nn.LeakyReLU(pick(0.1, 0.3, 0.6))]
        channels, size = outputs, (size - 1) // stride + 1
        case.append(f"{outputs}/{stride}")
    widths = (48, SAMPLE_CLASSES) if loss == "cross_entropy" else (64, 24, 1)
    inputs = channels * size * size
    modules.append(nn.Flatten())
    for width in widths:
        modules += [nn.Linear(inputs, width, bias=bias), nn.LeakyReLU(0.2)]
        inputs = width
    with torch.no_grad():
        for p in nn.ParameterList(p for module in modules for p in module.parameters()):
            fan = p[0].numel() if p.ndim > 1 else 10
            p.copy_(torch.randn(p.shape, generator=generator) / fan**0.5)
    case = f"{' '.join(case)} {'-'.join(map(str, widths))} {'bias' if bias else 'no bias'}"
    return nn.Sequential(*modules[:-1]), case, loss


def plot_against_batch(runs: pd.DataFrame, value: str, label: str, limits: Mapping[str, int]) -> Figure:
    """One number of every attack against the batch size, a line for each precision; bands are the extremes over seeds.

    Runs have the columns `batch`, `dtype` and `value`; limits are name -> largest batch, each a dotted line just
    beyond.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    lines(axis, runs, "batch", value, by="dtype")
    for name, limit in limits.items():
        mark(axis, limit + 0.5, f"{name}: {limit}", ha="right")
    axis.set(xlabel="images in the batch, B", ylabel=label, ylim=(0, None))
    axis.set_xlim(0.5, max([*limits.values(), runs["batch"].max()]) + 0.9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    name_lines(axis)
    return finish(figure)
