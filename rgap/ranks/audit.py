"""The audit of a network, without data: its rank analysis, what follows from it, and what would stop the leak.

Advice is the outcome of the rank analysis of changed copies that were built. It concerns the linear equations, layer by
layer, and is no guarantee: an attacker may also use a prior on natural images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from rgap.ranks.analysis import analyses, rank_analysis
from rgap.ranks.exposure import LEAST_SHARE, Exposure, exposure
from rgap.ranks.numbers import MAX_UNKNOWNS
from rgap.ranks.rebuild import chain_steps, with_convolution
from rgap.ranks.steps import is_layer
from rgap.results import LayerRank, RankAnalysis, UnsupportedLayerError, reports_frame

if TYPE_CHECKING:
    import pandas as pd

CONVOLUTIONS_CHANGED = 3  # number of convolutions that are changed, counted from the image
STRIDES_TRIED = 3  # number of strides above its own with which a convolution is tried
MAX_BATCH_ADVISED = 1024  # largest batch size tried
ARGUMENTS = {"output channels": "out_channels", "stride": "stride"}  # change -> argument of `with_convolution`

COLUMNS = [
    "name", "kind", "unknowns", "weight_rows", "gradient_rows", "ra_index", "deficit", "law_proved", "supply", "status",
]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """A change of a network after which the image no longer follows from the linear equations."""

    what: str  # "output channels", "stride" or "batch size"
    layer: str  # path of the layer, empty for the batch size
    before: int  # the present value
    after: int  # the nearest value at which the analysis says "stops", with enough equations missing
    stops_at: str  # the step that then lacks the largest share of its equations
    unknowns: int  # of that step, as in `StepExposure`
    deficit: int
    supply: int

    @property
    def sentence(self) -> str:
        """The change and what follows, in words."""
        place = f"{self.what} of {self.layer!r}" if self.layer else self.what
        return (
            f"{place}: with {self.after} instead of {self.before}, {self.stops_at!r} would lack {self.deficit} of "
            f"{self.unknowns} equations, and the step before it could add {self.supply} at most"
        )


def advise(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int = 1, least_share: float = LEAST_SHARE
) -> list[Change]:
    """Finds the smallest changes after which the rank analysis says that a network stops a leak, by a margin.

    At least `least_share` of the unknowns of a step must then be missing; of fewer a prior on images makes up.

    Larger batches are tried and, if the network is a chain of layers, fewer output channels and larger strides of the
    convolutions nearest to the image, one change at a time. Ranks are those by law, so that weights do not matter.
    The model stays unchanged; raises what `rgap.rank_analysis` raises.

    Returns:
        At most one change for each layer and kind, widths first, from the image on; none if the analysis does not know
        whether the network leaks, if so much is missing already, or if no change that was tried closes the leak.
    """
    return _changes(model, image_shape, batch_size, least_share, _judge(model, image_shape, batch_size))


def _changes(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int, least_share: float, now: Exposure
) -> list[Change]:
    """The changes that `advise` finds, where the exposure by law is known."""
    found, stops = [], partial(_stops, least_share=least_share)
    if now.outcome == "unknown" or stops(now):
        return []
    convolutions = [s for s in chain_steps(model, image_shape) if is_layer(s) and not isinstance(s.module, nn.Linear)]
    for what in ARGUMENTS:
        for step in convolutions[:CONVOLUTIONS_CHANGED]:
            built = partial(_changed, model, image_shape, batch_size, step.path, what)
            if what == "stride":
                before = max(step.module.stride)
                tried = ((value, built(value)) for value in range(before + 1, before + 1 + STRIDES_TRIED))
                best = next((pair for pair in tried if stops(pair[1])), None)
            else:
                before = step.module.out_channels
                best = _bisect(before, 0, built, stops)
            found.append(_change(what, step.path, before, best))
    best = _first_batch(batch_size, partial(_judge, model, image_shape), stops)
    found.append(_change("batch size", "", batch_size, best))
    return [change for change in found if change is not None]


def changed(model: nn.Module, image_shape: tuple[int, ...], change: Change, seed: int = 0) -> nn.Module:
    """A copy of a network with the new width or stride, or the network itself where the change is a batch size.

    The seed is that of the weights of the layers that change.
    """
    if change.what not in ARGUMENTS:
        return model
    return with_convolution(model, image_shape, change.layer, seed=seed, **{ARGUMENTS[change.what]: change.after})


def advice_frame(changes: Iterable[Change]) -> pd.DataFrame:
    """Changes as a table, columns as in `Change`."""
    return reports_frame(list(changes), Change)


def _judge(model: nn.Module, image_shape: tuple[int, ...], batch_size: int) -> Exposure:
    return exposure(rank_analysis(model, image_shape, batch_size, limit=0))


def _changed(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int, path: str, what: str, value: int
) -> Exposure | None:
    """The exposure of a changed copy; None where there is no such network."""
    try:
        return _judge(with_convolution(model, image_shape, path, **{ARGUMENTS[what]: value}), image_shape, batch_size)
    except (UnsupportedLayerError, ValueError):
        return None


def _stops(found: Exposure | None, least_share: float) -> bool:
    return found is not None and found.outcome == "stops" and found.missing_share >= least_share


def _bisect(
    start: int, end: int, judge: Callable[[int], Exposure | None], stops: Callable[[Exposure | None], bool]
) -> tuple[int, Exposure] | None:
    """The value nearest to `start` at which the leak stops, between it and `end` (both excluded), by bisection."""
    step = 1 if end > start else -1
    near, far = start, end - step  # near leaks, far stops
    if far == start or not stops(best := judge(far)):
        return None
    while abs(far - near) > 1:
        middle = (near + far) // 2
        if stops(outcome := judge(middle)):
            far, best = middle, outcome
        else:
            near = middle
    return far, best


def _first_batch(
    batch_size: int, judge: Callable[[int], Exposure | None], stops: Callable[[Exposure | None], bool]
) -> tuple[int, Exposure] | None:
    """Doubles the size until the leak stops, then bisects between the last two sizes."""
    size = batch_size
    while size < MAX_BATCH_ADVISED:
        if stops(judge(2 * size)):
            return _bisect(size, 2 * size + 1, judge, stops)
        size *= 2
    return None


def _change(what: str, layer: str, before: int, found: tuple[int, Exposure] | None) -> Change | None:
    if found is None:
        return None
    step = found[1].open_step
    return Change(what, layer, before, found[0], step.name, step.unknowns, step.deficit, step.supply)


@dataclass(frozen=True)
class Audit:
    """A rank analysis for images of `image_shape`, what it means for the network, and changes that would help."""

    image_shape: tuple[int, ...]
    analysis: RankAnalysis
    exposure: Exposure
    advice: tuple[Change, ...]

    def to_frame(self) -> pd.DataFrame:
        """The counted steps, columns as in `LayerRank`, and `supply` and `status` as in `StepExposure`."""
        steps = self.exposure.to_frame()
        return self.analysis.to_frame(counted=True).assign(supply=steps["supply"], status=steps["status"])

    def table(self) -> pd.DataFrame:
        """The columns of `to_frame` in `COLUMNS`."""
        return self.to_frame()[COLUMNS]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The outcome and the advice in words."""
        changes = [f"  {change.sentence}" for change in self.advice]
        intro = ["the analysis would say that it stops after any of:"] if changes else []
        return (self.exposure.sentence, *intro, *changes)

    def to_dict(self) -> dict:
        """Everything in JSON's types, None where something is not known."""
        judged = iter(self.exposure.steps)  # by order: a module used twice has one name
        layers = []
        for layer in self.analysis.layers:
            step = None if layer.ra_index is None else next(judged)
            more = {"supply": step and step.supply, "status": step and step.status}
            layers.append({f.name: _plain(getattr(layer, f.name)) for f in fields(LayerRank)} | more)
        return {
            "image_shape": list(self.image_shape), "batch_size": self.analysis.batch_size,
            "outcome": self.exposure.outcome, "sentence": self.exposure.sentence,
            "missing_share": self.exposure.missing_share, "max_ra_index": self.analysis.max_ra_index,
            "copa_index": self.analysis.copa_index, "layers": layers,
            "advice": [asdict(change) | {"sentence": change.sentence} for change in self.advice],
        }  # fmt: skip


def audit(
    model: nn.Module,
    image_shape: tuple[int, ...],
    batch_size: int = 1,
    *,
    limit: int = MAX_UNKNOWNS,
    least_share: float = LEAST_SHARE,
) -> Audit:
    """Analyses a network, judges it, and looks for changes that would close the leak.

    Arguments and errors are those of `rgap.rank_analysis`; with `limit` 0 there are laws alone, which are quick. After
    each change at least `least_share` of a step's equations would be missing.
    """
    analysis, by_law = analyses(model, image_shape, batch_size, torch.float64, (limit, 0))
    changes = _changes(model, image_shape, batch_size, least_share, exposure(by_law))
    return Audit(tuple(image_shape), analysis, exposure(analysis), tuple(changes))


def _plain(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
