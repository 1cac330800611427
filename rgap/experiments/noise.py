"""Notebook 07: attacks on defended gradients: their quality, their predicted errors, and no false certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap import client
from rgap.attack.descent import descend
from rgap.attack.reconstruct import reconstruct
from rgap.experiments.common import client_steps
from rgap.experiments.drawing import against_diagonal, finish, lines, name_lines
from rgap.head import read_head
from rgap.head.hypothesis import starts_of
from rgap.metrics import mse, psnr_db, ssim
from rgap.network.layer import Chain
from rgap.results import Reconstruction
from rgap.shared_gradient import receive

RECOGNISABLE_PSNR_DB = 20.0  # below this PSNR an image counts as lost


def root_mean_square(gradients: Sequence[Tensor]) -> float:
    """Of all entries of all tensors: the unit of the noise here."""
    return (sum(g.double().square().sum().item() for g in gradients) / sum(g.numel() for g in gradients)) ** 0.5


def defend(gradients: Sequence[Tensor], defence: str, strength: float | str, seed: int = 0) -> Sequence[Tensor]:
    """Applies a defence by name; ValueError for another one.

    Strengths: of "noise" the standard deviation in units of the gradient's root mean square, of "dp-sgd" the noise
    multiplier, clipped to half of the norm, of "prune" a share, of "quantise" a format. The seed is that of its noise.
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
    make_model: Callable[[int], nn.Module], images: Tensor, labels: Tensor, seeds: Sequence[int],
    strengths: Mapping[str, Sequence], dtype: str = "float32", **options,
) -> tuple[pd.DataFrame, list[Reconstruction]]:  # fmt: skip
    """Attacks every image (N, C, H, W) behind every defence; the attack is told neither defence nor strength.

    Strengths are defence -> those that `defend` takes, the dtype is the client's, and options are `reconstruct`'s.
    Returns a row for each attack (defence, strength, seed, image, verdict, psnr_db, ssim, rmse, predicted, the
    predicted rmse, and plain_db, the PSNR of `plain_attack`) and the results in the same order.
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
        "verdict": result.verdict, "psnr_db": psnr_db(found, image).item(),
        "ssim": ssim(found.clamp(0, 1), image).item(), "rmse": mse(found, image).sqrt().item(),
        "predicted": getattr(result.candidates[0], "predicted_error", None),
    }  # fmt: skip


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

    It is told the label, to make it easier, and returns the darkest of the images that the label allows, (1, C, H, W).
    """
    received = receive(chain, gradients)
    starts = starts_of(chain, read_head(loss, chain.layers[-1], received, label).hypotheses)
    images = []
    for start in starts:
        darkest = min(twin.factor for twin in start.twins[0])
        images.append(darkest * descend(chain, received, start).layer_inputs[chain.layers[0].name])
    return min(images, key=lambda image: image.abs().max().item())


def predicted_and_true(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """Predicted and true root-mean-square error of every layer's input, for the true image (1, C, H, W).

    Columns: layer, predicted, rmse, and size, the root mean square of the true input.
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


def mean_quality(runs: pd.DataFrame) -> pd.DataFrame:
    """Means of `defended_attacks` for each defence and strength, the share lost (below 20 dB), and DP-SGD's epsilon."""
    table = runs.assign(lost=runs["psnr_db"] < RECOGNISABLE_PSNR_DB)
    values = ["psnr_db", "plain_db", "ssim", "lost"]
    table = table.groupby(["defence", "strength"], sort=False)[values].mean().reset_index()
    private = table["defence"] == "dp-sgd"
    return table.assign(
        epsilon=[client.epsilon(s) if p else None for p, s in zip(private, table["strength"], strict=True)]
    )


def plot_quality(runs: pd.DataFrame) -> Figure:
    """PSNR against the strength of each defence that has a numeric one, with and without deciding signs.

    Runs are `defended_attacks`'; lines are medians, bands reach from the smallest to the largest.
    """
    names = {"noise": "noise, standard deviation /\nrms of the gradient", "dp-sgd": "DP-SGD, noise multiplier",
             "prune": "pruning, share of entries"}  # fmt: skip
    names = {name: label for name, label in names.items() if (runs["defence"] == name).any()}
    figure, axes = plt.subplots(1, len(names), figsize=(2.7 * len(names), 3.0), sharey=True, squeeze=False)
    columns = {"psnr_db": "signs decided\nby identities", "plain_db": "plain R-GAP"}
    for axis, (name, label) in zip(axes[0], names.items(), strict=True):
        data = runs[runs["defence"] == name].astype({"strength": float}).rename(columns=columns)
        lines(axis, data.melt("strength", list(columns.values()), "method", "psnr"), "strength", "psnr", by="method")
        axis.set(xscale="log", xlabel=label)
    axes[0, 0].set_ylabel("PSNR, dB")
    name_lines(axes[0, -1])
    return finish(figure)


def plot_predicted(errors: pd.DataFrame) -> Figure:
    """Predicted against measured error of every layer's input, both above zero; dashed lines are factors of 3."""
    figure, axis = plt.subplots(figsize=(5.6, 3.8))
    against_diagonal(axis, errors, "rmse", "predicted", "defence", (1, 3, 1 / 3))
    axis.set(xscale="log", yscale="log", xlabel="measured error of a layer's input, rms", ylabel="predicted error, rms")
    return finish(figure, grid=None)
