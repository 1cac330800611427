"""Notebook 04: the closed form and optimisers on the same gradients, their quality and their time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap import models
from rgap.attack.reconstruct import reconstruct
from rgap.baselines import Optimised, dlg, hybrid, inverting_gradients
from rgap.client import client_gradients
from rgap.experiments.common import one_thread, seeded, timed
from rgap.experiments.drawing import MARKERS, NETWORK_NAMES, colours, finish, name_lines
from rgap.experiments.side_by_side import run_each
from rgap.metrics import mse, psnr_db
from rgap.network.chain import prepare
from rgap.results import Reconstruction

CLOSED_FORMS = ("plain R-GAP", "virtual constraints")
OPTIMISERS = {"DLG": dlg, "Inverting Gradients": inverting_gradients}
METHODS = (*CLOSED_FORMS, *OPTIMISERS, "hybrid")  # the closed form without and with virtual constraints first
WITHIN_DB = 0.5  # an optimiser has arrived when its PSNR is this close to the best of its own trajectory


def attack_by(method: str, model: nn.Module, gradients: Sequence[Tensor], image_shape, label: Tensor, steps, seed):
    """One attack from network and gradient alone, by a name in `METHODS`, of an image of that shape (C, H, W).

    Optimisers are told the label (1,), to their advantage; the closed form and the hybrid find it. Steps are method ->
    steps, of the optimisers and the hybrid; the seed is that of their starts.
    """
    if method in CLOSED_FORMS:
        return reconstruct(
            model, gradients, image_shape, virtual_constraints=method == CLOSED_FORMS[1], effort="full",
            gradient_scale=1.0,
        )  # fmt: skip
    if method == "hybrid":
        return hybrid(model, gradients, image_shape, steps=steps[method], seed=seed)
    return OPTIMISERS[method](model, gradients, image_shape, labels=label, steps=steps[method], seed=seed)


def compare_methods(
    images: Mapping[str, tuple[Tensor, Tensor]], seeds: Sequence[int], steps: Mapping[str, int],
    methods: Sequence[str] = METHODS, jobs: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[tuple[str, str], Tensor]]:  # fmt: skip
    """Every method on every image, network and seed, each with one thread and from the same gradient.

    Images are name of a network in `rgap.models` -> images (N, C, H, W) and labels (N,); steps as for `attack_by`; with
    more than one job, runs share the machine while they are timed.

    Returns one row a run: network, seed, image, method, mse, psnr_db, verdict, seconds (from network and gradient to
    the image), seconds_prepared (the same on a prepared chain; of the closed form only) and seconds_to_best (until the
    PSNR is within 0.5 dB of the best of the trajectory). The trajectories: network, seed, image, method, restart, step,
    seconds, psnr_db. And (network, method) -> the images of the first seed.
    """
    keys, calls = [], []
    for (network, (pictures, labels)), seed in product(images.items(), seeds):
        for i, method in product(range(len(pictures)), methods):
            keys.append({"network": network, "seed": seed, "image": i, "method": method})
            calls.append((network, method, pictures[i : i + 1], labels[i : i + 1], seed, dict(steps)))
    done = run_each(_compared, calls, jobs, title="attacks")
    runs = pd.DataFrame([key | row for key, (row, _, _) in zip(keys, done, strict=True)])
    tables = [table.assign(**key) for key, (_, table, _) in zip(keys, done, strict=True)]
    found: dict[tuple[str, str], list[Tensor]] = {}
    for key, (_, _, picture) in zip(keys, done, strict=True):
        if key["seed"] == seeds[0]:
            found.setdefault((key["network"], key["method"]), []).append(picture)
    return runs, pd.concat(tables, ignore_index=True), {key: torch.cat(each) for key, each in found.items()}


def _compared(network: str, method: str, image: Tensor, label: Tensor, seed: int, steps: dict[str, int]):
    """One run: its row, its trajectory and its image."""
    shape, prepared = tuple(image.shape[1:]), np.nan
    with one_thread():
        model = getattr(models, network)(seed)
        gradients = client_gradients(model, image, label)
        start = time.perf_counter()
        chain = model if method in OPTIMISERS else prepare(model, shape)
        result = attack_by(method, chain, gradients, shape, label, steps, seed)
        seconds = time.perf_counter() - start
        if method in CLOSED_FORMS:
            _, prepared = timed(attack_by, method, chain, gradients, shape, label, steps, seed)
    table = _trajectory(result, image, seconds)
    row = _quality(result.images, image) | {"verdict": result.verdict, "seconds": seconds}
    arrived = table["psnr_db"] >= table["psnr_db"].max() - WITHIN_DB
    row |= {"seconds_prepared": prepared, "seconds_to_best": table.loc[arrived, "seconds"].min()}
    return row, table, result.images


def _trajectory(result: Reconstruction, image: Tensor, seconds: float) -> pd.DataFrame:
    """PSNR of every snapshot and of the result, measured after the attack, which never gets the true image."""
    shots = result.snapshots if isinstance(result, Optimised) else ()
    rows = [(s.restart, s.step, s.seconds, _quality(s.images, image)["psnr_db"]) for s in shots]
    last = (shots[-1].restart, shots[-1].step) if shots else (0, 0)
    rows.append((*last, seconds, _quality(result.images, image)["psnr_db"]))
    return pd.DataFrame(rows, columns=["restart", "step", "seconds", "psnr_db"])


def _quality(found: Tensor, image: Tensor) -> dict[str, float]:
    found = found.to(torch.float64).reshape(image.shape)
    return {"mse": mse(found, image).item(), "psnr_db": psnr_db(found, image).item()}


def quality_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation of MSE and PSNR, the counterpart of the paper's Table 1.

    One row for each network and method of `compare_methods`: runs, mse, mse_std, psnr_db, psnr_db_std; numbers rounded
    to what repeats.
    """
    groups = runs.groupby(["network", "method"], sort=False)
    table = groups.agg(runs=("mse", "size"), mse=("mse", "mean"), mse_std=("mse", "std"),
                       psnr_db=("psnr_db", "mean"), psnr_db_std=("psnr_db", "std")).reset_index()  # fmt: skip
    for name in ("mse", "mse_std"):
        table[name] = [float(f"{value:.2g}") for value in table[name]]
    return table.round({"psnr_db": 1, "psnr_db_std": 1})


