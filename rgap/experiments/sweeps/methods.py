"""Closed form and optimisers on the same gradients: quality, time, and what both cost."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgap import models
from rgap.attack.reconstruct import reconstruct
from rgap.baselines import Optimised, dlg, hybrid, inverting_gradients
from rgap.client import client_gradients
from rgap.experiments.sweeps.parallel import run_each
from rgap.metrics import mse, psnr_db
from rgap.network.chain import prepare
from rgap.results import Reconstruction

CLOSED = ("plain R-GAP", "virtual constraints")
METHODS = (*CLOSED, "DLG", "Inverting Gradients", "hybrid")
"""The attacks that are compared: our closed form without and with virtual constraints, the optimisers, the hybrid."""

WITHIN_DB = 0.5
"""An optimiser has arrived when its PSNR is so close to the best of its own trajectory."""


def attack_by(method: str, model: nn.Module, gradients: Sequence[Tensor], image_shape, label: Tensor, steps, seed):
    """One attack from network and gradient alone.

    Optimisers are told the label, to their advantage; the closed form and the hybrid find it.

    Args:
        method: A name in `METHODS`.
        model: The network, or a `Chain`.
        gradients: What the client shared.
        image_shape: (C, H, W).
        label: (1,).
        steps: Method -> steps, of the optimisers and the hybrid.
        seed: Of their starts.

    Returns:
        A `Reconstruction`.
    """
    if method in CLOSED:
        return reconstruct(model, gradients, image_shape, virtual_constraints=method == CLOSED[1])
    if method == "hybrid":
        return hybrid(model, gradients, image_shape, steps=steps[method], seed=seed)
    attack = {"DLG": dlg, "Inverting Gradients": inverting_gradients}[method]
    return attack(model, gradients, image_shape, labels=label, steps=steps[method], seed=seed)


def compare_methods(
    images: Mapping[str, tuple[Tensor, Tensor]],
    seeds: Sequence[int],
    steps: Mapping[str, int],
    methods: Sequence[str] = METHODS,
    jobs: int = 1,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[tuple[str, str], Tensor]]:
    """Every method on every image, network and seed, each with one thread and from the same gradient.

    Args:
        images: Name of a network in `rgap.models` -> images (N, C, H, W) and labels (N,).
        seeds: Of the networks and of the optimisers' starts.
        steps: Method -> steps, of the optimisers and the hybrid.
        methods: Names in `METHODS`.
        jobs: Processes on this machine; with more than one, runs share it while they are timed.

    Returns:
        One row a run: network, seed, image, method, mse, psnr_db, verdict, seconds (from network and gradient to the
        image), seconds_prepared (the same on a prepared chain; of the closed form only) and seconds_to_best (until the
        PSNR is within 0.5 dB of the best of the trajectory). The trajectories: network, seed, image, method, restart,
        step, seconds, psnr_db. And (network, method) -> the images of the first seed.
    """
    keys, calls = [], []
    for (network, (pictures, labels)), seed in product(images.items(), seeds):
        for i, method in product(range(len(pictures)), methods):
            keys.append({"network": network, "seed": seed, "image": i, "method": method})
            calls.append((network, method, pictures[i : i + 1], labels[i : i + 1], seed, dict(steps)))
    done = run_each(_run, calls, jobs, title="attacks")
    runs = pd.DataFrame([key | row for key, (row, _, _) in zip(keys, done, strict=True)])
    tables = [table.assign(**key) for key, (_, table, _) in zip(keys, done, strict=True)]
    found: dict[tuple[str, str], list[Tensor]] = {}
    for key, (_, _, picture) in zip(keys, done, strict=True):
        if key["seed"] == seeds[0]:
            found.setdefault((key["network"], key["method"]), []).append(picture)
    return runs, pd.concat(tables, ignore_index=True), {key: torch.cat(each) for key, each in found.items()}


def _run(network: str, method: str, image: Tensor, label: Tensor, seed: int, steps: dict[str, int]):
    """One run: its row, its trajectory and its image. A function of the module, so that other processes find it."""
    shape = tuple(image.shape[1:])
    with one_thread():
        model = getattr(models, network)(seed)
        gradients = client_gradients(model, image, label)
        start = time.perf_counter()
        chain = model if method in METHODS[2:4] else prepare(model, shape)
        result = attack_by(method, chain, gradients, shape, label, steps, seed)
        seconds, prepared = time.perf_counter() - start, np.nan
        if method in CLOSED:
            start = time.perf_counter()
            attack_by(method, chain, gradients, shape, label, steps, seed)
            prepared = time.perf_counter() - start
    table = _trajectory(result, image, seconds)
    row = _quality(result.images, image) | {"verdict": result.verdict, "seconds": seconds}
    arrived = table["psnr_db"] >= table["psnr_db"].max() - WITHIN_DB
    row |= {"seconds_prepared": prepared, "seconds_to_best": table.loc[arrived, "seconds"].min()}
    return row, table, result.images


def _trajectory(result: Reconstruction, image: Tensor, seconds: float) -> pd.DataFrame:
    """PSNR along the way, and of the result; only a sweep compares it with the truth."""
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

    Args:
        runs: As from `compare_methods`.

    Returns:
        One row for each network and method: runs, mse, mse_std, psnr_db, psnr_db_std; numbers rounded to what repeats.
    """
    groups = runs.groupby(["network", "method"], sort=False)
    table = groups.agg(runs=("mse", "size"), mse=("mse", "mean"), mse_std=("mse", "std"),
                       psnr_db=("psnr_db", "mean"), psnr_db_std=("psnr_db", "std")).reset_index()  # fmt: skip
    for name in ("mse", "mse_std"):
        table[name] = [float(f"{value:.2g}") for value in table[name]]
    return table.round({"psnr_db": 1, "psnr_db_std": 1})


def time_table(runs: pd.DataFrame, dtype: str = "float32") -> pd.DataFrame:
    """Medians of the seconds, DLG's time over the closed form's, and the machine that they were measured on.

    Args:
        runs: As from `compare_methods`.
        dtype: Of the networks and of DLG and Inverting Gradients.

    Returns:
        One row for each network and method: seconds, seconds_prepared, seconds_to_best, cores, threads, torch, dtype.
    """
    names = ["seconds", "seconds_prepared", "seconds_to_best"]
    table = runs.groupby(["network", "method"], sort=False)[names].median().reset_index()
    return table.assign(cores=os.cpu_count(), threads=1, torch=torch.__version__, dtype=dtype)


def time_ratios(runs: pd.DataFrame, of: str = "DLG", to: str = CLOSED[1], column: str = "seconds") -> pd.Series:
    """An optimiser's time to within 0.5 dB of its own best over the closed form's time, run by run."""
    keys = ["network", "seed", "image"]
    slow = runs[runs["method"] == of].set_index(keys)["seconds_to_best"]
    return slow / runs[runs["method"] == to].set_index(keys)[column]


def networks_won(runs: pd.DataFrame, by: str = CLOSED[1], rivals: Sequence[str] = METHODS[2:4]) -> pd.DataFrame:
    """Mean PSNR of a method and of the best of its rivals, network by network, and whether it is ahead."""
    means = runs.pivot_table(index="network", columns="method", values="psnr_db", sort=False)
    best = means[list(rivals)].max(axis=1)
    return pd.DataFrame({"ours": means[by], "best_rival": best, "ahead": means[by] > best}).reset_index()


@contextmanager
def one_thread():
    """One thread for torch's operations: what a run takes then depends least on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
