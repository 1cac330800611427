"""Defences: what is left of the image, and how well that is predicted."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from rgap.experiments.plots.style import MARKERS, PALETTE


def defence_quality(runs: pd.DataFrame) -> Figure:
    """PSNR and SSIM against the strength of each defence that has a numeric one.

    Args:
        runs: Columns `defence`, `strength`, `psnr_db`, `plain_db` and `ssim`.

    Returns:
        The figure; lines are medians, bands reach from the smallest to the largest.
    """
    names = {"noise": "noise, std in units of\nthe gradient's rms", "dp-sgd": "DP-SGD, noise multiplier",
             "prune": "share of entries pruned"}  # fmt: skip
    names = {name: label for name, label in names.items() if (runs["defence"] == name).any()}
    figure, axes = plt.subplots(2, len(names), figsize=(3.0 * len(names), 4.6), sharey="row", sharex="col")
    axes = axes.reshape(2, len(names))
    colours = sns.color_palette(PALETTE)
    lines = [(0, "plain_db", "plain R-GAP", 1), (0, "psnr_db", "signs by identities", 0), (1, "ssim", None, 0)]
    for column, (name, label) in enumerate(names.items()):
        data = runs[runs["defence"] == name].astype({"strength": float}).groupby("strength")
        for row, value, legend, colour in lines:
            axis, middle = axes[row, column], data[value].median()
            axis.plot(middle.index, middle, marker=MARKERS[colour], color=colours[colour], label=legend, lw=1.5, ms=5)
            axis.fill_between(middle.index, data[value].min(), data[value].max(), color=colours[colour], alpha=0.15)
            axis.set_xscale("log")
            axis.grid(axis="y", alpha=0.3)
        axes[0, column].set_ylim(-10, 112)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("PSNR (dB)")
    axes[1, 0].set_ylabel("SSIM")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    sns.despine(figure)
    figure.tight_layout()
    return figure


def predicted_against_measured(errors: pd.DataFrame) -> Figure:
    """Predicted against measured error of every layer's input, on logarithmic axes.

    Args:
        errors: Columns `defence`, `rmse` and `predicted`, both above zero.

    Returns:
        The figure; the dashed lines are factors of 3.
    """
    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    names = list(dict.fromkeys(errors["defence"]))
    markers = dict(zip(names, MARKERS, strict=False))
    sns.scatterplot(errors, x="rmse", y="predicted", hue="defence", style="defence", markers=markers,
                    palette=sns.color_palette(PALETTE, len(names)), s=22, alpha=0.7, linewidth=0, ax=axis)  # fmt: skip
    ends = [errors[["rmse", "predicted"]].min().min(), errors[["rmse", "predicted"]].max().max()]
    for factor, style in ((1, "-"), (3, "--"), (1 / 3, "--")):
        axis.plot(ends, [factor * end for end in ends], style, color="0.5", lw=0.9, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="measured error of a layer's input (rms)", ylabel="predicted (rms)")
    axis.legend(frameon=False, fontsize=9)
    sns.despine(figure)
    figure.tight_layout()
    return figure


def stage_quality(runs: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """PSNR of every method behind every defence, one panel for each kind of weights.

    Args:
        runs: Columns `weights`, `defence`, `strength`, `method` and `psnr_db`.
        methods: The order of the legend.

    Returns:
        The figure; markers are medians.
    """
    kinds = list(dict.fromkeys(runs["weights"]))
    named = runs.assign(case=runs["defence"] + "\n" + runs["strength"].astype(str))
    counts = [named[named["weights"] == kind]["case"].nunique() for kind in kinds]
    figure, axes = plt.subplots(1, len(kinds), figsize=(1.6 + 1.05 * sum(counts), 3.6), sharey=True, squeeze=False,
                                width_ratios=counts)  # fmt: skip
    colours = sns.color_palette(PALETTE)
    for axis, kind in zip(axes[0], kinds, strict=True):
        data = named[named["weights"] == kind]
        cases = list(dict.fromkeys(data["case"]))
        for number, (method, colour) in enumerate(zip(methods, colours, strict=False)):
            middle = data[data["method"] == method].groupby("case")["psnr_db"].median()[cases]
            places = [place + 0.13 * (number - (len(methods) - 1) / 2) for place in range(len(cases))]
            axis.plot(places, middle, MARKERS[number], color=colour, ms=6, label=method)
        axis.set_xticks(range(len(cases)), cases, fontsize=8)
        axis.set(title=kind, xlim=(-0.5, len(cases) - 0.5))
        axis.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("PSNR (dB)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="center right")
    sns.despine(figure)
    figure.tight_layout(rect=(0, 0, 1 - 1.45 / figure.get_figwidth(), 1))
    return figure
