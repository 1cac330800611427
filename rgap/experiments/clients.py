"""Notebook 07: attacks on clients that do not go by the book, and are not asked whether they do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from rgap import client, models
from rgap.attack.reconstruct import reconstruct
from rgap.client import gradients_of
from rgap.data import load_images
from rgap.experiments.calibration import CLIENTS, Case, Shared, attack_outcome, random_case
from rgap.experiments.common import progress
from rgap.experiments.real_networks import RECOVERED_DB
from rgap.results import GradientMismatchError

REAL_NETWORK_SHARE = 0.1
"""Share of the attacks on LeNet and embedded images; the others are on small random networks."""

OUTSIDE = "pixels outside the range"
"""The kind of client whose images were normalised, of which the attack is not told."""

SMOOTHINGS_DRAWN = (0.05, 0.1, 0.2)
"""Label smoothings of the clients."""


def _scaled(factor: Callable[[Case], float]) -> Callable[[Case], Shared]:
    def share(case: Case) -> Shared:
        size = factor(case)
        return Shared([size * g for g in case.gradients()])

    return share


def _clipped(case: Case) -> Shared:
    gradients = case.gradients()
    norm = math.hypot(*(g.double().norm().item() for g in gradients))
    return Shared(client.clip_and_noise(gradients, norm * case.rng.uniform(0.1, 0.99), 0.0))


def _smoothed(case: Case) -> Shared:
    smoothing = float(case.rng.choice(SMOOTHINGS_DRAWN)) if case.loss == "cross_entropy" else 0.0
    values = next(case.model.parameters())
    shared = gradients_of(
        case.model, dict(case.model.named_parameters()), case.images.to(values), case.labels, case.loss,
        label_smoothing=smoothing,
    )  # fmt: skip
    return Shared(list(shared.values()))


FACTOR_CLIENTS: dict[str, Callable[[Case], Shared]] = {
    "by the book": lambda case: Shared(case.gradients()),
    "accumulated": _scaled(lambda case: 1 / int(case.rng.integers(2, 33))),
    "summed": _scaled(lambda case: float(case.rng.integers(2, 129))),
    "class weight": _scaled(lambda case: case.log_uniform(0.2, 5.0)),
    "loss scaling": _scaled(lambda case: 2.0 ** int(case.rng.integers(8, 17))),
    "clipped": _clipped,
}
"""Clients whose gradient has a factor -> what they share."""

ALL_CLIENTS = FACTOR_CLIENTS | {
    "smoothed labels": _smoothed,
    OUTSIDE: lambda case: Shared(case.gradients()),
    "half precision": CLIENTS["computed in 16 bits"],
    "autocast": CLIENTS["autocast"],
    "weights one step old": CLIENTS["other weights"],
    "one tensor scaled": CLIENTS["one tensor scaled"],
    "two images as one": CLIENTS["two images as one"],
}
"""The same for all clients of this family."""


def sample_clients(count: int = 520, seed: int = 0) -> pd.DataFrame:
    """Attacks gradients of clients of every kind; the attack is told nothing.

    Columns: case, client, verdict, psnr_db, rmse, predicted, gradient_scale, identifiable (whether the last layer
    determines the factor: the brightness is not called open), ok (by the measure of `rgap.experiments.calibration`),
    why.
    """
    return pd.DataFrame([_attacked(seed, number) for number in progress(range(count), "clients")])


def _attacked(seed: int, number: int) -> dict:
    rng = np.random.default_rng([seed, number, 27])
    name = list(ALL_CLIENTS)[number % len(ALL_CLIENTS)]
    case = _real_case(rng) if rng.random() < REAL_NETWORK_SHARE else random_case(rng)
    if name == OUTSIDE:
        case = replace(case, images=(case.images - 0.45) / 0.25)
    kind = f"{case.loss}, {'biased' if any(p.ndim == 1 for p in case.model.parameters()) else 'bias-free'}"
    row = {"case": f"{seed}/{number}: {kind}", "client": name, "verdict": "no gradient", "psnr_db": math.nan}
    row |= {"rmse": math.nan, "predicted": math.nan, "gradient_scale": None, "identifiable": False}
    try:
        shared = ALL_CLIENTS[name](case)
        result = reconstruct(case.model, shared.gradients, tuple(case.images.shape[1:]), case.loss)
    except GradientMismatchError as refusal:
        return row | {"ok": True, "why": str(refusal)}
    row |= {"verdict": result.verdict, "gradient_scale": result.gradient_scale}
    row |= {"identifiable": result.gradient_scale is not None}
    return row | attack_outcome(result, case.images, shared.second)


def _real_case(rng: np.random.Generator) -> Case:
    images, _ = load_images("embedded", image_shape=(3, 32, 32))
    image = images[int(rng.integers(len(images)))][None].double()
    model = models.lenet(int(rng.integers(100)), bias=bool(rng.integers(2)))
    return Case(model, image, torch.tensor([int(rng.integers(10))]), "cross_entropy", rng)


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
