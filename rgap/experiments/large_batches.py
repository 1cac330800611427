"""Notebook 11: batches far beyond the classes through ordinary ReLU networks, image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise, product

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.experiments.common import MIN_CERTIFIED_PSNR_DB, certified, choice, progress, seeded, timed
from rgap.experiments.drawing import against_diagonal, finish, gallery, lines, name_lines
from rgap.metrics import psnr_db
from rgap.network.chain import prepare
from rgap.ranks.peeled import active_shares, predicted_share
from rgap.results import Reconstruction

CLASS_COUNT = 10

MAX_CHECKED_PSNR_DB = 240.0  # accuracy from which on rounding decides how good an image is
MAX_OPTIMISM_DB = 20.0  # accuracy by which an image may fall short of its certificate, an order of magnitude

INITIALISATIONS = ("N(0, 0.5²)", "torch's default", "Kaiming")
"""Of the weights: as the published attack has them (the second layer Xavier, biases zero), and the two usual ones."""

PUBLISHED_SHARES = pd.DataFrame({
    "images": ["CIFAR-10"] * 3 + ["MNIST"] * 3, "batch": [64, 128, 256] * 2,
    "share": [0.994, 0.666, 0.215, 0.484, 0.017, 0.002],
})  # fmt: skip
"""Shares recovered that a published passive attack of 2026 reports at 1,000 hidden units, first layer N(0, 0.5²)."""


def relu_network(
    inputs: int, widths: Sequence[int], seed: int = 0, initialisation: str = INITIALISATIONS[0], slope: float = 0.0
) -> nn.Module:
    """A fully connected network for ten classes with biases, float64; LeakyReLU of that slope, ReLU for 0."""
    activation = partial(nn.LeakyReLU, slope) if slope else nn.ReLU
    with seeded(seed):
        linear = [nn.Linear(before, after).double() for before, after in pairwise((inputs, *widths, CLASS_COUNT))]
        if initialisation != INITIALISATIONS[1]:
            for layer in linear:
                draw = nn.init.kaiming_normal_ if initialisation == INITIALISATIONS[2] else nn.init.xavier_normal_
                draw(layer.weight)
                nn.init.zeros_(layer.bias)
        if initialisation == INITIALISATIONS[0]:
            nn.init.normal_(linear[0].weight, 0, 0.5)
    modules = [module for layer in linear for module in (layer, activation())]
    return nn.Sequential(nn.Flatten(), *modules[:-1])


def attack_batch(model: nn.Module, images: Tensor, labels: Tensor, **options) -> tuple[dict, Reconstruction]:
    """One batch attacked: found, share (of the batch, at 50 dB or better), certified, false, psnr_db, verdict, seconds.

    `false` counts the certified images that are not in the batch at 50 dB; options are `reconstruct`'s.
    """
    dtype = next(model.parameters()).dtype
    gradients = client_gradients(model, images.to(dtype), labels, loss="cross_entropy")
    options = {"batch_size": len(images), "gradient_scale": 1.0, **options}
    result, seconds = timed(reconstruct, model, gradients, tuple(images.shape[1:]), "cross_entropy", **options)
    quality, nearest = _nearest(result.images, images)
    good, exact = quality >= MIN_CERTIFIED_PSNR_DB, certified(result)
    row = {
        "found": len(nearest),
        "share": len(set(nearest[good].tolist())) / len(images),
        "certified": int(exact.sum()),
    }
    row |= {"false": int((exact & ~good).sum()), "psnr_db": min(quality.tolist(), default=float("nan"))}
    return row | {"verdict": result.verdict, "seconds": seconds}, result


def _nearest(found: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR of each image found to the nearest true one, and that one's place."""
    if not len(found):
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    rows = [psnr_db(one.expand(len(images), *one.shape), images.double()) for one in found]
    best = torch.stack(rows).max(1)
    return best.values, best.indices


def share_table(
    sources: Mapping[str, tuple[Tensor, Tensor]], widths: Sequence[int], batches: Sequence[int],
    initialisations: Sequence[str] = INITIALISATIONS[:1], seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """How much of a batch comes back from networks with one hidden layer.

    Sources are name -> images (N, C, H, W) and labels (N,), at least as many as the largest batch; the seed is that of
    weights and draws. Columns: images, width, initialisation, batch, predicted (`predicted_share`), and those of
    `attack_batch`.
    """
    rows, cases = [], list(product(sources, initialisations, widths, batches))
    for name, initialisation, width, batch in progress(cases, "batches"):
        images, labels = sources[name]
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:batch]
        model = relu_network(images[0].numel(), (width,), seed, initialisation)
        row = {"images": name, "width": width, "initialisation": initialisation, "batch": batch}
        chain = prepare(model, tuple(images.shape[1:]))
        row["predicted"] = predicted_share(active_shares(chain, chain.layers[0], images), batch, seed)
        rows.append(row | attack_batch(model, images[drawn], labels[drawn])[0])
    return pd.DataFrame(rows)


