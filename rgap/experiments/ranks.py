"""Notebook 02: rank analysis of networks, beside measured ranks and beside attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap.artifact.progress import progress
from rgap.equations.proofs import rank_bounds
from rgap.experiments.common import attack_each, seeded
from rgap.experiments.drawing import NAME_POINTS, PALETTE, finish, lines, mark, name_lines, step_labels
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.ranking import layer_shape


def rank_table(
    networks: Mapping[str, tuple[nn.Module, tuple[int, ...]]], batch_sizes: Sequence[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank analysis of several networks, name -> network and image shape, from shapes alone, for several batch sizes.

    Returns a row for each network and batch size: counted steps, max_ra_index, by_count (steps with RA > 0), by_rank
    (steps that lack rank), unknown (steps without a known rank), proved (steps whose laws are proved for their shapes),
    deficit (the sum over the steps), copa_index. And the counted steps themselves, columns as in `LayerRank`, with
    network, batch and step (0 at the image).
    """
    rows, steps = [], []
    for (name, (model, shape)), batch in product(networks.items(), batch_sizes):
        analysis = rank_analysis(model, shape, batch, limit=0)
        counted = analysis.to_frame(counted=True)
        steps.append(counted.assign(network=name, batch=batch, step=range(len(counted))))
        rows.append({"network": name, "batch": batch, "steps": len(counted), "max_ra_index": analysis.max_ra_index})
        rows[-1] |= {"by_count": (counted["ra_index"] > 0).sum(), "by_rank": (counted["deficit"] > 0).sum()}
        rows[-1] |= {"unknown": counted["deficit"].isna().sum(), "proved": counted["law_proved"].eq(True).sum()}
        rows[-1] |= {"deficit": counted["deficit"].sum(), "copa_index": analysis.copa_index}
    return pd.DataFrame(rows).astype({"copa_index": "Int64"}), pd.concat(steps, ignore_index=True)


def predicted_and_measured(
    family: Mapping[int, Callable[[int], nn.Module]], images: Tensor, labels: Tensor, seeds: Sequence[int], **options
) -> pd.DataFrame:
    """Attacks a family of networks, with what the rank analysis predicts for each beside it.

    The family is width, or another number that distinguishes the networks -> seed of the weights -> network. Returns
    the rows of `attack_each`, whose options it takes, with width, deficit (by law, the sum over the steps) and ra_index
    (the network's).
    """
    tables = []
    for width, make_model in family.items():
        analysis = rank_analysis(make_model(seeds[0]), tuple(images.shape[1:]), limit=0)
        deficit = analysis.to_frame(counted=True)["deficit"].sum(skipna=False)
        runs, _ = attack_each(make_model, images, labels, seeds, **options)
        tables.append(runs.assign(width=width, deficit=deficit, ra_index=analysis.max_ra_index))
    return pd.concat(tables, ignore_index=True)


def rank_law_sample(count: int, seed: int = 0, max_unknowns: int = 600) -> pd.DataFrame:
    """The rank laws beside measured ranks, on random convolutions in one and two dimensions.

    Layers with more than `max_unknowns` are drawn again. Returns three rows a layer, for W, K and [W; K]: layer,
    system, law (missing where there is none), counted (smaller of equations and unknowns), measured, bound (below the
    generic rank, rigorously: the rank modulo a prime).
    """
    rng, rows = np.random.default_rng(seed), []
    with seeded(seed):
        for number in progress(range(count), "layers"):
            module, shape = random_convolution(rng, max_unknowns)
            rank = rank_analysis(module, shape, dtype=torch.float64, seed=number).layers[0]
            bounds = [module.groups * bound for bound in rank_bounds(layer_shape(module, shape, 1)[0], number)]
            both = rank.weight_rows + rank.gradient_rows
            systems = [("W", rank.law_weights, rank.weight_rows, rank.rank_weights)]
            systems += [("K", rank.law_gradients, rank.gradient_rows, rank.rank_gradients)]
            systems += [("[W; K]", rank.law_rank, both, rank.rank)]
            for bound, (system, law, equations, measured) in zip(bounds, systems, strict=True):
                row = {"layer": number, "system": system, "law": law, "counted": min(equations, rank.unknowns)}
                rows.append(row | {"measured": measured, "bound": bound})
    return pd.DataFrame(rows).astype({"law": "Int64"})


