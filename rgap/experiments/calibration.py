"""Notebook 07: whether certificates are true and predicted errors right, on thousands of small random networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from torch import Tensor, nn

from rgap.artifact.outputs import ROOT, save_csv
from rgap.attack.reconstruct import reconstruct
from rgap.experiments.clients import (
    ALL_CLIENTS,
    CLIENTS,
    FACTOR_CLIENTS,
    OUTSIDE,
    Case,
    Shared,
    random_case,
    real_case,
)  # fmt: skip
from rgap.experiments.common import progress
from rgap.experiments.real_networks import RECOVERED_DB
from rgap.metrics import psnr_db
from rgap.results import GradientMismatchError, Reconstruction

MAX_ERROR_RATIO = 3.0  # true over predicted error from which a certificate below `SAFE_DB` is false
SAFE_DB = 50.0  # PSNR from which no certificate is false, whatever error was predicted
ASSERTED_SHARE = 0.7  # share of the attacks that are told that the loss was not scaled
ERROR_BINS = (0.0, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, math.inf)  # edges, in widths of the range
VERIFIED = ROOT / "notebooks" / "verified"  # where the tables of long runs are committed
REAL_NETWORK_SHARE = 0.1  # share of the attacks on LeNet and embedded images; the others are on small random networks


def sample_calibration(count: int = 200, seed: int = 0) -> pd.DataFrame:
    """Attacks random small networks whose clients share clean, coarse, noisy and altered gradients.

    A row is ok unless the verdict is "exact" although the image is off by more than `MAX_ERROR_RATIO` times its
    predicted error and by more than `SAFE_DB` allows. Where the verdict is "ambiguous", the best candidate counts.
    Columns: case, client, dtype, verdict, psnr_db, rmse, predicted, certified_psnr_db, ok, why.
    """
    rows = []
    for number in progress(range(count), "calibration"):
        rng = np.random.default_rng([seed, number, 16])
        name, case = list(CLIENTS)[number % len(CLIENTS)], random_case(rng)
        dtype = str(next(case.model.parameters()).dtype).removeprefix("torch.")
        row, result = _attacked(case, CLIENTS[name], lambda rng=rng: rng.random() < ASSERTED_SHARE)
        row |= {"certified_psnr_db": result.certified_psnr_db if result else None}
        names = [type(module).__name__ for module in case.model if not isinstance(module, nn.Flatten)]
        what = ", ".join([*names, case.loss])
        rows.append({"case": f"{seed}/{number}: {what}", "client": name, "dtype": dtype, **row})
    return pd.DataFrame(rows)


def sample_clients(count: int = 520, seed: int = 0) -> pd.DataFrame:
    """Attacks gradients of clients of every kind; the attack is told nothing.

    Columns: case, client, verdict, psnr_db, rmse, predicted, gradient_scale, identifiable (whether the last layer
    determines the factor: the brightness is not called open), ok (as in `sample_calibration`), why.
    """
    rows = []
    for number in progress(range(count), "clients"):
        rng = np.random.default_rng([seed, number, 27])
        name = list(ALL_CLIENTS)[number % len(ALL_CLIENTS)]
        case = real_case(rng) if rng.random() < REAL_NETWORK_SHARE else random_case(rng)
        if name == OUTSIDE:
            case = replace(case, images=(case.images - 0.45) / 0.25)
        row, result = _attacked(case, ALL_CLIENTS[name])
        scale = result.gradient_scale if result else None
        row |= {"gradient_scale": scale, "identifiable": scale is not None}
        kind = f"{case.loss}, {'biased' if any(p.ndim == 1 for p in case.model.parameters()) else 'bias-free'}"
        rows.append({"case": f"{seed}/{number}: {kind}", "client": name, **row})
    return pd.DataFrame(rows)


def _attacked(
    case: Case, share: Callable[[Case], Shared], asserts: Callable[[], bool] = lambda: False
) -> tuple[dict, Reconstruction | None]:
    """What came of a client's gradient; `asserts`: whether the attack is told that the loss was not scaled."""
    try:
        shared = share(case)
        told = {**shared.told, **({"gradient_scale": 1.0} if asserts() else {})}
        result = reconstruct(case.model, shared.gradients, tuple(case.images.shape[1:]), case.loss, **told)
    except GradientMismatchError as refusal:
        nothing = dict.fromkeys(("psnr_db", "rmse", "predicted"), math.nan)
        return {"verdict": "no gradient", **nothing, "ok": True, "why": str(refusal)}, None
    return {"verdict": result.verdict, **attack_outcome(result, case.images, shared.second)}, result


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


def clients_by_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each kind of client: attacks, verdicts, wrong certificates, and how many of those found are certified.

    "recovered" counts images above `RECOVERED_DB` dB of identifiable brightness, of clients whose gradient is that of
    the image but for a factor or smoothing; "certified" is the share of these with the verdict "exact".
    """
    honest = [*FACTOR_CLIENTS, "smoothed labels"]
    found = rows["client"].isin(honest) & rows["identifiable"] & (rows["psnr_db"] > RECOVERED_DB)
    exact = rows["verdict"] == "exact"
    table = pd.DataFrame({
        "client": rows["client"], "attacks": 1, "exact": exact, "ambiguous": rows["verdict"] == "ambiguous",
        "wrong_exact": ~rows["ok"], "recovered": found, "certified": found & exact,
    })  # fmt: skip
    table = table.groupby("client", sort=False).sum().astype(int)
    table.loc["all"] = table.sum()
    table["certified_share"] = table["certified"] / table["recovered"].where(table["recovered"] > 0)
    return table.reset_index()