def plot_shares(table: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Share recovered against the batch size, a line a width, a panel a source, published numbers beside it."""
    names = list(dict.fromkeys(table["images"]))
    figure, axes = plt.subplots(1, len(names), figsize=(3.7 * len(names), 3.4), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        rows = table[table["images"] == name]
        lines(axis, rows.assign(width=rows["width"].map("{:,} units".format)), "batch", "share", by="width", band=False)
        axis.set(xlabel="images in the batch", title=name, ylim=(-0.14, 1.05))
    axes[0, 0].set_ylabel("share of the batch recovered")
    if published is not None:
        for axis, (name, rows) in zip(axes[0], published.groupby("images"), strict=False):
            axis.plot(rows["batch"], rows["share"], "k:", marker="x", label=f"published,\n{name},\n1,000 units")
    for axis in axes[0]:
        axis.set(xscale="log", xticks=(ticks := sorted({x for line in axis.lines for x in line.get_xdata()})))
        axis.set_xticks([], minor=True)
        axis.set_xticklabels([f"{tick:g}" for tick in ticks])
        name_lines(axis, in_margin=True)
    return finish(figure)


def plot_prediction(table: pd.DataFrame) -> Figure:
    """Share predicted from activation probabilities alone against the share recovered."""
    figure, axis = plt.subplots(figsize=(6.0, 3.6))
    against_diagonal(axis, table.assign(kind=table["width"].map("{:,} units".format)), "predicted", "share", "kind")
    axis.set(xlabel="predicted to peel, units taken as independent", ylabel="share of the batch recovered")
    return finish(figure, "both")


def plot_seconds(table: pd.DataFrame) -> Figure:
    """Seconds of an attack against the batch size, a line a width; bands from the fastest to the slowest source."""
    figure, axis = plt.subplots(figsize=(6.0, 3.2))
    rows = table.assign(width=table["width"].map("{:,} units".format))
    lines(axis, rows, "batch", "seconds", by="width")
    axis.set(xlabel="images in the batch", ylabel="seconds", ylim=(0, None), xticks=sorted(rows["batch"].unique()))
    name_lines(axis)
    return finish(figure)


def plot_batch(result: Reconstruction, columns: int = 16) -> Figure:
    """Every image that was found, as one sheet from dark to bright; in what order they peel off is up to rounding."""
    images = result.images[result.images.flatten(1).mean(1).argsort()]
    return gallery({" " * row: line for row, line in enumerate(images.split(columns))}, size=0.6)


def sample_peeling(count: int = 300, seed: int = 0) -> pd.DataFrame:
    """Random batches beyond the classes, of tables and of small images, through ReLU and LeakyReLU networks.

    Widths, depth, initialisation, precision and batch size are drawn; some gradients carry noise, some batches equal
    rows, a row of zeros, or a batch size that is given wrongly or not at all. Columns: case, verdict, psnr_db (the
    smallest over certified images), found, certified, optimistic (images that are worse than certified by more than an
    order of magnitude), ok and why: a certified image that is not in the batch is not ok.
    """
    generator = torch.Generator().manual_seed(seed)
    return pd.DataFrame([_peel_random_batch(generator) for _ in progress(range(count), "batches")])


def _peel_random_batch(generator: torch.Generator) -> dict:
    pick = partial(choice, generator)

    def between(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    shape, width, batch = pick((40,), (1, 8, 8), (90,)), between(60, 300), between(10, 60)
    widths = pick((width,), (width,), (width, between(20, 100)), (width, 60, 40))
    slope, dtype = pick(0.0, 0.0, 0.1), getattr(torch, pick("float32", "float64"))
    trouble = pick("", "", "", "noise", "equal", "zeros", "size", "unknown size")
    model = relu_network(torch.Size(shape).numel(), widths, between(0, 10**6), pick(*INITIALISATIONS), slope).to(dtype)
    spread = pick(0.1, 0.25, 0.5)
    images = (0.6 + spread * torch.randn(batch, *shape, generator=generator)).clamp(0, 1)
    labels = torch.randint(CLASS_COUNT, (batch,), generator=generator)
    if trouble == "equal":
        images[1] = images[0]
    elif trouble == "zeros":
        images[0] = 0
    given = {"size": batch + pick(-2, 1, 5), "unknown size": None}.get(trouble, batch)
    gradients = client_gradients(model, images.to(dtype), labels, loss="cross_entropy")
    if trouble == "noise":
        level = 10.0 ** -between(3, 7)
        gradients = [
            g + level * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator) for g in gradients
        ]
        gradients = [g.to(dtype) for g in gradients]
    case = f"{shape} {widths} slope {slope:g} {str(dtype)[6:]} spread {spread:g} B={batch} given={given} {trouble}"
    result = reconstruct(model, gradients, shape, "cross_entropy", batch_size=given)
    return {"case": case.strip(), "verdict": result.verdict, **_checked_images(result, images)}


def _checked_images(result: Reconstruction, images: Tensor) -> dict:
    """Whether every certified image is in the batch, and as good as certified."""
    distance = (result.images[:, None].flatten(2) - images.double().flatten(1)).square().mean(2)
    quality = -10 * distance.amin(1).clamp(min=1e-32).log10() if len(distance) else torch.zeros(0)
    exact = certified(result)
    promised = torch.tensor([c[0].certified_psnr_db or 0.0 for _, c in result.per_image], dtype=torch.float64)
    wrong = int((exact & (quality < 30)).sum())
    worse = int((exact & (quality < promised.clamp(max=MAX_CHECKED_PSNR_DB) - MAX_OPTIMISM_DB)).sum())
    why = [f"{wrong} wrong images are certified"] if wrong else []
    smallest = min(quality[exact].tolist(), default=float("nan"))
    return {
        "psnr_db": smallest, "found": len(quality), "certified": int(exact.sum()), "optimistic": worse, "ok": not why,
        "why": "; ".join(why),
    }  # fmt: skip
