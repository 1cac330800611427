"""What a rank analysis means for the whole network: the one judgement of the analysis, the audit and the command line.

A step that lacks equations may get them from the step before it. Its input x_i is that step's output, so |z| − rank W
combinations of σ⁻¹(x_i) vanish; and what W and K both determine of x_{i−1} is one more equation each for x_i. Together
these are at most |z_{i−1}| + rank K_{i−1} − rank [W_{i−1}; K_{i−1}] virtual constraints, the *supply* of x_i (ours).

Three words: *leaks*, every step gives its input away, so that the image follows; *stops*, a step lacks equations that
nothing before it can add, whatever stands above it; *unknown*, neither is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rgap.equations.rank_laws import CERTIFICATE_SURPLUS
from rgap.results import LayerRank, RankAnalysis, reports_frame

if TYPE_CHECKING:
    import pandas as pd

MAX_SENTENCE = 200  # most characters of an outcome in words
LEAST_SHARE = 0.1  # share of unknowns that must be missing for *stops*; of fewer a prior makes up
UNREAD = "are never read"  # note on a convolution some of whose pixels no output reads: no gradient reaches them
FROZEN = "frozen"  # first word of the note on a step whose weight is not trained, and so shares no gradient


@dataclass(frozen=True)
class StepExposure:
    """What is known of one counted step's input."""

    name: str  # as in `LayerRank`
    kind: str
    unknowns: int
    deficit: int | None
    supply: int | None  # the most virtual constraints that the step before can supply; None where that is not known
    # "determined" (its own equations suffice), "closable" (with the supply they suffice, by count; an attack may still
    # fail to find the solution), "separated" (a fully connected layer at the end, where the images of a batch come
    # apart), "open" (not even the supply suffices), or "unknown"
    status: str

    @property
    def missing(self) -> int:
        """Equations that an open step lacks beyond all that the step before it can add; 0 for any other."""
        return self.deficit - self.supply if self.status == "open" else 0

    @property
    def sentence(self) -> str:
        """The status in words."""
        if self.status == "determined":
            return f"{self.name!r} gives its input away"
        if self.status == "separated":
            return f"{self.name!r} tells the images apart"
        if self.deficit is None:
            return f"{self.name!r} has no known rank"
        if self.deficit == 0:
            return f"{self.name!r} has the equations, but no known way to them"
        lack = f"{self.name!r} lacks {self.deficit} of {self.unknowns} equations"
        if self.supply is None:
            return f"{lack}, and what the step before adds is not known"
        if self.status == "unknown":
            return f"{lack}, and how to get {self.supply} at most from the step before is not known"
        return f"{lack}, {'which' if self.status == 'closable' else 'and'} the step before adds ({self.supply} at most)"


@dataclass(frozen=True)
class Exposure:
    """What an architecture gives away to linear equations, layer by layer.

    Attributes:
        steps: The counted steps, from the image to the output.
        outcome: "leaks": every step is determined, closable or separated, so that the image follows from the gradient.
            "stops": a step is open, and nothing below it follows. "unknown": neither is shown.
        not_analysed: Names of steps on the way that are of no kind known to the analysis.
        lossy: Whether an activation on the way is not invertible, so that ranks are the most that it can have.
        doubts: What else keeps the network from being judged, in words.
        entry: As in `RankAnalysis`; where it leaks, the network does, whatever stands above the blind layer.
    """

    steps: tuple[StepExposure, ...]
    outcome: str
    not_analysed: tuple[str, ...] = ()
    lossy: bool = False
    doubts: tuple[str, ...] = ()
    entry: str = ""

    @property
    def open_step(self) -> StepExposure | None:
        """The open step that lacks the largest share of its equations; None where none is open."""
        return max((s for s in self.steps if s.status == "open"), key=lambda s: s.missing / s.unknowns, default=None)

    @property
    def missing_share(self) -> float:
        """Share of that step's unknowns which neither it nor the step before determines; 0 where no step is open."""
        return 0.0 if self.open_step is None else self.open_step.missing / self.open_step.unknowns

    @property
    def sentence(self) -> str:
        """The outcome in words, at most `MAX_SENTENCE` characters; it holds for the linear equations alone."""
        if self.outcome == self.entry.partition(":")[0]:
            return self.entry
        if self.outcome == "stops":
            few = ", so few that a prior on images may make up for them" if self.missing_share < LEAST_SHARE else ""
            return _fitted("stops: ", [self.open_step.sentence], f"; missing: {_percent(self.missing_share)}{few}")
        if self.outcome == "leaks":
            helped = [step.sentence for step in self.steps if step.status == "closable"]
            start = f"leaks: every one of {len(self.steps)} steps gives its input away"
            return _fitted(f"{start}; with virtual constraints: ", helped) if helped else start
        why = [f"{name!r} is not analysed" for name in self.not_analysed] + list(self.doubts)
        why += [step.sentence for step in reversed(self.steps) if step.status == "unknown"]
        if not self.steps:
            why.append("no step stands alone on the way from the image to the output")
        if self.lossy:
            why.append("not every activation is invertible, so that ranks are upper bounds")
        return _fitted("unknown: ", why)

    def to_frame(self) -> pd.DataFrame:
        """The steps as a table, columns as in `StepExposure`; integers stay integers where some are missing."""
        return reports_frame(self.steps, StepExposure).astype({"deficit": "Int64", "supply": "Int64"})


