"""Closed form against optimisers: quality against time, and cost against size."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def quality_against_time(trajectories: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """PSNR against seconds since network and gradient were given, one panel a network.

    Args:
        trajectories: Columns `network`, `seed`, `image`, `method`, `restart`, `step`, `seconds`, `psnr_db`.
        methods: The order of the legend.

    Returns:
        The figure; a line is an optimiser's whole way on one image, a large marker where it ended, or the one point of
        a method without steps.
    """
    networks = list(dict.fromkeys(trajectories["network"]))
    figure, axes = plt.subplots(1, len(networks), figsize=(3.6 * len(networks), 3.6), squeeze=False)
    colours = sns.color_palette(PALETTE)
    for axis, network in zip(axes[0], networks, strict=True):
        data = trajectories[trajectories["network"] == network]
        for method, colour, marker in zip(methods, colours, MARKERS, strict=False):
            for _, run in data[data["method"] == method].groupby(["seed", "image"]):
                axis.plot(run["seconds"], run["psnr_db"], color=colour, lw=1, alpha=0.7, zorder=2)
                last = run.iloc[-1]
                axis.scatter(last["seconds"], last["psnr_db"], color=colour, marker=marker, s=46, zorder=3, lw=0)
            axis.scatter([], [], color=colour, marker=marker, s=46, lw=0, label=method)
        axis.set(xscale="log", xlabel="seconds", title=network)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("PSNR (dB)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    sns.despine(figure)
    figure.tight_layout()
    return figure


def cost_against_size(table: pd.DataFrame, exponents: pd.DataFrame) -> Figure:
    """Seconds against the size of images or networks, log-log, with the fitted exponents in the legends.

    Args:
        table: Columns `network`, `against`, `value`, `method`, `seconds`.
        exponents: Columns `network`, `against`, `method`, `exponent`.

    Returns:
        The figure, one panel for each network.
    """
    panels = list(table.groupby(["network", "against"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False)
    for axis, ((network, against), data) in zip(axes[0], panels, strict=True):
        fitted = exponents[(exponents["network"] == network) & (exponents["against"] == against)]
        slopes = fitted.set_index("method")["exponent"]
        named = data.assign(method=[f"{m} (exponent {slopes[m]:.1f})" for m in data["method"]])
        style = {"markers": MARKERS[: named["method"].nunique()], "dashes": False, "palette": PALETTE}
        sns.lineplot(named, x="value", y="seconds", hue="method", style="method", ax=axis, **style)
        axis.set(xscale="log", yscale="log", title=network, ylabel="seconds")
        axis.set_xlabel("side of the image, pixels" if against == "side" else "width of the first layer")
        axis.set_xticks(sorted(data["value"].unique()), [str(v) for v in sorted(data["value"].unique())])
        axis.set_xticks([], minor=True)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
        axis.legend(title=None, frameon=False, fontsize=8, **below)
        axis.grid(alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
