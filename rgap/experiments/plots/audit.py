"""What an audit says of every step: equations against unknowns."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rgap.experiments.plots.style import PALETTE

WORDS = {
    "determined": "gives its input away",
    "closable": "gives its input away with the step before",
    "open": "stays open",
    "unknown": "whether it leaks is not known",
}


def audit_steps(steps: pd.DataFrame) -> Figure:
    """Independent equations of every step as a share of its unknowns, from the image (top) to the output.

    Args:
        steps: Columns `name`, `kind`, `unknowns`, `deficit`, `supply` and `status`, as in
            `rgap.ranks.exposure.StepExposure`.

    Returns:
        The figure: what a step's own equations determine, what the step before can add, and what stays open; the
        numbers and the verdict stand beside each bar.
    """
    own, added, gap = sns.color_palette(PALETTE)[0], sns.color_palette(PALETTE)[1], "0.9"
    figure, axis = plt.subplots(figsize=(9.0, 1.3 + 0.34 * len(steps)))
    for place, step in enumerate(steps.itertuples()):
        known = not pd.isna(step.deficit)
        share = 1 - step.deficit / step.unknowns if known else 0.0
        help_ = min(step.supply / step.unknowns, 1 - share) if known and not pd.isna(step.supply) else 0.0
        axis.barh(place, 100, color=gap if known else "white", edgecolor="0.6", lw=0.8, hatch="" if known else "..")
        axis.barh(place, 100 * share, color=own)
        axis.barh(place, 100 * help_, left=100 * share, color=added, hatch="///", edgecolor="white", lw=0)
        lack = f", {step.deficit:,} missing" if known and step.deficit else ""
        axis.text(102, place, f"{step.unknowns:,} unknowns{lack}: {WORDS[step.status]}", va="center", fontsize=8)
    axis.set_yticks(range(len(steps)), [f"{s.name}\n{s.kind}" for s in steps.itertuples()], fontsize=8)
    axis.set(xlim=(0, 100), xlabel="independent equations, % of the step's unknowns")
    axis.invert_yaxis()
    keys = {
        "its own": {"color": own},
        "from the step before": {"facecolor": added, "hatch": "///", "edgecolor": "white"},
    }
    keys |= {"missing": {"facecolor": gap, "edgecolor": "0.6"}}
    keys |= (
        {"not known": {"facecolor": "white", "edgecolor": "0.6", "hatch": ".."}}
        if steps["deficit"].isna().any()
        else {}
    )
    handles = [Patch(label=label, **style) for label, style in keys.items()]
    axis.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    sns.despine(figure, left=True)
    figure.tight_layout()
    return figure
