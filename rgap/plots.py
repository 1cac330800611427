"""Figures from results and tables; nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

PALETTE = "colorblind"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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
    data = errors.assign(layer=pd.Categorical(errors["layer"], order, ordered=True))
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    sns.lineplot(
        data, x="layer", y="error", hue="dtype", style="dtype", markers=MARKERS[: data["dtype"].nunique()],
        dashes=False, estimator="median", errorbar=("pi", 100), palette=PALETTE, ax=axis,
    )  # fmt: skip
    axis.set(yscale="log", ylim=(max(data["error"].min() / 3, 1e-16), data["error"].max() * 3))
    axis.set(xlabel="layer whose input is recovered, from the head to the image", ylabel="relative error ‖x̂ − x‖ / ‖x‖")
    axis.legend(title="gradients", frameon=False)
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
