"""Notebook 07: whether certificates are true and predicted errors right, on thousands of small random networks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from rgap import client
from rgap.artifact.outputs import ROOT, save_csv
from rgap.attack.reconstruct import reconstruct
from rgap.client import LOSSES, client_gradients
from rgap.experiments.common import progress, seeded
from rgap.experiments.noise import root_mean_square
from rgap.experiments.random_networks import ACTIVATIONS
from rgap.experiments.real_networks import RECOVERED_DB
from rgap.metrics import psnr_db
from rgap.results import GradientMismatchError, Reconstruction

MAX_ERROR_RATIO = 3.0
"""True over predicted error from which a certificate below `SAFE_DB` is false."""

SAFE_DB = 50.0
"""PSNR from which no certificate is false, whatever error was predicted."""

ASSERTED_SHARE = 0.7
"""Share of the attacks that are told that the loss was not scaled."""

ERROR_BINS = (0.0, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, math.inf)
"""Edges of the bins of predicted errors, in widths of the pixel range."""


VERIFIED = ROOT / "notebooks" / "verified"
"""Where the tables of long runs are committed."""


@dataclass(frozen=True)
class Case:
    """A network, an image and what the client does with them.

    Attributes:
        model: In eval mode and the client's dtype.
        images: Of the batch, (B, C, H, W).
        labels: (B,).
        loss: A name in `rgap.client.LOSSES`.
        rng: For what is drawn on the way.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    loss: str
    rng: np.random.Generator

    def gradients(self, model: nn.Module | None = None) -> list[Tensor]:
        """The gradient of the mean loss, of this network or a changed one."""
        model = model or self.model
        dtype = next(model.parameters()).dtype
        return client_gradients(model, self.images.to(dtype), self.labels, self.loss)

    def log_uniform(self, low: float, high: float) -> float:
        """A number drawn uniformly on a logarithmic scale."""
        return float(np.exp(self.rng.uniform(math.log(low), math.log(high))))


@dataclass(frozen=True)
class Shared:
    """What a client shares.

    Attributes:
        gradients: One tensor for each parameter.
        told: Options of `rgap.reconstruct` with what the attack is told.
        second: Another image in the gradient, (1, C, H, W): where the network is linear between the two, a mean of them
            has this very gradient, and counts as right.
    """

    gradients: Sequence[Tensor]
    told: Mapping[str, float] = field(default_factory=dict)
    second: Tensor | None = None


def _rounded(name: str) -> Callable[[Case], Shared]:
    return lambda case: Shared(client.quantise(case.gradients(), name))


def _half(case: Case) -> Shared:
    return Shared(
        case.gradients(copy.deepcopy(case.model).to(torch.bfloat16 if case.rng.random() < 0.5 else torch.half))
    )


def _pruned(case: Case) -> Shared:
    return Shared(client.prune(case.gradients(), case.rng.uniform(0.01, 0.3)))


def _noisy(case: Case, declared: bool = False) -> Shared:
    gradients = case.gradients()
    std = root_mean_square(gradients) * case.log_uniform(1e-7, 1e-2)
    noisy = client.gaussian_noise(gradients, std, int(case.rng.integers(2**31)))
    return Shared(noisy, {"noise_std": std} if declared else {})


def _tampered(case: Case) -> Shared:
    gradients = case.gradients()
    if case.rng.random() < 0.5:
        gradients = client.quantise(gradients, "float16")
    which = int(case.rng.integers(len(gradients)))
    gradients[which] = gradients[which] * (1 + case.log_uniform(1e-3, 0.3))
    return Shared(gradients)


def _averaged(case: Case) -> Shared:
    """Two images of one class as one."""
    other = _image(case.rng, case.images.shape[1:])
    second = torch.lerp(other, case.images, float(case.rng.choice([0.0, 0.5, 0.9, 0.99])))
    both = replace(case, images=torch.cat([case.images, second]), labels=case.labels.repeat(2))
    gradients = both.gradients()
    gradients = client.quantise(gradients, "float16") if case.rng.random() < 0.3 else gradients
    return Shared(gradients, second=second)


def _outdated(case: Case) -> Shared:
    """The client's weights differ a little from those that the attack is given."""
    size, model = case.log_uniform(1e-6, 1e-2), copy.deepcopy(case.model)
    with seeded(int(case.rng.integers(2**31))), torch.no_grad():
        for p in model.parameters():
            p.add_(size * p.square().mean().sqrt() * torch.randn_like(p))
    return Shared(case.gradients(model))


def _autocast(case: Case) -> Shared:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.model(case.images.to(next(case.model.parameters()).dtype))
    loss = client.loss_value(case.loss, outputs.float(), case.labels)
    return Shared(torch.autograd.grad(loss, list(case.model.parameters())))


