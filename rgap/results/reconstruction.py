"""What an attack returns: images, candidates, the reports of the layers, and a verdict with its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from rgap.results import display

if TYPE_CHECKING:
    import pandas as pd

VERDICTS = ("rank-deficient", "inconsistent", "ambiguous", "exact")
"""The verdicts of a reconstruction, worst first; the first that holds is given. What each licenses, without any truth:

- "exact": the image is the client's, to `certified_psnr_db`. Its own gradient is the shared one, tensor by tensor, to
  within what the gradient's format, or noise that was declared or confirmed, explains; the same errors leave the image
  with a predicted error of at most 1 % of the pixel range; and no other hypothesis inside that range has this gradient.
- "ambiguous": the client's image is one of the candidates, and the gradient does not tell which; the notes name what it
  leaves open.
- "inconsistent": nothing is certified. The gradient is not that of the image found: it was altered, belongs to another
  network, loss or batch, or its noise exceeds what is known of it; or noise limits the accuracy, as a note then says.
- "rank-deficient": nothing is certified. Equations are missing: many images have this gradient, and one is shown.
"""

MAX_CERTIFIED_ERROR = 0.01  # largest predicted error of an image that is certified, in widths of the pixel range
PIXEL_SLACK_FACTOR = 5.0  # times its predicted error by which a pixel may lie outside the range
MIN_ERROR = 1e-16  # smallest error that a number of dB is given for, that of float64: 320 dB


@dataclass(frozen=True)
class PixelRange:
    """The values that a pixel may have.

    Attributes:
        low, high: Smallest and largest; may be infinite.
    """

    low: float = 0.0
    high: float = 1.0

    @property
    def width(self) -> float:
        """High − low, the unit of errors; 1 where that is infinite."""
        return self.high - self.low if math.isfinite(self.high - self.low) else 1.0

    @property
    def middle(self) -> float:
        """The mean of both; 0 where the range is infinite."""
        return (self.low + self.high) / 2 if math.isfinite(self.high - self.low) else 0.0

    def contains(self, images: torch.Tensor, slack: float) -> bool:
        """Whether every pixel lies in the range, up to `slack`."""
        return bool((images >= self.low - slack).all() and (images <= self.high + slack).all())


class UnsupportedLayerError(ValueError):
    """The network has a module without closed-form inverse; the message names its path and the reason."""


class GradientMismatchError(ValueError):
    """The gradients do not belong to the network: wrong count, shape, dtype, or values that are not finite."""


@dataclass(frozen=True)
class LayerReport:
    """How one layer's input was recovered. A field is None where the method used does not compute it.

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
        predicted_error: Predicted root-mean-square error of the layer's input, including that of the system of virtual
            constraints where they closed the layer.
        seconds: Wall time spent on this layer.
        saturated: Entries of the layer's output that do not determine their pre-activation, such as zeros of a ReLU;
            W's rows there were not used. None where every entry determines it.
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
    saturated: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One hypothesis that was followed down to the image.

    Attributes:
        images: Recovered images, (B, C, H, W), float64.
        labels: Labels of the hypothesis, (B,), int64; real-valued targets of a squared error are (B, outputs).
        gradient_residual: Largest over the tensors of ‖g′ − g‖ / ‖g‖, with g′ the gradient of this candidate.
        in_pixel_range: Whether every pixel lies in the pixel range, up to the accuracy that the gradient allows.
        layer_inputs: Layer name -> recovered input of that layer, (B, C, H, W) or (B, n); the first is the image.
        layers: The reports of this candidate's descent, from the last layer to the first.
        open_layers: Names of rank-deficient layers whose null space nothing closed.
        beliefs: Name of a layer that virtual constraints closed -> belief on its input after each step, (steps, n).
        residual_allowed: Residual up to which the candidate is consistent, given the gradient's format, its noise and
            the image's predicted error.
        predicted_error: Predicted root-mean-square error of the image, of a batch that of the worst one, pixel units;
            that of a brightness that is not determined is no part of it.
        certified_psnr_db: The same as a PSNR for the pixel range, where the verdict vouches for it: of an "exact"
            image, and of each of several "ambiguous" ones if it is the right one. None where nothing is certified, or
            the brightness is not determined.
        gradient_scale: Factor κ of the shared gradient κ ∇ℓ under this hypothesis; for a batch the mean over images.
        brightness_error: Relative error of the image's brightness that the last layer's equations leave; infinite where
            they do not determine it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    gradient_residual: float
    in_pixel_range: bool
    layer_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    layers: tuple[LayerReport, ...] = field(default=(), repr=False)
    open_layers: tuple[str, ...] = ()
    beliefs: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    residual_allowed: float = 0.0
    predicted_error: float | None = None
    certified_psnr_db: float | None = None
    gradient_scale: float = 1.0
    brightness_error: float = 0.0

    @property
    def consistent(self) -> bool:
        """Whether the candidate reproduces the shared gradient as well as it can."""
        return self.gradient_residual <= self.residual_allowed


