"""What a rank analysis says about a network as a whole: does the image follow from the gradient, layer by layer?

A step that lacks equations may get them from the step before it. Its input x_i is the output of that step, so that
|z| − rank W combinations of σ⁻¹(x_i) vanish, and the combinations of x_{i−1} that W and K both see hold for it, too.
Together that is at most |z_{i−1}| + rank K_{i−1} − rank [W_{i−1}; K_{i−1}] equations, the step's *supply* (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from rgap.results import LayerRank, RankAnalysis, reports_frame

STATUSES = ("determined", "closable", "open", "unknown")
"""Of a step; see `StepExposure`."""

OUTCOMES = ("stops", "leaks", "unknown")
"""Of a network; see `Exposure`."""

SOLVABLE = {"convolution", "linear"}
NAMED = 3  # reasons that a sentence names before it counts the rest


@dataclass(frozen=True)
class StepExposure:
    """What is known of one counted step's input.

    Attributes:
        name: Its path in the model.
        kind: As in `LayerRank`.
        unknowns: Entries of its input, over the batch.
        deficit: Unknowns that its own equations leave open; None where no rank is known.
        supply: The most equations that the step before can add; None where that is not known.
        status: "determined" (its own equations are enough), "closable" (with those of the step before there are
            enough, by count: whether an attack finds the solution is another question, for mini-batches above all),
            "open" (there are not enough even so), or "unknown".
    """

    name: str
    kind: str
    unknowns: int
    deficit: int | None
    supply: int | None
    status: str

    @property
    def sentence(self) -> str:
        """The status in words."""
        if self.status == "determined":
            return f"{self.name!r} gives its input away"
        if self.deficit is None:
            return f"{self.name!r} has no known rank"
        lacks = f"{self.name!r} lacks {self.deficit} of {self.unknowns} equations"
        if self.supply is None:
            return f"{lacks}, and what the step before it can add is not known"
        ends = {"closable": "which the step before it can add", "open": "which the step before it cannot add"}
        return f"{lacks}, {ends.get(self.status, 'for which no solution is known here')} ({self.supply} at most)"


@dataclass(frozen=True)
class Exposure:
    """What an architecture gives away to linear equations, layer by layer.

    Attributes:
        steps: The counted steps, from the image to the output.
        outcome: "leaks": every step is determined or closable, so that the image follows from the gradient. "stops":
            some step stays open, and nothing below it follows. "unknown": neither is shown.
        not_analysed: Names of steps on the way that the analysis has no kind for.
        lossy: Whether activations that are not invertible stand on the way; "leaks" is then the most that can leak.
    """

    steps: tuple[StepExposure, ...]
    outcome: str
    not_analysed: tuple[str, ...] = ()
    lossy: bool = False

    @property
    def sentence(self) -> str:
        """The outcome in words; it says what the linear analysis says, which is no guarantee."""
        if self.outcome == "stops":
            first = next(step for step in reversed(self.steps) if step.status == "open")
            return f"stops: {first.sentence}; below it nothing follows from the linear equations alone"
        if self.outcome == "leaks":
            helped = _some([step.sentence for step in self.steps if step.status == "closable"])
            end = "; not every activation is invertible, so that this is the most that can leak" if self.lossy else ""
            helped = f"; with virtual constraints: {helped}" if helped else ""
            return f"leaks: every one of {len(self.steps)} steps gives its input away{helped}{end}"
        why = [step.sentence for step in reversed(self.steps) if step.status == "unknown"]
        why += [f"{name!r} is not analysed" for name in self.not_analysed]
        return f"unknown: {_some(why) or 'no step stands alone on the way from the image to the output'}"

    def to_frame(self) -> pd.DataFrame:
        """The steps as a table, columns as in `StepExposure`; integers stay integers where some are missing."""
        return reports_frame(self.steps, StepExposure).astype({"deficit": "Int64", "supply": "Int64"})


def exposure(analysis: RankAnalysis) -> Exposure:
    """Judges a rank analysis: which steps are determined, closable by the step before, or open.

    Only the step directly before is drawn on, as `rgap.reconstruct` does. Where an activation between the two is not
    invertible, its zeros may add equations that no rank counts: such a step is never called open.

    Args:
        analysis: From `rgap.rank_analysis`.

    Returns:
        An `Exposure`.
    """
    main = [layer for layer in analysis.layers if not layer.note.startswith("inside ")]
    steps: list[StepExposure] = []
    before: LayerRank | None = None
    between: list[LayerRank] = []
    for layer in main:
        if layer.ra_index is None:
            between.append(layer)
            continue
        steps.append(_step(layer, before, between))
        before, between = layer, []
    not_analysed = tuple(layer.name for layer in main if layer.kind == "not analysed")
    lossy = any(_is_lossy(layer) for layer in analysis.layers)
    return Exposure(tuple(steps), _outcome(steps, not_analysed), not_analysed, lossy)


def supply(before: LayerRank | None) -> int | None:
    """The most equations that a step can add to those of the one after it; None where its ranks are unknown.

    Args:
        before: The step before, None at the image.
    """
    if before is None:
        return 0
    numbers = before.rank_gradients, before.rank
    gradients, both = (before.law_gradients, before.law_rank) if None in numbers else numbers
    return None if gradients is None or both is None else before.weight_rows + gradients - both


def _step(layer: LayerRank, before: LayerRank | None, between: Sequence[LayerRank]) -> StepExposure:
    clear = not any(step.kind == "not analysed" or _is_lossy(step) for step in between)
    added = supply(before) if clear else None
    if layer.deficit is None:
        status = "unknown"
    elif layer.deficit == 0:
        status = "determined"
    elif added is None:
        status = "unknown"
    elif layer.deficit > added:
        status = "open"
    else:
        status = "closable" if layer.kind in SOLVABLE and before.kind in SOLVABLE else "unknown"
    return StepExposure(layer.name, layer.kind, layer.unknowns, layer.deficit, added, status)


def _some(sentences: Sequence[str]) -> str:
    rest = [f"and {len(sentences) - NAMED} more"] if len(sentences) > NAMED else []
    return "; ".join([*sentences[:NAMED], *rest])


def _is_lossy(layer: LayerRank) -> bool:
    return layer.kind == "activation" and "not invertible" in layer.note


def _outcome(steps: Sequence[StepExposure], not_analysed: Sequence[str]) -> str:
    statuses = {step.status for step in steps}
    if "open" in statuses:
        return "stops"
    return "leaks" if steps and "unknown" not in statuses and not not_analysed else "unknown"
