"""What several experiments share: attacks on images and on batches, times and seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from rgap.artifact.progress import progress as progress  # for the other experiments
from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.isolation import isolated
from rgap.metrics import match, mse, psnr_db, ssim
from rgap.network.chain import prepare
from rgap.network.layer import Chain
from rgap.results import Reconstruction
from rgap.results.display import rescale as rescale  # for notebooks

SAME_IMAGE_COSINE = 1 - 1e-6  # cosine between the directions of two images from which on they count as the same image
MIN_CERTIFIED_PSNR_DB = 50.0  # an image of a batch that is certified as exact below this PSNR is a false certificate


class ClientStep(NamedTuple):
    """One client's gradient of one image, and what it was computed from."""

    seed: int
    dtype: str
    index: int
    chain: Chain
    image: Tensor
    label: Tensor
    gradients: list[Tensor]


def client_steps(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int],
    dtypes: Sequence[str] = ("float32",), loss: str = "logistic", title: str = "attacks",
) -> Iterator[ClientStep]:  # fmt: skip
    """The gradient of every image alone, for every seed of the weights and every dtype.

    `make_model` takes a seed; images are (N, C, H, W) in [0, 1], labels (N,), dtypes names of torch dtypes in which the
    client computes, and the title is the progress bar's.
    """
    for seed, dtype in progress(list(product(seeds, dtypes)), title):
        model = make_model(seed).to(getattr(torch, dtype))
        chain = prepare(model, tuple(images.shape[1:]))
        for i, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
            yield ClientStep(seed, dtype, i, chain, image, label, client_gradients(model, image, label, loss))


def attack_each(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int],
    dtypes: Sequence[str] = ("float32",), loss: str = "logistic", **options,
) -> tuple[pd.DataFrame, list[Reconstruction]]:  # fmt: skip
    """Attacks every image (N, C, H, W) alone, for every seed of the weights and every dtype of the gradients.

    Labels (N,) are given to the client, never to the attack. Options are `reconstruct`'s; what a deficient layer leaves
    determined is solved for. Returns a table with a row for each attack (seed, dtype, image, verdict, label_found, mse,
    psnr_db, ssim, gradient_residual, seconds of an attack on a prepared chain) and the results in the same order.
    """
    rows, results = [], []
    for step in client_steps(make_model, images, labels, seeds, dtypes, loss):
        result, seconds = timed(
            reconstruct, step.chain, step.gradients, loss=loss, **{"gradient_scale": 1.0, "effort": "full", **options}
        )
        found = result.images.to(torch.float64).reshape(step.image.shape)
        rows.append({"seed": step.seed, "dtype": step.dtype, "image": step.index, "verdict": result.verdict})
        rows[-1] |= {"label_found": bool(result.labels[0] == step.label[0])}
        rows[-1] |= {f.__name__: f(found, step.image).item() for f in (mse, psnr_db, ssim)}
        rows[-1] |= {"gradient_residual": result.candidates[0].gradient_residual, "seconds": seconds}
        results.append(result)
    return pd.DataFrame(rows), results


def attack_images(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: str = "float32", defend: Callable | None = None,
    loss: str = "cross_entropy", **options,
) -> tuple[pd.DataFrame, list[Reconstruction]]:  # fmt: skip
    """Attacks the gradient of every image (N, C, H, W) alone, of one network, as the client computes it in that dtype.

    `defend` changes the gradients before they are shared; options are `reconstruct`'s. Returns a row for each image
    (image, verdict, label_found, psnr_db, predicted_psnr_db, gradient_residual, of the first layer that was solved
    entered, its name, condition and deficit, gradient_seconds and attack_seconds of the processor) and the results in
    the same order.
    """
    model, shape, rows, results = model.to(getattr(torch, dtype)).eval(), tuple(images.shape[1:]), [], []
    for index, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
        gradients, gradient_seconds = cpu_timed(client_gradients, model, image, label, loss)
        gradients = gradients if defend is None else defend(gradients)
        result, seconds = cpu_timed(reconstruct, model, gradients, shape, loss, **options)
        best, first = result.candidates[0], next(iter(result.layers), None)
        predicted = -20 * math.log10(best.predicted_error) if best.predicted_error else math.nan
        row = {"image": index, "verdict": result.verdict, "label_found": bool(result.labels[0] == label[0])}
        row |= {"psnr_db": psnr_db(result.images, image).item(), "predicted_psnr_db": predicted}
        row |= {"gradient_residual": best.gradient_residual, "entered": first.name if first else ""}
        row |= {"condition": first and first.condition, "deficit": first and first.deficit}
        rows.append(row | {"gradient_seconds": gradient_seconds, "attack_seconds": seconds})
        results.append(result)
    return pd.DataFrame(rows), results


