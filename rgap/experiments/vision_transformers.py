"""Notebook 14: images of vision transformers' gradients: photographs, widths, training, noise, local steps."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap import client
from rgap.attack.reconstruct import reconstruct
from rgap.experiments.common import MIN_CERTIFIED_PSNR_DB, attack_images, choice, progress, seeded
from rgap.experiments.drawing import MARKERS, against_diagonal, colours, finish, key_of_points, mark, name_lines, points
from rgap.metrics import psnr_db
from rgap.tokens import recognise

HEAD_STD = 0.02  # of the heads' weights, which torchvision leaves at zero: no gradient would reach the image

TROUBLES = ("", "", "noise", "pruned", "float16", "weights", "two images", "steps")
"""What happens to a gradient of the sample, every second time in eight nothing."""


def vit_b_16(seed: int = 0) -> nn.Module:
    """ViT-B/16 of torchvision with random weights, its head drawn, in eval mode."""
    from torchvision.models import vit_b_16  # slow to import, and only needed here

    with seeded(seed):
        return with_head(vit_b_16())


def small_transformer(
    width: int, depth: int = 4, seed: int = 0, *, size: int = 32, patch: int = 4, classes: int = 10, head: bool = True
) -> nn.Module:
    """A small transformer of torchvision's class with random weights, in eval mode; width is that of the tokens.

    Images have the side `size`, patches `patch`; torchvision leaves the head at zero, and so it stays without `head`.
    """
    from torchvision.models import VisionTransformer

    heads = next(count for count in (4, 3, 2, 5, 1) if width % count == 0)
    with seeded(seed):
        model = VisionTransformer(size, patch, depth, heads, width, 2 * width, num_classes=classes)
        return with_head(model) if head else model.eval()


def with_head(model: nn.Module) -> nn.Module:
    """The transformer with its head drawn, which torchvision leaves at zero, in eval mode."""
    nn.init.normal_(model.heads.head.weight, std=HEAD_STD)
    return model.eval()


def attack_widths(widths: Sequence[int], images: Tensor, labels: Tensor, seed: int = 0, **options) -> pd.DataFrame:
    """Attacks small transformers of several widths, of four blocks, or six from width 128 on, in both precisions.

    Returns the rows of `attack_images`, whose options it takes, with width, tokens and dtype before them.
    """
    tables = []
    for width in progress(widths, "widths"):
        for dtype in ("float32", "float64"):
            model = small_transformer(width, 6 if width >= 128 else 4, seed, size=images.shape[-1])
            table, _ = attack_images(model, images, labels, dtype, **options)
            tokens = (images.shape[-1] // 4) ** 2
            tables.append(pd.DataFrame({"width": width, "tokens": tokens, "dtype": dtype}, table.index).join(table))
    return pd.concat(tables, ignore_index=True)


def _noisy(share: float) -> Callable:
    """Noise of a share of the first tensor's root mean square."""
    return lambda g, seed: client.gaussian_noise(g, share * g[0].square().mean().sqrt().item(), seed)


DEFENCES: dict[str, Callable] = {
    "float16": lambda g, seed: client.quantise(g, "float16"),
    **{f"noise, {share:.0e} rms".replace("e-0", "e-"): _noisy(share) for share in (1e-4, 1e-3, 1e-2)},
    "half pruned": lambda g, seed: client.prune(g, 0.5),
}
"""Name -> function of the gradients and a seed."""


