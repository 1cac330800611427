"""What an attack or an analysis returns, and the errors that stand at the door.

Everything here is frozen: a result is a record, not a workspace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import pandas as pd
import torch

VERDICTS = ("rank-deficient", "inconsistent", "ambiguous", "exact")
"""The verdicts of a reconstruction, worst first; the first that holds is given."""


class UnsupportedLayerError(ValueError):
    """A module of the network has no closed-form inverse here; the message names its path and the reason."""


class GradientMismatchError(ValueError):
    """The gradients do not belong to the network: wrong count, shape, dtype, or values that are not finite."""


@dataclass(frozen=True)
class LayerReport:
    """How one layer's input was recovered. Fields are None where the path taken had no need of them.

    Attributes:
        name: The layer's path in the model.
        unknowns: Entries of the layer's input that the system solves for.
        rank_weights: Numerical rank of the weight constraints W.
        rank_gradients: Numerical rank of the gradient constraints K = I ⊗ M.
        rank: Numerical rank of [W; K].
        deficit: unknowns − rank, before virtual constraints.
        virtual_constraints: Equations that the layer before supplied to close the deficit.
        iterations: Steps of the sign fixed point, or of an iterative solver.
        condition: Largest over smallest singular value of the system that was solved.
        sigma_above_cut: Smallest singular value kept, relative to the largest of its matrix.
        sigma_below_cut: Largest singular value dropped, relative to the largest of its matrix.
        residual: ‖A x − b‖ / ‖b‖ over the constraints that were used.
        predicted_error: Predicted root-mean-square error of the layer's input.
        seconds: Wall time spent on this layer.
    """

    name: str
    unknowns: int
    rank_weights: int | None = None
    rank_gradients: int | None = None
    rank: int | None = None
    deficit: int | None = None
    virtual_constraints: int | None = None
    iterations: int | None = None
    condition: float | None = None
    sigma_above_cut: float | None = None
    sigma_below_cut: float | None = None
    residual: float | None = None
    predicted_error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One hypothesis that was followed down to the image.

    Attributes:
        images: Recovered images, (B, C, H, W), float64.
        labels: Labels of the hypothesis, (B,), int64.
        gradient_residual: Largest over the tensors of ‖g′ − g‖ / ‖g‖, with g′ the gradient of this candidate.
        in_pixel_range: Whether every pixel lies in the pixel range, up to the accuracy that the gradient allows.
        layer_inputs: Layer name -> recovered input of that layer, (B, C, H, W) or (B, n); the first is the image.
        layers: The reports of this candidate's way down, from the last layer to the first.
    """

    images: torch.Tensor
    labels: torch.Tensor
    gradient_residual: float
    in_pixel_range: bool
    layer_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    layers: tuple[LayerReport, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Reconstruction:
    """The outcome of an attack.

    Attributes:
        images: Images of the best candidate, (B, C, H, W), float64, in pixel units.
        labels: Its labels, (B,), int64.
        verdict: One of `VERDICTS`; needs no ground truth.
        candidates: Every consistent hypothesis, best first; where none is consistent, the least inconsistent one.
        layers: A report for each layer of the best candidate, from the last layer to the first.
        notes: Sentences on what was decided and on what evidence.
        per_image: For a mini-batch, a (verdict, candidates) pair for each image found.
    """

    images: torch.Tensor
    labels: torch.Tensor
    verdict: str
    candidates: tuple[Candidate, ...]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    per_image: tuple[tuple[str, tuple[Candidate, ...]], ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """The layer reports as a table, one row a layer, columns as in `LayerReport`."""
        return reports_frame(self.layers, LayerReport)


def reports_frame(reports, kind) -> pd.DataFrame:
    """A table of dataclass records, one row each, with every field of `kind` as a column even without rows."""
    names = [f.name for f in fields(kind)]
    return pd.DataFrame([[getattr(report, name) for name in names] for report in reports], columns=names)