CLIENTS: dict[str, Callable[[Case], Shared]] = {
    "clean": lambda case: Shared(case.gradients()),
    "float16": _rounded("float16"),
    "bfloat16": _rounded("bfloat16"),
    "computed in 16 bits": _half,
    "int8": _rounded("int8"),
    "pruned": _pruned,
    "noise": _noisy,
    "noise, declared": partial(_noisy, declared=True),
    "one tensor scaled": _tampered,
    "two images as one": _averaged,
    "other weights": _outdated,
    "autocast": _autocast,
}
"""Name -> what such a client shares, and what the attack is told of it."""


def sample_calibration(count: int = 200, seed: int = 0) -> pd.DataFrame:
    """Attacks random small networks whose clients share clean, coarse, noisy and altered gradients.

    A row is ok unless the verdict is "exact" although the image is off by more than `MAX_ERROR_RATIO` times its
    predicted error and by more than `SAFE_DB` allows. Where the verdict is "ambiguous", the best candidate counts.
    Columns: case, client, dtype, verdict, psnr_db, rmse, predicted, certified_psnr_db, ok, why.
    """
    return pd.DataFrame([_attacked(seed, number) for number in progress(range(count), "calibration")])


def _attacked(seed: int, number: int) -> dict:
    rng = np.random.default_rng([seed, number, 16])
    name = list(CLIENTS)[number % len(CLIENTS)]
    case = random_case(rng)
    dtype = str(next(case.model.parameters()).dtype).removeprefix("torch.")
    row = {"case": f"{seed}/{number}: {_kinds(case)}", "client": name, "dtype": dtype, "verdict": "no gradient"}
    row |= {
        "psnr_db": math.nan,
        "rmse": math.nan,
        "predicted": math.nan,
        "certified_psnr_db": None,
        "ok": True,
        "why": "",
    }
    try:
        shared = CLIENTS[name](case)
        told = dict(shared.told) | ({"gradient_scale": 1.0} if rng.random() < ASSERTED_SHARE else {})
        result = reconstruct(case.model, shared.gradients, tuple(case.images.shape[1:]), case.loss, **told)
    except GradientMismatchError as refusal:
        return row | {"why": str(refusal)}
    certified = {"verdict": result.verdict, "certified_psnr_db": result.certified_psnr_db}
    return row | certified | attack_outcome(result, case.images, shared.second)


def attack_outcome(result: Reconstruction, image: Tensor, second: Tensor | None = None) -> dict:
    """Quality of the best candidate, if these are ambiguous, and whether a certificate is false."""
    found = result.candidates if result.verdict == "ambiguous" else result.candidates[:1]
    truths = [_nearest(c.images.cpu(), image.double(), second) for c in found]
    each = [
        (psnr_db(_flat(c.images), _flat(truth)).item(), c.predicted_error)
        for c, truth in zip(found, truths, strict=True)
    ]
    psnr, predicted = max(each, key=lambda pair: pair[0])
    rmse, predicted = 10 ** (-psnr / 20), math.nan if predicted is None else predicted
    false = result.verdict == "exact" and psnr < SAFE_DB and not rmse <= MAX_ERROR_RATIO * predicted
    why = f"certified, and off by {rmse:.2g} where {predicted:.2g} is predicted" if false else ""
    return {"psnr_db": psnr, "rmse": rmse, "predicted": predicted, "ok": not false, "why": why}


def _nearest(found: Tensor, image: Tensor, second: Tensor | None) -> Tensor:
    """The image, or of two the mean, with whatever weights, that is nearest to what was found."""
    if second is None:
        return image
    way = second - image
    share = ((found - image) * way).sum() / way.square().sum()
    return image + share.clamp(0, 1).nan_to_num() * way


def _flat(image: Tensor) -> Tensor:
    return image.double().reshape(1, 1, 1, -1)


def random_case(rng: np.random.Generator) -> Case:
    """A network of one to four layers on 36 to 300 pixels, an image, and a label."""
    shape = (int(rng.choice([1, 3])), int(rng.integers(6, 11)), int(rng.integers(6, 11)))
    loss = str(rng.choice(LOSSES))
    outputs = {"logistic": 1, "cross_entropy": int(rng.integers(2, 8)), "mse": int(rng.integers(1, 5))}[loss]
    with seeded(int(rng.integers(2**31))):
        model = _network(rng, shape, outputs).to(torch.float64 if rng.random() < 0.2 else torch.float32).eval()
    with torch.no_grad():
        list(model.parameters())[-1 if rng.random() < 0.5 else 0].mul_(float(rng.choice([1.0, 1.0, 3.0, 10.0])))
    labels = torch.tensor([int(rng.integers(max(2, outputs)))])
    return Case(model, _image(rng, shape), labels, loss, rng)


