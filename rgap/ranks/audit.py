"""The audit of a network: its rank analysis, what follows from it, and what would stop the leak. It needs no data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from torch import nn

from rgap.ranks.advice import Change, advise
from rgap.ranks.analysis import rank_analysis
from rgap.ranks.exposure import LEAST_SHARE, Exposure, exposure
from rgap.ranks.numbers import MAX_UNKNOWNS
from rgap.results import LayerRank, RankAnalysis

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "name",
    "kind",
    "unknowns",
    "weight_rows",
    "gradient_rows",
    "ra_index",
    "deficit",
    "law_proved",
    "supply",
    "status",
]


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
            "image_shape": list(self.image_shape),
            "batch_size": self.analysis.batch_size,
            "outcome": self.exposure.outcome,
            "sentence": self.exposure.sentence,
            "missing_share": self.exposure.missing_share,
            "max_ra_index": self.analysis.max_ra_index,
            "copa_index": self.analysis.copa_index,
            "layers": layers,
            "advice": [asdict(change) | {"sentence": change.sentence} for change in self.advice],
        }


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
    analysis = rank_analysis(model, image_shape, batch_size, limit=limit)
    changes = advise(model, image_shape, batch_size, least_share)
    return Audit(tuple(image_shape), analysis, exposure(analysis), tuple(changes))


def _plain(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
