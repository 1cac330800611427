"""Networks as users have them: ranks at the truth, and how narrow a first layer with ReLU may be."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap.equations.blocks import blocks, gradient_matrix, split_groups, weight_matrix
from rgap.experiments.sweeps.attacks import attack_each
from rgap.experiments.sweeps.chains import RCOND, RECOVERED_DB, true_derivatives
from rgap.network.chain import Layer, prepare


def attacked_and_ranked(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int]
) -> pd.DataFrame:
    """Attacks on float64 gradients of the cross-entropy, without virtual constraints, and why those fail that do.

    Args:
        make_model: Seed -> network.
        images: (N, C, H, W).
        labels: (N,).
        seeds: Of the weights.

    Returns:
        The rows of `attack_each`, with missing: rank that the layers lack at the truth, 0 without looking where the
        attack certified its result.
    """
    runs, _ = attack_each(make_model, images, labels, seeds, ["float64"], "cross_entropy", virtual_constraints=False)
    missing = []
    for run in runs.itertuples():
        i, lack = run.image, {}
        if run.verdict != "exact":
            lack = missing_ranks(make_model(run.seed).double(), images[[i]], labels[[i]], "cross_entropy")
        missing.append(sum(lack.values()))
    return runs.assign(missing=missing)


def missing_ranks(model: nn.Module, image: Tensor, label: Tensor, loss: str) -> dict[str, int]:
    """Rank that each layer's [W; K] lacks for one image, by dense linear algebra at the true z and ∂ℓ/∂z.

    Rows of W count where σ tells z. W and K are each scaled to size 1; singular values below `RCOND` of the largest are
    zero.

    Args:
        model: The network.
        image: (1, C, H, W).
        label: (1,).
        loss: Its name.

    Returns:
        Layer name -> unknowns less rank, of the layers where that is not 0; the head is left out.
    """
    every = true_derivatives(prepare(model, tuple(image.shape[1:])), image, label, loss)
    missing = {}
    for layer, dz, z in every:
        told = layer.activation.derivative(z) != 0
        parts = zip(split_groups(layer), dz[0].chunk(layer.groups), told[0].chunk(layer.groups), strict=True)
        missing[layer.name] = sum(layer_part.unknowns - _rank(layer_part, *rest) for layer_part, *rest in parts)
    return {name: lack for name, lack in missing.items() if lack}


def _rank(layer: Layer, dz: Tensor, told: Tensor) -> int:
    """Numerical rank of one group's [W; K] by the eigenvalues of WᵀW + KᵀK."""
    channels, pixels = layer.input_shape[0], math.prod(layer.input_shape[1:])
    W = weight_matrix(layer)[told.flatten().numpy()]
    grams = [torch.from_numpy((W.T @ W).toarray()), torch.zeros(layer.unknowns, layer.unknowns, dtype=dz.dtype)]
    if not layer.is_fixed:
        MTM = dz.new_zeros(pixels, pixels)
        for block in blocks(layer):
            M = gradient_matrix(layer, block, dz / dz.norm().clamp(min=1e-300))
            MTM[block.pixels[:, None], block.pixels] += M.T @ M
        grams[1] = torch.from_numpy(sp.kron(sp.eye_array(channels), sp.csr_array(MTM.numpy())).toarray())
    values = torch.linalg.eigvalsh(sum(gram / gram.trace().clamp(min=1e-300) for gram in grams)).clamp(min=0)
    return int((values > RCOND**2 * values.max()).sum())


def least_width(
    make_model: Callable[[int], nn.Module], image: Tensor, label: Tensor, loss: str, dtype: str = "float64"
) -> dict:
    """The smallest width of a first layer with ReLU at which the image comes back at `RECOVERED_DB` or more.

    The search starts where units that are active, and 74 equations of the gradient a filter (75 weights, one of which
    the filter's own identity ⟨G[o], W[o]⟩ = ⟨δz[o], z[o] − b[o]⟩ makes redundant), first outnumber the pixels; it goes
    down while the image is recovered, or up until it is.

    Args:
        make_model: Width -> network.
        image: (1, C, H, W).
        label: (1,).
        loss: Its name.
        dtype: Of the gradients.

    Returns:
        bound (the start), width, active (units of the first layer there), psnr_db and verdict there, and below_db and
        below_verdict for a filter less.
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
        "bound": bound,
        "width": width,
        "active": active_units(make_model(width), image),
        "psnr_db": best["psnr_db"],
        "verdict": best["verdict"],
        "below_db": below["psnr_db"],
        "below_verdict": below["verdict"],
    }


def active_units(model: nn.Sequential, image: Tensor) -> int:
    """Outputs of a network's first two modules that are positive."""
    with torch.no_grad():
        return int((model[:2].double()(image.double()) > 0).sum())


def least_widths(
    make_model: Callable[[int, int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int], loss: str
) -> pd.DataFrame:
    """`least_width` for several seeds, each with the next of the images.

    Args:
        make_model: Seed and width -> network.
        images: (N, C, H, W).
        labels: (N,).
        seeds: Of the weights.
        loss: Its name.

    Returns:
        seed and the columns of `least_width`.
    """
    rows = []
    for number, seed in enumerate(tqdm(seeds, desc="widths", disable=not sys.stderr.isatty())):
        i = number % len(images)
        found = least_width(lambda width, seed=seed: make_model(seed, width), images[[i]], labels[[i]], loss)
        rows.append({"seed": seed} | found)
    return pd.DataFrame(rows)


def recovered_or_short(runs: pd.DataFrame, limit_db: float) -> float:
    """Share of attacks that reached the limit, or ended as rank-deficient on an image for which rank is missing.

    Args:
        runs: Columns psnr_db, verdict and missing, the rank that is missing at the truth.
        limit_db: PSNR to reach, dB.
    """
    explained = (runs["verdict"] == "rank-deficient") & (runs["missing"] > 0)
    return (explained | (runs["psnr_db"] >= limit_db)).mean()
