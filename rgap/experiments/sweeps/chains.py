"""Random chains over every kind of layer and activation, attacked; the dense rank of each layer as the judge."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients, loss_value
from rgap.experiments.sweeps.random_chains import UNKNOWNS, random_chain
from rgap.metrics import psnr_db
from rgap.network.chain import Chain, Layer, prepare
from rgap.results import GradientMismatchError

RECOVERED_DB = 60.0
"""PSNR from which an image counts as recovered."""

RCOND = 1e-5
"""Singular values below this share of the largest count as zero, as the attack has it for float64 gradients."""


def sample_chains(count: int, seed: int = 0, unknowns: int = UNKNOWNS) -> pd.DataFrame:
    """Attacks random chains from float64 gradients and judges every verdict by dense ranks.

    A row is in order where the image came back at 60 dB or more (as one of the candidates, if these are ambiguous), or
    where the verdict is not "exact" and a layer's dense [W; K], at the true input and its true ∂ℓ/∂z, is short of full
    numerical rank.

    Args:
        count: Chains.
        seed: Of the first; the others follow.
        unknowns: Most entries of any layer's input or output.

    Returns:
        case, kinds, unknowns (most of a layer), verdict, psnr_db, ok, why.
    """
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")  # of torch, about its own speed
        for number in tqdm(range(seed, seed + count), desc="chains", disable=not sys.stderr.isatty()):
            rows.append(_attack(number, unknowns))
    return pd.DataFrame(rows)


def kind_table(sample: pd.DataFrame) -> pd.DataFrame:
    """How often each kind of layer and activation was drawn, recovered, and explained by rank.

    Args:
        sample: From `sample_chains`.

    Returns:
        kind, chains, recovered, short_of_rank, wrong; sorted by name.
    """
    each = sample.assign(kind=sample["kinds"].str.split(", ")).explode("kind").drop_duplicates(["case", "kind"])
    each["recovered"] = each["psnr_db"] >= RECOVERED_DB
    each["short_of_rank"] = ~each["recovered"] & each["ok"]
    each["wrong"] = ~each["ok"]
    columns = ["recovered", "short_of_rank", "wrong"]
    table = each.groupby("kind")[columns].sum()
    table.insert(0, "chains", each.groupby("kind").size())
    return table.reset_index()


def dense_ranks(chain: Chain, image: Tensor, label: Tensor, loss: str = "logistic") -> dict[str, tuple[int, int]]:
    """Rank of every layer's [W; K] at the truth, by dense linear algebra and autograd.

    Args:
        chain: The prepared network.
        image: (1, C, H, W).
        label: (1,).
        loss: Its name.

    Returns:
        Layer name -> (unknowns, numerical rank); the head is left out.
    """
    every = true_derivatives(chain, image, label, loss)
    return {layer.name: (layer.unknowns, _dense_rank(layer, dz, z)) for layer, dz, z in every}


def true_derivatives(
    chain: Chain, image: Tensor, label: Tensor, loss: str = "logistic"
) -> list[tuple[Layer, Tensor, Tensor]]:
    """What an attack has to find for every layer but the head, by autograd.

    Args:
        chain: The prepared network.
        image: (1, C, H, W).
        label: (1,).
        loss: Its name.

    Returns:
        Layer, ∂ℓ/∂z and z, both (1, O, H′, W′), float64.
    """
    x, zs = image.to(torch.float64), []
    for layer in chain.layers:
        zs.append((layer.apply(x.reshape(1, *layer.input_shape)) + layer.pre_bias()).requires_grad_())
        x = layer.activation.forward(zs[-1])
    dzs = torch.autograd.grad(loss_value(loss, x.flatten(1), label), zs)
    return [(layer, dz, z.detach()) for layer, dz, z in zip(chain.layers, dzs, zs, strict=True)][:-1]


def _dense_rank(layer: Layer, dz: Tensor, z: Tensor) -> int:
    """Rank of [W; K], where σ tells z; W and K each scaled to size 1."""
    units = torch.eye(layer.unknowns, dtype=torch.float64).reshape(-1, *layer.input_shape)
    told = (layer.activation.derivative(z) != 0).flatten()
    systems = [layer.apply(units).flatten(1).T[told]]
    if not layer.is_fixed:

        def product(weight: Tensor, unit: Tensor) -> Tensor:
            return (replace(layer, weight=weight, cache={}).apply(unit[None]) * dz).sum()

        by_weight = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0), chunk_size=256)
        systems.append(by_weight(layer.weight, units).flatten(1).T)
    A = torch.cat([S / S.norm().clamp(min=1e-300) for S in systems])
    S = torch.linalg.eigvalsh(A.T @ A).clamp(min=0).sqrt()
    return int((S > RCOND * S.max()).sum())


def _attack(number: int, unknowns: int) -> dict:
    network, shape, loss, kinds = random_chain(number, unknowns)
    generator = torch.Generator().manual_seed(number)
    image = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    label = torch.randint(max(2, network[-1].out_features), (1,), generator=generator)
    chain = prepare(network, shape)
    row = {"case": f"chain {number}", "kinds": ", ".join(kinds), "unknowns": max(x.unknowns for x in chain.layers)}
    gradients = client_gradients(network, image, label, loss)
    try:
        result = reconstruct(chain, gradients, loss=loss)
    except GradientMismatchError as error:
        nothing = not gradients[-1].any() or not any(g.any() for g in gradients[-2:])
        return row | {"verdict": "no gradient", "psnr_db": float("nan"), "ok": nothing, "why": str(error)}
    found = result.candidates if result.verdict == "ambiguous" else result.candidates[:1]
    quality = max(psnr_db(c.images.reshape(1, 1, 1, -1), image.reshape(1, 1, 1, -1)).item() for c in found)
    ok, why = quality >= RECOVERED_DB, ""
    if not ok:
        short = {name: n - rank for name, (n, rank) in dense_ranks(chain, image, label, loss).items() if rank < n}
        ok = result.verdict != "exact" and bool(short)
        why = ", ".join(f"{name} lacks {lack}" for name, lack in short.items()) or "every layer has full rank"
    return row | {"verdict": result.verdict, "psnr_db": quality, "ok": ok, "why": why}