def time_table(runs: pd.DataFrame, dtype: str = "float32") -> pd.DataFrame:
    """Medians of the seconds, and the machine that they were measured on.

    One row for each network and method of `compare_methods`: seconds, seconds_prepared, seconds_to_best, cores,
    threads, torch, and dtype, of the networks and of the optimisers.
    """
    names = ["seconds", "seconds_prepared", "seconds_to_best"]
    table = runs.groupby(["network", "method"], sort=False)[names].median().reset_index()
    return table.assign(cores=os.cpu_count(), threads=1, torch=torch.__version__, dtype=dtype)


def time_ratios(runs: pd.DataFrame, of: str = "DLG", to: str = CLOSED_FORMS[1], column: str = "seconds") -> pd.Series:
    """An optimiser's time to within 0.5 dB of its own best over the closed form's time, run by run."""
    keys = ["network", "seed", "image"]
    slow = runs[runs["method"] == of].set_index(keys)["seconds_to_best"]
    return slow / runs[runs["method"] == to].set_index(keys)[column]


def networks_won(runs: pd.DataFrame, by: str = CLOSED_FORMS[1], rivals: Sequence[str] = (*OPTIMISERS,)) -> pd.DataFrame:
    """Mean PSNR of a method and of the best of its rivals, network by network, and whether it is ahead."""
    means = runs.pivot_table(index="network", columns="method", values="psnr_db", sort=False)
    best = means[list(rivals)].max(axis=1)
    return pd.DataFrame({"ours": means[by], "best_rival": best, "ahead": means[by] > best}).reset_index()


