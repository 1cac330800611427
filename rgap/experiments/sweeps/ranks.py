"""Rank analysis over many networks, and against measured ranks and attacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from rgap.experiments.sweeps.attacks import attack_each
from rgap.ranks.analysis import rank_analysis


def rank_table(
    networks: Mapping[str, tuple[nn.Module, tuple[int, ...]]], batch_sizes: Sequence[int]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rank analysis of several networks, from shapes alone.

    Args:
        networks: Name -> the network and the image shape that it takes.
        batch_sizes: Images behind one gradient.

    Returns:
        A row for each network and batch size: counted steps, max_ra_index, by_count (steps with RA > 0), by_rank (steps
        that lack rank), unknown (steps without a known rank), deficit (the sum over the steps), copa_index. And the
        counted steps themselves, columns as in `LayerRank`, with network, batch and step (0 at the image).
    """
    rows, steps = [], []
    for (name, (model, shape)), batch in product(networks.items(), batch_sizes):
        analysis = rank_analysis(model, shape, batch, limit=0)
        counted = analysis.to_frame(counted=True)
        steps.append(counted.assign(network=name, batch=batch, step=range(len(counted))))
        rows.append({"network": name, "batch": batch, "steps": len(counted), "max_ra_index": analysis.max_ra_index})
        rows[-1] |= {"by_count": (counted["ra_index"] > 0).sum(), "by_rank": (counted["deficit"] > 0).sum()}
        rows[-1] |= {"unknown": counted["deficit"].isna().sum(), "deficit": counted["deficit"].sum()}
        rows[-1] |= {"copa_index": analysis.copa_index}
    return pd.DataFrame(rows).astype({"copa_index": "Int64"}), pd.concat(steps, ignore_index=True)


def predicted_and_measured(
    family: Mapping[int, Callable[[int], nn.Module]],
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    **options,
) -> pd.DataFrame:
    """Attacks a family of networks, with what the rank analysis predicts for each beside it.

    Args:
        family: Width, or another number that tells the networks apart -> seed of the weights -> network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        seeds: Seeds of the weights.
        **options: For `rgap.reconstruct`.

    Returns:
        The rows of `attack_each`, with width, deficit (by law, the sum over the steps) and ra_index (the network's).
    """
    tables = []
    for width, make_model in family.items():
        analysis = rank_analysis(make_model(seeds[0]), tuple(images.shape[1:]), limit=0)
        deficit = analysis.to_frame(counted=True)["deficit"].sum(skipna=False)
        runs, _ = attack_each(make_model, images, labels, seeds, **options)
        tables.append(runs.assign(width=width, deficit=deficit, ra_index=analysis.max_ra_index))
    return pd.concat(tables, ignore_index=True)


def rank_law_sample(count: int, seed: int = 0, unknowns: int = 600) -> pd.DataFrame:
    """The rank laws beside measured ranks, on random convolutions in one and two dimensions.

    Args:
        count: Layers.
        seed: Of their shapes and weights.
        unknowns: Most unknowns of a layer.

    Returns:
        Three rows a layer, for W, K and [W; K]: layer, system, law (missing where there is none), counted (smaller of
        equations and unknowns), measured.
    """
    rng, rows = np.random.default_rng(seed), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(count):
            module, shape = _random_convolution(rng, unknowns)
            rank = rank_analysis(module, shape, dtype=torch.float64, seed=number).layers[0]
            laws = {"W": rank.law_weights, "K": rank.law_gradients, "[W; K]": rank.law_rank}
            numbers = {"W": rank.rank_weights, "K": rank.rank_gradients, "[W; K]": rank.rank}
            equations = {"W": rank.weight_rows, "K": rank.gradient_rows}
            counted = {s: min(n, rank.unknowns) for s, n in (equations | {"[W; K]": sum(equations.values())}).items()}
            columns = {"law": laws, "counted": counted, "measured": numbers}
            rows += [{"layer": number, "system": s} | {name: c[s] for name, c in columns.items()} for s in laws]
    return pd.DataFrame(rows).astype({"law": "Int64"})


def _random_convolution(rng: np.random.Generator, unknowns: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution with random strides, paddings, dilations and groups, and the shape of its input."""
    while True:
        axes, groups = int(rng.choice([1, 2, 2])), int(rng.choice([1, 1, 1, 2, 3]))
        kernel, stride, dilation = (rng.integers(1, top, axes).tolist() for top in (6, 4, 3))
        padding = [int(rng.integers(0, k * d // 2 + 1)) for k, d in zip(kernel, dilation, strict=True)]
        image = rng.integers(4, 16, axes).tolist()
        channels, filters = groups * int(rng.integers(1, 9)), groups * int(rng.integers(1, 25))
        fits = all(n + 2 * p > d * (k - 1) for n, p, d, k in zip(image, padding, dilation, kernel, strict=True))
        if fits and channels * np.prod(image) <= unknowns:
            kind = nn.Conv1d if axes == 1 else nn.Conv2d
            module = kind(channels, filters, kernel, stride, padding, dilation, groups, bias=False)
            return module.double(), (channels, *image)
