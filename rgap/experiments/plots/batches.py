"""Mini-batches: success and cost against the batch size."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def found_against_batch(runs: pd.DataFrame, limit: int) -> Figure:
    """Share of each batch that was found and certified, against the batch size.

    Args:
        runs: Columns `batch`, `seed`, `found`, `false` and `certified`.
        limit: Outputs of the second layer: the largest batch that its gradient can tell apart.

    Returns:
        The figure; lines are means over seeds, the dotted line is the limit.
    """
    shares = {
        "found": (runs["found"] - runs["false"]) / runs["batch"],
        "certified as exact": runs["certified"] / runs["batch"],
        "false images": runs["false"] / runs["batch"],
    }
    data = pd.concat([runs[["batch"]].assign(share=share, what=what) for what, share in shares.items()])
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    sns.lineplot(
        data, x="batch", y="share", hue="what", style="what", markers=MARKERS[:3], dashes=False, errorbar=None,
        palette=PALETTE, ax=axis,
    )  # fmt: skip
    # Mostly every image found is certified, too: the wider marker shows behind the other.
    axis.lines[0].set(markersize=11, linewidth=4, alpha=0.5)
    _with_limit(axis, limit)
    axis.set(xlabel="images in the batch, B", ylabel="share of the batch", ylim=(-0.05, 1.08))
    axis.legend(frameon=False, loc="center left")
    return _finished(figure, axis)


def seconds_against_batch(runs: pd.DataFrame, limit: int) -> Figure:
    """Seconds of an attack against the batch size.

    Args:
        runs: Columns `batch`, `seed` and `seconds`.
        limit: As for `found_against_batch`.

    Returns:
        The figure; the line is the median over seeds, points are attacks.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    colour = sns.color_palette(PALETTE)[0]
    sns.lineplot(runs, x="batch", y="seconds", estimator="median", errorbar=None, color=colour, ax=axis)
    sns.scatterplot(runs, x="batch", y="seconds", color=colour, marker=MARKERS[0], ax=axis)
    _with_limit(axis, limit)
    axis.set(xlabel="images in the batch, B", ylabel="seconds", ylim=(0, None))
    return _finished(figure, axis)


def _with_limit(axis, limit):
    axis.axvline(limit, color="0.4", ls=":", lw=1)
    axis.annotate(
        f"second layer's width, {limit}",
        (limit, 1.01), xycoords=("data", "axes fraction"), fontsize=8, ha="center",
    )  # fmt: skip


def _finished(figure: Figure, axis) -> Figure:
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
