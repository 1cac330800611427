"""Notebook 10: networks as users have them: which layers lack rank at the truth, how narrow a first layer may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from rgap.client import loss_value
from rgap.experiments.common import attack_each, progress
from rgap.network.chain import prepare
from rgap.network.layer import Chain, Layer

RECOVERED_DB = 60.0  # PSNR from which an image counts as recovered
RANK_RCOND = 1e-5  # singular values below this share of the largest count as zero, as for float64 gradients


def attacked_and_ranked(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int]
) -> pd.DataFrame:
    """Attacks on float64 gradients of the cross-entropy, without virtual constraints; the rank that failures lack.

    Returns the rows of `attack_each`, with missing: rank that the layers lack at the truth, 0 (not computed) where the
    attack certified its result.
    """
    runs, _ = attack_each(make_model, images, labels, seeds, ["float64"], "cross_entropy", virtual_constraints=False)
    missing = []
    for run in runs.itertuples():
        lack = {}
        if run.verdict != "exact":
            chain = prepare(make_model(run.seed).double(), tuple(images.shape[1:]))
            lack = missing_ranks(chain, images[[run.image]], labels[[run.image]], "cross_entropy")
        missing.append(sum(lack.values()))
    return runs.assign(missing=missing)


def missing_ranks(chain: Chain, image: Tensor, label: Tensor, loss: str = "logistic") -> dict[str, int]:
    """Rank that each layer's [W; K] lacks for one image, by dense linear algebra at the true z and ∂ℓ/∂z of autograd.

    Rows of W count where σ determines z. W and K are each scaled to norm 1; singular values below `RANK_RCOND` of the
    largest are zero. Returns layer name -> unknowns less rank, of the layers where that is not 0; the head is left out.
    """
    x, zs = image.to(torch.float64), []
    for layer in chain.layers:
        zs.append((layer.apply(x.reshape(1, *layer.input_shape)) + layer.pre_bias()).requires_grad_())
        x = layer.activation.forward(zs[-1])
    dzs = torch.autograd.grad(loss_value(loss, x.flatten(1), label), zs)
    every = list(zip(chain.layers, dzs, zs, strict=True))[:-1]
    missing = {layer.name: layer.unknowns - _dense_rank(layer, dz, z.detach()) for layer, dz, z in every}
    return {name: lack for name, lack in missing.items() if lack}


def _dense_rank(layer: Layer, dz: Tensor, z: Tensor) -> int:
    """Rank of [W; K], with the rows of W where σ determines z; W and K each scaled to norm 1."""
    units = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, *layer.input_shape)
    determined = (layer.activation.derivative(z) != 0).flatten()
    systems = [layer.apply(units).flatten(1).T[determined]]
    if not layer.is_fixed:

        def product(weight: Tensor, unit: Tensor) -> Tensor:
            return (replace(layer, weight=weight, cache={}).apply(unit[None]) * dz).sum()

        by_weight = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0), chunk_size=256)
        systems.append(by_weight(layer.weight, units).flatten(1).T)
    gram = 0.0
    for system in systems:  # most of their entries are zero
        A = sp.csr_array((system / system.norm().clamp(min=1e-300)).numpy())
        gram += (A.T @ A).toarray()
    S = torch.linalg.eigvalsh(torch.from_numpy(gram)).clamp(min=0).sqrt()
    return int((S > RANK_RCOND * S.max()).sum())


def least_width(
    make_model: Callable[[int], nn.Module], image: Tensor, label: Tensor, loss: str, dtype: str = "float64"
) -> dict:
    """The smallest width of a first layer with ReLU at which the image is recovered; `make_model` takes the width.

    The search starts where active units and the gradient's 74 equations a filter (75 weights, one of them redundant by
    the filter's identity ⟨G[o], W[o]⟩ = ⟨δz[o], z[o] − b[o]⟩) first outnumber the pixels. It goes down while the image
    is recovered, or up until it is. Returns bound (the start), width, active (units of the first layer there), psnr_db
    and verdict there, and below_db and below_verdict for one filter fewer.
    """

    def attack(width: int) -> dict:
        runs, _ = attack_each(lambda _: make_model(width), image, label, [0], [dtype], loss)
        return runs.iloc[0].to_dict()

    bound = 1
    while active_units(make_model(bound), image) + 74 * bound < image[0].numel():
        bound += 1
    runs, width = {bound: attack(bound)}, bound
    while runs[width]["psnr_db"] < RECOVERED_DB:
        width += 1
        runs[width] = attack(width)
    while width - 1 not in runs or runs[width - 1]["psnr_db"] >= RECOVERED_DB:
        runs.setdefault(width - 1, attack(width - 1))
        width -= int(runs[width - 1]["psnr_db"] >= RECOVERED_DB)
    best, below = runs[width], runs[width - 1]
    return {
        "bound": bound, "width": width, "active": active_units(make_model(width), image), "psnr_db": best["psnr_db"],
        "verdict": best["verdict"], "below_db": below["psnr_db"], "below_verdict": below["verdict"],
    }  # fmt: skip


def active_units(model: nn.Sequential, image: Tensor) -> int:
    """Outputs of a network's first two modules that are positive."""
    with torch.no_grad():
        return int((model[:2].double()(image.double()) > 0).sum())


def least_widths(
    make_model: Callable[[int, int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int], loss: str
) -> pd.DataFrame:
    """`least_width` for several seeds, each with the next of the images; `make_model` takes seed and width."""
    rows = []
    for number, seed in enumerate(progress(seeds, "widths")):
        i = number % len(images)
        found = least_width(lambda width, seed=seed: make_model(seed, width), images[[i]], labels[[i]], loss)
        rows.append({"seed": seed} | found)
    return pd.DataFrame(rows)


def recovered_or_short(runs: pd.DataFrame, limit_db: float) -> float:
    """Share of `attacked_and_ranked` that reached the limit, or ended as rank-deficient where rank is missing."""
    explained = (runs["verdict"] == "rank-deficient") & (runs["missing"] > 0)
    return (explained | (runs["psnr_db"] >= limit_db)).mean()
