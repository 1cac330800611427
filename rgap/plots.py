"""Figures from results and tables; nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

PALETTE = "colorblind"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def gallery(rows: Mapping[str, Tensor], titles: Sequence[str] | None = None, size: float = 1.25) -> Figure:
    """Images in a grid, one row for each entry.

    Args:
        rows: Row label -> images (N, C, H, W) with values in [0, 1]; others are clipped.
        titles: A line above each column, (N,).
        size: Side of one picture, inches.

    Returns:
        The figure.
    """
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), count, figsize=(size * count, size * len(rows)), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
        for axis, image in zip(row, images, strict=False):
            pixels = image.detach().clamp(0, 1).permute(1, 2, 0)
            axis.imshow(pixels.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


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


def rescale(image: Tensor) -> Tensor:
    """Stretches an image's own range to [0, 1], to show the shapes in one that is far off in scale."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else image * 0


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
    axis.set(xlabel="step", ylabel="wrong signs", ylim=(-0.3, None), xticks=sorted(data["step"].unique()))
    axis.legend(title="image", frameon=False)
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure


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
        axis.annotate(group["channels"].iloc[0], (deficit, group["psnr_db"].max() + 4), fontsize=8, ha="center")
    full = sorted(runs.loc[runs["deficit"] == 0, "width"].unique())
    axis.annotate(f"{full[0]} to {full[-1]}", (0, runs["psnr_db"].max() + 4), fontsize=8, ha="center")
    axis.set(xlabel="predicted deficit of the second layer (labels: its channels)", ylabel="PSNR (dB)")
    axis.set(xlim=(-3, 2 * runs["deficit"].max()), ylim=(None, runs["psnr_db"].max() + 14))
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
