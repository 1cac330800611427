"""What an attack met on its way down the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def error_growth(errors: pd.DataFrame, order: Sequence[str]) -> Figure:
    """Relative error of each layer's recovered input, from the head down to the image.

    Args:
        errors: Columns `layer`, `dtype` and `error` (‖x̂ − x‖ / ‖x‖), several rows for each pair.
        order: Layer labels in the order of the attack.

    Returns:
        The figure; lines are medians, bands reach from the smallest to the largest.
    """
    layers = pd.Categorical(errors["layer"], order, ordered=True)
    data = errors.assign(layer=layers, error=errors["error"].clip(lower=1e-16))  # 0 has no place on the axis
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    sns.lineplot(
        data, x="layer", y="error", hue="dtype", style="dtype", markers=MARKERS[: data["dtype"].nunique()],
        dashes=False, estimator="median", errorbar=("pi", 100), palette=PALETTE, ax=axis,
    )  # fmt: skip
    axis.set(yscale="log", ylim=(data["error"].min() / 3, data["error"].max() * 3))
    axis.set(xlabel="layer whose input is recovered, from the head to the image", ylabel="relative error ‖x̂ − x‖ / ‖x‖")
    axis.legend(title="gradients", frameon=False)
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure


def phase_transition(runs: pd.DataFrame, thresholds: Mapping[str, int]) -> Figure:
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
            axis.axvline(edge, color="0.4", ls=":", lw=1)
            axis.annotate(
                f"{label}\n(deficit ≤ {limit})",
                (edge, 1.01),
                xycoords=("data", "axes fraction"),
                fontsize=8,
                ha="center",
            )
    axis.set(xlabel="channels of the second layer", ylabel="PSNR (dB)")
    axis.invert_xaxis()
    axis.scatter([], [], marker="o", facecolor="white", edgecolor="0.3", label="not certified")
    axis.legend(loc="center", bbox_to_anchor=(0.5, 0.5), framealpha=1, edgecolor="white")
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure


def wrong_signs(history: pd.DataFrame) -> Figure:
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
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
