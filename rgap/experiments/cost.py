"""Notebook 04: what an attack costs as images and networks grow, beside one pass and one step of an optimiser.

And, as a sample, the optimisers at the budgets that they usually get, with restarts, beside the closed form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from rgap import data, models
from rgap.artifact.progress import progress
from rgap.attack.reconstruct import reconstruct
from rgap.baselines import dlg
from rgap.client import client_gradients
from rgap.experiments.common import one_thread, seeded, timed
from rgap.experiments.drawing import NETWORK_NAMES, finish, lines, name_lines
from rgap.experiments.methods import OPTIMISERS
from rgap.metrics import psnr_db
from rgap.network.chain import prepare
from rgap.ranks.analysis import rank_analysis

MAX_REPEATED_SECONDS = 2.0  # a call that takes longer is not timed again

USUAL_STEPS = {"DLG": 6000, "Inverting Gradients": 4800}
"""DLG: 300 steps of L-BFGS with up to 20 evaluations each; Inverting Gradients: 4,800 steps of Adam."""

USUAL_RESTARTS = 2  # starts of each; the one with the smallest distance between gradients counts
NETWORKS = ("cnn6", "cnn6_d", "fcn3")


def cnn6_for(side: int) -> nn.Module:
    """CNN6 with a last layer that fits square images of another side."""
    model = models.cnn6()
    with seeded(0), torch.no_grad():
        features = model[:-1](torch.zeros(1, 3, side, side)).shape[1]
        model[-1] = nn.Linear(features, 1, bias=False)
    return model


def expanding_for(side: int) -> nn.Module:
    """Two strided convolutions, 3→16 4×4 and 16→72 3×3, and a linear layer, for square images of this side.

    The convolutions' outputs outnumber their inputs, so that W alone determines every input, however large the image:
    the cost on this network shows how the attack scales.
    """
    with seeded(0), torch.no_grad():
        body = [
            nn.Conv2d(3, 16, 4, 2, 2, bias=False), nn.LeakyReLU(models.LEAKY_SLOPE),
            nn.Conv2d(16, 72, 3, 2, 1, bias=False), nn.LeakyReLU(models.LEAKY_SLOPE), nn.Flatten(),
        ]  # fmt: skip
        features = nn.Sequential(*body)(torch.zeros(1, 3, side, side)).shape[1]
        return nn.Sequential(*body, nn.Linear(features, 1, bias=False)).eval()


def deficits(sides: Sequence[int]) -> pd.DataFrame:
    """How far CNN6's equations fall short of its unknowns as square images grow, by the rank laws; no attack.

    Columns: side, layer (the one that lacks most), unknowns, rank, deficit (before virtual constraints).
    """
    rows = []
    for side in sides:
        layers = rank_analysis(cnn6_for(side), (3, side, side), limit=0).layers
        worst = max((layer for layer in layers if layer.deficit is not None), key=lambda layer: layer.deficit)
        rows.append((side, worst.name, worst.unknowns, worst.unknowns - worst.deficit, worst.deficit))
    return pd.DataFrame(rows, columns=["side", "layer", "unknowns", "rank", "deficit"])


def costs(sides: Sequence[int], expanding_sides: Sequence[int], widths: Sequence[int]) -> pd.DataFrame:
    """Seconds of one attack, one pass and one step of DLG, each with one thread.

    Images have the sides given, through CNN6 and through the network of `expanding_for`; widths are those of FCN3's
    first hidden layer. Columns: network, against ("side" or "width"), value, method, seconds (the fastest of several
    runs; the only run where it takes more than two seconds), psnr_db (of the closed form, NaN elsewhere).
    """
    cases = [("cnn6", "side", side, partial(cnn6_for, side), (3, side, side)) for side in sides]
    cases += [("expanding", "side", side, partial(expanding_for, side), (3, side, side)) for side in expanding_sides]
    cases += [("fcn3", "width", w, partial(models.fcn3, widths=(w, 100)), (1, 28, 28)) for w in widths]
    rows = []
    for network, against, value, make, shape in progress(cases, "costs"):
        with one_thread():
            measured = _measured(make(), shape)
        key = {"network": network, "against": against, "value": value}
        rows += [key | {"method": m, "seconds": s, "psnr_db": psnr} for m, (s, psnr) in measured.items()]
    return pd.DataFrame(rows)


def _measured(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, tuple[float, float]]:
    """Method -> its seconds and the PSNR of its image."""
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    label, chain = torch.tensor([0]), prepare(model, shape)
    gradients = client_gradients(model, image, label)
    found, first = timed(reconstruct, chain, gradients)
    quality = psnr_db(found.images, image).item()
    return {
        "forward and backward": (_fastest(lambda: client_gradients(model, image, label), 5), np.nan),
        "R-GAP, first attack": (first, quality),
        "R-GAP, prepared": (_fastest(lambda: reconstruct(chain, gradients, gradient_scale=1.0), 3), quality),
        "one step of DLG": (
            dlg(model, gradients, shape, labels=label, steps=8).history["seconds"].diff().min(),
            np.nan,
        ),
    }


def _fastest(call: Callable[[], object], times: int) -> float:
    spans = []
    while len(spans) < times and max(spans, default=0.0) <= MAX_REPEATED_SECONDS:
        spans.append(timed(call)[1])
    return min(spans)


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Slopes of log seconds against log value, for each network and method of `costs`, of two values or more."""
    rows = [
        (*key, np.polyfit(np.log(group["value"]), np.log(group["seconds"]), 1)[0])
        for key, group in table.groupby(["network", "against", "method"], sort=False)
    ]
    return pd.DataFrame(rows, columns=["network", "against", "method", "exponent"])


