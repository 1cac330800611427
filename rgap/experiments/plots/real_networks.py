"""Networks as users have them: how narrow a first layer may be."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def least_widths(widths: pd.DataFrame, published: int) -> Figure:
    """Smallest width that gives the image away, for every seed, and where counting active units puts it.

    Args:
        widths: Columns `seed`, `width` and `bound`.
        published: Width from which the gradient alone is enough, drawn as a line.

    Returns:
        The figure.
    """
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    first, second, third = sns.color_palette(PALETTE, 3)
    place = range(len(widths))
    axis.vlines(place, 0, widths["width"], color="0.8", lw=1, zorder=0)
    axis.scatter(place, widths["bound"], s=70, color=second, marker=MARKERS[1], label="by counting active units")
    axis.scatter(place, widths["width"], s=34, color=first, marker=MARKERS[0], label="smallest recovered")
    axis.axhline(published, color=third, ls="--", lw=1.2, label="published, gradient alone")
    axis.set(xlabel="seed of the weights", ylabel="filters of the first layer", ylim=(0, None))
    axis.set_xticks(list(place), widths["seed"].astype(str))
    axis.margins(x=0.1)
    axis.legend(frameon=False, fontsize=8, loc="center right")
    sns.despine(figure)
    figure.tight_layout()
    return figure
