"""What training does to the attack."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def trained(runs: pd.DataFrame) -> Figure:
    """Quality, size of the gradient, condition and ambiguity of the attack against epochs of training.

    Args:
        runs: Columns as `rgap.experiments.sweeps.trained_attacks` gives them.

    Returns:
        The figure; lines are medians over the images, bands reach from the smallest to the largest.
    """
    panels = [
        ("psnr_best_db", "PSNR of the closer candidate / dB", "linear"),
        ("gradient_norm", "size of the gradient ‖G‖", "log"),
        ("condition", "worst condition number of a layer", "linear"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(14.0, 3.2))
    colours = sns.color_palette(PALETTE)
    for number, (axis, (column, label, scale)) in enumerate(zip(axes, panels, strict=False)):
        sns.lineplot(
            runs, x="epoch", y=column, estimator="median", errorbar=("pi", 100), marker=MARKERS[number],
            color=colours[number], ax=axis,
        )  # fmt: skip
        axis.set(yscale=scale, ylabel=label)
    share = runs.groupby("epoch")["verdict"].value_counts(normalize=True).unstack(fill_value=0.0)
    for number, verdict in enumerate(v for v in ("exact", "ambiguous", "inconsistent", "rank-deficient") if v in share):
        axes[3].plot(share.index, share[verdict], marker=MARKERS[number], color=colours[number], label=verdict)
    axes[3].set(ylabel="share of the attacks", ylim=(-0.05, 1.05), xlabel="epoch")
    axes[3].legend(title="verdict", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in axes:
        axis.set_xlabel("epochs of training")
        axis.set_xticks(sorted(runs["epoch"].unique()))
        axis.grid(axis="y", alpha=0.3)
    sns.despine(figure)
    figure.tight_layout()
    return figure