def exposure(analysis: RankAnalysis) -> Exposure:
    """Judges a rank analysis: which steps are determined, closable by the step before, or open."""
    return judge(analysis.layers, analysis.batch_size, analysis.separable, analysis.entry)


def judge(layers: Sequence[LayerRank], batch_size: int = 1, separable: int | None = None, entry: str = "") -> Exposure:
    """The exposure of steps that were analysed, of a network whose last layers separate `separable` images.

    `entry` is that of the analysis.

    Only the step directly before may supply equations, as in `rgap.reconstruct`. If an activation between the two is
    not invertible, its zeros may add equations that no rank counts: such a step is never called open.
    """
    steps: list[StepExposure] = []
    before, between, first_dense = None, [], _first_dense(layers)
    for place, layer in enumerate(layers):
        if layer.ra_index is not None:
            step = _step(layer, before, between, batch_size)
            in_tail = place > first_dense or (place == first_dense and step.status != "open")
            if batch_size > 1 and in_tail:  # whatever the ranks, images come apart here or not
                step = replace(step, status="separated" if batch_size <= (separable or 0) else "unknown")
            steps.append(step)
            before, between = layer, []
        elif not layer.note.startswith("inside "):
            between.append(layer)
    not_analysed = tuple(x.name for x in layers if x.kind == "not analysed" and not x.note.startswith("inside"))
    lossy = any(map(_is_lossy, layers[: first_dense if batch_size > 1 else None]))  # images come apart through ReLU
    doubts = _doubts(layers, batch_size, separable)
    statuses = {step.status for step in steps}
    shown = steps and "unknown" not in statuses and not (not_analysed or lossy or doubts)
    outcome = "stops" if "open" in statuses else "leaks" if shown else "unknown"
    outcome = "leaks" if entry.startswith("leaks") else outcome
    return Exposure(tuple(steps), outcome, not_analysed, lossy, doubts, entry)


def available_virtual_constraints(before: LayerRank | None) -> int | None:
    """The most equations that a step (None at the image) can supply to the next; None where its ranks are unknown."""
    if before is None:
        return 0
    numbers = before.rank_gradients, before.rank
    gradients, both = (before.law_gradients, before.law_rank) if None in numbers else numbers
    return None if gradients is None or both is None else before.weight_rows + gradients - both


def _step(layer: LayerRank, before: LayerRank | None, between: Sequence[LayerRank], batch: int) -> StepExposure:
    clear = not any(step.kind == "not analysed" or _is_lossy(step) for step in between)
    supply = available_virtual_constraints(before) if clear else None
    status = "unknown"
    if layer.deficit == 0:
        status = "determined"
    elif layer.deficit is not None and supply is not None:
        linear = before is not None and {layer.kind, before.kind} <= {"convolution", "linear"}
        linear = linear and UNREAD not in layer.note  # there the layer before has no δz, which its supply assumes
        joined = layer.kind == "pooling" and before is not None and not any(s.kind == "activation" for s in between)
        if layer.deficit > supply and not joined:  # what was pooled may be determined where z is not
            status = "open"
        elif linear and layer.deficit + CERTIFICATE_SURPLUS <= (supply if batch == 1 else _range_rows(before)):
            status = "closable"
    return StepExposure(layer.name, layer.kind, layer.unknowns, layer.deficit, supply, status)


def _range_rows(before: LayerRank) -> int:
    """Equations that a step supplies by the range of its W alone, which is all that a batch can use."""
    rank = before.law_weights if before.rank_weights is None else before.rank_weights
    return 0 if rank is None else before.weight_rows - rank


def _first_dense(layers: Sequence[LayerRank]) -> int:
    """Place of the first counted step from which on all are linear."""
    counted = [place for place, layer in enumerate(layers) if layer.ra_index is not None]
    others = [place for place in counted if layers[place].kind != "linear"]
    return min((place for place in counted if not others or place > others[-1]), default=len(layers))


def _doubts(layers: Sequence[LayerRank], batch_size: int, separable: int | None) -> tuple[str, ...]:
    """Why a network is not said to leak although its steps may be determined."""
    doubts = []
    weighted = [layer for layer in layers if layer.kind in {"convolution", "linear"}]
    if weighted and weighted[-1].note.startswith(FROZEN):
        doubts.append(f"the last layer {weighted[-1].name!r} shares no gradient, with which an attack begins")
    if batch_size > 1 and batch_size > (separable or 0):
        limit = f"{separable} images are" if separable else "no batch is"
        doubts.append(f"by its last layers {limit} known to come apart")
    return tuple(doubts)


def _is_lossy(layer: LayerRank) -> bool:
    return layer.kind == "activation" and "not invertible" in layer.note


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else "100 %"


def _fitted(start: str, parts: Sequence[str], end: str = "") -> str:
    """As many parts as fit between start and end, the rest counted; a part that alone is too long is cut."""
    room = MAX_SENTENCE - len(start) - len(end)
    for count in range(len(parts), 0, -1):
        rest = len(parts) - count
        text = "; ".join([*parts[:count], *([f"and {rest} more"] if rest else [])])
        if len(text) <= room:
            return f"{start}{text}{end}"
    rest = f"; and {len(parts) - 1} more" if len(parts) > 1 else ""
    return f"{start}{parts[0][: room - len(rest) - 1]}…{rest}{end}"
