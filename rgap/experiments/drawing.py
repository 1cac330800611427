"""How every figure is drawn: the finding above, what it rests on below, and names at the ends of lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D
from torch import Tensor

PALETTE = "colorblind"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # every line of a figure has a marker of its own beside its colour
NAME_POINTS = 9  # size of the names of lines and of what stands above the pictures of a gallery, points

ROW_LABEL_INCHES, TITLE_INCHES, LINE_INCHES = 0.7, 0.7, 0.18
"""Room that a gallery leaves beside its pictures, for its title and note, and for a line of text above pictures."""

LABEL_WIDTH = 12  # characters of a line beside the pictures of a gallery
NETWORK_NAMES = {"cnn6": "CNN6", "cnn6_d": "CNN6-d", "fcn3": "FCN3", "lenet": "LeNet"}  # as a figure writes it


def colours(names: Iterable[Any]) -> dict[Any, tuple[float, float, float]]:
    """A colour for each of the names, in the order in which they first appear."""
    distinct = list(dict.fromkeys(names))
    return dict(zip(distinct, sns.color_palette(PALETTE, len(distinct)), strict=True))


def step_labels(kinds: Mapping[str, str]) -> dict[str, str]:
    """Layers as a reader calls them: conv1, conv2, … from the image on, and fc, or fc1, fc2, … where there are several.

    Kinds are name of a layer -> "convolution", "linear", or another kind, which keeps the layer's name.
    """
    short, labels = {"convolution": "conv", "linear": "fc"}, {}
    for kind, word in short.items():
        names = [name for name, of in kinds.items() if of == kind]
        alone = kind == "linear" and len(names) == 1
        labels |= {name: word if alone else f"{word}{i}" for i, name in enumerate(names, 1)}
    return {name: labels.get(name, name) for name in kinds}


def lines(axis: Axes, data: pd.DataFrame, x: str, y: str, by: str | None = None, band: bool = True) -> None:
    """A line through the medians of y at each x for each value of a column, and a band from smallest to largest.

    The values of the column `by` name the lines; without it there is one line without a name.
    """
    groups = [("_", data)] if by is None else [(name, data[data[by] == name]) for name in dict.fromkeys(data[by])]
    for number, ((name, rows), colour) in enumerate(zip(groups, colours(n for n, _ in groups).values(), strict=True)):
        values = rows.groupby(x, observed=True)[y]
        middle = values.median()
        axis.plot(middle.index, middle, marker=MARKERS[number % len(MARKERS)], color=colour, label=str(name), ms=5.5)
        if band:
            axis.fill_between(middle.index, values.min(), values.max(), color=colour, alpha=0.18, lw=0)


def name_lines(axis: Axes, in_margin: bool = False) -> None:
    """Writes each line's label beside its last point, in the line's colour, apart from each other; no legend is needed.

    With `in_margin` the labels stand at the right edge, at the height of the last point.
    """
    named = [line for line in axis.lines if not str(line.get_label()).startswith("_") and len(line.get_xdata())]
    points = [np.asarray(line.get_xydata(), dtype=float) for line in named]
    ends = np.array([xy[np.isfinite(xy).all(1)][-1] for xy in points])
    sizes = np.array([1.25 * NAME_POINTS * (1 + str(line.get_label()).count("\n")) for line in named])

    def place(renderer, number: int) -> Affine2D:
        """Where a label starts: found when the figure is drawn, since titles and limits move what lies between."""
        scale, pixels = renderer.points_to_pixels(1.0), axis.transData.transform(ends)
        x = axis.bbox.x1 if in_margin else pixels[number, 0]
        return Affine2D().scale(scale).translate(x, _apart(pixels[:, 1], scale * sizes)[number])

    style = {"fontsize": NAME_POINTS, "va": "center", "annotation_clip": False}
    style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    for number, (line, end) in enumerate(zip(named, ends, strict=True)):
        at = {"xytext": (8, 0), "textcoords": partial(place, number=number)}
        axis.annotate(line.get_label(), end, **at, color=line.get_color(), **style)


def points(axis: Axes, data: pd.DataFrame, x: str, y: str, colour: Any, marker: str = "o") -> None:
    """A marker for each attack, filled where the verdict is "exact"."""
    exact = data["verdict"] == "exact"
    for rows, face in ((data[exact], colour), (data[~exact], "white")):
        axis.scatter(rows[x], rows[y], marker=marker, facecolor=face, edgecolor=colour, s=36, zorder=3)


def key_of_points(axis: Axes, **place) -> None:
    """A legend for `points`: filled is certified, open is not."""
    for face, text in (("0.3", "certified as exact"), ("white", "not certified")):
        axis.scatter([], [], marker="o", facecolor=face, edgecolor="0.3", s=36, label=text)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[-2:], labels[-2:], frameon=False, fontsize=NAME_POINTS, **place)


def against_diagonal(axis: Axes, data: pd.DataFrame, x: str, y: str, by: str, factors: Sequence[float] = (1,)) -> None:
    """Points with a colour and a marker for each value of a column, and lines y = factor · x; a legend at the right."""
    for number, (name, colour) in enumerate(colours(data[by]).items()):
        rows = data[data[by] == name]
        style = {"marker": MARKERS[number % len(MARKERS)], "color": colour, "label": str(name)}
        axis.scatter(rows[x], rows[y], s=26, alpha=0.75, linewidth=0, **style)
    ends = np.array([data[[x, y]].min().min(), data[[x, y]].max().max()])
    for factor in factors:
        axis.plot(ends, factor * ends, "-" if factor == 1 else "--", color="0.5", lw=0.9, zorder=0)
    axis.legend(frameon=False, fontsize=NAME_POINTS, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _apart(places: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The centres of texts of those heights, moved as little as need be for none to overlap, in the same order."""
    order, moved = np.argsort(places, kind="stable"), places.astype(float)
    lower, upper = order[:-1], order[1:]
    for _ in range(200):
        lack = np.clip((sizes[lower] + sizes[upper]) / 2 - (moved[upper] - moved[lower]), 0, None) / 2
        if not lack.any():
            break
        np.subtract.at(moved, lower, lack)
        np.add.at(moved, upper, lack)
    return moved


