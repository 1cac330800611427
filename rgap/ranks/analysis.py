"""Rank analysis: which layers of a network determine their input, predicted before any attack.

Each layer gets the counting index, exact ranks by law (`rgap.equations.rank_laws`) and, where it is small enough,
numerical ranks (`rgap.ranks.numbers`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from rgap.arguments import VALUE_FORMATS, check_count, check_dtype, check_image_shape, check_model, check_seed
from rgap.equations.rank_laws import RankLaws, rank_laws
from rgap.isolation import isolated
from rgap.network.folding import linear_layer
from rgap.network.layer import Chain
from rgap.network.tracing import Step, trace
from rgap.ranks.exposure import verdict
from rgap.ranks.numbers import MAX_UNKNOWNS, numerical_ranks, pooling_rank, too_large
from rgap.ranks.patches import BYPASSED, patch_ranks
from rgap.ranks.steps import SHARED, CountedStep, counted_steps, is_layer, kind_of, pooling_of
from rgap.results import LayerRank, RankAnalysis, UnsupportedLayerError

KNOWN_BELOW = {"convolution", "linear", "activation", "batch norm", "reshape"}
"""Kinds of steps through which ∂ℓ/∂z is known as soon as their output and its gradient are."""


@isolated()
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

    The network is analysed in eval mode. Ranks assume that z and ∂ℓ/∂z are known at the layer's output; those by law
    also assume generic weights. Under activations that are not invertible they are upper bounds. Of a transformer with
    learned position embeddings the patches are analysed (`rgap.ranks.patches`); what follows them is only listed.

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
    """
    model = check_model(model.model if isinstance(model, Chain) else model, TypeError)
    image_shape = check_image_shape(image_shape)
    batch_size, limit, seed = check_count("batch_size", batch_size), check_count("limit", limit, 0), check_seed(seed)
    check_dtype(dtype, VALUE_FORMATS)
    patches = patch_ranks(model, image_shape, batch_size)
    try:
        steps = _checked_steps(model, image_shape)
    except UnsupportedLayerError:
        if not patches:
            raise
        steps = []
    ranks: dict[str, LayerRank] = {}
    for step in steps:
        ranks[step.step.name] = _layer_rank(step, batch_size, dtype, 0 if patches else limit, seed, ranks)
    layers = _with_index(ranks.values(), [step.counted for step in steps])
    if patches:
        layers = [*patches, *(replace(layer, ra_index=None, note=BYPASSED) for layer in layers)]
    counted = [layer for layer in layers if layer.ra_index is not None]
    return RankAnalysis(
        layers=tuple(layers),
        batch_size=batch_size,
        max_ra_index=max((layer.ra_index for layer in counted), default=None),
        copa_index=copa_index([layer.deficit for layer in layers if layer.kind == "convolution"]),
        leaking=tuple(layer.name for layer in counted if layer.deficit == 0),
        verdict=verdict(layers),
    )


def _checked_steps(model: nn.Module, image_shape: tuple[int, ...]) -> list[CountedStep]:
    if next(model.parameters(), None) is None:
        raise UnsupportedLayerError(f"{type(model).__name__} has no parameters, and so no gradient that could leak")
    steps = counted_steps(trace(model, image_shape))
    if not any(step.weights for step in steps):
        raise UnsupportedLayerError(f"{type(model).__name__} has no convolution and no linear layer to analyse")
    return steps


