"""Notebook 06: twin data, two inputs with one gradient: how many there are, and which of them the attack returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.baselines import dlg
from rgap.client import client_gradients
from rgap.experiments.common import client_steps, progress
from rgap.experiments.drawing import MARKERS, NAME_POINTS, PALETTE, finish, lines, name_lines
from rgap.head.logistic import MU_AT_MINIMUM, margins
from rgap.metrics import psnr_db
from rgap.results import Reconstruction

MAX_SHOWN_PIXEL = 1.02  # largest value of an image that a gallery shows; beyond it the image has left the pixel range

PAIR_COLUMNS = ["seed", "image", "mu", "twin_mu", "twin_in_range", "candidates", "truth_error", "gradient_difference"]


def margin_curve(start: float = -1.0, stop: float = 8.0, points: int = 181) -> pd.DataFrame:
    """c(μ) = −μ / (1 + e^μ), all that the last layer's gradient contains about the margin μ.

    Columns: mu, c and branch, "falling" up to the minimum of c, "rising" from there on.
    """
    mu = np.union1d(np.linspace(start, stop, points), [MU_AT_MINIMUM])
    parts = {"falling": mu[mu <= MU_AT_MINIMUM], "rising": mu[mu >= MU_AT_MINIMUM]}
    return pd.concat(
        [pd.DataFrame({"mu": part, "c": -part / (1 + np.exp(part)), "branch": name}) for name, part in parts.items()],
        ignore_index=True,
    )


def enlarged(model: nn.Module, factor: float) -> nn.Module:
    """A copy with every parameter times `factor`, as a stand-in for the larger margins of a trained network."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(factor)
    return copied


def true_margins(model: nn.Module, images: Tensor, labels: Tensor) -> pd.DataFrame:
    """The margin of each image and of its twin, for a bias-free network with homogeneous activations and one output.

    Returns a row for each image: mu = y f(x) in float64; twin_mu, the other root of c, NaN where there is none
    (misclassified images); twin_in_range, whether the twin, (twin_mu / mu) x, is an image with pixels in [0, 1] as
    well.
    """
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(images.double())[:, 0]
    mu = (2 * labels - 1) * outputs
    frame = pd.DataFrame({"mu": mu.numpy(), "twin_mu": [_other_root(m) for m in mu.tolist()]})
    brightest = frame["twin_mu"] / frame["mu"] * images.flatten(1).amax(1).double().numpy()
    return frame.assign(twin_in_range=brightest <= 1)


def twin_census(networks: Mapping[str, Iterable[nn.Module]], images: Tensor, labels: Tensor) -> pd.DataFrame:
    """How many images of the data have a twin at all, and how many have one inside the pixel range.

    Networks are name of a kind of weights -> its networks. Returns a row for each name: samples (images times
    networks), correct (correctly classified: these have a twin), ambiguous (the twin lies inside the pixel range),
    share (ambiguous of correct) and median_mu of the correct.
    """
    rows = []
    for name, models in progress(networks.items(), "twins"):
        found = pd.concat([true_margins(model, images, labels) for model in models])
        correct = found[found["mu"] > 0]
        ambiguous = int(correct["twin_in_range"].sum())
        row = {"weights": name, "samples": len(found), "correct": len(correct), "ambiguous": ambiguous}
        rows.append(row | {"share": ambiguous / max(len(correct), 1), "median_mu": correct["mu"].median()})
    return pd.DataFrame(rows)


def twin_pairs(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int], max_attacks: int
) -> tuple[pd.DataFrame, list[Reconstruction]]:
    """Attacks up to `max_attacks` correctly classified samples, float64; compares the candidates with the truth.

    Networks are bias-free and have homogeneous activations. Returns a row for each attack and the results in the same
    order: seed, image; mu, twin_mu, twin_in_range of `true_margins`; candidates, how many were returned; truth_error,
    ‖x̂ − x‖ / ‖x‖ of the closest one; gradient_difference, the largest relative difference in any tensor between the
    candidates' gradients and the shared one; verdict; psnr_db of the image that was chosen.
    """
    rows, results, truth = [], [], pd.DataFrame()
    for step in client_steps(make_model, images.double(), labels, seeds, ["float64"]):
        if len(rows) == max_attacks:
            break
        model, image, i = step.chain.model, step.image, step.index
        truth = true_margins(model, images, labels) if i == 0 else truth
        if truth["mu"][i] <= 0:
            continue
        result = reconstruct(step.chain, step.gradients, gradient_scale=1.0)
        theirs = [client_gradients(model, c.images, c.labels) for c in result.candidates]
        errors = [((c.images - image).norm() / image.norm()).item() for c in result.candidates]
        values = [step.seed, i, *truth.loc[i], len(result.candidates), min(errors), _difference(theirs, step.gradients)]
        rows.append(dict(zip(PAIR_COLUMNS, values, strict=True)))
        rows[-1] |= {"verdict": result.verdict, "psnr_db": psnr_db(result.images, image).item()}
        results.append(result)
    return pd.DataFrame(rows, columns=[*PAIR_COLUMNS, "verdict", "psnr_db"]), results