@dataclass(frozen=True)
class Reconstruction:
    """The outcome of an attack.

    Attributes:
        images: Images of the best candidate, (B, C, H, W), float64, in pixel units.
        labels: Its labels, (B,), int64, or the real-valued targets of a squared error, (B, outputs).
        verdict: One of `VERDICTS`; needs no ground truth.
        candidates: Every consistent hypothesis, best first; where none is consistent, the least inconsistent one
            and its twin.
        layers: A report for each layer of the best candidate, from the last layer to the first.
        notes: Sentences on what was decided, and on what evidence.
        per_image: For a mini-batch, a (verdict, candidates) pair for each image found.
        certified_psnr_db: The accuracy that the verdict "exact" vouches for, by the predicted error, of a batch that of
            the worst image; None with any other verdict.
        gradient_scale: Factor κ of the shared gradient κ ∇ℓ, as given or estimated, of a batch the mean over its
            images; None where the gradient does not determine it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    verdict: str
    candidates: tuple[Candidate, ...]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    per_image: tuple[tuple[str, tuple[Candidate, ...]], ...] = ()
    certified_psnr_db: float | None = None
    gradient_scale: float | None = None

    def __repr__(self) -> str:
        """Verdict, images and residual in one line."""
        return display.reconstruction_line(self)

    def _repr_html_(self) -> str:
        return display.reconstruction_page(self)

    def to_frame(self) -> pd.DataFrame:
        """The layer reports as a table, one row a layer, columns as in `LayerReport`."""
        return display.reports_frame(self.layers, LayerReport)


def certified_psnr_db(candidate: Candidate, pixels: PixelRange) -> float | None:
    """The PSNR that a candidate's predicted error allows; None without prediction, or beyond `MAX_CERTIFIED_ERROR`."""
    error = math.inf if candidate.predicted_error is None else candidate.predicted_error / pixels.width
    return -20 * math.log10(max(error, MIN_ERROR)) if error <= MAX_CERTIFIED_ERROR else None


def noise_limit(error: float | None, pixels: PixelRange, most: float | None = None) -> str:
    """That noise keeps an image from being certified, in words; `most` is the largest error that would be."""
    if error is None or not math.isfinite(error):
        return "the gradient's noise exceeds the image: its effect on the image could not be predicted"
    psnr = -20 * math.log10(error / pixels.width)
    most = MAX_CERTIFIED_ERROR * pixels.width if most is None else most
    return (
        f"the gradient's noise limits the accuracy to {psnr:.0f} dB, by a predicted error of {error:.2g}; a "
        f"certificate takes at most {most:.2g}"
    )


def with_accuracy(result: Reconstruction, pixels: PixelRange) -> Reconstruction:
    """The result with the accuracy that its verdict vouches for, in `certified_psnr_db` of it and its candidates.

    An "exact" result gets a note that says it.
    """

    def vouched(verdict: str, candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        def psnr(one: Candidate) -> float | None:  # an open brightness is no part of the predicted error
            sure = verdict in ("exact", "ambiguous") and math.isfinite(one.brightness_error)
            return certified_psnr_db(one, pixels) if sure else None

        return tuple(replace(one, certified_psnr_db=psnr(one)) for one in candidates)

    candidates = vouched(result.verdict, result.candidates)
    per_image = tuple((verdict, vouched(verdict, each)) for verdict, each in result.per_image)
    result = replace(result, candidates=candidates, per_image=per_image)
    psnr = candidates[0].certified_psnr_db
    if result.verdict != "exact" or psnr is None:
        return result
    what, error = "each image" if len(result.images) > 1 else "the image", candidates[0].predicted_error
    note = f"{what} is certified to {psnr:.0f} dB, by a predicted error of {error:.2g}"
    return replace(result, certified_psnr_db=psnr, notes=(*result.notes, note))