def attack_defended(
    model: nn.Module, images: Tensor, labels: Tensor, defences: Mapping[str, Callable], seed: int = 0
) -> tuple[pd.DataFrame, dict[str, list[Tensor]]]:
    """Attacks gradients under defences (name -> function of gradients and seed), by each estimate.

    Returns a row for each defence: the share of certified images, and the mean PSNR of plain least squares, of ridge
    regression and of the smoothest image; and of every defence the first image by least squares and by the attack.
    """
    rows, pictures = [], {}
    for name, defence in progress(defences.items(), "defences"):
        quality: dict[str, list[float]] = {}
        exact, shown = 0, []
        for index, (image, label) in enumerate(zip(images.split(1), labels.split(1), strict=True)):
            gradients = defence(client.client_gradients(model, image, label, "cross_entropy"), seed + index)
            result = reconstruct(model, gradients, tuple(images.shape[1:]), "cross_entropy")
            plain = least_squares_image(model, gradients, tuple(images.shape[1:]))
            names = ("smoothest image", "ridge regression") if len(result.candidates) > 1 else ("attack",)
            found_by = dict(zip(names, (c.images for c in result.candidates), strict=True)) | {"least squares": plain}
            for estimate, found in found_by.items():
                quality.setdefault(estimate, []).append(psnr_db(found, image).item())
            exact += result.verdict == "exact"
            shown.append((plain[0], result.images[0]))
        pictures[name] = list(shown[0])
        rows.append({"defence": name, "certified": exact / len(images)})
        rows[-1] |= {estimate: sum(values) / len(values) for estimate, values in quality.items()}
    return pd.DataFrame(rows), pictures


def least_squares_image(model: nn.Module, gradients: Sequence[Tensor], image_shape: tuple[int, int, int]) -> Tensor:
    """What plain least squares makes of a gradient, (1, C, H, W), with every singular value kept."""
    embedding = recognise(model, image_shape)
    named = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    delta = named[embedding.position_name].double().flatten()[embedding.position_entries]
    G = named[embedding.weight_name].double().flatten(1)
    return embedding.image(torch.linalg.pinv(delta.T, rtol=0.0) @ G)


def attack_updates(
    model: nn.Module, images: Tensor, labels: Tensor, steps: Sequence[int], momenta: Sequence[float] = (0.0, 0.9),
    learning_rate: float = 0.01,
) -> pd.DataFrame:  # fmt: skip
    """Attacks updates of several local steps of SGD on one image each; the client starts from the model, in its dtype.

    Returns a row for each update: steps, momentum, image, verdict, psnr_db.
    """
    rows, some = [], next(model.parameters())
    cases = [(k, m, i) for k in steps for m in momenta for i in range(len(images)) if k > 1 or m == 0]
    for count, momentum, index in progress(cases, "updates"):
        image, label = images[index : index + 1].to(some.dtype), labels[index : index + 1]
        after = client_update(
            model, image, label, "cross_entropy", client.LocalTraining(learning_rate, count, momentum)
        )
        update = client.gradients_from_update(model, after, learning_rate)
        result = reconstruct(model, update, tuple(images.shape[1:]), "cross_entropy")
        row = {"steps": count, "momentum": momentum, "image": index, "verdict": result.verdict}
        rows.append(row | {"psnr_db": psnr_db(result.images, image).item()})
    return pd.DataFrame(rows)


def client_update(
    model: nn.Module, images: Tensor, labels: Tensor, loss: str, training: client.LocalTraining
) -> dict[str, Tensor]:
    """The parameters that a client returns after local steps on one batch, in the model's dtype, by name."""
    start = {name: p.detach() for name, p in model.named_parameters()}
    return training.run(model, start, images, labels, loss)


