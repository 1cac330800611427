"""Twin data: two inputs, one gradient. How many there are, and what the attack says about them."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rgap.attack.reconstruct import reconstruct
from rgap.baselines import dlg
from rgap.client import client_gradients
from rgap.head.read import MU_AT_MINIMUM, margins
from rgap.metrics import psnr_db
from rgap.network.chain import prepare
from rgap.results import Reconstruction

PAIR_COLUMNS = ["seed", "image", "mu", "twin_mu", "twin_in_range", "candidates", "truth_error", "gradient_difference"]


def margin_curve(start: float = -1.0, stop: float = 8.0, points: int = 181) -> pd.DataFrame:
    """c(μ) = −μ / (1 + e^μ), what the last layer's gradient says about the margin μ.

    Args:
        start: Smallest μ.
        stop: Largest μ.
        points: How many.

    Returns:
        Columns mu, c and branch: "falling" up to the minimum of c, "rising" from there on.
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

    Args:
        model: The network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), 0 or 1.

    Returns:
        A row an image: mu = y f(x) in float64; twin_mu, the other root of c, NaN where there is none (misclassified
        images); twin_in_range, whether the twin, (twin_mu / mu) x, is an image with pixels in [0, 1] as well.
    """
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(images.double())[:, 0]
    mu = (2 * labels - 1) * outputs
    frame = pd.DataFrame({"mu": mu.numpy(), "twin_mu": [_other_root(m) for m in mu.tolist()]})
    brightest = frame["twin_mu"] / frame["mu"] * images.flatten(1).amax(1).double().numpy()
    return frame.assign(twin_in_range=brightest <= 1)


def twin_census(networks: Mapping[str, Iterable[nn.Module]], images: Tensor, labels: Tensor) -> pd.DataFrame:
    """How many images of the data have a twin at all, and how many one inside the pixel range: no attack can choose.

    Args:
        networks: Name of a kind of weights -> its networks.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), 0 or 1.

    Returns:
        A row for each name: samples (images times networks), correct (correctly classified: these have a twin),
        ambiguous (the twin lies inside the pixel range), share (ambiguous of correct) and median_mu of the correct.
    """
    rows = []
    for name, models in tqdm(networks.items(), desc="twins", disable=not sys.stderr.isatty()):
        found = pd.concat([true_margins(model, images, labels) for model in models])
        correct = found[found["mu"] > 0]
        ambiguous = int(correct["twin_in_range"].sum())
        row = {"weights": name, "samples": len(found), "correct": len(correct), "ambiguous": ambiguous}
        rows.append(row | {"share": ambiguous / max(len(correct), 1), "median_mu": correct["mu"].median()})
    return pd.DataFrame(rows)


def twin_pairs(
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int], most: int
) -> tuple[pd.DataFrame, list[Reconstruction]]:
    """Attacks correctly classified samples by their float64 gradients and compares the candidates with the truth.

    Args:
        make_model: Seed -> network, bias-free and with homogeneous activations.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), 0 or 1.
        seeds: Seeds of the weights.
        most: Attacks; further samples are left out.

    Returns:
        A row for each attack and the results in the same order: seed, image; mu, twin_mu, twin_in_range of
        `true_margins`; candidates, how many were returned; truth_error, ‖x̂ − x‖ / ‖x‖ of the closest one;
        gradient_difference, the largest relative difference in any tensor between the candidates' gradients and the
        shared one; verdict; psnr_db of the image that was chosen.
    """
    rows, results = [], []
    for seed, i in tqdm(list(product(seeds, range(len(images)))), desc="attacks", disable=not sys.stderr.isatty()):
        if i == 0:
            model = make_model(seed).double()
            chain = prepare(model, tuple(images.shape[1:]))
            truth = true_margins(model, images, labels)
        if truth["mu"][i] <= 0 or len(rows) == most:
            continue
        image, label = images[i : i + 1].double(), labels[i : i + 1]
        gradients = client_gradients(model, image, label)
        result = reconstruct(chain, gradients)
        theirs = [client_gradients(model, c.images, c.labels) for c in result.candidates]
        errors = [((c.images - image).norm() / image.norm()).item() for c in result.candidates]
        values = [seed, i, *truth.loc[i], len(result.candidates), min(errors), _difference(theirs, gradients)]
        rows.append(dict(zip(PAIR_COLUMNS, values, strict=True)))
        rows[-1] |= {"verdict": result.verdict, "psnr_db": psnr_db(result.images, image).item()}
        results.append(result)
    return pd.DataFrame(rows, columns=[*PAIR_COLUMNS, "verdict", "psnr_db"]), results


def dlg_on_twins(
    networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor, most: int, steps: int
) -> tuple[pd.DataFrame, Tensor]:
    """Where Deep Leakage from Gradients ends, started from random pixels, on the images that a network is surest of.

    Args:
        networks: Name of a kind of weights -> network, bias-free and with homogeneous activations.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), 0 or 1; DLG is told them.
        most: Correctly classified images for each network.
        steps: Evaluations in each run.

    Returns:
        A row for each run and what it found, (rows, C, H, W): weights, image, mu, twin_mu; from_image and from_twin,
        ‖x̂ − x‖ / ‖x‖ for either; gradient_residual.
    """
    rows, found = [], []
    for name, model in networks.items():
        truth = true_margins(model, images, labels)
        for i, margins_of in truth[truth["mu"] > 0].nlargest(most, "mu").iterrows():
            image, label = images[i : i + 1], labels[i : i + 1]
            gradients = client_gradients(model, image, label)
            result = dlg(model, gradients, tuple(image.shape[1:]), labels=label, steps=steps)
            pair = (image.double(), margins_of["twin_mu"] / margins_of["mu"] * image.double())
            away = [((result.images - x).norm() / x.norm()).item() for x in pair]
            row = {"weights": name, "image": i, "mu": margins_of["mu"], "twin_mu": margins_of["twin_mu"]}
            row |= {"from_image": away[0], "from_twin": away[1]}
            rows.append(row | {"gradient_residual": result.candidates[0].gradient_residual})
            found.append(result.images)
    return pd.DataFrame(rows), torch.cat(found)


def _other_root(mu: float) -> float:
    if mu <= 0:
        return math.nan
    roots, _ = margins(-mu / (1 + math.exp(mu)) if mu < 700 else -0.0)
    return max(roots, key=lambda root: abs(root - mu)) if len(roots) > 1 else roots[0]


def _difference(candidates: list[list[Tensor]], shared: list[Tensor]) -> float:
    """The largest ‖g − g′‖ / ‖g‖ over tensors, of every candidate's gradient from the shared one."""
    return max(((one - g).norm() / g.norm()).item() for mine in candidates for one, g in zip(mine, shared, strict=True))
