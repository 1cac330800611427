"""Notebook 07: what each part of the attack adds behind a defence, and an optimiser beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.baselines import hybrid, inverting_gradients
from rgap.experiments.common import client_steps
from rgap.experiments.drawing import MARKERS, NAME_POINTS, PALETTE, finish
from rgap.experiments.noise import cases_of, defend, plain_attack
from rgap.metrics import psnr_db, ssim
from rgap.network.layer import Chain

STAGES = ("plain R-GAP", "+ signs", "+ noise found", "+ matching", "Inverting Gradients")
"""The recursion with every sign as it comes; with signs decided by identities, for the errors that single values show;
with the noise that surplus equations show, which together is `reconstruct`; refined by gradient matching, `hybrid`; the
opponent."""


def attack_kinds(
    kinds: Mapping[str, tuple[Callable[[int], nn.Module], Mapping[str, Sequence]]], images: Tensor, labels: Tensor,
    seeds: Sequence[int], steps: int,
) -> tuple[pd.DataFrame, dict[tuple, Tensor]]:  # fmt: skip
    """`attack_stages` of several kinds of weights: name -> the networks, and their defences' strengths."""
    tables, guesses = [], {}
    for name, (make, strengths) in kinds.items():
        rows, found = attack_stages({name: make}, images, labels, seeds, strengths, steps)
        tables.append(rows)
        guesses |= found
    return pd.concat(tables, ignore_index=True), guesses


def attack_stages(
    networks: Mapping[str, Callable[[int], nn.Module]], images: Tensor, labels: Tensor, seeds: Sequence[int],
    strengths: Mapping[str, Sequence], steps: int,
) -> tuple[pd.DataFrame, dict[tuple, Tensor]]:  # fmt: skip
    """Attacks each defended gradient by every one of `STAGES`; none is told the defence.

    Inverting Gradients and plain R-GAP are told the label, to their advantage. Networks are name of a kind of weights
    -> seed -> network, labels 0 or 1, strengths defence -> those that `defend` takes, without "dp-sgd", whose clipping
    hides the brightness; steps bound the evaluations of gradient matching and of Inverting Gradients.

    Returns a row for each attack (weights, defence, strength, seed, image, method, psnr_db, ssim), and (weights,
    defence, strength, method) -> the images of the first seed.
    """
    rows, found = [], {}
    for weights, make_model in networks.items():
        for step in client_steps(make_model, images, labels, seeds, title=f"stages, {weights}"):
            for defence, strength in cases_of(strengths):
                gradients = defend(step.gradients, defence, strength, seed=step.index)
                case = {"weights": weights, "defence": defence, "strength": strength}
                for method, guess in _stages(step.chain, gradients, step.label, steps).items():
                    rows.append(case | {"seed": step.seed, "image": step.index, "method": method})
                    rows[-1] |= {"psnr_db": psnr_db(guess, step.image.double()).item()}
                    rows[-1] |= {"ssim": ssim(guess.clamp(0, 1), step.image.double()).item()}
                    if step.seed == seeds[0]:
                        found.setdefault((weights, defence, strength, method), []).append(guess)
    return pd.DataFrame(rows), {key: torch.cat(guesses) for key, guesses in found.items()}


def _stages(chain: Chain, gradients: Sequence[Tensor], label: Tensor, steps: int) -> dict[str, Tensor]:
    """The image of each stage, from network and gradient alone."""
    images = [
        plain_attack(chain, gradients, int(label)),
        reconstruct(chain, gradients, noise_std=0.0, gradient_scale=1.0).images,  # none beyond what values show
        reconstruct(chain, gradients, gradient_scale=1.0).images,
        hybrid(chain, gradients, steps=steps, dtype=torch.float32).images,
        inverting_gradients(chain, gradients, labels=label, steps=steps).images,
    ]
    return dict(zip(STAGES, (image.double() for image in images), strict=True))


def plot_stages(runs: pd.DataFrame, methods: Sequence[str] = STAGES) -> Figure:
    """Median PSNR of every method behind every defence, one panel for each kind of weights."""
    named = runs.assign(case=runs["defence"] + "\n" + runs["strength"].astype(str))
    kinds = {kind: data["case"].nunique() for kind, data in named.groupby("weights", sort=False)}
    figure, axes = plt.subplots(1, len(kinds), figsize=(1.6 + 1.0 * sum(kinds.values()), 3.4), sharey=True,
                                squeeze=False, width_ratios=list(kinds.values()))  # fmt: skip
    style = {"hue_order": methods, "markers": list(MARKERS[: len(methods)]), "palette": PALETTE, "linestyle": "none"}
    for axis, kind in zip(axes[0], kinds, strict=True):
        data = named[named["weights"] == kind]
        sns.pointplot(data, x="case", y="psnr_db", hue="method", dodge=0.62, estimator="median", errorbar=None, ax=axis,
                      **style)  # fmt: skip
        axis.set(title=kind, xlabel="", ylabel="PSNR, dB")
        handles, labels = axis.get_legend_handles_labels()
        axis.get_legend().remove()
    figure.legend(handles, labels, frameon=False, fontsize=NAME_POINTS, loc="outside center right")
    return finish(figure)
