"""Mini-batches: how many images come back, how well, and at what cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise, product

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.metrics import match, mse, psnr_db
from rgap.models import SLOPE
from rgap.network.chain import prepare
from rgap.results import Reconstruction

COSINE = 1 - 1e-6
"""Direction cosine from which on an image counts as one of the batch."""


def attack_batches(
    make_model: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    dtype: str = "float32",
    loss: str = "logistic",
) -> tuple[pd.DataFrame, list[Reconstruction]]:
    """Attacks batches of several sizes, each drawn from the images by its seed.

    Args:
        make_model: Seed -> fully connected network.
        images: (N, C, H, W) in [0, 1], N at least the largest batch size.
        labels: (N,), given to the client, never to the attack.
        batch_sizes: Images behind one gradient.
        seeds: Seeds of the weights, of the draw and of the attack's starts.
        dtype: Name of the torch dtype in which the client computes.
        loss: A loss of `rgap.reconstruct`.

    Returns:
        A row for each batch (batch, seed, verdict, and what `batch_outcome` returns, seconds) and the results in the
        same order.
    """
    rows, results = [], []
    runs = list(product(batch_sizes, seeds))
    for batch, seed in tqdm(runs, desc="batches", disable=not sys.stderr.isatty()):
        model = make_model(seed).to(getattr(torch, dtype))
        chain = prepare(model, tuple(images.shape[1:]))
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:batch]
        gradients = client_gradients(model, images[drawn], labels[drawn], loss)
        start = time.perf_counter()
        result = reconstruct(chain, gradients, loss=loss, batch_size=batch, seed=seed)
        seconds = time.perf_counter() - start
        results.append(result)
        outcome = batch_outcome(result, images[drawn], labels[drawn])
        rows.append({"batch": batch, "seed": seed, "verdict": result.verdict, **outcome, "seconds": seconds})
    return pd.DataFrame(rows), results


def batch_outcome(result: Reconstruction, images: Tensor, labels: Tensor) -> dict:
    """How far a batch's result is from the truth.

    Args:
        result: What the attack returned.
        images: The true images, (B, C, H, W).
        labels: The true labels, (B,).

    Returns:
        found (images returned), false (images returned that are none of the batch, by direction), certified (with the
        verdict "exact"), cosine (the smallest direction cosine to the matched truth), mse (the largest over certified
        images; NaN without any), psnr_db (the smallest over all) and label_share (of labels that are right).
    """
    order = match(_unit(result.images), _unit(images))
    truth = images[order]
    cosine = (_unit(result.images) * _unit(truth)).flatten(1).sum(1)
    errors, quality = mse(result.images, truth), psnr_db(result.images, truth)
    exact = _certified(result)
    return {
        "found": len(result.images),
        "false": int((cosine < COSINE).sum()),
        "certified": int(exact.sum()),
        "cosine": min(cosine.tolist(), default=float("nan")),
        "mse": max(errors[exact].tolist(), default=float("nan")),
        "psnr_db": min(quality.tolist(), default=float("nan")),
        "label_share": (result.labels.cpu() == labels[order]).double().mean().item(),
    }


def width_table(
    make_model: Callable[[int, tuple[int, ...]], nn.Module],
    images: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    seed: int = 0,
) -> pd.DataFrame:
    """One batch against networks with more and more units in the first hidden layer.

    Args:
        make_model: Seed and hidden widths -> network; the second hidden layer keeps 100 units.
        images: The batch, (B, C, H, W).
        labels: (B,).
        widths: Units of the first hidden layer.
        seed: Of weights and starts.

    Returns:
        width, found, false, certified, cosine, mse, psnr_db, label_share, parameters, megabytes (of the float64 arrays
        that the attack works on at once: weights, gradients and the factors of the first gradient), seconds.
    """
    rows = []
    for width in widths:
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
    of zeros, or a batch size that is given wrongly.

    Args:
        count: How many.
        seed: Of all draws.

    Returns:
        case, verdict, psnr_db (the smallest over the images), ok and why: a false certificate, or an image that is none
        of the batch, is not ok.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_sample(generator) for _ in range(count)])


def _sample(generator: torch.Generator) -> dict:
    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    def between(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    widths = (between(24, 160), between(4, 40))
    bias, dtype, trouble = pick(True, False), pick("float32", "float64"), pick("", "", "", "equal", "zeros", "size")
    slope, batch = pick(SLOPE, 0.01, 0.6), between(2, min(24, widths[1] + 4))
    shape = (1, 8, 8)
    sizes = (64, *widths, 1)
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
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
    result = reconstruct(model, client_gradients(model, images, labels), shape, batch_size=given)
    return {"case": case, "verdict": result.verdict, **_checked(result, images)}


def _checked(result: Reconstruction, images: Tensor) -> dict:
    """Whether everything returned is of the batch, and everything certified is right."""
    distance = torch.cdist(result.images.flatten(1), images.double().flatten(1))
    cosine = _unit(result.images).flatten(1) @ _unit(images).flatten(1).T
    cosine[distance < 1e-3] = 1.0  # an image of zeros has no direction
    nearest = cosine.argmax(1)
    quality = psnr_db(result.images, images[nearest])
    false = int((cosine < COSINE).all(1).sum())
    certified = _certified(result)
    wrong = int((certified & (quality < 50)).sum())
    incomplete = result.verdict == "exact" and len(set(nearest.tolist())) < len(images)
    why = "; ".join(
        text
        for text, holds in (
            (f"{false} returned images are none of the batch", false),
            (f"{wrong} wrong images are certified", wrong),
            ("a batch is certified that is not complete", incomplete),
        )
        if holds
    )
    return {"psnr_db": min(quality.tolist(), default=float("nan")), "ok": not why, "why": why}


def _certified(result: Reconstruction) -> Tensor:
    """Which images are exact by their own verdict, (F,); a single image has that of the result."""
    verdicts = [verdict for verdict, _ in result.per_image] or [result.verdict] * len(result.images)
    return torch.tensor([verdict == "exact" for verdict in verdicts], dtype=torch.bool)


def _unit(images: Tensor) -> Tensor:
    flat = images.detach().double().flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)).reshape(images.shape)
