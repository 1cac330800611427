"""Notebook 01: single images from their gradients, layer by layer, before and after training."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap.attack.reconstruct import reconstruct
from rgap.client import client_gradients
from rgap.client.training import training
from rgap.experiments.drawing import MARKERS, colours, finish, key_of_points, lines, name_lines, points, step_labels
from rgap.metrics import psnr_db
from rgap.network.chain import prepare
from rgap.network.layer import Chain
from rgap.results import Reconstruction


def layer_errors(chain: Chain, image: Tensor, result: Reconstruction) -> pd.DataFrame:
    """The layer reports of a result with the true error of each layer's recovered input, for the true image.

    Returns `result.to_frame()` with `layer`, its name in figures, and `error`, ‖x̂ − x‖ / ‖x‖, as further columns.
    """
    truth = chain.layer_inputs(image)
    found = result.candidates[0].layer_inputs
    frame = result.to_frame()
    frame["layer"] = frame["name"].map(layer_names(chain))
    frame["error"] = [((found[name] - truth[name]).norm() / truth[name].norm()).item() for name in frame["name"]]
    return frame


def trained_attacks(
    model: nn.Module, images: Tensor, labels: Tensor, victims: Tensor, victim_labels: Tensor, loss: str = "logistic", *,
    epochs: int = 3, seed: int = 0, dtype: str = "float32", **options,
) -> pd.DataFrame:  # fmt: skip
    """Trains a network on images (N, C, H, W), and attacks every victim (M, C, H, W), each alone, after each epoch.

    The dtype is the one in which the client computes the victims' gradients; options are for
    `rgap.client.training.training`. Returns a row for each epoch (0 is before training) and victim: epoch, loss (mean
    over the images), image, gradient_norm (over all parameters), condition (largest of a layer's system), verdict,
    label_found, twins (consistent candidates inside the pixel range), psnr_db, psnr_best_db (of the candidate closest
    to the truth).
    """
    rows = []
    # In float64, because in float32 two kinds of processors end at networks that have little in common.
    states = training(copy.deepcopy(model).double(), images, labels, loss, epochs=epochs, seed=seed, **options)
    for epoch, (mean_loss, trained) in enumerate(states):
        client = trained.to(getattr(torch, dtype))
        chain = prepare(client, tuple(victims.shape[1:]))
        for i, (victim, label) in enumerate(zip(victims.split(1), victim_labels.split(1), strict=True)):
            gradients = client_gradients(client, victim, label, loss)
            result = reconstruct(chain, gradients, loss=loss, effort="full", gradient_scale=1.0)
            quality = [psnr_db(c.images, victim.to(c.images)).item() for c in result.candidates]
            rows.append({"epoch": epoch, "loss": mean_loss, "image": i})
            rows[-1] |= {"gradient_norm": sum(g.double().square().sum().item() for g in gradients) ** 0.5}
            rows[-1] |= {"condition": max(r.condition for r in result.layers if r.condition is not None)}
            rows[-1] |= {"verdict": result.verdict, "label_found": bool(result.labels[0] == label)}
            rows[-1] |= {"twins": sum(c.in_pixel_range for c in result.candidates)}
            rows[-1] |= {"psnr_db": quality[0], "psnr_best_db": max(quality)}
    return pd.DataFrame(rows)


def layer_names(chain: Chain) -> dict[str, str]:
    """A chain's layers as a reader calls them: conv1, conv2, …, fc."""
    modules = {layer.name: chain.model.get_submodule(layer.name) for layer in chain.layers}
    return step_labels({n: "linear" if isinstance(m, nn.Linear) else "convolution" for n, m in modules.items()})


def by_epoch(attacks: pd.DataFrame) -> pd.DataFrame:
    """What training changes: medians over the images of `trained_attacks`, and the share that is ambiguous.

    Columns: epoch, loss, gradient_norm, condition, twins, closer_psnr_db and ambiguous; numbers to two digits.
    """
    columns = ["loss", "gradient_norm", "condition", "twins", "psnr_best_db"]
    median = attacks.groupby("epoch")[columns].median().rename(columns={"psnr_best_db": "closer_psnr_db"})
    for column in median.columns.drop("twins"):
        median[column] = [float(f"{value:.2g}") for value in median[column]]
    ambiguous = (attacks["verdict"] == "ambiguous").groupby(attacks["epoch"]).mean()
    return median.assign(ambiguous=ambiguous).reset_index()


def plot_error_growth(errors: pd.DataFrame, order: Sequence[str]) -> Figure:
    """Relative error of each layer's recovered input, in the order of the attack, from the head down to the image.

    Errors have the columns `layer`, `dtype` and `error`; lines are medians, bands reach from the smallest to the
    largest.
    """
    layers = pd.Categorical(errors["layer"], order, ordered=True)
    data = errors.assign(layer=layers, error=errors["error"].clip(lower=1e-16))  # 0 has no place on the axis
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    lines(axis, data.assign(gradients=data["dtype"] + "\ngradients"), "layer", "error", by="gradients")
    axis.set(yscale="log", ylim=(data["error"].min() / 3, data["error"].max() * 3))
    axis.set(xlabel="layer whose input is recovered, from the head to the image", ylabel="relative error ‖x̂ − x‖ / ‖x‖")
    name_lines(axis)
    return finish(figure)


def plot_training(runs: pd.DataFrame) -> Figure:
    """Quality of `trained_attacks` against epochs, a line for each image, filled where it is certified."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for (image, rows), marker in zip(runs.groupby("image"), MARKERS, strict=False):
        colour = colours(runs["image"])[image]
        axis.plot(rows["epoch"], rows["psnr_best_db"], color=colour, lw=1.5, label=f"image {image}")
        points(axis, rows, "epoch", "psnr_best_db", colour, marker)
    axis.set(xlabel="epochs of training", ylabel="PSNR, dB", ylim=(0, None))
    axis.set_xticks(sorted(runs["epoch"].unique()))
    name_lines(axis)
    key_of_points(axis, loc="lower left")
    return finish(figure)