def random_convolution(rng: np.random.Generator, max_unknowns: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution with random strides, paddings, dilations and groups, and the shape of its input."""
    while True:
        axes, groups = int(rng.choice([1, 2, 2])), int(rng.choice([1, 1, 1, 2, 3]))
        kernel, stride, dilation = (rng.integers(1, top, axes).tolist() for top in (6, 4, 3))
        padding = [int(rng.integers(0, k * d // 2 + 1)) for k, d in zip(kernel, dilation, strict=True)]
        image = rng.integers(4, 16, axes).tolist()
        channels, filters = groups * int(rng.integers(1, 9)), groups * int(rng.integers(1, 25))
        fits = all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(image, padding, dilation, kernel, strict=True))
        if fits and channels * np.prod(image) <= max_unknowns:
            kind = nn.Conv1d if axes == 1 else nn.Conv2d
            module = kind(channels, filters, kernel, stride, padding, dilation, groups, bias=False)
            return module.double(), (channels, *image)


def by_width(runs: pd.DataFrame) -> pd.DataFrame:
    """What `predicted_and_measured` says of each width: prediction, number of attacks, PSNR and verdicts."""
    table = runs.groupby("width").agg(
        deficit=("deficit", "first"), ra_index=("ra_index", "first"), attacks=("psnr_db", "size"),
        psnr_min=("psnr_db", "min"), psnr_max=("psnr_db", "max"),
        verdict=("verdict", lambda verdicts: ", ".join(sorted(set(verdicts)))),
    )  # fmt: skip
    table[["psnr_min", "psnr_max"]] = table[["psnr_min", "psnr_max"]].round(0) + 0.0  # no -0
    return table.reset_index()


def count_and_rank(steps: pd.DataFrame) -> pd.DataFrame:
    """Of each step of `to_frame(counted=True)` the surplus of equations by counting, and ranks beside it."""
    layer = steps["name"].map(step_labels(dict(zip(steps["name"], steps["kind"], strict=True))))
    surplus = steps["weight_rows"] + steps["gradient_rows"] - steps["unknowns"]
    condition = [float(f"{value:.2g}") for value in steps["condition"]]
    columns = ["layer", "unknowns", "surplus", "ra_index", "rank_weights", "rank_gradients", "rank", "law_rank",
               "deficit", "virtual_constraints", "condition"]  # fmt: skip
    return steps.assign(layer=layer, surplus=surplus, condition=condition)[columns]


def plot_ra_along_depth(steps: pd.DataFrame) -> Figure:
    """Counting index of each step of one network, from the image to the output, a line for each batch size.

    Above zero, counting predicts that a step cannot be recovered.
    """
    kinds = dict(zip(steps["name"], steps["kind"], strict=True))
    images = steps["batch"].astype(str) + steps["batch"].map(lambda batch: " image" + "s" * (batch > 1))
    layer = pd.Categorical(steps["name"].map(step_labels(kinds)), step_labels(kinds).values(), ordered=True)
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    lines(axis, steps.assign(layer=layer, images=images), "layer", "ra_index", by="images", band=False)
    axis.set_yscale("symlog", linthresh=100)
    axis.axhspan(0, axis.get_ylim()[1], color="0.93", zorder=0)
    axis.text(0.02, 0.95, "more unknowns than equations", transform=axis.transAxes, va="top", color="0.4")
    axis.axhline(0, color="0.3", lw=1)
    axis.set(xlabel="layer, from the image on", ylabel="counting index RA")
    name_lines(axis)
    return finish(figure)


def plot_laws(sample: pd.DataFrame) -> Figure:
    """Rank by law against measured rank, one panel a system, one point a layer; rows without a law are left out.

    On the line both are equal. Grey crosses stand where counting rows and columns puts the rank.
    """
    data = sample.dropna(subset="law").astype({"law": float})
    largest = data[["law", "counted"]].to_numpy().max()
    systems = list(dict.fromkeys(data["system"]))
    figure, axes = plt.subplots(1, len(systems), figsize=(2.9 * len(systems), 3.4), sharex=True, sharey=True)
    for axis, system in zip(axes, systems, strict=True):
        shown = data[data["system"] == system]
        axis.plot([0, largest], [0, largest], color="0.6", lw=1, zorder=0)
        axis.scatter(shown["counted"], shown["measured"], s=16, color="0.6", marker="x", lw=0.9, label="by counting")
        axis.scatter(shown["law"], shown["measured"], s=16, color=sns.color_palette(PALETTE)[0], lw=0, label="by law")
        axis.set(title=f"rank {system}, {len(shown)} layers", xlabel="predicted rank")
    axes[0].set_ylabel("measured rank")
    axes[0].legend(frameon=False, fontsize=NAME_POINTS, loc="upper left")
    return finish(figure, grid=None)


def plot_width_family(runs: pd.DataFrame, limit: float) -> Figure:
    """Quality of the attack against a layer's width, with the least width that ranks and that counting ask for.

    Runs are from `predicted_and_measured`, a point each; from `limit` dB on an attack counts as a success.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    axis.scatter(runs["width"], runs["psnr_db"], s=30, color=sns.color_palette(PALETTE)[0], zorder=3)
    axis.axhline(limit, color="0.4", ls=":", lw=1)
    axis.annotate(f"success: {limit:g} dB", (1, limit), (-2, 4), ("axes fraction", "data"), "offset points", ha="right")
    for column, text, line in (
        ("ra_index", "counting:\nenough from here", "--"),
        ("deficit", "rank:\nenough from here", "-"),
    ):
        short = runs[column] > 0
        if short.any() and not short.all():
            edge = (runs.loc[short, "width"].max() + runs.loc[~short, "width"].min()) / 2
            mark(axis, edge, text, line=line, ha="right" if column == "ra_index" else "left")
    axis.set(xlabel="channels of the second layer", ylabel="PSNR, dB")
    return finish(figure)
