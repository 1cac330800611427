"""Notebook 07: attacks on defended gradients: their quality, their predicted errors, and no false certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap import client
from rgap.attack.descent import descend
from rgap.attack.reconstruct import reconstruct
from rgap.baselines import hybrid, inverting_gradients
from rgap.client import client_gradients
from rgap.experiments.common import MARKERS, PALETTE, client_steps, finish, progress, seeded
from rgap.head import read_head
from rgap.head.hypothesis import starts_of
from rgap.metrics import mse, psnr_db, ssim
from rgap.network.chain import prepare
from rgap.network.layer import Chain
from rgap.results import Reconstruction
from rgap.shared_gradient import receive

FALSE_CERTIFICATE_RATIO = 10.0
"""An image certified as exact is a false certificate where its error is more than this many times the predicted one."""

NEGLIGIBLE_ERROR = 1e-4
"""Error of an image, pixel units, below which no certificate is false, whatever error was predicted."""

STAGES = ("plain R-GAP", "+ signs", "+ noise found", "+ matching", "Inverting Gradients")
"""The recursion with every sign as it comes; with signs decided by identities, for the errors that single values show;
with the noise that surplus equations show, which together is `reconstruct`; refined by gradient matching, `hybrid`; the
opponent."""


def root_mean_square(gradients: Sequence[Tensor]) -> float:
    """Of all entries of all tensors: the unit of the noise here."""
    return (sum(g.double().square().sum().item() for g in gradients) / sum(g.numel() for g in gradients)) ** 0.5


def defend(gradients: Sequence[Tensor], defence: str, strength: float | str, seed: int = 0) -> Sequence[Tensor]:
    """Applies a defence by name.

    Args:
        gradients: What the client computed.
        defence: "noise" (strength: standard deviation in units of the gradient's root mean square), "dp-sgd" (noise
            multiplier, clipped to half of the norm), "prune" (share) or "quantise" (a format).
        strength: Of the defence.
        seed: Of its noise.

    Raises:
        ValueError: If there is no defence of that name.
    """
    rms = root_mean_square(gradients)
    if defence == "noise":
        return client.gaussian_noise(gradients, float(strength) * rms, seed)
    if defence == "dp-sgd":
        norm = rms * sum(g.numel() for g in gradients) ** 0.5
        return client.clip_and_noise(gradients, norm / 2, float(strength), seed)
    if defence == "prune":
        return client.prune(gradients, float(strength))
    if defence == "quantise":
        return client.quantise(gradients, str(strength))
    raise ValueError(f"defence is {defence!r}; it must be noise, dp-sgd, prune or quantise")


def cases_of(strengths: Mapping[str, Sequence]) -> list[tuple[str, float | str]]:
    """Defence and strength, for every strength of every defence."""
    return [(name, strength) for name, values in strengths.items() for strength in values]


def defended_attacks(
    make_model: Callable[[int], nn.Module],
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    strengths: Mapping[str, Sequence],
    dtype: str = "float32",
    **options,
) -> tuple[pd.DataFrame, list[Reconstruction]]:
    """Attacks every image behind every defence; the attack is told neither defence nor strength.

    Args:
        make_model: Seed -> network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,).
        seeds: Seeds of the weights.
        strengths: Defence -> its strengths, as `defend` takes them.
        dtype: In which the client computes.
        **options: For `rgap.reconstruct`.

    Returns:
        A row an attack (defence, strength, seed, image, verdict, psnr_db, ssim, rmse, predicted, the predicted rmse,
        and plain_db, the PSNR of `plain_attack`) and the results in the same order.
    """
    rows, results = [], []
    for step in client_steps(make_model, images, labels, seeds, [dtype], title="defences"):
        for defence, strength in cases_of(strengths):
            gradients = defend(step.gradients, defence, strength, seed=step.index)
            factor = None if defence == "dp-sgd" else 1.0  # clipping scales the gradient
            result = reconstruct(step.chain, gradients, **options, gradient_scale=factor)
            plain = plain_attack(step.chain, gradients, int(step.label))
            image = reference(step.chain, defence, step.image, result)
            row = {"defence": defence, "strength": strength, "seed": step.seed, "image": step.index}
            rows.append(row | outcome(result, image) | {"plain_db": psnr_db(plain, image.double()).item()})
            results.append(result)
    return pd.DataFrame(rows), results


def outcome(result: Reconstruction, image: Tensor) -> dict:
    """Verdict, PSNR, SSIM, root-mean-square error and the predicted one; the image is clipped to [0, 1] for SSIM."""
    found, image = result.images.double(), image.double()
    return {
        "verdict": result.verdict,
        "psnr_db": psnr_db(found, image).item(),
        "ssim": ssim(found.clamp(0, 1), image).item(),
        "rmse": mse(found, image).sqrt().item(),
        "predicted": getattr(result.candidates[0], "predicted_error", None),
    }


def reference(chain: Chain, defence: str, image: Tensor, result: Reconstruction) -> Tensor:
    """What a result is compared with: the image, up to its brightness where the defence makes that unknowable.

    Clipping scales the gradient, and the gradient of a positively homogeneous network times a factor is that of a
    brighter or darker image.
    """
    if defence != "dp-sgd" or not chain.homogeneous:
        return image
    return image * ((result.images * image).sum() / image.square().sum())


def plain_attack(chain: Chain, gradients: Sequence[Tensor], label: int, loss: str = "logistic") -> Tensor:
    """The image of the recursion that takes every sign as it comes and knows of no noise, for comparison.

    Args:
        chain: The prepared network.
        gradients: As shared.
        label: Given, to make it easier.
        loss: A name in `rgap.client.LOSSES`.

    Returns:
        The darkest of the images that the label allows, (1, C, H, W).
    """
    received = receive(chain, gradients)
    starts = starts_of(chain, read_head(loss, chain.layers[-1], received, label).hypotheses)
    images = []
    for start in starts:
        darkest = min(twin.factor for twin in start.twins[0])
        images.append(darkest * descend(chain, received, start).layer_inputs[chain.layers[0].name])
    return min(images, key=lambda image: image.abs().max().item())


def predicted_and_true(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """Predicted and true root-mean-square error of every layer's input.

    Args:
        chain: The prepared network.
        image: The true image, (1, C, H, W).
        result: What the attack returned for its gradient.

    Returns:
        Columns layer, predicted, rmse, and size, the root mean square of the true input.
    """
    truth = chain.layer_inputs(image)
    rows = []
    for report in result.layers:
        x, found = truth[report.name], result.candidates[0].layer_inputs[report.name]
        rmse, size = ((found - x).square().mean().sqrt().item(), x.square().mean().sqrt().item())
        rows.append({"layer": report.name, "predicted": report.predicted_error, "rmse": rmse, "size": size})
    return pd.DataFrame(rows)


def normal_weights(make_model: Callable[[int], nn.Module], std: float) -> Callable[[int], nn.Module]:
    """The same networks with every parameter drawn from N(0, std²)."""

    def make(seed: int) -> nn.Module:
        model = make_model(seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, std, generator=generator)
        return model

    return make


def attack_stages(
    networks: Mapping[str, Callable[[int], nn.Module]],
    images: Tensor,
    labels: Tensor,
    seeds: Sequence[int],
    strengths: Mapping[str, Sequence],
    steps: int,
) -> tuple[pd.DataFrame, dict[tuple, Tensor]]:
    """Attacks each defended gradient by every one of `STAGES`; none is told the defence.

    Inverting Gradients and plain R-GAP are told the label, to their advantage.

    Args:
        networks: Name of a kind of weights -> seed -> network.
        images: (N, C, H, W) in [0, 1].
        labels: (N,), 0 or 1.
        seeds: Of the weights.
        strengths: Defence -> its strengths, as `defend` takes them; not "dp-sgd", whose clipping hides the brightness.
        steps: Most evaluations of gradient matching and of Inverting Gradients.

    Returns:
        A row an attack (weights, defence, strength, seed, image, method, psnr_db, ssim), and (weights, defence,
        strength, method) -> the images of the first seed.
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