def peak_memory_gb() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def sample_transformers(count: int = 100, seed: int = 0) -> pd.DataFrame:
    """Random small transformers, with noise, pruning, half precision, wrong weights, two images or several local steps.

    Columns: case, trouble, verdict, psnr_db, ok and why: a false certificate is not ok.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = progress(range(count), "transformers")
    return pd.DataFrame([_attack_random_transformer(generator, number) for number in numbers])


def _attack_random_transformer(generator: torch.Generator, number: int) -> dict:
    pick = partial(choice, generator)
    size, patch = pick((8, 2), (8, 4), (12, 4), (16, 4))
    tokens = (size // patch) ** 2
    width = max(4, tokens + pick(-4, -1, 0, 1, 2, tokens, 2 * tokens))
    depth, classes, loss = pick(1, 2, 3), pick(2, 5, 10), pick("cross_entropy", "cross_entropy", "mse")
    dtype, trouble = pick("float32", "float64"), pick(*TROUBLES)
    build = partial(small_transformer, width, depth, size=size, patch=patch, classes=classes)
    model = build(seed=number).to(getattr(torch, dtype))
    images = torch.rand(2, 3, size, size, generator=generator) ** pick(1, 2, 4)
    labels = torch.randint(classes, (2,), generator=generator)
    batch = images[: 1 + (trouble == "two images")].to(getattr(torch, dtype)), labels[: 1 + (trouble == "two images")]
    theirs = build(seed=number + 1).to(getattr(torch, dtype)) if trouble == "weights" else model
    if trouble == "steps":
        after = client_update(model, *batch, "cross_entropy", client.LocalTraining(0.05, pick(2, 5)))
        gradients = client.gradients_from_update(model, after, 0.05)
    else:
        gradients = client.client_gradients(theirs, *batch, loss)
    if trouble == "noise":
        rms = pick(1e-5, 1e-4, 1e-3, 1e-2) * gradients[0].square().mean().sqrt().item()
        gradients = client.gaussian_noise(gradients, rms, seed=number)
    elif trouble == "pruned":
        gradients = client.prune(gradients, pick(0.001, 0.01, 0.1, 0.5))
    elif trouble == "float16":
        gradients = client.quantise(gradients, pick("float16", "bfloat16"))
    result = reconstruct(model, gradients, (3, size, size), loss, gradient_scale=1.0)
    quality = psnr_db(result.images, images[:1]).item()
    false = result.verdict == "exact" and (quality < MIN_CERTIFIED_PSNR_DB or trouble == "two images")
    case = f"{tokens} tokens, width {width}, depth {depth}, {classes} classes, {loss}, {dtype}"
    row = {"case": case, "trouble": trouble or "none", "verdict": result.verdict, "psnr_db": quality}
    return {**row, "ok": not false, "why": "a wrong image is certified" if false else ""}


def plot_widths(runs: pd.DataFrame) -> Figure:
    """PSNR of `attack_widths` against the width, a colour for each precision; certified ones are filled."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for (dtype, colour), marker in zip(colours(runs["dtype"]).items(), MARKERS, strict=False):
        rows = runs[runs["dtype"] == dtype].sort_values("width")
        median = rows.groupby("width")["psnr_db"].median()
        axis.plot(median.index, median, color=colour, lw=1, label=f"{dtype} gradients")
        points(axis, rows, "width", "psnr_db", colour, marker)
    tokens = int(runs["tokens"].iloc[0])
    mark(axis, tokens + 0.5, f"{tokens} patches")
    axis.set(xlabel="width of the tokens", ylabel="PSNR, dB", ylim=(0, None))
    name_lines(axis)
    key_of_points(axis, loc="center right")
    return finish(figure)


def plot_predicted(runs: pd.DataFrame) -> Figure:
    """Predicted against true PSNR of every attack, a colour for each precision, with the diagonal."""
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    against_diagonal(axis, runs.sort_values("dtype"), "predicted_psnr_db", "psnr_db", "dtype")
    axis.set(xlabel="predicted PSNR, dB", ylabel="PSNR, dB")
    return finish(figure, "both")


def magnified_error(found: Tensor, truth: Tensor, times: float = 1e4) -> Tensor:
    """The difference of images, magnified, around grey."""
    return 0.5 + times * (found.double() - truth.double())


def worst_prediction(runs: pd.DataFrame) -> float:
    """Largest ratio of true and predicted error, either way round."""
    return float(10 ** ((runs["psnr_db"] - runs["predicted_psnr_db"]).abs().max() / 20))