def plot_cost(table: pd.DataFrame, exponents: pd.DataFrame, names: Mapping[str, str]) -> Figure:
    """Seconds against the size of images or networks, with the first method's fitted exponent; a panel a network.

    Names are method -> as the figure names it; other methods are left out.
    """
    table = table[table["method"].isin(list(names))]
    panels = list(table.groupby(["network", "against"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(2.3 * len(panels), 3.2), squeeze=False, sharey=True)
    for axis, ((network, against), part) in zip(axes[0], panels, strict=True):
        fitted = exponents[(exponents["network"] == network) & (exponents["against"] == against)]
        slopes = fitted.set_index("method")["exponent"]
        lines(axis, part.assign(named=part["method"].map(names)), "value", "seconds", by="named", band=False)
        title = f"{NETWORK_NAMES.get(network, network)}\n{next(iter(names.values()))} ∝ {against}"
        axis.set(xscale="log", yscale="log")
        axis.set_title(f"{title}$^{{{slopes[next(iter(names))]:.1f}}}$", fontsize=10)
        axis.set_xlabel("side of the image, pixels" if against == "side" else "units of the first layer")
        axis.set_xticks(sorted(part["value"].unique()), [str(v) for v in sorted(part["value"].unique())])
        axis.set_xticks([], minor=True)
    axes[0, 0].set_ylabel("seconds")
    name_lines(axes[0, -1])
    return finish(figure, grid="both")


def sample_opponents(count: int = 24, seed: int = 0) -> pd.DataFrame:
    """Optimisers at their usual budgets and the closed form on the same gradients, float32, labels told to the former.

    Case n is image n // 6 through one network by one optimiser, so that chunks run side by side; the first is `seed`.
    Columns: case, network, method, image, steps, restarts, psnr_db (the optimiser's), ours_db, ours_verdict, seconds,
    verdict, ok (the closed form's image is the better one), why.
    """
    rows = []
    kinds = list(product(NETWORKS, OPTIMISERS))
    for number in progress(range(seed, seed + count), "opponents"):
        image_number, (name, method) = number // len(kinds), kinds[number % len(kinds)]
        rows.append(_beside(name, method, image_number, USUAL_STEPS[method], USUAL_RESTARTS))
    return pd.DataFrame(rows)


def _beside(name: str, method: str, index: int, steps: int, restarts: int) -> dict:
    """One optimiser and the closed form on one gradient."""
    shape, model = models.IMAGE_SHAPES[name], getattr(models, name)()
    image, label = data.load_images("embedded", image_shape=shape, index=[index], classes=2)
    gradients = client_gradients(model, image, label)
    with one_thread():
        start = time.perf_counter()
        rival = OPTIMISERS[method](model, gradients, shape, labels=label, steps=steps, restarts=restarts)
        seconds = time.perf_counter() - start
        ours = reconstruct(model, gradients, shape, effort="full", gradient_scale=1.0)
    theirs_db, ours_db = (psnr_db(found.images.double(), image.double()).item() for found in (rival, ours))
    row = {"case": f"{name}, image {index}, {method}", "network": name, "method": method, "image": index}
    row |= {"steps": steps, "restarts": restarts, "psnr_db": theirs_db, "ours_db": ours_db}
    row |= {"ours_verdict": ours.verdict, "seconds": seconds, "verdict": rival.verdict, "ok": ours_db > theirs_db}
    return {**row, "why": "" if row["ok"] else "the optimiser's image is the better one"}
