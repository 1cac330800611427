"""Notebook 05: rank-deficient layers closed by the layer before."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from rgap.experiments.common import MARKERS, PALETTE, finish, mark
from rgap.network.layer import Chain
from rgap.results import Reconstruction


def wrong_signs(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """How many signs of a deficient layer's input were wrong after each step of the virtual constraints.

    Args:
        chain: The prepared network.
        image: The true image, (1, C, H, W).
        result: What the attack returned for its gradient.

    Returns:
        Columns `layer`, `step` (from 1) and `wrong`.
    """
    truth = chain.layer_inputs(image)
    rows = [
        {"layer": name, "step": step, "wrong": int(((x > 0) != (truth[name].flatten() > 0)).sum())}
        for name, estimates in result.candidates[0].beliefs.items()
        for step, x in enumerate(estimates, 1)
    ]
    return pd.DataFrame(rows, columns=["layer", "step", "wrong"])


def plot_wrong_signs(history: pd.DataFrame) -> Figure:
    """Signs of a deficient layer's input still wrong after each step, one line for each image.

    Args:
        history: Columns `image`, `step` and `wrong`.

    Returns:
        The figure.
    """
    figure, axis = plt.subplots(figsize=(5.2, 3.2))
    data = history.assign(image=history["image"].astype(str))
    style = {"markers": MARKERS[: data["image"].nunique()], "dashes": False, "palette": PALETTE}
    sns.lineplot(data, x="step", y="wrong", hue="image", style="image", ax=axis, **style)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="step", ylabel="wrong signs", xticks=sorted(data["step"].unique()))
    axis.set_ylim(-0.3, 2 * max(1, data["wrong"].max()))
    axis.legend(title="image", frameon=False)
    return finish(figure)


def plot_phase_transition(runs: pd.DataFrame, thresholds: Mapping[str, int]) -> Figure:
    """PSNR against the width of a layer, for the plain method and with virtual constraints.

    Args:
        runs: Columns `width`, `deficit`, `psnr_db`, `verdict` and `virtual` (whether constraints were solved).
        thresholds: Label -> largest deficit that its equations can close.

    Returns:
        The figure; filled markers are certified results.
    """
    figure, axis = plt.subplots(figsize=(7.2, 4.2))
    colours = dict(zip((False, True), sns.color_palette(PALETTE)[1::-1], strict=True))
    for virtual, name in ((False, "plain R-GAP"), (True, "with virtual constraints")):
        data = runs[runs["virtual"] == virtual]
        median = data.groupby("width")["psnr_db"].median()
        axis.plot(median.index, median, color=colours[virtual], lw=1.5, label=name, zorder=2)
        for certified, face in ((True, colours[virtual]), (False, "white")):
            points = data[(data["verdict"] == "exact") == certified]
            style = {"marker": "os"[virtual], "facecolor": face, "edgecolor": colours[virtual], "s": 42, "zorder": 3}
            axis.scatter(points["width"], points["psnr_db"], **style)
    deficits = runs.groupby("width")["deficit"].max().sort_index()
    for label, limit in {"no deficit": 0, **thresholds}.items():
        if (deficits > limit).any() and (deficits <= limit).any():
            edge = (deficits[deficits > limit].index.max() + deficits[deficits <= limit].index.min()) / 2
            mark(axis, edge, f"{label}\n(deficit ≤ {limit})")
    axis.set(xlabel="channels of the second layer", ylabel="PSNR (dB)")
    axis.invert_xaxis()
    axis.scatter([], [], marker="o", facecolor="white", edgecolor="0.3", label="not certified")
    axis.legend(loc="center", bbox_to_anchor=(0.5, 0.5), framealpha=1, edgecolor="white")
    return finish(figure)
