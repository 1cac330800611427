"""Twin data: the curve on which they lie, and how many there are."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from rgap.experiments.plots.style import MARKERS, PALETTE


def twin_branches(curve: pd.DataFrame, pairs: Sequence[tuple[float, float]]) -> Figure:
    """c(μ) with its two branches, and pairs of margins that share one value of c.

    Args:
        curve: Columns `mu`, `c` and `branch`, as of `sweeps.margin_curve`.
        pairs: (μ₁, μ₂) of samples and their twins.

    Returns:
        The figure.
    """
    colours = sns.color_palette(PALETTE)
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    labels = {"falling": "first branch", "rising": "second branch"}
    for (branch, part), colour, style in zip(curve.groupby("branch", sort=False), colours, ("-", "--"), strict=False):
        axis.plot(part["mu"], part["c"], style, color=colour, lw=1.8, label=labels[branch])
    lowest = curve.loc[curve["c"].idxmin()]
    axis.plot(lowest["mu"], lowest["c"], "D", color="black", ms=5, label=f"minimum, μ = {lowest['mu']:.4f}")
    for i, (first, second) in enumerate(pairs):
        c = curve["c"].iloc[(curve["mu"] - first).abs().argmin()]
        marker = MARKERS[i % len(MARKERS)]
        label = "one image and its twin" if i == 0 else None
        axis.plot([first, second], [c, c], ":", marker=marker, color=colours[2], ms=6, lw=1.2, label=label, zorder=3)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(xlabel="margin μ = y f(x)", ylabel="c = −μ / (1 + e^μ)")
    axis.legend(frameon=False, fontsize=9)
    sns.despine(figure)
    figure.tight_layout()
    return figure


def ambiguity(census: pd.DataFrame) -> Figure:
    """Share of images whose twin lies inside the pixel range, against the size of the weights.

    Args:
        census: Columns `network`, `factor` and `share`; a row without a factor becomes a level line of its own, named
            by `weights`.

    Returns:
        The figure.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    curves = census.dropna(subset="factor")
    names = list(dict.fromkeys(census["network"]))
    colours = dict(zip(names, sns.color_palette(PALETTE, len(names)), strict=True))
    sns.lineplot(
        curves, x="factor", y="share", hue="network", style="network", dashes=False, palette=colours,
        markers=dict(zip(names, MARKERS, strict=False)), ax=axis,
    )  # fmt: skip
    for row in census[census["factor"].isna()].itertuples():
        axis.axhline(row.share, color=colours[row.network], ls=":", lw=1.5, label=f"{row.network}, {row.weights}")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel="every weight times", ylabel="correctly classified images\nwith a twin in the pixel range")
    axis.legend(frameon=False, fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
