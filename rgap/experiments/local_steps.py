"""Notebook 15: updates of several local steps: networks, steps and rates, and the fixed point's iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap import models
from rgap.attack.local_steps import reconstruct_update
from rgap.baselines import inverting_gradients
from rgap.client import LocalTraining, mean_gradients
from rgap.experiments.common import choice, cpu_timed, progress, seeded
from rgap.experiments.drawing import finish, lines, name_lines
from rgap.experiments.vision_transformers import client_update, small_transformer
from rgap.metrics import psnr_db
from rgap.results import Reconstruction

MIN_SURE_PSNR_DB = 50.0  # below it, and beyond three times its predicted error, a certificate is false
MAX_DRAWN_PSNR_DB = 200.0  # above, rounding decides, and another machine's differs
MISTAKES = ("none", "none", "steps", "rate", "momentum", "decay")  # what a server may not know of a client's training


def networks(seed: int = 0) -> dict[str, tuple[nn.Module, str]]:
    """Name -> network for (3, 32, 32) and its loss: one of each kind, float64."""
    elu = models.cnn6(seed)
    for name, module in elu.named_children():
        if isinstance(module, nn.LeakyReLU):
            setattr(elu, name, nn.ELU())
    with seeded(seed):
        mlp = nn.Sequential(
            nn.Flatten(), nn.Linear(3072, 200), nn.ReLU(), nn.Linear(200, 50), nn.ReLU(), nn.Linear(50, 10)
        )
    found = {
        "vision transformer": (small_transformer(96, seed=seed), "cross_entropy"),
        "MLP, ReLU": (mlp, "cross_entropy"),
        "CNN6, ELU": (elu, "logistic"),
        "LeNet, sigmoid": (models.lenet(seed, bias=True), "cross_entropy"),
        "CNN6, LeakyReLU": (models.cnn6(seed), "logistic"),
    }
    return {name: (network.double().eval(), loss) for name, (network, loss) in found.items()}


def attack_update(
    model: nn.Module, image: Tensor, label: Tensor, loss: str, training: LocalTraining, **known
) -> tuple[dict, Reconstruction]:
    """Attacks the update of one image (1, C, H, W), whose label (1,) the client alone is given.

    `known` is what the server believes in place of the client's training: learning_rate, steps, momentum, weight_decay.
    Returns a row (steps, learning_rate, momentum, verdict, psnr_db, predicted_psnr_db, drift-free iterations, seconds
    of the processor), and the result.
    """
    after = client_update(model, image, label, loss, training)
    fields = ("learning_rate", "steps", "momentum", "weight_decay")
    options = {key: getattr(training, key) for key in fields} | known
    result, seconds = cpu_timed(reconstruct_update, model, after, tuple(image.shape[1:]), loss, **options)
    best = result.candidates[0]
    row = {
        "steps": training.steps, "learning_rate": training.learning_rate, "momentum": training.momentum,
        "verdict": result.verdict, "psnr_db": psnr_db(result.images, image).item(),
        "predicted_error": best.predicted_error,
        "iterations": max((len(steps) for steps in best.beliefs.values()), default=0), "attack_seconds": seconds,
    }  # fmt: skip
    return row, result


def attack_updates(
    chosen: Mapping[str, tuple[nn.Module, str]], images: Tensor, labels: Tensor, steps: Sequence[int],
    rates: Sequence[float], momenta: Sequence[float] = (0.0,),
) -> pd.DataFrame:  # fmt: skip
    """Attacks every network's update after every number of steps, at every rate and momentum, for every image.

    Networks are as from `networks`, images (N, 3, 32, 32), labels (N,), taken modulo 2 for one output. Returns the rows
    of `attack_update` with network and image before them.
    """
    cases = [
        (name, k, rate, m, i) for name in chosen for k in steps for rate in rates for m in momenta
        for i in range(len(images)) if k > 1 or m == 0
    ]  # fmt: skip
    rows = []
    for name, k, rate, momentum, i in progress(cases, "updates"):
        model, loss = chosen[name]
        label = labels[i : i + 1] % (2 if loss == "logistic" else 10)
        image = images[i : i + 1].to(next(model.parameters()))
        row, _ = attack_update(model, image, label, loss, LocalTraining(rate, k, momentum))
        rows.append({"network": name, "image": i, **row})
    return pd.DataFrame(rows)


def against_optimiser(
    model: nn.Module, image: Tensor, label: Tensor, loss: str, training: LocalTraining, steps: int
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """The same update by the fixed point and by Inverting Gradients with the client's steps unrolled.

    The optimiser is told the label, both the client's training. Returns method, psnr_db and seconds of the processor;
    and method -> image.
    """
    row, result = attack_update(model, image, label, loss, training)
    update = mean_gradients(model, client_update(model, image, label, loss, training), training)
    options = {"labels": label, "steps": steps, "training": training}
    optimised, seconds = cpu_timed(inverting_gradients, model, update, tuple(image.shape[1:]), loss, **options)
    rows = [
        {"method": "fixed point", "psnr_db": row["psnr_db"], "attack_seconds": row["attack_seconds"]},
        {
            "method": "Inverting Gradients, unrolled",
            "psnr_db": psnr_db(optimised.images, image).item(),
            "attack_seconds": seconds,
        },
    ]
    found = {"fixed point": result.images[0], "Inverting\nGradients": optimised.images[0]}
    return pd.DataFrame(rows), found


def iteration_quality(result: Reconstruction, image: Tensor) -> list[float]:
    """PSNR of every iterate of the fixed point, dB."""
    iterates = next(iter(result.candidates[0].beliefs.values()))
    return [psnr_db(x.reshape(image.shape), image).item() for x in iterates]


def sample_updates(count: int = 200, seed: int = 0) -> pd.DataFrame:
    """Updates of small networks, of whose training the server believes wrong steps, rates, momentum or decay, or not.

    Columns: case, trouble, verdict, psnr_db, ok and why: a false certificate is not ok.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_attack_random_update(generator, number) for number in progress(range(count), "updates")])