def sample_noisy_attacks(count: int = 500, seed: int = 0) -> pd.DataFrame:
    """Attacks on random small networks behind random defences: no NaN, no exception, no false certificate.

    Where clipping hides the brightness, the image counts up to it, as in `reference`.

    Args:
        count: Attacks.
        seed: Of networks, images, defences and strengths.

    Returns:
        A row an attack: case, verdict, psnr_db, rmse, predicted, ok, and why not.
    """
    rng, rows = np.random.default_rng(seed), []
    for number in progress(range(count), "defended"):
        model, image, label = _random_network(rng)
        defence, strength = _random_defence(rng)
        row = {"case": f"{number}: {defence} {strength}", "verdict": "", "psnr_db": math.nan, "ok": False, "why": ""}
        try:
            gradients = defend(client_gradients(model, image, label), defence, strength, seed=number)
            factor = None if defence == "dp-sgd" else 1.0
            result = reconstruct(model, gradients, tuple(image.shape[1:]), gradient_scale=factor)
            image = reference(prepare(model, tuple(image.shape[1:])), defence, image, result)
            row |= {k: v for k, v in outcome(result, image).items() if k != "ssim"}
            row["why"] = _complaint(result, row)
        except Exception as error:  # any exception is a finding of this sample
            row["why"] = f"{type(error).__name__}: {error}"
        rows.append(row | {"ok": not row["why"]})
    return pd.DataFrame(rows)


