"""Notebook 13: images of residual and pooling networks' gradients, entered at blind layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from rgap import client
from rgap.attack.reconstruct import reconstruct
from rgap.baselines import Optimised, inverting_gradients
from rgap.experiments.common import MIN_CERTIFIED_PSNR_DB, attack_images, choice, cpu_timed, progress, seeded
from rgap.metrics import psnr_db
from rgap.models import resnet
from rgap.residual.blind import solve_blind
from rgap.results import GradientMismatchError, UnsupportedLayerError

TROUBLES = ("", "", "", "noise", "undeclared noise", "pruned", "float16", "weights", "two images", "one entry", "scale")
"""What happens to a gradient of the sample, three times in eleven nothing."""


def vgg(
    seed: int = 0, widths: Sequence[int] = (64, 128, 256, 512, 512), convolutions: Sequence[int] = (2, 2, 3, 3, 3),
    classes: int = 10, *, pool: bool = True,
) -> nn.Sequential:  # fmt: skip
    """A VGG for images of 32×32, with biases and Kaiming weights, in eval mode; the defaults are VGG-16's.

    Each stage has its width and its number of convolutions. Max pooling follows every stage but the last; without
    `pool` the first convolution of each further stage has stride 2. The last map is averaged in any case.
    """
    modules, channels = [], 3
    with seeded(seed):
        for stage, (width, count) in enumerate(zip(widths, convolutions, strict=True)):
            for place in range(count):
                conv = nn.Conv2d(channels, width, 3, 2 if stage and not place and not pool else 1, 1)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                modules, channels = [*modules, conv, nn.ReLU()], width
            if pool and stage < len(widths) - 1:
                modules.append(nn.MaxPool2d(2))
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
        return nn.Sequential(*modules, *head).eval()


def solve_shapes(shapes: Iterable[tuple[int, int, int]], seed: int = 0) -> pd.DataFrame:
    """Solves padded 3×3 convolutions of random inputs and δz, with ReLU's zeros, from their own gradients.

    Shapes are (filters, channels, side of the map). Columns: filters, channels, map, dtype, taps (on the side of δz),
    gap, error (relative, of x), predicted_error, certified, seconds (of the processor).
    """
    rows, generator = [], torch.Generator().manual_seed(seed)
    for filters, channels, side in shapes:
        x = torch.randn(1, channels, side, side, generator=generator, dtype=torch.float64).relu()
        dz = torch.randn(1, filters, side, side, generator=generator, dtype=torch.float64)
        dz = dz * (torch.rand(dz.shape, generator=generator) > 0.5)
        for name in ("float64", "float32"):
            values, changes = x.to(getattr(torch, name)), dz.to(getattr(torch, name))
            G = torch.nn.grad.conv2d_weight(values, (filters, channels, 3, 3), changes, padding=1)
            solution, seconds = cpu_timed(solve_blind, G, (side, side), padding=1, sum_dz=changes.sum((0, 2, 3)))
            error = float("nan") if solution.x is None else ((solution.x - x[0]).norm() / x.norm()).item()
            row = {"filters": filters, "channels": channels, "map": f"{side}×{side}", "dtype": name}
            row |= {"taps": "none" if solution.taps is None else "×".join(map(str, solution.taps)), "gap": solution.gap}
            row |= {"error": error, "predicted_error": solution.predicted_error, "certified": solution.certified}
            rows.append(row | {"seconds": seconds})
    return pd.DataFrame(rows)


def attack_networks(
    networks: Mapping[str, nn.Module], images: Tensor, labels: Tensor, dtype: str = "float32"
) -> pd.DataFrame:
    """The rows of `attack_images` for each network, with its name before them and what its walk and inversion said.

    The verdict is "refused" where the network is, with the reason as entered.
    """
    tables = []
    for name, model in progress(networks.items(), "networks"):
        try:
            table, results = attack_images(model, images, labels, dtype)
        except UnsupportedLayerError as error:
            table, results = pd.DataFrame([{"image": 0, "verdict": "refused", "entered": str(error)}]), []
        known = [note.split()[2] for r in results for note in r.notes if note.startswith("below it ")]
        table["known_per_pixel"] = [float(n) for n in known] if len(known) == len(table) else float("nan")
        table.insert(0, "network", name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def attack_noisy(model: nn.Module, images: Tensor, labels: Tensor, levels: Iterable[float]) -> pd.DataFrame:
    """`attack_images` with declared white noise of several shares of the gradients' root mean square, float64."""
    tables = []
    for level in levels:

        def defend(gradients: Sequence[Tensor], level: float = level) -> list[Tensor]:
            return client.gaussian_noise(gradients, level * _rms(gradients), seed=0)

        std = level * _rms(client.client_gradients(model.double(), images[:1].double(), labels[:1], "cross_entropy"))
        table, _ = attack_images(model, images, labels, "float64", defend, noise_std=std)
        table.insert(0, "noise", level)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _rms(gradients: Iterable[Tensor]) -> float:
    return torch.cat([g.flatten() for g in gradients]).square().mean().sqrt().item()


