"""What a rank analysis means for the whole network: does the image follow from the gradient, layer by layer?

A step that lacks equations may get them from the step before it. Its input x_i is that step's output, so |z| − rank W
combinations of σ⁻¹(x_i) vanish; and what W and K both determine of x_{i−1} is one more equation each for x_i. Together
these are at most |z_{i−1}| + rank K_{i−1} − rank [W_{i−1}; K_{i−1}] virtual constraints, the *supply* of x_i (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from rgap.results import LayerRank, RankAnalysis, reports_frame

MAX_NAMED_REASONS = 3
"""Number of reasons that a sentence names; it counts the rest."""


@dataclass(frozen=True)
class StepExposure:
    """What is known of one counted step's input.

    Attributes:
        name, kind, unknowns, deficit: As in `LayerRank`.
        supply: The most virtual constraints that the step before can supply; None where that is not known.
        status: "determined" (its own equations suffice), "closable" (with the supply they suffice, by count; an attack
            may still fail to find the solution, above all for mini-batches), "open" (not even with it), or "unknown".
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
        lack = f"{self.name!r} {_lack(self)}"
        if self.deficit is None:
            return lack
        if self.supply is None:
            return f"{lack}, and what the step before it can add is not known"
        ends = {"closable": "which the step before it can add", "open": "which the step before it cannot add"}
        return f"{lack}, {ends.get(self.status, 'for which no solution is known here')} ({self.supply} at most)"


@dataclass(frozen=True)
class Exposure:
    """What an architecture gives away to linear equations, layer by layer.

    Attributes:
        steps: The counted steps, from the image to the output.
        outcome: "leaks": every step is determined or closable, so that the image follows from the gradient. "stops":
            a step is open, and nothing below it follows. "unknown": neither is shown.
        not_analysed: Names of steps on the way that are of no kind known to the analysis.
        lossy: Whether an activation on the way is not invertible; "leaks" is then the most that can leak.
    """

    steps: tuple[StepExposure, ...]
    outcome: str
    not_analysed: tuple[str, ...] = ()
    lossy: bool = False

    @property
    def sentence(self) -> str:
        """The outcome in words. It holds for the linear equations alone and is no guarantee."""
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

    Only the step directly before may supply equations, as in `rgap.reconstruct`. If an activation between the two is
    not invertible, its zeros may add equations that no rank counts: such a step is never called open.
    """
    steps: list[StepExposure] = []
    before, between = None, []
    for layer in analysis.layers:
        if layer.ra_index is not None:
            steps.append(_step(layer, before, between))
            before, between = layer, []
        elif not layer.note.startswith("inside "):
            between.append(layer)
    not_analysed = _not_analysed(analysis.layers)
    statuses = {step.status for step in steps}
    shown = steps and "unknown" not in statuses and not not_analysed
    outcome = "stops" if "open" in statuses else "leaks" if shown else "unknown"
    return Exposure(tuple(steps), outcome, not_analysed, any(map(_is_lossy, analysis.layers)))


def verdict(layers: Sequence[LayerRank]) -> str:
    """`RankAnalysis.verdict`: how far down each step's own equations alone determine the inputs, in words."""
    counted = [layer for layer in layers if layer.ra_index is not None]
    short = [layer for layer in reversed(counted) if layer.deficit != 0]
    if not counted:
        text = "unknown: no step stands alone on the way from the image to the output"
    elif not short:
        text = f"leaks: all {len(counted)} steps determine their input, so that the image follows from the gradient"
    else:
        text = (
            f"stops: {len(short)} of {len(counted)} steps do not determine their input by themselves; from the output "
            f"down the first is {short[0].name!r}, which {_lack(short[0])}"
        )
        if short[0].deficit and short[0].virtual_constraints:
            text += f" before {short[0].virtual_constraints} virtual constraints"
    if lossy := sum(map(_is_lossy, layers)):
        text += f"; {lossy} activations are not invertible, so that this is the most that can leak layer by layer"
    if unknown := _not_analysed(layers):
        text += f"; not analysed: {', '.join(unknown)}"
    return text


def available_virtual_constraints(before: LayerRank | None) -> int | None:
    """The most equations that a step (None at the image) can supply to the next; None where its ranks are unknown."""
    if before is None:
        return 0
    numbers = before.rank_gradients, before.rank
    gradients, both = (before.law_gradients, before.law_rank) if None in numbers else numbers
    return None if gradients is None or both is None else before.weight_rows + gradients - both


def _step(layer: LayerRank, before: LayerRank | None, between: Sequence[LayerRank]) -> StepExposure:
    clear = not any(step.kind == "not analysed" or _is_lossy(step) for step in between)
    supply = available_virtual_constraints(before) if clear else None
    status = "unknown"
    if layer.deficit == 0:
        status = "determined"
    elif layer.deficit is not None and supply is not None:
        if layer.deficit > supply:
            status = "open"
        elif {layer.kind, before.kind} <= {"convolution", "linear"}:
            status = "closable"
    return StepExposure(layer.name, layer.kind, layer.unknowns, layer.deficit, supply, status)


def _lack(step: LayerRank | StepExposure) -> str:
    return "has no known rank" if step.deficit is None else f"lacks {step.deficit} of {step.unknowns} equations"


def _is_lossy(layer: LayerRank) -> bool:
    return layer.kind == "activation" and "not invertible" in layer.note


def _not_analysed(layers: Sequence[LayerRank]) -> tuple[str, ...]:
    return tuple(x.name for x in layers if x.kind == "not analysed" and not x.note.startswith("inside"))


def _some(sentences: Sequence[str]) -> str:
    rest = len(sentences) - MAX_NAMED_REASONS
    return "; ".join([*sentences[:MAX_NAMED_REASONS], *([f"and {rest} more"] if rest > 0 else [])])
