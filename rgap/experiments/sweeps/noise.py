"""Attacks on defended gradients: how good they are, how good they say they are, and that they never claim too much."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap.attack.descent import descend
from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients, defences
from rgap.head.read import read_head
from rgap.metrics import mse, psnr_db, ssim
from rgap.network.chain import Chain, prepare
from rgap.results import Reconstruction
from rgap.shared_gradient import receive

FALSE = 10.0
"""An image certified as exact is a false certificate where its error is this many times the predicted one."""

NEGLIGIBLE = 1e-4
"""Error of an image, pixel units, that is none whatever was predicted."""


def root_mean_square(gradients: Sequence[Tensor]) -> float:
    """Of all entries of all tensors: the unit of the noise here."""
    return (sum(g.double().square().sum().item() for g in gradients) / sum(g.numel() for g in gradients)) ** 0.5


def defend(gradients: Sequence[Tensor], defence: str, strength: float | str, seed: int = 0) -> Sequence[Tensor]:
    """Applies a defence by name.

    Args:
        gradients: What the client computed.
        defence: "noise" (strength: standard deviation in units of the gradient's root mean square), "dp-sgd" (noise
            multiplier, clipped to half of the norm), "prune" (share) or "quantise" (a format); "none" for none.
        strength: Of the defence.
        seed: Of its noise.

    Raises:
        ValueError: If there is no defence of that name.
    """
    if defence == "none":
        return gradients
    if defence == "noise":
        return defences.gaussian_noise(gradients, float(strength) * root_mean_square(gradients), seed)
    if defence == "dp-sgd":
        norm = root_mean_square(gradients) * sum(g.numel() for g in gradients) ** 0.5
        return defences.clip_and_noise(gradients, norm / 2, float(strength), seed)
    if defence == "prune":
        return defences.prune(gradients, float(strength))
    if defence == "quantise":
        return defences.quantise(gradients, str(strength))
    raise ValueError(f"defence is {defence!r}; it must be none, noise, dp-sgd, prune or quantise")


def defended_attacks(
    make_model: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    strengths: Mapping[str, Sequence],
    dtype: str = "float32",
    **options,
) -> tuple[pd.DataFrame, list[Reconstruction]]:
    """Attacks every image behind every defence; the attack is told neither defence nor strength.

    Args:
        make_model: Seed -> network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        seeds: Seeds of the weights.
        strengths: Defence -> its strengths, as `defend` takes them.
        dtype: In which the client computes.
        **options: For `rgap.reconstruct`.

    Returns:
        A row an attack (defence, strength, seed, image, verdict, psnr_db, ssim, rmse, predicted, the predicted rmse,
        and plain_db, the PSNR of `plain_attack`) and the results in the same order.
    """
    rows, results = [], []
    cases = [(name, strength) for name, values in strengths.items() for strength in values]
    for seed in tqdm(seeds, desc="defences", disable=not sys.stderr.isatty()):
        model = make_model(seed).to(getattr(torch, dtype))
        chain = prepare(model, tuple(images.shape[1:]))
        for i, (defence, strength) in product(range(len(images)), cases):
            image = images[i : i + 1]
            gradients = defend(client_gradients(model, image, labels[i : i + 1]), defence, strength, seed=i)
            result = reconstruct(chain, gradients, **options)
            plain = plain_attack(chain, gradients, int(labels[i]))
            image = reference(chain, defence, image, result)
            rows.append({"defence": defence, "strength": strength, "seed": seed, "image": i} | outcome(result, image))
            rows[-1] |= {"plain_db": psnr_db(plain, image.double()).item()}
            results.append(result)
    return pd.DataFrame(rows), results


def outcome(result: Reconstruction, image: Tensor) -> dict:
    """Verdict, PSNR, SSIM, root-mean-square error and the predicted one; the image is clipped to [0, 1] for SSIM."""
    found, image = result.images.double(), image.double()
    return {
        "verdict": result.verdict,
        "psnr_db": psnr_db(found, image).item(),
        "ssim": ssim(found.clamp(0, 1), image).item(),
        "rmse": mse(found, image).sqrt().item(),
        "predicted": getattr(result.candidates[0], "predicted_error", None),
    }


def reference(chain: Chain, defence: str, image: Tensor, result: Reconstruction) -> Tensor:
    """What a result is compared with: the image, up to its brightness where the defence makes that unknowable.

    Clipping scales the gradient, and the gradient of a positively homogeneous network times a factor is that of a
    brighter or darker image.
    """
    if defence != "dp-sgd" or not chain.homogeneous:
        return image
    return image * ((result.images * image).sum() / image.square().sum())


def plain_attack(chain: Chain, gradients: Sequence[Tensor], label: int, loss: str = "logistic") -> Tensor:
    """The image of the recursion that takes every sign as it comes and knows of no noise, for comparison.

    Args:
        chain: The prepared network.
        gradients: As shared.
        label: Given, to make it easier.
        loss: A name in `rgap.client.LOSSES`.

    Returns:
        The darkest of the images that the label allows, (1, C, H, W).
    """
    received = receive(chain, gradients)
    hypotheses = read_head(loss, chain.layers[-1], received, label).hypotheses
    if chain.homogeneous:  # twins: their images differ by the ratio of the scales, and the smallest is the darkest
        by_size = sorted(hypotheses, key=lambda hypothesis: -abs(hypothesis.scale))
        hypotheses = {hypothesis.scale > 0: hypothesis for hypothesis in by_size}.values()
    images = [descend(chain, received, h).layer_inputs[chain.layers[0].name] for h in hypotheses]
    return min(images, key=lambda image: image.abs().max().item())


def predicted_and_true(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """Predicted and true root-mean-square error of every layer's input.

    Args:
        chain: The prepared network.
        image: The true image, (1, C, H, W).
        result: What the attack made of its gradient.

    Returns:
        Columns layer, predicted, rmse, and size, the root mean square of the true input.
    """
    truth = chain.layer_inputs(image)
    rows = []
    for report in result.layers:
        x, found = truth[report.name], result.candidates[0].layer_inputs[report.name]
        rmse, size = ((found - x).square().mean().sqrt().item(), x.square().mean().sqrt().item())
        rows.append({"layer": report.name, "predicted": report.predicted_error, "rmse": rmse, "size": size})
    return pd.DataFrame(rows)


def sample_noisy_attacks(count: int = 500, seed: int = 0) -> pd.DataFrame:
    """Attacks on random small networks behind random defences: no NaN, no exception, no false certificate.

    Where clipping hides the brightness, the image counts up to it, as in `reference`.

    Args:
        count: Attacks.
        seed: Of networks, images, defences and strengths.

    Returns:
        A row an attack: case, verdict, psnr_db, rmse, predicted, ok, and why not.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in range(count):
        model, image, label = _random_network(rng)
        defence, strength = _random_defence(rng)
        row = {"case": f"{number}: {defence} {strength}", "verdict": "", "psnr_db": math.nan, "ok": False, "why": ""}
        try:
            gradients = defend(client_gradients(model, image, label), defence, strength, seed=number)
            result = reconstruct(model, gradients, tuple(image.shape[1:]))
            image = reference(prepare(model, tuple(image.shape[1:])), defence, image, result)
            row |= {k: v for k, v in outcome(result, image).items() if k != "ssim"}
            row["why"] = _complaint(result, row)
        except Exception as error:  # whatever it is, it is what is looked for here
            row["why"] = f"{type(error).__name__}: {error}"
        rows.append(row | {"ok": not row["why"]})
    return pd.DataFrame(rows)