def dlg_on_twins(
    networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor, max_images: int, steps: int
) -> tuple[pd.DataFrame, Tensor]:
    """Where Deep Leakage from Gradients ends, from random pixels, on the `max_images` with the largest margins.

    Networks as for `twin_pairs`, one for each name; DLG is told the labels and has `steps` evaluations a run. Returns a
    row for each run and what it found, (rows, C, H, W): weights, image, mu, twin_mu; from_image and from_twin, ‖x̂ − x‖
    / ‖x‖ for either; gradient_residual.
    """
    rows, found = [], []
    for name, model in networks.items():
        truth = true_margins(model, images, labels)
        for i, own in truth[truth["mu"] > 0].nlargest(max_images, "mu").iterrows():
            image, label = images[i : i + 1], labels[i : i + 1]
            gradients = client_gradients(model, image, label)
            result = dlg(model, gradients, tuple(image.shape[1:]), labels=label, steps=steps)
            pair = (image.double(), own["twin_mu"] / own["mu"] * image.double())
            away = [((result.images - x).norm() / x.norm()).item() for x in pair]
            row = {"weights": name, "image": i, "mu": own["mu"], "twin_mu": own["twin_mu"]}
            row |= {"from_image": away[0], "from_twin": away[1]}
            rows.append(row | {"gradient_residual": result.candidates[0].gradient_residual})
            found.append(result.images)
    return pd.DataFrame(rows), torch.cat(found)


def vivid_pair(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The image with the largest margin and its twin, (2, C, H, W), and the label that the network gives them, (2,)."""
    zeros = torch.zeros(len(images), dtype=torch.long)
    labels = torch.tensor(true_margins(model, images, zeros)["mu"].to_numpy() < 0).long()
    truth = true_margins(model, images, labels)
    i = int(truth["mu"].argmax())
    twin = truth["twin_mu"][i] / truth["mu"][i] * images[i]
    return torch.stack([images[i], twin]), labels[[i, i]]


def pair_summary(table: pd.DataFrame) -> pd.DataFrame:
    """What `twin_pairs` found, counted for each kind of weights."""
    return table.groupby("weights").agg(
        pairs=("mu", "size"),
        two_candidates=("candidates", lambda n: (n == 2).sum()),
        truth_among_them=("truth_error", lambda error: (error < 1e-6).sum()),
        one_gradient=("gradient_difference", lambda difference: (difference < 1e-8).sum()),
        twin_in_range=("twin_in_range", "sum"),
        ambiguous=("verdict", lambda verdict: (verdict == "ambiguous").sum()),
    )


def shown_in_range(images: Tensor) -> list[Tensor | str]:
    """The images (N, C, H, W) for a gallery; a text in place of those that leave the pixel range."""
    text = "outside the\npixel range"
    return [text if image.max() > MAX_SHOWN_PIXEL else image for image in images]


def by_brightness(result: Reconstruction) -> list[Tensor | str]:
    """The darker and the brighter of a result's candidates, as `shown_in_range` gives them."""
    pair = sorted((result.candidates[0].images, result.candidates[-1].images), key=lambda image: image.abs().sum())
    return shown_in_range(torch.cat(pair))


def _other_root(mu: float) -> float:
    if mu <= 0:
        return math.nan
    roots, _ = margins(-mu / (1 + math.exp(mu)) if mu < 700 else -0.0)
    return max(roots, key=lambda root: abs(root - mu)) if len(roots) > 1 else roots[0]


def _difference(candidates: list[list[Tensor]], shared: list[Tensor]) -> float:
    """The largest ‖g − g′‖ / ‖g‖ over tensors, of every candidate's gradient from the shared one."""
    return max(((one - g).norm() / g.norm()).item() for mine in candidates for one, g in zip(mine, shared, strict=True))


def plot_branches(curve: pd.DataFrame, pairs: Sequence[tuple[float, float]]) -> Figure:
    """c(μ) of `margin_curve`, and pairs (μ₁, μ₂) of samples and their twins that share one value of c."""
    first, second, third = sns.color_palette(PALETTE, 3)
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for (_, part), colour, style in zip(curve.groupby("branch", sort=False), (first, second), ("-", "--"), strict=True):
        axis.plot(part["mu"], part["c"], style, color=colour, lw=1.8)
    lowest = curve.loc[curve["c"].idxmin()]
    axis.plot(lowest["mu"], lowest["c"], "D", color="black", ms=5)
    for (low, high), marker in zip(pairs, MARKERS, strict=False):
        c = curve["c"].iloc[(curve["mu"] - low).abs().argmin()]
        axis.plot([low, high], [c, c], ":", marker=marker, color=third, ms=6, lw=1.2, zorder=3)
    axis.axhline(0, color="0.6", lw=0.8)
    beside = {"textcoords": "offset points", "fontsize": NAME_POINTS}
    axis.annotate("first branch", (-0.6, 0.39), (8, 0), color=first, **beside)
    axis.annotate("second branch", (6, -0.015), (0, -14), color=second, ha="center", **beside)
    axis.annotate(f"minimum, μ = {lowest['mu']:.3f}", (lowest["mu"], lowest["c"]), (8, -6), **beside)
    if pairs:
        axis.annotate(
            "an image and its twin", (sum(pairs[0]) / 2, 0.02), color=third, ha="center", fontsize=NAME_POINTS
        )
    axis.set(xlabel="margin μ = y f(x)", ylabel=r"c = −μ / (1 + e$^μ$)", ylim=(-0.35, 0.75))
    return finish(figure, grid=None)


def plot_census(census: pd.DataFrame) -> Figure:
    """Share of images whose twin lies inside the pixel range, against the size of the weights."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    lines(axis, census, "factor", "share", by="network", band=False)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set(xlabel="factor on every weight", ylabel="correctly classified images\nwith a twin in the pixel range")
    axis.set_ylim(-0.03, 1.03)
    name_lines(axis)
    return finish(figure)