def optimise(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> tuple[list[Optimised], float]:
    """Inverting Gradients with the true labels on every image, and the processor seconds of one, on average."""
    model, found, total = model.float().eval(), [], 0.0
    for image, label in zip(images.float().split(1), labels.split(1), strict=True):
        gradients = client.client_gradients(model, image, label, "cross_entropy")
        shape = tuple(image.shape[1:])
        result, seconds = cpu_timed(
            inverting_gradients, model, gradients, shape, "cross_entropy", labels=label, steps=steps
        )
        found.append(result)
        total += seconds
    return found, total / max(len(found), 1)


def sample_residual(count: int = 200, seed: int = 0) -> pd.DataFrame:
    """Random small residual and pooling networks, with noise, pruning, wrong weights, tampered entries, two images.

    The first has the number `seed`, the next ones the next. Columns: case, trouble, verdict, psnr_db, ok and why: a
    false certificate is not ok.
    """
    numbers = progress(range(seed, seed + count), "networks")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")  # of torch, about its own speed
        return pd.DataFrame([_attack_random_network(number) for number in numbers])


def _random_network(pick: Callable, seed: int) -> tuple[nn.Module, int, str]:
    size = pick(8, 8, 16)
    activation = pick(nn.ReLU, nn.ReLU, partial(nn.LeakyReLU, 0.2))
    if pick(True, False):
        widths = pick((8, 24), (16, 32), (16, 48), (32, 64), (16, 32, 64))
        blocks, expansion = pick(1, 1, 2), pick(0, 0, 0, 2)
        options = {"blocks": blocks, "activation": activation, "expansion": expansion, "kaiming": pick(True, False)}
        flat = pick(0, 0, (size >> (len(widths) - 1)) ** 2)
        model = resnet(seed, widths, flat_pixels=flat, **options)
        return model, size, f"residual, {widths}, {blocks} blocks, expansion {expansion}, {flat} pixels to the head"
    widths = pick((16, 32), (24, 48), (32, 64), (16, 32, 64))
    counts, pool = [pick(1, 2) for _ in widths], pick(True, True, False)
    return vgg(seed, widths, counts, pool=pool), size, f"{'pooling' if pool else 'plain'}, {widths}, {counts}"


def _attack_random_network(number: int) -> dict:
    generator = torch.Generator().manual_seed(number)
    pick = partial(choice, generator)
    model, size, case = _random_network(pick, number)
    dtype, trouble = pick("float32", "float64"), pick(*TROUBLES)
    model = model.to(getattr(torch, dtype)).eval()
    images = (torch.rand(2, 3, size, size, generator=generator) ** pick(1, 2, 4)).to(getattr(torch, dtype))
    labels = torch.randint(10, (2,), generator=generator)
    count = 1 + (trouble == "two images")
    gradients = client.client_gradients(model, images[:count], labels[:count], "cross_entropy")
    gradients, noise_std = _troubled(list(gradients), trouble, pick, generator)
    if trouble == "weights":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * parameter.std(unbiased=False) * torch.randn(parameter.shape, generator=generator))
    row = {"case": f"{case}, {size}×{size}, {dtype}", "trouble": trouble or "none"}
    try:
        result = reconstruct(model, gradients, (3, size, size), "cross_entropy", noise_std=noise_std)
    except (UnsupportedLayerError, GradientMismatchError) as error:
        return row | {"verdict": "refused", "psnr_db": float("nan"), "ok": True, "why": str(error)}
    quality = psnr_db(result.images, images[:1].double()).item()
    false = result.verdict == "exact" and (quality < MIN_CERTIFIED_PSNR_DB or trouble == "two images")
    why = "a wrong image is certified" if false else result.notes[-1]
    return row | {"verdict": result.verdict, "psnr_db": quality, "ok": not false, "why": why}


def _troubled(gradients: list[Tensor], trouble: str, pick: Callable, generator: torch.Generator) -> tuple:
    """The gradients with that trouble, and the noise that is declared."""
    rms = gradients[0].square().mean().sqrt().item()
    if trouble in ("noise", "undeclared noise"):
        std = pick(1e-6, 1e-5, 1e-4, 1e-3) * rms
        return client.gaussian_noise(gradients, std, int(pick(1, 2, 3))), std if trouble == "noise" else None
    if trouble == "pruned":
        return client.prune(gradients, pick(0.001, 0.01, 0.1, 0.5)), None
    if trouble == "float16":
        return client.quantise(gradients, pick("float16", "bfloat16")), None
    if trouble == "one entry":
        place = int(torch.randint(len(gradients), (1,), generator=generator))
        changed = gradients[place].clone()
        entry = int(torch.randint(changed.numel(), (1,), generator=generator))
        changed.view(-1)[entry] += pick(1e-4, 1e-2, 1.0) * changed.square().mean().sqrt()
        gradients[place] = changed
    if trouble == "scale":
        place = int(torch.randint(len(gradients), (1,), generator=generator))
        gradients[place] = gradients[place] * pick(0.5, 0.99, 1.0001)
    return gradients, None