def _complaint(result: Reconstruction, row: dict) -> str:
    if not all(torch.isfinite(c.images).all() for c in result.candidates):
        return "the image holds NaN or infinity"
    if result.verdict != "exact":
        return ""
    limit = max(FALSE * (row["predicted"] or 0.0), NEGLIGIBLE)
    return "" if row["rmse"] <= limit else f"certified, and off by {row['rmse']:.2g} where {limit:.2g} is allowed"


def _random_network(rng: np.random.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    """One to three convolutions and a linear layer on 8 to 12 pixels, and a smooth image with its label."""
    size, channels, bias = int(rng.integers(8, 13)), int(rng.choice([1, 3])), bool(rng.integers(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        modules, inputs, pixels = [], channels, size
        for outputs, stride in zip(rng.integers(8, 25, int(rng.integers(1, 4))).tolist(), (2, 1, 1), strict=False):
            modules += [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias),
                nn.LeakyReLU(float(rng.choice([0.01, 0.2]))),
            ]
            inputs, pixels = outputs, (pixels - 1) // stride + 1
        model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(inputs * pixels**2, 1, bias=bias))
        coarse = torch.rand(1, channels, 4, 4)
    image = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return model, image, torch.tensor([int(rng.integers(2))])


def _random_defence(rng: np.random.Generator) -> tuple[str, float | str]:
    name = str(rng.choice(["noise", "dp-sgd", "prune", "quantise"]))
    if name == "quantise":
        return name, str(rng.choice(["float16", "bfloat16", "int8"]))
    if name == "prune":
        return name, round(float(rng.uniform(0, 0.99)), 3)
    return name, float(f"{10 ** rng.uniform(-7, 1 if name == 'noise' else 0):.2g}")
