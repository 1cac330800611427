"""A sample of blind layers: convolutions read from their own gradient alone, over random shapes and values."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rgap.equations.tap_splits import is_blind
from rgap.experiments.common import progress
from rgap.residual.blind import solve_blind

MAX_ENTRIES = 300_000  # largest number of weights of a convolution that is drawn
LIMITS = {"float64": 1e-12, "float32": 1e-5}  # relative error that a certificate promises, by format
MAX_ERROR_RATIO = 10.0  # true over predicted relative error up to which a certificate under noise was right

VALUES = ("Gaussian", "ReLU", "smooth", "silent units", "open units", "few directions")
"""How x and δz are drawn: both sides Gaussian; with ReLU's zeros; x a few waves; a third of the channels zero; δz of
units that are always active, one value for a whole map; x and δz of half the rank of their positions."""

DAMAGES = ("none", "none", "none", "noise", "undeclared noise", "one entry", "batch", "foreign bias")
"""What is done to the gradient."""


def sample_blind(count: int = 100, seed: int = 0) -> pd.DataFrame:
    """Solves random convolutions from their own gradients, in float64 and float32, and judges every certificate.

    A row is ok where what is certified is as near as the certificate says: a relative error of x and of δz up to 1e-12
    in float64 and 1e-5 in float32, or 10 times the predicted error of a damaged gradient. It is also ok where nothing
    is certified, if no split of the taps has the rank by law, values or gradient were damaged, or the predicted error
    is the reason.

    Columns: case, values, damage, dtype, filters, channels, blind (by law), gap, predicted_error, error, verdict
    ("certified" or "not certified"), psnr_db (−20 lg of the error), ok, why.
    """
    return pd.DataFrame([_solve_one(number) for number in progress(range(seed, seed + count), "convolutions")])


def _solve_one(number: int) -> dict:
    rng = np.random.default_rng(number)
    shape = _random_shape(rng)
    values, damage = (str(rng.choice(names)) for names in (VALUES, DAMAGES))
    dtype = torch.float64 if rng.random() < 0.5 else torch.float32
    generator = torch.Generator().manual_seed(number)
    x, dz = _random_values(shape, values, 2 if damage == "batch" else 1, generator)
    x, dz = x.to(dtype), dz.to(dtype)
    weight = (shape["filters"], shape["channels"], *shape["kernel"])
    G = torch.nn.grad.conv2d_weight(x, weight, dz, shape["stride"], shape["padding"])
    sums, noise = dz.sum((0, 2, 3)), None
    size = G.double().square().mean().sqrt().item()
    if "noise" in damage:
        noise = size * 10 ** rng.uniform(-6, -1)
        G = G + noise * torch.randn(G.shape, generator=generator, dtype=dtype)
    elif damage == "one entry":
        G.flatten()[int(rng.integers(G.numel()))] += size * 10 ** rng.uniform(-3, 1)
    elif damage == "foreign bias":
        sums = sums.roll(1)
    solution = solve_blind(
        G, shape["image"], padding=shape["padding"], stride=shape["stride"], sum_dz=sums,
        noise_std=noise if damage == "noise" else None,
    )  # fmt: skip
    blind = is_blind(*(shape[name] for name in ("channels", "filters", "kernel", "image", "stride", "padding")))
    error = max(_error(solution.x, x), _error(solution.dz, dz))
    if solution.certified:
        undamaged = damage in ("none", "foreign bias")
        ok = error <= (LIMITS[str(dtype).split(".")[1]] if undamaged else MAX_ERROR_RATIO * solution.predicted_error)
    else:
        excused = not blind or damage != "none" or values not in VALUES[:2] or not G.any()
        ok = excused or "predicted error" in solution.reason
    return {
        "case": f"convolution {number}", "values": values, "damage": damage, "dtype": str(dtype).split(".")[1],
        **{name: shape[name] for name in ("filters", "channels")}, "blind": blind, "gap": solution.gap,
        "predicted_error": solution.predicted_error, "error": error,
        "verdict": "certified" if solution.certified else "not certified",
        "psnr_db": -20 * math.log10(max(error, 1e-300)) if math.isfinite(error) else float("nan"), "ok": ok,
        "why": f"{shape}: {solution.reason}",
    }  # fmt: skip


def _random_shape(rng: np.random.Generator) -> dict:
    """A convolution of at most MAX_ENTRIES weights, with as many filters or channels as its positions or fewer."""
    while True:
        image = tuple(int(n) for n in rng.integers(1, 9, 2))
        kernel, stride = int(rng.choice([2, 3, 3, 3, 3, 5])), int(rng.choice([1, 1, 1, 2]))
        padding = int(rng.choice([0, kernel // 2, kernel // 2]))
        filters, channels = (max(1, int(math.prod(image) * 2 ** rng.uniform(-2, 2))) for _ in range(2))
        if min(image) + 2 * padding >= kernel and filters * channels * kernel**2 <= MAX_ENTRIES:
            return {
                "filters": filters, "channels": channels, "kernel": (kernel, kernel), "image": image,
                "stride": stride, "padding": padding,
            }  # fmt: skip


def _random_values(shape: dict, values: str, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Values x (B, C, H, W) and δz (B, O, H′, W′), float64."""
    sizes = zip(shape["image"], shape["kernel"], strict=True)
    outputs = [(n + 2 * shape["padding"] - k) // shape["stride"] + 1 for n, k in sizes]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, dz = normal(images, shape["channels"], *shape["image"]), normal(images, shape["filters"], *outputs)
    if values == "few directions":
        for side in (x, dz):
            rank = max(1, math.prod(side.shape[2:]) // 2)
            side.copy_((normal(images, side.shape[1], rank) @ normal(images, rank, side[0, 0].numel())).view_as(side))
        return x, dz
    if values == "smooth":
        waves = torch.stack(
            [torch.cos(torch.arange(n, dtype=torch.float64) * f) for n in shape["image"][1:] for f in (0, 0.7, 1.9)]
        )
        x = normal(images, shape["channels"], shape["image"][0], 3) @ waves
    if values != "Gaussian":
        x, dz = x.relu(), dz * (torch.rand(dz.shape, generator=generator) > 0.5)
    if values == "silent units":
        for side in (x, dz):
            side *= (torch.rand(side.shape[1], generator=generator) > 1 / 3)[:, None, None]
    if values == "open units":
        open_ = (torch.rand(dz.shape[1], generator=generator) > 0.5)[:, None, None]
        dz = dz.mean((2, 3), keepdim=True) * (open_ | (dz != 0))
    return x, dz


def _error(found: Tensor | None, true: Tensor) -> float:
    """Relative error; of a batch, that of no image is small."""
    if found is None:
        return math.inf
    return min((found - image).norm().item() / max(image.norm().item(), 1e-300) for image in true.double())
