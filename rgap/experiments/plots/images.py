"""Images side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor


def gallery(
    rows: Mapping[str, Tensor | Sequence[Tensor]], titles: Sequence[str] | None = None, size: float = 1.25
) -> Figure:
    """Images in a grid, one row for each entry.

    Args:
        rows: Row label -> images (N, C, H, W), or a list of images (C, H, W), with values in [0, 1];
            others are clipped.
        titles: A line above each column, (N,).
        size: Side of one picture, inches.

    Returns:
        The figure.
    """
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), count, figsize=(size * count, size * len(rows)), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis in row:
            axis.set(xticks=[], yticks=[])
            sns.despine(ax=axis, left=True, bottom=True)
        for axis, image in zip(row, images, strict=False):
            pixels = image.detach().clamp(0, 1).permute(1, 2, 0)
            axis.imshow(pixels.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles or [], strict=False):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.4)
    return figure


def rescale(image: Tensor) -> Tensor:
    """Stretches an image's own range to [0, 1], to show the shapes in one that is far off in scale."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else image * 0