def counting_index(unknowns: int, outputs: int, weights: int, virtual: int) -> tuple[int, int]:
    """RA_i = |x| − |W| − |z| − v_i, > 0 where equations are fewer than unknowns, and v_{i+1} of the next layer.

    This is the counting form of later implementations of the paper's index; the paper's own text was not consulted. It
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


def _layer_rank(
    step: CountedStep, batch: int, dtype: torch.dtype, limit: int, seed: int, ranks: dict[str, LayerRank]
) -> LayerRank:
    unknowns, outputs = batch * math.prod(step.input_shape), batch * math.prod(step.step.output_shape)
    weights = sum(module.weight.numel() for module in step.weights)
    rank = LayerRank(step.name, step.kind, unknowns, outputs, weights, note=step.note)
    if step.kind in {"convolution", "linear"}:
        return _with_ranks(rank, step, batch, dtype, limit, seed)
    if step.kind == "pooling":
        return _pooling(rank, step.step, batch)
    if step.kind == "residual block":
        return _residual(rank, step, ranks)
    return rank


def _with_ranks(rank: LayerRank, step: CountedStep, batch: int, dtype: torch.dtype, limit: int, seed: int) -> LayerRank:
    """The rank of a convolution or a linear layer by law and, where it is small enough, by number."""
    if SHARED in step.note:
        return rank
    (module,) = step.weights
    laws, why_no_law = _laws(module, step.input_shape, batch)
    rank = replace(rank, law_weights=laws.weights, law_gradients=laws.gradients, law_rank=laws.both)
    if isinstance(module, nn.Conv3d) or getattr(module, "padding_mode", "zeros") != "zeros":
        why_no_number = f"no numbers: {type(module).__name__} has no constraint matrices here"
    else:
        layer = linear_layer(module, step.input_shape, step.step.output_shape)
        why_no_number = too_large(layer, batch, limit)
    if not why_no_number:
        layer = replace(layer, weight=layer.weight.to("cpu", torch.float64))
        weights, gradients, both, condition = numerical_ranks(layer, batch, dtype, seed)
        rank = replace(rank, rank_weights=weights, rank_gradients=gradients, rank=both, condition=condition)
    best = rank.law_rank if rank.rank is None else rank.rank
    note = "; ".join(text for text in (rank.note, why_no_law, why_no_number) if text)
    return replace(rank, deficit=None if best is None else rank.unknowns - best, note=note)


def _laws(module: nn.Module, input_shape: tuple[int, ...], batch: int) -> tuple[RankLaws, str]:
    """The rank laws of a module, and why there are none."""
    if isinstance(module, nn.Linear):
        laws = rank_laws(*reversed(module.weight.shape), (1,), image=(math.prod(input_shape[:-1]),), batch=batch)
    elif module.padding_mode != "zeros":
        return RankLaws(None, None, None), f"padding mode {module.padding_mode!r}, for which there is no law"
    else:
        flat = module._reversed_padding_repeated_twice
        laws = rank_laws(
            *(module.in_channels, module.out_channels, module.kernel_size, module.stride),
            tuple(zip(flat[-2::-2], flat[-1::-2], strict=True)),
            *(module.dilation, module.groups, input_shape[1:], batch),
        )
    names = [what for what, law in zip(("W", "K", "[W; K]"), laws, strict=True) if law is None]
    return laws, f"no law for {' and '.join(names)}" if names else ""


def _pooling(rank: LayerRank, step: Step, batch: int) -> LayerRank:
    """A layer without weights: average pooling is a known matrix, for max pooling there is a bound."""
    if pooling_of(step) == "max":
        lacking = rank.unknowns - rank.weight_rows
        note = "at most one equation an output, for positions that are known; the deficit is a lower bound"
        return replace(rank, deficit=lacking if lacking > 0 else None, note="; ".join(filter(None, (rank.note, note))))
    found = batch * pooling_rank(step.module or step.call, step.input_shape)
    laws = {"law_weights": found, "law_gradients": 0, "law_rank": found}
    numbers = {"rank_weights": found, "rank_gradients": 0, "rank": found}
    return replace(rank, **laws, **numbers, deficit=rank.unknowns - found)


def _residual(rank: LayerRank, step: CountedStep, ranks: dict[str, LayerRank]) -> LayerRank:
    """Only the sum of both paths' z is known, so that gradients alone must determine the main path."""
    layers = [ranks[s.name] for s in step.path if is_layer(s)]
    clear = all(len(s.sources) == 1 and kind_of(s)[0] in KNOWN_BELOW for s in step.path)
    if clear and all(layer.unknowns in (layer.rank_gradients, layer.law_gradients) for layer in layers):
        note = f"{rank.note}; every convolution of the main path is determined by its gradient alone"
        return replace(rank, law_gradients=rank.unknowns, law_rank=rank.unknowns, deficit=0, note=note)
    note = "the sum hides each path's z, and gradients alone do not determine the main path: no rank is given"
    return replace(rank, note=f"{rank.note}; {note}")


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
