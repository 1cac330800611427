"""Rank analysis: counting, laws and what was measured."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def ra_along_depth(layers: pd.DataFrame) -> Figure:
    """Counting index of each counted step, from the image to the output, one panel a batch size.

    Args:
        layers: Columns `network`, `batch`, `step` (0 at the image) and `ra_index`.

    Returns:
        The figure; above zero counting says that a step cannot be recovered.
    """
    batches = sorted(layers["batch"].unique())
    figure, axes = plt.subplots(1, len(batches), figsize=(4.2 * len(batches), 3.4), sharey=True, squeeze=False)
    style = {"markers": MARKERS[: layers["network"].nunique()], "dashes": False, "palette": PALETTE}
    style |= {"markersize": 6, "markeredgewidth": 0.3}
    for axis, batch in zip(axes[0], batches, strict=True):
        shown = layers[layers["batch"] == batch]
        sns.lineplot(shown, x="step", y="ra_index", hue="network", style="network", ax=axis, **style)
        axis.set_yscale("symlog", linthresh=100)
        axis.axhline(0, color="0.3", lw=1)
        axis.set(
            title=f"{batch} image{'s' if batch > 1 else ''}",
            xlabel="step from the image on",
            ylabel="counting index RA",
        )
        axis.grid(axis="y", alpha=0.3)
        axis.get_legend().remove()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(figure)
    figure.tight_layout()
    return figure


def law_against_number(sample: pd.DataFrame) -> Figure:
    """Rank by law against measured rank, one panel a system, one point a layer.

    Args:
        sample: Columns `system`, `law`, `counted` and `measured`; rows without a law are left out.

    Returns:
        The figure; the line is where both are equal. What counting rows and columns would say is drawn in grey.
    """
    data = sample.dropna(subset="law").astype({"law": float})
    largest = data[["law", "counted"]].to_numpy().max()
    systems = list(dict.fromkeys(data["system"]))
    figure, axes = plt.subplots(1, len(systems), figsize=(3.0 * len(systems), 3.1), sharex=True, sharey=True)
    for axis, system, color in zip(axes, systems, sns.color_palette(PALETTE), strict=False):
        shown = data[data["system"] == system]
        axis.plot([0, largest], [0, largest], color="0.6", lw=1, zorder=0)
        axis.scatter(shown["counted"], shown["measured"], s=14, color="0.75", marker="x", lw=0.8, label="by counting")
        axis.scatter(shown["law"], shown["measured"], s=14, alpha=0.6, color=color, linewidth=0, label="by law")
        axis.set(title=f"rank {system}, {len(shown)} layers", xlabel="predicted", ylabel="measured", aspect="equal")
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    sns.despine(figure)
    figure.tight_layout()
    return figure


def deficit_against_psnr(runs: pd.DataFrame, limit: float, counted: float) -> Figure:
    """Quality of the attack against the predicted deficit of the deficient layer.

    Args:
        runs: Columns `width`, `deficit` (predicted) and `psnr_db`, one row an attack.
        limit: PSNR from which an attack counts as a success, dB.
        counted: Deficit from which on the counting index is positive, too.

    Returns:
        The figure, the threshold of the ranks and that of counting drawn in.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    data = runs.assign(channels=runs["width"].astype(str))
    style = {"palette": "viridis", "s": 42, "linewidth": 0, "legend": False}
    sns.scatterplot(data, x="deficit", y="psnr_db", hue="width", ax=axis, **style)
    axis.set_xscale("symlog", linthresh=10, linscale=0.6)
    axis.axhline(limit, color="0.4", ls=":", lw=1)
    least = runs.loc[runs["deficit"] > 0, "deficit"].min()
    for place, text in ((least**0.5, "full rank | short of rank"), (0.93 * counted, "counting: RA > 0")):
        axis.axvline(place, color="0.4", ls="--", lw=1)
        axis.annotate(text, (place, 1.02), xycoords=("data", "axes fraction"), fontsize=8, ha="center")
    for deficit, group in data[data["deficit"] > 0].groupby("deficit"):
        place = (deficit, group["psnr_db"].max() + 4)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.annotate(group["channels"].iloc[0], place, fontsize=8, ha="center", bbox=box)
    full = sorted(runs.loc[runs["deficit"] == 0, "width"].unique())
    axis.annotate(f"{full[0]} to {full[-1]}", (0, runs["psnr_db"].max() + 4), fontsize=8, ha="center")
    axis.set(xlabel="predicted deficit of the second layer (labels: its channels)", ylabel="PSNR (dB)")
    axis.set(xlim=(-3, 2 * runs["deficit"].max()), ylim=(None, runs["psnr_db"].max() + 14))
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
