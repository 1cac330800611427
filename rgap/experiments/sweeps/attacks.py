"""Many attacks on single images, and how far each was from the truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import product

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.metrics import mse, psnr_db, ssim
from rgap.network.chain import Chain, prepare
from rgap.results import Reconstruction


def attack_each(
    make_model: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    dtypes: Sequence[str] = ("float32",),
    loss: str = "logistic",
    **options,
) -> tuple[pd.DataFrame, list[Reconstruction]]:
    """Attacks every image alone, for every seed of the weights and every dtype of the gradients.

    Args:
        make_model: Seed -> network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), given to the client, never to the attack.
        seeds: Seeds of the weights.
        dtypes: Names of torch dtypes in which the client computes.
        loss: Name of the client's loss.
        **options: For `rgap.reconstruct`.

    Returns:
        A table with a row for each attack (seed, dtype, image, verdict, label_found, mse, psnr_db, ssim,
        gradient_residual, seconds of an attack on a prepared chain) and the results in the same order.
    """
    rows, results = [], []
    runs = list(product(seeds, dtypes))
    for seed, dtype in tqdm(runs, desc="attacks", disable=not sys.stderr.isatty()):
        model = make_model(seed).to(getattr(torch, dtype))
        chain = prepare(model, tuple(images.shape[1:]))
        for i in range(len(images)):
            gradients = client_gradients(model, images[i : i + 1], labels[i : i + 1], loss)
            start = time.perf_counter()
            result = reconstruct(chain, gradients, loss=loss, **options)
            seconds = time.perf_counter() - start
            results.append(result)
            rows.append({"seed": seed, "dtype": dtype, "image": i} | _outcome(result, images[i : i + 1], labels[i]))
            rows[-1]["seconds"] = seconds
    return pd.DataFrame(rows), results


def layer_errors(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """The layer reports of a result with the true error of each layer's recovered input.

    Args:
        chain: The prepared network.
        image: The true image, (1, C, H, W).
        result: What the attack made of its gradient.

    Returns:
        `result.to_frame()` with `error`, ‖x̂ − x‖ / ‖x‖, as another column.
    """
    truth = chain.layer_inputs(image)
    found = result.candidates[0].layer_inputs
    frame = result.to_frame()
    frame["error"] = [((found[name] - truth[name]).norm() / truth[name].norm()).item() for name in frame["name"]]
    return frame


def wrong_signs(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """How many signs of a deficient layer's input were wrong after each step of the virtual constraints.

    Args:
        chain: The prepared network.
        image: The true image, (1, C, H, W).
        result: What the attack made of its gradient.

    Returns:
        Columns `layer`, `step` (from 1) and `wrong`.
    """
    truth = chain.layer_inputs(image)
    rows = [
        {"layer": name, "step": step, "wrong": int(((x > 0) != (truth[name].flatten() > 0)).sum())}
        for name, beliefs in result.candidates[0].beliefs.items()
        for step, x in enumerate(beliefs, 1)
    ]
    return pd.DataFrame(rows, columns=["layer", "step", "wrong"])


def _outcome(result: Reconstruction, image: Tensor, label: Tensor) -> dict:
    found = result.images.to(torch.float64).reshape(image.shape)
    return {
        "verdict": result.verdict,
        "label_found": bool(result.labels[0] == label),
        "mse": mse(found, image).item(),
        "psnr_db": psnr_db(found, image).item(),
        "ssim": ssim(found, image).item(),
        "gradient_residual": result.candidates[0].gradient_residual,
    }
