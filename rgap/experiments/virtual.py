"""Notebook 05: rank-deficient layers closed by the layer before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor

from rgap.experiments.drawing import NAME_POINTS, colours, finish, key_of_points, lines, mark, name_lines, points
from rgap.network.layer import Chain
from rgap.results import Reconstruction


def wrong_signs(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """How many signs of a deficient layer's input were wrong after each step of the virtual constraints.

    Columns: layer, step (from 1), wrong, and largest: the largest entry whose sign is wrong, in units of the input's
    root mean square, zero without any. The image is the true one, (1, C, H, W).
    """
    truth, rows = {name: x.flatten() for name, x in chain.layer_inputs(image).items()}, []
    for name, estimates in result.candidates[0].beliefs.items():
        sizes = truth[name].abs() / truth[name].square().mean().sqrt()
        for step, x in enumerate(estimates, 1):
            wrong = (x > 0) != (truth[name] > 0)
            rows.append((name, step, int(wrong.sum()), (sizes * wrong).max().item()))
    return pd.DataFrame(rows, columns=["layer", "step", "wrong", "largest"])


def compared(
    plain: pd.DataFrame, solved: pd.DataFrame, results: Sequence[Reconstruction]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Attacks of `attack_each` without and with virtual constraints beside each other, and what the latter returned.

    Returns deficit, virtual constraints, PSNR and verdicts of each image; and the iterations and seconds.
    """
    second = [next(layer for layer in result.layers if layer.deficit) for result in results]
    table = pd.DataFrame([{"deficit": s.deficit, "virtual_constraints": s.virtual_constraints} for s in second])
    for name, runs in {"plain_": plain, "": solved}.items():
        table[f"{name}psnr_db"], table[f"{name}verdict"] = runs["psnr_db"].round(0), runs["verdict"]
    times = pd.DataFrame({"iterations": [s.iterations for s in second]})
    return table, times.assign(seconds=solved["seconds"], plain_seconds=plain["seconds"])


def plot_wrong_signs(history: pd.DataFrame) -> Figure:
    """Signs of a deficient layer's input still wrong after each step of `wrong_signs`, one line for each image.

    Where signs are wrong at the end, the figure says how small their entries are.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    names = "image " + history["image"].astype(str)
    lines(axis, history.assign(image=names), "step", "wrong", by="image", band=False)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="step of the inference", ylabel="wrong signs", xticks=sorted(history["step"].unique()))
    axis.set_ylim(-0.3, 2 * max(1, history["wrong"].max()))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for last in history.groupby("image").tail(1).query("wrong > 0").itertuples():
        text, style = (
            f"entry of at most\n{last.largest:.0e} rms",
            {"textcoords": "offset points", "fontsize": NAME_POINTS},
        )
        axis.annotate(text, (last.step, last.wrong), (0, 10), ha="center", **style)
    name_lines(axis, in_margin=True)
    return finish(figure)


def plot_phase_transition(runs: pd.DataFrame, thresholds: Mapping[str, int]) -> Figure:
    """PSNR against the width of a layer, for the plain method and with virtual constraints.

    Thresholds are label -> largest deficit that its equations can close. Lines are medians over the seeds, filled
    markers certified results.
    """
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    names = {True: "with virtual\nconstraints", False: "plain R-GAP"}
    for (virtual, name), marker in zip(names.items(), "so", strict=True):
        data = runs[runs["virtual"] == virtual]
        median = data.groupby("width")["psnr_db"].median().sort_index(ascending=False)
        colour = colours(names)[virtual]
        axis.plot(median.index, median, color=colour, lw=1.5, label=name, zorder=2)
        points(axis, data, "width", "psnr_db", colour, marker)
    deficits = runs.groupby("width")["deficit"].max().sort_index()
    for label, limit in {"no deficit": 0, **thresholds}.items():
        if (deficits > limit).any() and (deficits <= limit).any():
            edge = (deficits[deficits > limit].index.max() + deficits[deficits <= limit].index.min()) / 2
            mark(axis, edge, f"{label}\n(deficit ≤ {limit})")
    axis.set(xlabel="channels of the second layer", ylabel="PSNR, dB")
    axis.invert_xaxis()
    name_lines(axis)
    key_of_points(axis, loc="center")
    return finish(figure)