def wide_lenet(seed: int = 0) -> nn.Module:
    """LeNet with sigmoids and weights uniform in ±0.5, as Deep Leakage from Gradients was shown on, ten classes."""
    model = models.lenet(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) - 0.5)
    return model


def small_convnet(seed: int = 0) -> nn.Module:
    """Three 3×3 convolutions of 16 channels with biases and ELU (strides 1, 2, 2) and a linear layer, ten classes."""
    with seeded(seed):
        modules: list[nn.Module] = []
        for inputs, stride in ((3, 1), (16, 2), (16, 2)):
            modules += [nn.Conv2d(inputs, 16, 3, stride, 1), nn.ELU()]
        return nn.Sequential(*modules, nn.Flatten(), nn.Linear(1024, 10)).eval()


SOUND_ON = {"DLG": wide_lenet, "Inverting Gradients": small_convnet}  # on which it is known to work


def soundness(
    images: Tensor, labels: Tensor, steps: Mapping[str, int], jobs: int = 1
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Each optimiser on the network on which it is known to work, a new seed for every image; the label is inferred.

    Images are (N, 3, 32, 32) with labels (N,) of ten classes; steps, method -> steps, says which methods are tried.
    Returns one row a run (method, image, psnr_db, label_found, verdict), and method -> the images found.
    """
    keys = [(method, i) for method in steps for i in range(len(images))]
    calls = [(method, images[i : i + 1], labels[i : i + 1], i, steps[method]) for method, i in keys]
    done = run_each(_sound, calls, jobs, title="soundness")
    rows = [{"method": method, "image": i} | row for (method, i), (row, _) in zip(keys, done, strict=True)]
    found = {m: torch.cat([x for (method, _), (_, x) in zip(keys, done, strict=True) if method == m]) for m in steps}
    return pd.DataFrame(rows), found


def _sound(method: str, image: Tensor, label: Tensor, seed: int, steps: int):
    with one_thread():
        model = SOUND_ON[method](seed)
        gradients = client_gradients(model, image, label, loss="cross_entropy")
        shape = tuple(image.shape[1:])
        result = OPTIMISERS[method](model, gradients, shape, "cross_entropy", steps=steps, seed=seed)
    row = {"psnr_db": psnr_db(result.images, image).item(), "label_found": bool(result.labels[0] == label[0])}
    return row | {"verdict": result.verdict}, result.images


def plot_quality_against_time(trajectories: pd.DataFrame, names: Mapping[str, str], networks: Sequence[str]) -> Figure:
    """Best PSNR so far against seconds since network and gradient were given, one panel a network.

    A line is a method's way on one image, the marker its end. Names are method -> as the figure names it; other methods
    are left out.
    """
    figure, axes = plt.subplots(1, len(networks), figsize=(3.5 * len(networks), 3.4), squeeze=False, sharey=True)
    for axis, network in zip(axes[0], networks, strict=True):
        for marker, (method, colour) in zip(MARKERS, colours(names).items(), strict=False):
            shown = trajectories[(trajectories["network"] == network) & (trajectories["method"] == method)]
            ways = sorted((run for _, run in shown.groupby(["seed", "image"])), key=lambda run: run["psnr_db"].max())
            for number, run in enumerate(ways):
                style = {"marker": marker, "markevery": [-1], "ms": 7, "lw": 1.2, "color": colour}
                label = names[method] if number == len(ways) // 2 else None  # the name stands beside a median end
                axis.plot(run["seconds"], run["psnr_db"].cummax(), label=label, **style)
        axis.set(xscale="log", xlabel="seconds", title=NETWORK_NAMES.get(network, network))
    axes[0, 0].set(ylabel="best PSNR so far, dB", ylim=(0, None))
    for axis in axes[0]:
        name_lines(axis, in_margin=True)
    return finish(figure, grid="both")