def _network(rng: np.random.Generator, shape: Sequence[int], outputs: int) -> nn.Module:
    name, bias = str(rng.choice(list(ACTIVATIONS))), bool(rng.integers(2))
    name = name if rng.random() < 0.6 else "LeakyReLU"
    channels, modules, size = shape[0], [], list(shape[1:])
    for _ in range(int(rng.integers(0, 3))):
        stride = int(rng.integers(1, 3))
        wide = min(24, int(1.3 * channels * stride**2) + int(rng.integers(1, 4)))
        modules += [nn.Conv2d(channels, wide, 3, stride, 1, bias=bias), ACTIVATIONS[name]()]
        channels, size = wide, [(side - 1) // stride + 1 for side in size]
    modules.append(nn.Flatten())
    features = channels * math.prod(size)
    for _ in range(int(rng.integers(0 if len(modules) > 1 else 1, 3))):
        modules += [nn.Linear(features, features := int(rng.integers(10, 80)), bias=bias), ACTIVATIONS[name]()]
    return nn.Sequential(*modules, nn.Linear(features, outputs, bias=bias))


def _image(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    """A noise image, a dark one with black pixels, or a smooth one."""
    pixels = torch.from_numpy(rng.random((1, *shape)))
    kind = rng.integers(3)
    if kind == 0:
        return pixels
    if kind == 1:
        return (2 * pixels - 1).clamp(min=0) ** 2
    return nn.functional.interpolate(pixels[..., :4, :4], shape[1:], mode="bilinear", align_corners=False)


def _kinds(case: Case) -> str:
    names = [type(module).__name__ for module in case.model if not isinstance(module, nn.Flatten)]
    return ", ".join([*names, case.loss])


def calibration_table(attacks: pd.DataFrame) -> pd.DataFrame:
    """How large the true error of certified images was, by predicted error, both in widths of the pixel range.

    Returns a row for each bin of predicted errors that is not empty: above, up_to, certified (images), and of true over
    predicted error the median, the quantile_95, and within_3, the share at most 3.
    """
    certified = attacks[attacks["verdict"] == "exact"]
    ratio = certified["rmse"] / certified["predicted"]
    bins = pd.cut(certified["predicted"], list(ERROR_BINS), labels=False)
    table = ratio.groupby(bins).agg(
        certified="size",
        median="median",
        quantile_95=lambda r: r.quantile(0.95),
        within_3=lambda r: (r <= MAX_ERROR_RATIO).mean(),
    )
    for place, (name, first) in enumerate((("above", 0), ("up_to", 1))):
        table.insert(place, name, [ERROR_BINS[int(number) + first] for number in table.index])
    return table.reset_index(drop=True)


def client_table(attacks: pd.DataFrame) -> pd.DataFrame:
    """What came of `sample_calibration`'s attacks on each kind of client.

    Columns: client, attacks, exact, false (certificates), recovered (at 60 dB or more), and certified, the share of
    those.
    """
    recovered = attacks["psnr_db"] >= RECOVERED_DB
    marks = attacks.assign(exact=attacks["verdict"] == "exact", false=~attacks["ok"], recovered=recovered)
    marks["certified"] = (marks["exact"] & recovered).astype(float).where(recovered)
    columns = {"attacks": ("ok", "size")} | {name: (name, "sum") for name in ("exact", "false", "recovered")}
    return marks.groupby("client", sort=False).agg(**columns, certified=("certified", "mean")).reset_index()


def false_rate(attacks: pd.DataFrame) -> dict[str, float]:
    """Attacks, certified and false ones, and at_most, the upper end of the 95 % interval of the false ones' rate.

    One-sided (Clopper and Pearson 1934), from the columns `verdict` and `ok`.
    """
    certified = attacks[attacks["verdict"] == "exact"]
    false = int((~certified["ok"].astype(bool)).sum())
    bound = 1.0
    if len(certified):
        bound = binomtest(false, len(certified), alternative="less").proportion_ci(0.95, "exact").high
    return {"attacks": len(attacks), "certified": len(certified), "false": false, "at_most": bound}


def write_verified(runs: Sequence[Path | str], folder: Path = VERIFIED) -> dict[str, float]:
    """Joins the CSVs of long runs of `python -m rgap verify calibration` into the tables that notebook 07 shows.

    The runs have different seeds. Writes calibration_bins.csv, calibration_clients.csv and calibration_rate.csv into
    the folder, and returns the `false_rate`.
    """
    attacks = pd.concat([pd.read_csv(run) for run in runs], ignore_index=True)
    if attacks["case"].duplicated().any():
        raise ValueError("the runs have cases in common; give runs with different seeds")
    rate = false_rate(attacks)
    seeds = attacks["case"].str.split("/").str[0].astype(int)
    about = {"date": date.today().isoformat(), "seeds": f"{seeds.min()} to {seeds.max()}"}
    save_csv(calibration_table(attacks), folder / "calibration_bins.csv")
    save_csv(client_table(attacks), folder / "calibration_clients.csv")
    save_csv(pd.DataFrame([about | rate]), folder / "calibration_rate.csv")
    return rate


def read_verified(folder: Path = VERIFIED) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series]:
    """The tables of the committed long run: by predicted error, by client, and the rate of false certificates."""
    bins, clients, rate = (pd.read_csv(folder / f"calibration_{name}.csv") for name in ("bins", "clients", "rate"))
    return bins, clients, rate.iloc[0]
