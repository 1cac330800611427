"""Rank analysis: which layers of a network determine their input, predicted before any attack.

Each layer gets the counting index, exact ranks by law (`rgap.equations.rank_laws`) and, where it is small enough,
numerical ranks (`rgap.ranks.numbers`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from rgap.arguments import VALUE_FORMATS, check_count, check_dtype, check_image_shape, check_model, check_seed
from rgap.isolation import isolated
from rgap.models import trained_names
from rgap.network.chain import prepare_graph
from rgap.network.layer import Chain
from rgap.network.steps import Step
from rgap.network.tracing import trace
from rgap.ranks.exposure import judge
from rgap.ranks.largest_batch import separable_images
from rgap.ranks.no_chains import BYPASSED, blind_layers, patch_ranks, walk_by_law
from rgap.ranks.numbers import MAX_UNKNOWNS
from rgap.ranks.ranking import Ranking
from rgap.ranks.steps import CountedStep, counted_steps
from rgap.results import LayerRank, RankAnalysis, UnsupportedLayerError

MAX_WALKED_PARAMETERS = 100_000_000  # parameters up to which blind layers are looked for: those of a chain are copied


def rank_analysis(
    model: nn.Module | Chain,
    image_shape: tuple[int, ...],
    batch_size: int = 1,
    dtype: torch.dtype = torch.float64,
    *,
    limit: int = MAX_UNKNOWNS,
    seed: int = 0,
) -> RankAnalysis:
    """Finds for every layer whether its output determines its input; needs no data and no attack.

    The network is analysed in eval mode. Parameters without `requires_grad` share no gradient and give no gradient
    constraints, unless none has it. Ranks assume that z and ∂ℓ/∂z are known at the layer's output; those by law
    also assume generic weights. Under activations that are not invertible they are upper bounds. Of a transformer with
    learned position embeddings the patches are analysed (`rgap.ranks.no_chains`); what follows them is only listed.

    Args:
        model: Any module that `torch.fx` can trace, or such a transformer.
        image_shape: Shape of one image without the batch dimension, e.g. (C, H, W).
        batch_size: Images behind one gradient. It multiplies unknowns and weight constraints, not gradient constraints.
        dtype: Precision of the gradient; numerical ranks count singular values below its resolution as zero.
        limit: Most unknowns of a layer (of each group of channels) for which numerical ranks are computed; 0 for none.
        seed: Of the Gaussian ∂ℓ/∂z behind the numerical ranks.

    Returns:
        A `RankAnalysis` with a `LayerRank` for every step.

    Raises:
        TypeError: If the model is not a `torch.nn.Module`.
        UnsupportedLayerError: If it cannot be traced, or has no layer with weights.
        ValueError: If another argument is out of range, or the image shape does not fit.

    Example:
        >>> import rgap
        >>> analysis = rgap.rank_analysis(rgap.models.cnn6_d(), image_shape=(3, 32, 32), limit=0)
        >>> analysis.layers[2].name, analysis.layers[2].deficit
        ('2', 280)
    """
    return analyses(model, image_shape, batch_size, dtype, (limit,), seed)[0]


@isolated()
def analyses(
    model: nn.Module | Chain, image_shape: tuple[int, ...], batch_size: int, dtype: torch.dtype, limits: Iterable[int],
    seed: int = 0,
) -> list[RankAnalysis]:  # fmt: skip
    """The analyses of a network for several limits, from one run of it; arguments and errors as `rank_analysis` has."""
    model = check_model(model.model if isinstance(model, Chain) else model, TypeError)
    image_shape = check_image_shape(image_shape)
    limits, seed = [check_count("limit", limit, 0) for limit in limits], check_seed(seed)
    batch_size = check_count("batch_size", batch_size)
    check_dtype(dtype, VALUE_FORMATS)
    patches = patch_ranks(model, image_shape, batch_size)
    try:
        traced, steps = _checked_steps(model, image_shape)
    except UnsupportedLayerError:
        if not patches:
            raise
        traced, steps = [], []
    frozen = frozenset(_frozen(model))
    separable = separable_images(model, image_shape) if batch_size > 1 else None
    few = sum(p.numel() for p in model.parameters()) <= MAX_WALKED_PARAMETERS
    walked = batch_size == 1 and few and not (patches or frozen)
    graph = prepare_graph(model, image_shape, traced) if walked else None
    blind, found = {} if graph is None else blind_layers(graph), []
    for limit in limits:
        ranking = Ranking(frozen, batch_size, dtype, 0 if patches else limit, seed)
        for step in steps:
            ranking.add(step)
        layers = _with_index(ranking.ranks.values(), [step.counted for step in steps])
        if patches:
            layers = [*patches, *(replace(layer, ra_index=None, note=BYPASSED) for layer in layers)]
        entry = ""
        if graph is not None:
            layers = [replace(layer, blind=blind.get(layer.name)) for layer in layers]
            walk = walk_by_law(graph, traced) if judge(layers).outcome != "leaks" else None
            entry = walk.sentence if walk else ""
        found.append(_summed(layers, batch_size, separable, entry))
    return found


def _summed(layers: list[LayerRank], batch_size: int, separable: int | None, entry: str) -> RankAnalysis:
    counted = [layer for layer in layers if layer.ra_index is not None]
    return RankAnalysis(
        layers=tuple(layers), batch_size=batch_size,
        max_ra_index=max((layer.ra_index for layer in counted), default=None),
        copa_index=copa_index([layer.deficit for layer in layers if layer.kind == "convolution"]),
        leaking=tuple(layer.name for layer in counted if layer.deficit == 0),
        verdict=judge(layers, batch_size, separable, entry).sentence, separable=separable, entry=entry,
    )  # fmt: skip


def _checked_steps(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[list[Step], list[CountedStep]]:
    if next(model.parameters(), None) is None:
        raise UnsupportedLayerError(f"{type(model).__name__} has no parameters, and so no gradient that could leak")
    traced = trace(model, image_shape)
    steps = counted_steps(traced)
    if not any(step.weights for step in steps):
        raise UnsupportedLayerError(f"{type(model).__name__} has no convolution and no linear layer to analyse")
    return traced, steps


def _frozen(model: nn.Module) -> set[int]:
    """Ids of the parameters that are not trained."""
    trained = set(trained_names(model))
    return {id(p) for name, p in model.named_parameters() if name not in trained}


def counting_index(unknowns: int, outputs: int, weights: int, virtual: int) -> tuple[int, int]:
    """RA_i = |x| − |W| − |z| − v_i, > 0 where equations are fewer than unknowns, and v_{i+1} of the next layer.

    This is the counting form of later implementations of the paper's index; the paper's text was not at hand. It
    counts equations, not ranks, and proves nothing in either direction: CNN6-d's second layer has more equations than
    unknowns, yet its rank falls 280 short. For linear layers only its sign has a meaning; for mini-batches it is no
    limit. |x| and |z| are counted over the batch, which shares one gradient (|W|); v_i is 0 for the first layer.
    """
    lacking = unknowns - weights - outputs
    return lacking - virtual, virtual + max(max(outputs - unknowns, 0) - max(lacking, 0), 0)


def copa_index(deficits: list[int | None]) -> int | None:
    """COPA's index of the convolutions, from the image on: Σ_i round(−deficit_i (L − i − 1) / (L − 1)), L − 1 of them.

    Deficits near the image weigh most. None where a deficit is unknown, 0 without convolutions.
    """
    if None in deficits:
        return None
    length = len(deficits) + 1
    return sum(round(-d * (length - i - 1) / (length - 1)) for i, d in enumerate(deficits))


def _with_index(layers: Iterable[LayerRank], counted: list[bool]) -> list[LayerRank]:
    """Adds the counting index, and the virtual constraints that each counted step gets from the one before."""
    virtual, supplied = 0, 0
    result = []
    for layer, counts in zip(layers, counted, strict=True):
        if counts:
            index, virtual = counting_index(layer.unknowns, layer.weight_rows, layer.gradient_rows, virtual)
            layer = replace(layer, ra_index=index, virtual_constraints=supplied)
            rank = layer.law_weights if layer.rank_weights is None else layer.rank_weights
            # |z| − rank W combinations of the step's outputs vanish for every input.
            supplied = None if rank is None else layer.weight_rows - rank
        result.append(layer)
    return result