def _complaint(result: Reconstruction, row: dict) -> str:
    if not all(torch.isfinite(c.images).all() for c in result.candidates):
        return "the image holds NaN or infinity"
    if result.verdict != "exact":
        return ""
    limit = max(FALSE_CERTIFICATE_RATIO * (row["predicted"] or 0.0), NEGLIGIBLE_ERROR)
    return "" if row["rmse"] <= limit else f"certified, and off by {row['rmse']:.2g} where {limit:.2g} is allowed"


def _random_network(rng: np.random.Generator) -> tuple[nn.Module, Tensor, Tensor]:
    """One to three convolutions and a linear layer on 8 to 12 pixels, and a smooth image with its label."""
    size, channels, bias = int(rng.integers(8, 13)), int(rng.choice([1, 3])), bool(rng.integers(2))
    with seeded(int(rng.integers(2**31))):
        modules, inputs, pixels = [], channels, size
        for outputs, stride in zip(rng.integers(8, 25, int(rng.integers(1, 4))).tolist(), (2, 1, 1), strict=False):
            modules.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias))
            modules.append(nn.LeakyReLU(float(rng.choice([0.01, 0.2]))))
            inputs, pixels = outputs, (pixels - 1) // stride + 1
        model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(inputs * pixels**2, 1, bias=bias))
        coarse = torch.rand(1, channels, 4, 4)
    image = nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return model, image, torch.tensor([int(rng.integers(2))])


def _random_defence(rng: np.random.Generator) -> tuple[str, float | str]:
    name = str(rng.choice(["noise", "dp-sgd", "prune", "quantise"]))
    if name == "quantise":
        return name, str(rng.choice(["float16", "bfloat16", "int8"]))
    if name == "prune":
        return name, round(float(rng.uniform(0, 0.99)), 3)
    return name, float(f"{10 ** rng.uniform(-7, 1 if name == 'noise' else 0):.2g}")


