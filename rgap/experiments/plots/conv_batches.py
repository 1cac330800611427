"""Mini-batches through convolutions: quality and cost against the batch size."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rgap.experiments.plots.style import MARKERS, PALETTE


def against_batch(runs: pd.DataFrame, value: str, label: str, limits: Mapping[str, int]) -> Figure:
    """One number of every attack against the batch size, a line for each precision.

    Args:
        runs: Columns `batch`, `dtype` and `value`.
        value: Name of the column.
        label: Of the axis, with its unit.
        limits: What a limit is -> largest batch, drawn as a dotted line just beyond.

    Returns:
        The figure; lines are means over seeds, markers are attacks.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    kinds = sorted(runs["dtype"].unique(), reverse=True)
    options = {"x": "batch", "y": value, "hue": "dtype", "style": "dtype", "hue_order": kinds, "style_order": kinds}
    options |= {"palette": PALETTE, "ax": axis}
    sns.lineplot(runs, dashes=False, errorbar=None, legend=False, **options)
    sns.scatterplot(runs, markers=MARKERS[: len(kinds)], s=50, **options)
    for name, limit in limits.items():
        axis.axvline(limit + 0.5, color="0.4", ls=":", lw=1)
        axis.annotate(
            name, (limit + 0.5, 0.98), xycoords=("data", "axes fraction"), fontsize=8, ha="right", va="top", rotation=90
        )
    axis.set(xlabel="images in the batch, B", ylabel=label, ylim=(0, None))
    axis.set_xlim(0.5, max([*limits.values(), runs["batch"].max()]) + 0.9)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(title="gradients", frameon=False, loc="center", bbox_to_anchor=(0.72, 0.4))
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
