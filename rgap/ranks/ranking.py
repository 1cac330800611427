"""The rank of every step of a network, one after the other: by law, and by number within a budget of dense work."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from rgap.equations.proofs import LayerShape, is_proved
from rgap.equations.rank_laws import RankLaws
from rgap.network.folding import linear_layer
from rgap.network.operations import MEANS
from rgap.network.steps import Step
from rgap.ranks.exposure import FROZEN, UNREAD
from rgap.ranks.numbers import dense_work, numerical_ranks, pooling_rank, too_large
from rgap.ranks.steps import SHARED, CountedStep, is_layer, kind_of, pooling_of
from rgap.results import LayerRank

KNOWN_BELOW = {"convolution", "linear", "activation", "batch norm", "reshape"}
"""Kinds of steps through which ∂ℓ/∂z is known as soon as their output and its gradient are."""


MAX_NETWORK_WORK = 2.5e11  # cubed unknowns of all layers up to which ranks are computed, from the image on


@dataclass
class Ranking:
    """The ranks of steps in the order of execution."""

    frozen: frozenset[int]  # ids of the parameters that share no gradient
    batch: int  # images behind one gradient
    dtype: torch.dtype  # as in `rank_analysis`
    limit: int
    seed: int
    ranks: dict[str, LayerRank] = field(default_factory=dict)  # name of a step in the graph -> its rank
    work: float = 0.0  # dense work done so far, in cubed unknowns

    def add(self, step: CountedStep) -> None:
        """Ranks one more step."""
        unknowns, outputs = self.batch * math.prod(step.input_shape), self.batch * math.prod(step.step.output_shape)
        weights = sum(module.weight.numel() for module in step.weights if id(module.weight) not in self.frozen)
        rank = LayerRank(step.name, step.kind, unknowns, outputs, weights, note=step.note)
        if step.kind in {"convolution", "linear"}:
            rank = self._layer(rank, step)
            rank = rank if weights else _without_gradient(rank)
        elif step.kind == "pooling":
            rank = _pooling(rank, step.step, self.batch)
        elif step.kind == "residual block":
            rank = self._residual(rank, step)
        self.ranks[step.step.name] = rank

    def _layer(self, rank: LayerRank, step: CountedStep) -> LayerRank:
        """The rank of a convolution or a linear layer by law and, where it is small enough, by number."""
        if SHARED in step.note:
            return rank
        (module,) = step.weights
        shape, why_no_law = layer_shape(module, step.input_shape, self.batch)
        laws = RankLaws(None, None, None)
        if shape:
            groups = getattr(module, "groups", 1)
            laws = RankLaws(*(None if law is None else groups * law for law in shape.laws()))
            names = [what for what, law in zip(("W", "K", "[W; K]"), laws, strict=True) if law is None]
            why_no_law = f"no law for {' and '.join(names)}" if names else ""
            rank = replace(rank, law_proved=is_proved(shape))
        rank = replace(rank, law_weights=laws.weights, law_gradients=laws.gradients, law_rank=laws.both)
        if isinstance(module, nn.Conv3d) or getattr(module, "padding_mode", "zeros") != "zeros":
            about_number = f"no numbers: {type(module).__name__} has no constraint matrices here"
        else:
            layer = linear_layer(module, step.input_shape, step.step.output_shape)
            about_number = too_large(layer, self.batch, self.limit)
            groups, work = dense_work(layer, self.batch)
            if not about_number and laws.both is not None and (not groups or self.work + work > MAX_NETWORK_WORK):
                about_number = "law only: numbers would take too much work"
            elif not about_number:
                groups = groups or 1
                self.work += work
                layer = replace(layer, weight=layer.weight.to("cpu", torch.float64))
                numbers = numerical_ranks(layer, self.batch, self.dtype, self.seed, laws, groups)
                weights, gradients, both, condition = numbers
                rank = replace(rank, rank_weights=weights, rank_gradients=gradients, rank=both, condition=condition)
                if groups < layer.groups:
                    about_number = f"numbers: {groups} of {layer.groups} groups, which stand for all"
        best = rank.law_rank if rank.rank is None else rank.rank
        note = "; ".join(text for text in (rank.note, _unread(module, step), why_no_law, about_number) if text)
        return replace(rank, deficit=None if best is None else rank.unknowns - best, note=note)

    def _residual(self, rank: LayerRank, step: CountedStep) -> LayerRank:
        """Only the sum of both paths' z is known, so that gradients alone must determine the main path."""
        layers = [self.ranks[s.name] for s in step.path if is_layer(s)]
        clear = all(len(s.sources) == 1 and kind_of(s)[0] in KNOWN_BELOW for s in step.path)
        if clear and all(layer.unknowns in (layer.rank_gradients, layer.law_gradients) for layer in layers):
            note = f"{rank.note}; every convolution of the main path is determined by its gradient alone"
            laws = {"law_gradients": rank.unknowns, "law_rank": rank.unknowns, "deficit": 0}
            return replace(rank, **laws, law_proved=all(layer.law_proved for layer in layers), note=note)
        note = "the sum hides each path's z, and gradients alone do not determine the main path: no rank is given"
        return replace(rank, note=f"{rank.note}; {note}")