def _attack_random_update(generator: torch.Generator, number: int) -> dict:
    pick = partial(choice, generator)
    kind, mistake = pick("transformer", "MLP", "MLP", "smooth chain", "kinked chain"), pick(*MISTAKES)
    dtype = pick(torch.float32, torch.float64, torch.float64)
    model, shape, loss = _small_network(kind, number)
    model = model.to(dtype)
    training = LocalTraining(pick(0.001, 0.01, 0.1), pick(1, 2, 5, 10), pick(0.0, 0.9), pick(0.0, 0.0, 1e-3))
    image = torch.rand(1, *shape, generator=generator).to(dtype)
    label = torch.randint(2 if loss == "logistic" else 5, (1,), generator=generator)
    known = {
        "none": {}, "steps": {"steps": training.steps + pick(1, 2)},
        "rate": {"learning_rate": training.learning_rate * pick(0.5, 0.9, 1.1, 2.0)},
        "momentum": {"momentum": 0.9 - training.momentum},
        "decay": {"weight_decay": 1e-2 if training.weight_decay == 0 else 0.0},
    }[mistake]  # fmt: skip
    row, _ = attack_update(model, image, label, loss, training, **known)
    error = 10 ** (-row["psnr_db"] / 20)
    false = row["verdict"] == "exact" and row["psnr_db"] < MIN_SURE_PSNR_DB and error > 3 * row["predicted_error"]
    case = f"{kind}, {str(dtype).removeprefix('torch.')}, {training.steps} steps at {training.learning_rate}"
    case += f", momentum {training.momentum}, decay {training.weight_decay}"
    found = {"case": case, "trouble": mistake, "verdict": row["verdict"], "psnr_db": row["psnr_db"]}
    return {**found, "ok": not false, "why": "a wrong image is certified" if false else ""}


def _small_network(kind: str, seed: int) -> tuple[nn.Module, tuple[int, int, int], str]:
    """A small network of a kind, the shape of its images and its loss."""
    if kind == "transformer":
        return small_transformer(24, 1, seed, size=8, patch=2, classes=5), (3, 8, 8), "cross_entropy"
    with seeded(seed):
        if kind == "MLP":
            layers = nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 5)
            return nn.Sequential(nn.Flatten(), *layers), (3, 4, 4), "cross_entropy"
        smooth = kind == "smooth chain"
        make = (lambda: nn.ELU()) if smooth else (lambda: nn.LeakyReLU(0.2))
        layers = nn.Conv2d(3, 8, 3, padding=1), make(), nn.Conv2d(8, 8, 3, padding=1), make(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(512, 1)), (3, 8, 8), "logistic"


def plot_iterations(series: Mapping[str, Sequence[float]]) -> Figure:
    """PSNR (dB) of the fixed point's iterates, a line for each case, up to where rounding decides."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    rows = []
    for name, values in series.items():
        drawn = values[: 1 + sum(value < MAX_DRAWN_PSNR_DB for value in values)]
        rows += [(name, step, min(value, MAX_DRAWN_PSNR_DB)) for step, value in enumerate(drawn)]
    lines(axis, pd.DataFrame(rows, columns=["case", "iteration", "psnr"]), "iteration", "psnr", by="case", band=False)
    axis.set(xlabel="iteration", xticks=range(1 + max(step for _, step, _ in rows)), ylim=(0, 1.05 * MAX_DRAWN_PSNR_DB))
    axis.set_ylabel(f"PSNR, dB, up to {MAX_DRAWN_PSNR_DB:g}")
    name_lines(axis, in_margin=True)
    return finish(figure)


def plot_basin(runs: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Median PSNR of `attack_updates` over steps and rate, a panel for each network; certified cells carry a tick."""
    figure, axes = plt.subplots(1, len(names), figsize=(4.0 * len(names), 2.6), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        cells = runs[runs["network"] == name].groupby(["steps", "learning_rate"])
        quality = cells["psnr_db"].median().unstack()
        sure = cells["verdict"].agg(lambda v: (v == "exact").all()).unstack()
        text = quality.round(0).astype(int).astype(str) + sure.replace({True: " ✓", False: ""}).astype(str)
        sns.heatmap(quality, annot=text, fmt="", vmin=0, vmax=150, cmap="cividis", cbar=False, ax=axis, linewidths=1)
        axis.set(title=name, xlabel="learning rate", ylabel="local steps" if axis is axes[0][0] else "")
        axis.tick_params(rotation=0)
    return finish(figure, None)
