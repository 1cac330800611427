"""Mini-batches through convolutions: predicted limits, and random networks within and beyond them."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.metrics import match, psnr_db
from rgap.ranks.largest_batch import LargestBatch, largest_batch
from rgap.results import Reconstruction

SIZE = 8
"""Side of the images of the sample."""

BATCHES = 6
"""Largest predicted limit of a network of the sample that is attacked beyond it."""

CLASSES = 12
"""Outputs of the sample's networks under cross-entropy: enough that convolutions set the limit."""

RIGHT = 50.0
"""PSNR from which on an image is right, dB."""


def batch_limits(networks: Mapping[str, nn.Module], image_shape: tuple[int, int, int]) -> pd.DataFrame:
    """Predicts how many images behind one gradient come back, for several networks.

    Args:
        networks: Name -> network.
        image_shape: (C, H, W).

    Returns:
        network, largest_batch, without_virtual_constraints, layer (the one that limits) and reason.
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

    Args:
        count: How many.
        seed: Of all draws.

    Returns:
        case, limit (the predicted largest batch), batch, beyond, verdict, psnr_db (the smallest over the images), ok
        and why: a false certificate is not ok, nor an image that is certified beyond the limit.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = tqdm(range(count), desc="batches through convolutions", disable=not sys.stderr.isatty())
    return pd.DataFrame([_sample(generator, beyond=number % 2 == 1) for number in numbers])


def _sample(generator: torch.Generator, *, beyond: bool) -> dict:
    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    while True:
        network, case, loss = _network(generator, pick)
        limit = largest_batch(network, (3, SIZE, SIZE), loss)
        if 0 < limit.batch_size <= BATCHES and (not beyond or _set_by_convolution(limit)):
            break
    batch = limit.batch_size + pick(1, 2) if beyond else pick(*range(1, limit.batch_size + 1))
    dtype, trouble = pick("float32", "float64"), pick("", "", "", "equal", "size")
    images = torch.rand(batch, 3, SIZE, SIZE, generator=generator) ** 2
    labels = torch.randint(2 if loss == "logistic" else CLASSES, (batch,), generator=generator)
    if trouble == "equal" and batch > 1:
        images[1], labels[1] = images[0], labels[0]
    given = max(1, batch + pick(-1, 1)) if trouble == "size" else batch
    network = network.to(getattr(torch, dtype))
    gradients = client_gradients(network, images.to(getattr(torch, dtype)), labels, loss)
    result = reconstruct(network, gradients, (3, SIZE, SIZE), loss, batch_size=given)
    quality = psnr_db(result.images, images[match(result.images, images)]).tolist()
    why = _what_is_wrong(result, quality, batch, limit.batch_size)
    case = f"{case} {dtype} B={batch} given={given} {trouble if trouble == 'equal' else ''}".strip()
    row = {"case": case, "limit": limit.batch_size, "batch": batch, "beyond": beyond, "verdict": result.verdict}
    return {**row, "psnr_db": min(quality, default=float("nan")), "ok": not why, "why": why}


def _what_is_wrong(result: Reconstruction, quality: list[float], batch: int, limit: int) -> str:
    """What no result may be, in words: what is certified must be right, complete, and within the limit."""
    verdicts = [verdict for verdict, _ in result.per_image] or [result.verdict] * len(quality)
    wrong = sum(verdict == "exact" and value < RIGHT for verdict, value in zip(verdicts, quality, strict=True))
    if wrong:
        return f"{wrong} wrong images are certified"
    if result.verdict == "exact" and len(quality) < batch:
        return "a batch is certified that is not complete"
    return (
        f"certified beyond the predicted largest batch of {limit}"
        if result.verdict == "exact" and batch > limit
        else ""
    )


def _set_by_convolution(limit: LargestBatch) -> bool:
    """Whether one convolution sets the limit, and all other layers would let two images more through."""
    lowest = sorted(one.limit for one in limit.limits if one.limit is not None)
    return all(one.limit is not None for one in limit.limits) and lowest[1] >= limit.batch_size + 2


def _network(generator: torch.Generator, pick) -> tuple[nn.Module, str, str]:
    """One to three convolutions of random width and stride, 3×3, two or three fully connected layers."""
    bias, loss = pick(True, False), pick("cross_entropy", "cross_entropy", "logistic")
    modules: list[nn.Module] = []
    channels, size, case = 3, SIZE, []
    for depth in range(pick(1, 2, 2, 3)):
        outputs, stride = pick(*((6, 9, 12, 16) if depth == 0 else (3, 4, 8, 12, 16))), pick(1, 2)
        conv = nn.Conv2d(channels, outputs, 3, stride, 1, bias=bias)
        modules += [conv, nn.LeakyReLU(pick(0.1, 0.3, 0.6))]
        channels, size = outputs, (size - 1) // stride + 1
        case.append(f"{outputs}/{stride}")
    widths = (48, CLASSES) if loss == "cross_entropy" else (64, 24, 1)
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