def _unread(module: nn.Module, step: CountedStep) -> str:
    """A note on the pixels that no output reads, as where a stride exceeds the kernel; empty where all are read."""
    if isinstance(module, nn.Linear):
        return ""
    flat, share = module._reversed_padding_repeated_twice, 1.0
    axes = zip(module.kernel_size, module.stride, module.dilation, flat[-2::-2], strict=True)
    for size, outputs, (taps, stride, dilation, pad) in zip(
        step.input_shape[1:], step.step.output_shape[1:], axes, strict=True
    ):
        read = np.add.outer(dilation * np.arange(taps), stride * np.arange(outputs)) - pad
        share *= len(np.unique(read[(read >= 0) & (read < size)])) / size
    return f"{1 - share:.0%} of its pixels {UNREAD}" if share < 1 else ""


def _without_gradient(rank: LayerRank) -> LayerRank:
    """The rank of a layer that is not trained: that of W alone."""
    weights = rank.law_weights if rank.rank_weights is None else rank.rank_weights
    note = "; ".join(filter(None, (f"{FROZEN}, so that no gradient of it is shared", rank.note)))
    return replace(
        rank, law_gradients=0, law_rank=rank.law_weights, rank_gradients=None if rank.rank_weights is None else 0,
        rank=rank.rank_weights, condition=None, deficit=None if weights is None else rank.unknowns - weights, note=note,
    )  # fmt: skip


def layer_shape(module: nn.Module, input_shape: tuple[int, ...], batch: int) -> tuple[LayerShape | None, str]:
    """The shape of one of a layer's groups, for the rank laws, and why there is none."""
    if isinstance(module, nn.Linear):
        features = math.prod(input_shape[:-1])
        return LayerShape(*reversed(module.weight.shape), (1,), (1,), ((0, 0),), (1,), (features,), batch), ""
    if module.padding_mode != "zeros":
        return None, f"padding mode {module.padding_mode!r}, for which there is no law"
    flat = module._reversed_padding_repeated_twice
    pads = tuple(zip(flat[-2::-2], flat[-1::-2], strict=True))
    sizes = (module.in_channels // module.groups, module.out_channels // module.groups)
    geometry = (module.kernel_size, module.stride, pads, module.dilation, tuple(input_shape[1:]))
    return LayerShape(*sizes, *geometry, batch), ""


def _pooling(rank: LayerRank, step: Step, batch: int) -> LayerRank:
    """A layer without weights: average pooling is a known matrix, for max pooling there is a bound."""
    if pooling_of(step) == "max":
        lacking = rank.unknowns - rank.weight_rows
        note = "at most one equation an output, for positions that are known; the deficit is a lower bound"
        return replace(rank, deficit=lacking if lacking > 0 else None, note="; ".join(filter(None, (rank.note, note))))
    if step.operation in MEANS:  # every mean is one of numbers of its own, whatever the axes
        found = rank.weight_rows
    else:
        found = batch * pooling_rank(step.module or step.call, step.input_shape)
    laws = {"law_weights": found, "law_gradients": 0, "law_rank": found, "law_proved": True}
    numbers = {"rank_weights": found, "rank_gradients": 0, "rank": found}
    return replace(rank, **laws, **numbers, deficit=rank.unknowns - found)
