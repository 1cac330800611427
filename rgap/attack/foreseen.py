"""What the rank laws foresee: layers whose input nothing can determine, before any system is solved (ours).

A layer's own equations leave at least unknowns − rank [W; K] open, by law. The layer before supplies at most the
|z| − rank W equations of its range and the rank of its K, and has the null space of its W as further unknowns. Where
that is too little for a certificate, the verdict is certain, and only a rough picture is left to be solved for.
"""

from __future__ import annotations

import math

import torch

from rgap.attack.candidates import Attack, Weighed
from rgap.equations.limits import DEFAULT_LIMITS
from rgap.equations.rank_laws import CERTIFICATE_SURPLUS, RankLaws, layer_laws
from rgap.head.hypothesis import Start
from rgap.network.layer import Layer
from rgap.results import Candidate, LayerReport

UNKNOWNS_A_SECOND = 1000  # open unknowns of a dense system solved within about a second; time grows with the cube
MAX_FUTILE_SECONDS = 0.5  # seconds, by estimate, that may be spent on the part of a hopeless network that is determined

EFFORTS = ("auto", "full")


def foreseen_deficits(attack: Attack) -> dict[str, int] | None:
    """The layers' deficits by law, down to the first that nothing can close.

    None where there is no such layer, or where solving for what is determined takes half a second at most.
    """
    layers, absent, seconds = attack.chain.layers, set(attack.received.absent), 0.0
    deficits: dict[str, int] = {}
    hopeless: dict[str, int] | None = None
    for i in reversed(range(len(layers) - 1)):
        layer, before = layers[i], layers[i - 1] if i else None
        laws = _laws(layer, absent)
        if laws.both is None:
            continue
        deficit = layer.unknowns - laws.both
        seconds += ((layer.unknowns - (laws.gradients or 0)) / UNKNOWNS_A_SECOND) ** 3
        if not deficit:
            continue
        deficits[layer.name] = deficit
        supply, further = (0, 0) if before is None or attack.close is None else _supplied(before, absent)
        seconds += ((deficit + further) / UNKNOWNS_A_SECOND) ** 3 * bool(supply)
        if supply < deficit + further + CERTIFICATE_SURPLUS:
            hopeless = hopeless or dict(deficits)
    return hopeless if seconds > MAX_FUTILE_SECONDS else None


def _laws(layer: Layer, absent: set[str]) -> RankLaws:
    """The rank laws of a layer with the equations that it has."""
    if layer.is_fixed:
        if layer.after is None or layer.before is not None:
            return RankLaws(layer.unknowns, 0, layer.unknowns)
        rank = min(layer.unknowns, layer.input_shape[0] * layer.after.rank)
        return RankLaws(rank, 0, rank)
    laws = layer_laws(layer)
    return laws if not absent & set(layer.weight_names) else RankLaws(laws.weights, 0, laws.weights)


def _supplied(before: Layer, absent: set[str]) -> tuple[int, int]:
    """Equations that a layer supplies at most to the next one, and unknowns that come with them."""
    laws, outputs = _laws(before, absent), math.prod(before.output_shape)
    largest = max(outputs, before.unknowns)
    if (
        before.groups > 1
        or before.is_fixed
        or not before.activation.one_to_one
        or largest > DEFAULT_LIMITS.max_pinv_side
    ):
        return 0, 0
    if laws.weights is None:
        return largest + before.weight.numel(), 0
    gradients = before.weight.numel() if laws.gradients is None else laws.gradients
    redundant = before.output_shape[0] if before.activation.homogeneous and before.bias is before.shift is None else 0
    return outputs - laws.weights + max(gradients - redundant, 0), before.unknowns - laws.weights


def without_solving(attack: Attack, start: Start, deficits: dict[str, int]) -> Weighed:
    """A candidate with the head's reading alone, a uniform image, and reports by law."""
    chain = attack.chain
    images = torch.full((1, *chain.image_shape), attack.pixels.middle, dtype=torch.float64)
    reports, absent = list(start.reports), set(attack.received.absent)
    for layer in reversed(chain.layers[:-1]):
        rank = _laws(layer, absent).both
        deficit = None if rank is None else layer.unknowns - rank
        reports.append(LayerReport(layer.name, layer.unknowns, rank=rank, deficit=deficit))
    head = chain.layers[-1]
    inputs = {head.name: start.x.reshape(1, *head.feature_shape)}
    open_ = tuple(deficits)[-1:]
    return Weighed(start, Candidate(images, start.labels, math.inf, True, inputs, tuple(reports), open_))