def plot_quality(runs: pd.DataFrame) -> Figure:
    """PSNR and SSIM against the strength of each defence that has a numeric one.

    Args:
        runs: Columns `defence`, `strength`, `psnr_db`, `plain_db` and `ssim`.

    Returns:
        The figure; lines are medians, bands reach from the smallest to the largest.
    """
    names = {"noise": "noise, std in units of\nthe gradient's rms", "dp-sgd": "DP-SGD, noise multiplier",
             "prune": "share of entries pruned"}  # fmt: skip
    names = {name: label for name, label in names.items() if (runs["defence"] == name).any()}
    figure, axes = plt.subplots(2, len(names), figsize=(3.0 * len(names), 4.6), sharey="row", sharex="col")
    axes = axes.reshape(2, len(names))
    colours = sns.color_palette(PALETTE)
    lines = [(0, "plain_db", "plain R-GAP", 1), (0, "psnr_db", "signs by identities", 0), (1, "ssim", None, 0)]
    for column, (name, label) in enumerate(names.items()):
        data = runs[runs["defence"] == name].astype({"strength": float}).groupby("strength")
        for row, value, legend, colour in lines:
            axis, middle = axes[row, column], data[value].median()
            axis.plot(middle.index, middle, marker=MARKERS[colour], color=colours[colour], label=legend, lw=1.5, ms=5)
            axis.fill_between(middle.index, data[value].min(), data[value].max(), color=colours[colour], alpha=0.15)
            axis.set_xscale("log")
        axes[0, column].set_ylim(-10, 112)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("PSNR (dB)")
    axes[1, 0].set_ylabel("SSIM")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower left")
    return finish(figure)


def plot_predicted(errors: pd.DataFrame) -> Figure:
    """Predicted against measured error of every layer's input, on logarithmic axes.

    Args:
        errors: Columns `defence`, `rmse` and `predicted`, both above zero.

    Returns:
        The figure; the dashed lines are factors of 3.
    """
    figure, axis = plt.subplots(figsize=(4.6, 4.2))
    names = list(dict.fromkeys(errors["defence"]))
    markers = dict(zip(names, MARKERS, strict=False))
    sns.scatterplot(errors, x="rmse", y="predicted", hue="defence", style="defence", markers=markers,
                    palette=sns.color_palette(PALETTE, len(names)), s=22, alpha=0.7, linewidth=0, ax=axis)  # fmt: skip
    ends = [errors[["rmse", "predicted"]].min().min(), errors[["rmse", "predicted"]].max().max()]
    for factor, style in ((1, "-"), (3, "--"), (1 / 3, "--")):
        axis.plot(ends, [factor * end for end in ends], style, color="0.5", lw=0.9, zorder=0)
    axis.set(xscale="log", yscale="log", xlabel="measured error of a layer's input (rms)", ylabel="predicted (rms)")
    axis.legend(frameon=False, fontsize=9)
    return finish(figure, grid=None)


def plot_stages(runs: pd.DataFrame, methods: Sequence[str] = STAGES) -> Figure:
    """PSNR of every method behind every defence, one panel for each kind of weights.

    Args:
        runs: Columns `weights`, `defence`, `strength`, `method` and `psnr_db`.
        methods: The order of the legend.

    Returns:
        The figure; markers are medians.
    """
    kinds = list(dict.fromkeys(runs["weights"]))
    named = runs.assign(case=runs["defence"] + "\n" + runs["strength"].astype(str))
    counts = [named[named["weights"] == kind]["case"].nunique() for kind in kinds]
    figure, axes = plt.subplots(1, len(kinds), figsize=(1.6 + 1.05 * sum(counts), 3.6), sharey=True, squeeze=False,
                                width_ratios=counts)  # fmt: skip
    colours = sns.color_palette(PALETTE)
    for axis, kind in zip(axes[0], kinds, strict=True):
        data = named[named["weights"] == kind]
        cases = list(dict.fromkeys(data["case"]))
        for number, (method, colour) in enumerate(zip(methods, colours, strict=False)):
            middle = data[data["method"] == method].groupby("case")["psnr_db"].median()[cases]
            places = [place + 0.13 * (number - (len(methods) - 1) / 2) for place in range(len(cases))]
            axis.plot(places, middle, MARKERS[number], color=colour, ms=6, label=method)
        axis.set_xticks(range(len(cases)), cases, fontsize=8)
        axis.set(title=kind, xlim=(-0.5, len(cases) - 0.5))
    axes[0, 0].set_ylabel("PSNR (dB)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="center right")
    return finish(figure, rect=(0, 0, 1 - 1.45 / figure.get_figwidth(), 1))