def mark(axis: Axes, place: float, text: str, height: float = 1.01, line: str = ":", **style) -> None:
    """Draws a vertical line at a value of x, with a text at that height of the axis."""
    axis.axvline(place, color="0.4", ls=line, lw=1)
    style = {"xycoords": ("data", "axes fraction"), "fontsize": NAME_POINTS, "ha": "center"} | style
    axis.annotate(text, (place, height), **style)


def gallery(
    rows: Mapping[str, Tensor | Sequence[Tensor | str]], titles: Sequence[str] | None = None, size: float = 1.25,
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure:  # fmt: skip
    """Images in a grid, one row for each entry: label -> images (N, C, H, W), or a list of images (C, H, W).

    Values are in [0, 1]; others are clipped. A text stands in its cell in place of an image. Titles (N,) stand above
    the columns, captions (row label -> a line for each image) above the images of a row in their place; size is the
    side of one picture, inches.
    """
    count = max(len(images) for images in rows.values())
    above = dict.fromkeys(rows, ()) | {next(iter(rows)): titles or ()} | dict(captions or {})
    text_lines = sum(max((text.count("\n") + 1 for text in texts), default=0) for texts in above.values())
    extent = (size * count + ROW_LABEL_INCHES, size * len(rows) + LINE_INCHES * text_lines + TITLE_INCHES)
    figure, axes = plt.subplots(len(rows), count, figsize=extent, squeeze=False, layout="compressed")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[], aspect="equal")
            sns.despine(ax=axis, left=True, bottom=True)
        for axis, image in zip(row, images, strict=False):
            _show(axis, image)
        for axis, text in zip(row, above[label], strict=False):
            axis.set_title(text, fontsize=NAME_POINTS, pad=3)
        row[0].set_ylabel(textwrap.fill(label, LABEL_WIDTH), rotation=0, ha="right", va="center", fontsize=NAME_POINTS)
    return figure


def _show(axis: Axes, image: Tensor | str) -> None:
    """An image, or a text where there is none to show."""
    if isinstance(image, str):
        axis.text(0.5, 0.5, image, ha="center", va="center", fontsize=8, color="0.35", transform=axis.transAxes)
        axis.set_facecolor("0.95")
        return
    pixels = image.detach().clamp(0, 1).permute(1, 2, 0)
    axis.imshow(pixels.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")


def finish(figure: Figure, grid: str | None = "y") -> Figure:
    """Gives every axis of a figure its grid ("x", "y", "both" or None) and takes off the upper and right edges."""
    for axis in figure.axes if grid else ():
        axis.grid(axis=grid, alpha=0.3)
    sns.despine(figure)
    figure.set_layout_engine("constrained")
    return figure


def titled(figure: Figure, finding: str, note: str = "") -> Figure:
    """Writes above a figure what it shows, a sentence, and below it what that rests on.

    The note has sample sizes, budgets, and what lines, bands and markers mean.
    """
    width = figure.get_figwidth()
    upper, lower = (textwrap.fill(text, round(width * density)) for text, density in ((finding, 10.5), (note, 14.5)))
    figure.suptitle(upper, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if note:
        figure.supxlabel(lower, x=0.01, ha="left", fontsize=8.5, color="0.3")
    return figure