def attack_batches(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, batch_sizes: Sequence[int],
    seeds: Sequence[int], dtype: str = "float32", loss: str = "logistic",
) -> tuple[pd.DataFrame, list[Reconstruction]]:  # fmt: skip
    """Attacks batches of several sizes, each drawn from the images (N, C, H, W) by its seed.

    The seeds are those of the weights, of the draw and of the attack's starts; the network must end in two or more
    fully connected layers. Returns a row for each batch (batch, seed, verdict, the columns of `batch_outcome`, seconds)
    and the results in the same order.
    """
    rows, results = [], []
    for batch, seed in progress(list(product(batch_sizes, seeds)), "batches"):
        model = make_model(seed).to(getattr(torch, dtype))
        chain = prepare(model, tuple(images.shape[1:]))
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:batch]
        gradients = client_gradients(model, images[drawn], labels[drawn], loss)
        result, seconds = timed(
            reconstruct, chain, gradients, loss=loss, batch_size=batch, seed=seed, gradient_scale=1.0
        )
        outcome = batch_outcome(result, images[drawn], labels[drawn])
        rows.append({"batch": batch, "seed": seed, "verdict": result.verdict, **outcome, "seconds": seconds})
        results.append(result)
    return pd.DataFrame(rows), results


def batch_outcome(result: Reconstruction, images: Tensor, labels: Tensor) -> dict:
    """How far a batch's result is from the true images (B, C, H, W) and labels (B,).

    Returns found (images returned), false (returned images whose direction is that of no image of the batch), certified
    (images with the verdict "exact"), cosine (smallest cosine to the direction of the matched true image), mse (largest
    over certified images; NaN without any), psnr_db (smallest over all) and label_share (share of correct labels).
    """
    order = match(directions(result.images), directions(images))
    truth = images[order]
    cosine = (directions(result.images) * directions(truth)).flatten(1).sum(1)
    errors, quality = mse(result.images, truth), psnr_db(result.images, truth)
    exact = certified(result)
    return {
        "found": len(result.images), "false": int((cosine < SAME_IMAGE_COSINE).sum()), "certified": int(exact.sum()),
        "cosine": min(cosine.tolist(), default=float("nan")),
        "mse": max(errors[exact].tolist(), default=float("nan")),
        "psnr_db": min(quality.tolist(), default=float("nan")),
        "label_share": (result.labels.cpu() == labels[order]).double().mean().item(),
    }  # fmt: skip


def certified(result: Reconstruction) -> Tensor:
    """Which of the F images found have the verdict "exact", (F,); a single image has the verdict of the result."""
    verdicts = [verdict for verdict, _ in result.per_image] or [result.verdict] * len(result.images)
    return torch.tensor([verdict == "exact" for verdict in verdicts], dtype=torch.bool)


def directions(images: Tensor) -> Tensor:
    """Images (N, C, H, W) scaled to norm 1, float64; an image of zeros stays zero."""
    flat = images.detach().double().flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-300)).reshape(images.shape)


def timed(function: Callable, *arguments, clock: Callable[[], float] = time.perf_counter, **options) -> tuple:
    """What a call returns, and the seconds that it took by a clock."""
    start = clock()
    result = function(*arguments, **options)
    return result, clock() - start


one_thread = isolated  # the time of a run then depends least on the machine
cpu_timed = partial(timed, clock=time.process_time)  # the processor's seconds, whatever else the machine does


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Puts torch's generator at a seed, and back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def choice(generator: torch.Generator, *values: Any) -> Any:
    """One of the values, drawn by the generator."""
    return values[int(torch.randint(len(values), (1,), generator=generator))]
