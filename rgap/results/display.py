"""How results look: a line for the console, and for a notebook the verdict, the pictures and a table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

PICTURE_PIXELS = 96  # height of a picture in a notebook, pixels
MAX_PICTURES = 16  # pictures that a result shows
MAX_TABLE_ROWS = 40  # rows of a table that a result shows


def rescale(image: Tensor) -> Tensor:
    """Stretches an image's own range to [0, 1], to show the shapes in one that is far off in scale."""
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else image * 0


def to_pixels(image: Tensor) -> np.ndarray:
    """An image (C, H, W) or of fewer axes as bytes, (H, W) or (H, W, 3); values outside [0, 1] are clipped.

    Channels other than one or three are shown by their mean, what is no image as one row.
    """
    values = image.detach().cpu().double().nan_to_num().clamp(0, 1)
    values = values.reshape((1,) * (3 - values.ndim) + tuple(values.shape))
    values = values if len(values) in (1, 3) else values.mean(0, keepdim=True)
    pixels = np.rint(values.numpy() * 255).astype(np.uint8).transpose(1, 2, 0)
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def to_png(image: Tensor, height: int) -> bytes:
    """A picture for the screen, enlarged to about that height, its pixels as squares."""
    from PIL import Image

    picture = Image.fromarray(to_pixels(image))
    scale, buffer = max(1, height // picture.height), io.BytesIO()
    picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def figure(image: Tensor, caption: str) -> str:
    """A picture with a line below, as HTML; an image that leaves [0, 1] is stretched to it, which the line says."""
    values = image.detach().cpu().double().nan_to_num()
    if values.numel() and (values.min() < -0.05 or values.max() > 1.05):
        values, caption = rescale(values), f"{caption}, stretched"
    data = base64.b64encode(to_png(values, PICTURE_PIXELS)).decode()
    return (
        f'<figure style="display: inline-block; margin: 4px"><img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def page(verdict: str, notes: Sequence[str], pictures: Iterable[str], table: pd.DataFrame) -> str:
    """Verdict, pictures, table and notes as HTML."""
    short = table.head(MAX_TABLE_ROWS).to_html(index=False, border=0, na_rep="", float_format=lambda v: f"{v:.3g}")
    more = f"<p>{len(table) - MAX_TABLE_ROWS} rows more: to_frame()</p>" if len(table) > MAX_TABLE_ROWS else ""
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    shown = f"<p><b>{html.escape(verdict)}</b></p><div>{''.join(pictures)}</div>{short}{more}"
    return shown + (f"<ul>{said}</ul>" if said else "")


def reconstruction_line(result) -> str:
    """One line on a `Reconstruction`."""
    count, shape = len(result.images), tuple(result.images.shape[1:])
    images = f"{count} image{'s' * (count != 1)} of shape {shape}, labels {result.labels.tolist()}"
    residual = f", gradient residual {result.candidates[0].gradient_residual:.2g}" if result.candidates else ""
    others = f", {len(result.candidates)} candidates" if len(result.candidates) > 1 else ""
    return f"<{type(result).__name__} {result.verdict!r}: {images}{residual}{others}>"


def reconstruction_page(result) -> str:
    """A `Reconstruction` as HTML: each image found, for a single one each candidate, and how the layers were solved."""
    pictures = [figure(x, f"label {label}") for x, label in zip(result.images, result.labels.tolist(), strict=True)]
    if len(result.images) == 1 and len(result.candidates) > 1:
        pictures = [
            figure(c.images[0], f"candidate {i}, label {c.labels.tolist()[0]}, residual {c.gradient_residual:.2g}")
            for i, c in enumerate(result.candidates)
        ]
    columns = ["name", "unknowns", "rank", "deficit", "virtual_constraints", "residual", "predicted_error", "seconds"]
    table = result.to_frame()[columns].dropna(axis="columns", how="all")
    return page(reconstruction_line(result).strip("<>"), result.notes, pictures[:MAX_PICTURES], table)


def ranks_line(analysis) -> str:
    """One line on a `RankAnalysis`."""
    counted = sum(layer.ra_index is not None for layer in analysis.layers)
    behind = "1 image" if analysis.batch_size == 1 else f"{analysis.batch_size} images"
    return f"<RankAnalysis of {counted} layers, {behind} behind the gradient: {analysis.verdict}>"


def ranks_page(analysis) -> str:
    """A `RankAnalysis` as HTML: the verdict and the counted layers."""
    columns = ["name", "kind", "unknowns", "weight_rows", "gradient_rows", "ra_index", "deficit", "virtual_constraints"]
    return page(ranks_line(analysis).strip("<>"), (), (), analysis.to_frame(counted=True)[columns])


def reports_frame(reports, kind) -> pd.DataFrame:
    """A table of dataclass records, one row each, with every field of `kind` as a column even without rows."""
    import pandas as pd  # as slow to import as half of this package

    names = [f.name for f in fields(kind)]
    return pd.DataFrame([[getattr(report, name) for name in names] for report in reports], columns=names)
