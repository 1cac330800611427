"""Notebook 10: random networks over every kind of layer and activation, attacked and judged by dense ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import LOSSES, client_gradients
from rgap.experiments.common import progress, seeded
from rgap.experiments.real_networks import RECOVERED_DB, missing_ranks
from rgap.metrics import psnr_db
from rgap.network.chain import prepare
from rgap.results import GradientMismatchError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "LeakyReLU": lambda: nn.LeakyReLU(0.2), "PReLU": nn.PReLU, "ELU": nn.ELU, "SELU": nn.SELU,
    "CELU": lambda: nn.CELU(0.5), "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid, "Softplus": lambda: nn.Softplus(2.0),
    "Softsign": nn.Softsign, "LogSigmoid": nn.LogSigmoid, "ReLU": nn.ReLU, "ReLU6": nn.ReLU6,
    "Hardtanh": nn.Hardtanh, "Identity": nn.Identity,
}  # fmt: skip
"""Name -> constructor of the activations that are drawn."""

MAX_UNKNOWNS = 1500  # largest number of unknowns of a layer: its dense matrices must be cheap


def sample_chains(count: int, seed: int = 0, max_unknowns: int = MAX_UNKNOWNS) -> pd.DataFrame:
    """Attacks random chains from float64 gradients and judges every verdict by dense ranks.

    A row is ok where the image is recovered at 60 dB or more (as one of the candidates, if these are ambiguous), or
    where the verdict is not "exact" and the dense [W; K] of a layer, at its true z and ∂ℓ/∂z, lacks rank. The first
    chain has the number `seed`, the next ones the next; `max_unknowns` bounds the entries of a layer's input or output.
    Columns: case, kinds, unknowns (of the largest layer), verdict, psnr_db, ok, why.
    """
    rows = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")  # of torch, about its own speed
        for number in progress(range(seed, seed + count), "chains"):
            rows.append(_attack_chain(number, max_unknowns))
    return pd.DataFrame(rows)


def kind_table(sample: pd.DataFrame) -> pd.DataFrame:
    """How many of `sample_chains` with each kind of layer or activation were recovered, or lacked rank.

    Columns: kind, chains, recovered, short_of_rank, wrong; sorted by name.
    """
    each = sample.assign(kind=sample["kinds"].str.split(", ")).explode("kind").drop_duplicates(["case", "kind"])
    each["recovered"] = each["psnr_db"] >= RECOVERED_DB
    each["short_of_rank"] = ~each["recovered"] & each["ok"]
    each["wrong"] = ~each["ok"]
    columns = ["recovered", "short_of_rank", "wrong"]
    table = each.groupby("kind")[columns].sum()
    table.insert(0, "chains", each.groupby("kind").size())
    return table.reset_index()


def _attack_chain(number: int, max_unknowns: int) -> dict:
    network, shape, loss, kinds = random_chain(number, max_unknowns)
    generator = torch.Generator().manual_seed(number)
    image = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    label = torch.randint(max(2, network[-1].out_features), (1,), generator=generator)
    chain = prepare(network, shape)
    row = {"case": f"chain {number}", "kinds": ", ".join(kinds), "unknowns": max(x.unknowns for x in chain.layers)}
    gradients = client_gradients(network, image, label, loss)
    try:
        result = reconstruct(chain, gradients, loss=loss, effort="full", gradient_scale=1.0)
    except GradientMismatchError as error:
        nothing = not gradients[-1].any() or not any(g.any() for g in gradients[-2:])
        return row | {"verdict": "no gradient", "psnr_db": float("nan"), "ok": nothing, "why": str(error)}
    found = result.candidates if result.verdict == "ambiguous" else result.candidates[:1]
    quality = max(psnr_db(c.images.reshape(1, 1, 1, -1), image.reshape(1, 1, 1, -1)).item() for c in found)
    ok, why = quality >= RECOVERED_DB, ""
    if not ok:
        short = missing_ranks(chain, image, label, loss)
        ok = result.verdict != "exact" and bool(short)
        why = ", ".join(f"{name} lacks {lack}" for name, lack in short.items()) or "every layer has full rank"
    return row | {"verdict": result.verdict, "psnr_db": quality, "ok": ok, "why": why}


@dataclass
class _Draft:
    """A chain under construction."""

    rng: np.random.Generator
    max_unknowns: int
    shape: tuple[int, ...]
    modules: list[nn.Module] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, module: nn.Module, kind: str) -> bool:
        """Adds a module, unless its output is empty or too large."""
        try:
            with torch.no_grad():
                shape = tuple(module.double().eval()(torch.zeros(1, *self.shape, dtype=torch.float64)).shape[1:])
        except RuntimeError:
            return False
        if min(shape) < 1 or np.prod(shape) > self.max_unknowns:
            return False
        self.shape = shape
        self.modules.append(module)
        self.kinds.append(kind)
        return True

    def pick(self, *values: Any) -> Any:
        """One of the values."""
        return values[int(self.rng.integers(len(values)))]

    def chance(self, share: float) -> bool:
        """True in that share of cases."""
        return bool(self.rng.random() < share)


def random_chain(seed: int, max_unknowns: int = MAX_UNKNOWNS) -> tuple[nn.Sequential, tuple[int, ...], str, list[str]]:
    """A random network in eval mode, float64, of 1 to 5 layers with weights, on an image of 8 to 24 pixels a side.

    The seed decides everything; `max_unknowns` bounds the entries of a layer's input or output. Returns the network,
    the image shape, the loss, and the kinds of its layers, options and activations.
    """
    rng = np.random.default_rng([seed, 7])
    axes = 1 if rng.random() < 0.2 else 2
    sides = rng.integers(8, min(24, int(max_unknowns ** (1 / axes))) + 1, axes).tolist()
    shape = (int(rng.choice([1, 3])) if np.prod(sides) <= max_unknowns // 3 else 1, *sides)
    with seeded(seed):
        draft = _Draft(rng, max_unknowns, shape)
        if draft.chance(0.15):
            draft.add(_batch_norm(draft), "normalisation")
        for _ in range(int(rng.integers(0, 4))):
            _add_convolution(draft, axes)
        draft.add(nn.Flatten(), "Flatten")
        for _ in range(int(rng.integers(0, 2))):
            draft.add(nn.Linear(draft.shape[0], int(rng.integers(4, 60)), draft.chance(0.5)), "Linear")
            _add_activation(draft)
        network, kinds = draft.modules, draft.kinds
        if draft.chance(0.3) and len(network) > 2:
            network, kinds = [nn.Sequential(*network[:2]), *network[2:]], [*kinds, "nested"]
        loss = draft.pick(*LOSSES)
        outputs = {"logistic": 1, "cross_entropy": int(rng.integers(2, 11)), "mse": int(rng.integers(1, 6))}[loss]
        head = nn.Linear(draft.shape[0], outputs, draft.chance(0.5))
        return nn.Sequential(*network, head).double().eval(), shape, loss, [*kinds, loss]


def _add_convolution(draft: _Draft, axes: int) -> None:
    rng, channels = draft.rng, draft.shape[0]
    groups = draft.pick(1, 1, 1, 1, channels, 2 if channels % 2 == 0 else 1)

    def several(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(low, high, axes))

    kernel, stride = several(2, 6), draft.pick((1,) * axes, (1,) * axes, (2,) * axes, several(1, 4))
    kernel = tuple(max(k, s) for k, s in zip(kernel, stride, strict=True)) if draft.chance(0.9) else several(1, 3)
    dilation = draft.pick((1,) * axes, (1,) * axes, (1,) * axes, several(1, 3))
    padding = draft.pick(several(0, 3), tuple(k // 2 for k in kernel), "same" if set(stride) == {1} else 0)
    mode = draft.pick("zeros", "zeros", "zeros", "reflect", "circular", "replicate") if padding != 0 else "zeros"
    sufficient = math.ceil(1.2 * channels / groups * np.prod(stride))  # more outputs than inputs
    filters = groups * (sufficient + int(rng.integers(0, 3)) if draft.chance(0.8) else int(rng.integers(1, 7)))
    if axes == 2 and draft.chance(0.1):
        ends = rng.integers(0, 3, 4).tolist()
        draft.add(draft.pick(nn.ZeroPad2d, nn.ReflectionPad2d)(ends), "padding layer")
    convolution = (nn.Conv1d if axes == 1 else nn.Conv2d)(
        channels, filters, kernel, stride, padding, dilation, groups, draft.chance(0.5), mode
    )
    kind = f"Conv{axes}d"
    if not draft.add(convolution, kind):
        return
    draft.kinds += [name for name, there in _traits(convolution).items() if there]
    if draft.chance(0.08):
        _add_pooling(draft, axes, "pooling of z")
    if draft.chance(0.2):
        draft.add(_batch_norm(draft), "BatchNorm")
    _add_activation(draft)
    if draft.chance(0.06):
        _add_pooling(draft, axes, "pooling of x")
    if draft.chance(0.1):
        draft.add(_batch_norm(draft), "BatchNorm behind σ")
    if draft.chance(0.1):
        draft.add(nn.Dropout(0.5), "Dropout")


def _traits(convolution: nn.Module) -> dict[str, bool]:
    return {
        "bias": convolution.bias is not None, "groups": convolution.groups > 1, "stride": max(convolution.stride) > 1,
        "dilation": max(convolution.dilation) > 1, "unequal-kernel": len(set(convolution.kernel_size)) > 1,
        "padding=same": convolution.padding == "same",
        f"padding_mode={convolution.padding_mode}": convolution.padding_mode != "zeros",
    }  # fmt: skip


def _add_activation(draft: _Draft) -> None:
    name = draft.pick(*ACTIVATIONS)
    draft.add(ACTIVATIONS[name](), name)


def _add_pooling(draft: _Draft, axes: int, kind: str) -> None:
    if draft.chance(0.5):
        draft.add((nn.AvgPool1d if axes == 1 else nn.AvgPool2d)(draft.pick(2, 3), draft.pick(1, 2)), kind)
    else:
        grid = [max(1, n // draft.pick(1, 2)) for n in draft.shape[1:]]
        draft.add((nn.AdaptiveAvgPool1d if axes == 1 else nn.AdaptiveAvgPool2d)(grid), kind)


def _batch_norm(draft: _Draft) -> nn.Module:
    norm = (nn.BatchNorm1d if len(draft.shape) < 3 else nn.BatchNorm2d)(draft.shape[0])
    for values, low, high in ((norm.running_mean, -0.5, 0.5), (norm.running_var, 0.5, 2)):
        nn.init.uniform_(values, low, high)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return norm
