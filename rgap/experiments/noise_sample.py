"""Notebook 07: random small networks behind random defences; no attack may certify a wrong image."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgap.artifact.progress import progress
from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.common import seeded
from rgap.experiments.noise import defend, outcome, reference
from rgap.network.chain import prepare
from rgap.results import Reconstruction

FALSE_CERTIFICATE_RATIO = 10.0  # times its predicted error from which on an exact image is a false certificate
NEGLIGIBLE_ERROR = 1e-4  # error, pixel units, below which no certificate is false, whatever was predicted


def sample_noisy_attacks(count: int = 500, seed: int = 0) -> pd.DataFrame:
    """Attacks on random small networks behind random defences: no NaN, no exception, no false certificate.

    Where clipping hides the brightness, the image counts up to it, as in `reference`. Columns: case, verdict, psnr_db,
    rmse, predicted, ok, why.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in progress(range(count), "defended"):
        model, image, label = _random_network(rng)
        defence, strength = _random_defence(rng)
        row = {"case": f"{number}: {defence} {strength}", "verdict": "", "psnr_db": math.nan, "ok": False, "why": ""}
        try:
            gradients = defend(client_gradients(model, image, label), defence, strength, seed=number)
            factor = None if defence == "dp-sgd" else 1.0
            result = reconstruct(model, gradients, tuple(image.shape[1:]), gradient_scale=factor)
            image = reference(prepare(model, tuple(image.shape[1:])), defence, image, result)
            row |= {k: v for k, v in outcome(result, image).items() if k != "ssim"}
            row["why"] = _complaint(result, row)
        except Exception as error:  # any exception is a finding of this sample
            row["why"] = f"{type(error).__name__}: {error}"
        rows.append(row | {"ok": not row["why"]})
    return pd.DataFrame(rows)


def _complaint(result: Reconstruction, row: dict) -> str:
    if not all(torch.isfinite(c.images).all() for c in result.candidates):
        return "the image holds NaN or infinity"
    if result.verdict != "exact":
        return ""
    limit = max(FALSE_CERTIFICATE_RATIO * (row["predicted"] or 0.0), NEGLIGIBLE_ERROR)
    return "" if row["rmse"] <= limit else f"certified, and off by {row['rmse']:.2g} where {limit:.2g} is allowed"


def _random_network(rng: np.random.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    """One to three convolutions and a linear layer on 8 to 12 pixels, and a smooth image with its label."""
    size, channels, bias = int(rng.integers(8, 13)), int(rng.choice([1, 3])), bool(rng.integers(2))
    with seeded(int(rng.integers(2**31))):
        modules, inputs, pixels = [], channels, size
        for outputs, stride in zip(rng.integers(8, 25, int(rng.integers(1, 4))).tolist(), (2, 1, 1), strict=False):
            modules.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias))
            modules.append(nn.LeakyReLU(float(rng.choice([0.01, 0.2]))))
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
