"""Pairs of seed and image through residual and pooling networks, too many for a notebook."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from rgap import client, models
from rgap.attack.reconstruct import reconstruct
from rgap.data import load_images
from rgap.experiments.common import progress, seeded
from rgap.experiments.residual_networks import vgg
from rgap.metrics import psnr_db
from rgap.residual.cut import prepare_residual
from rgap.residual.reconstruct import begin
from rgap.shared_gradient import receive_gradients

RESNET18_WIDTHS = (64, 128, 256, 512)

MAX_OVERSTATED_DB = 12.0  # by which a certified PSNR may exceed the true one; MIN_CERTIFIED_PSNR_DB always suffices
SMOOTHING, SCALE = 0.1, 0.37  # label smoothing and factor of the loss that the client uses and the attack is not told


class AttentionPooling(nn.Module):
    """Weights the pixels of the last map by a softmax of their own scores: no step of it can be inverted."""

    def __init__(self, channels: int, classes: int):
        """One score for each pixel, and a linear layer."""
        super().__init__()
        self.query, self.head = nn.Linear(channels, 1), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        pixels = x.flatten(2).transpose(1, 2)
        return self.head((torch.softmax(self.query(pixels), 1) * pixels).sum(1))


def _warm(model: nn.Module) -> nn.Module:
    """The running statistics of one batch."""
    norms = [module for module in model.train().modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        model(load_images("embedded", 40, image_shape=(3, 32, 32))[0].to(next(model.parameters())))
    return model.eval()


def _attention(seed: int) -> nn.Module:
    body = list(models.resnet(seed, RESNET18_WIDTHS, 2, kaiming=True))[:-3]
    with seeded(seed):
        return nn.Sequential(*body, AttentionPooling(RESNET18_WIDTHS[-1], 10)).eval()


def _log_softmax(seed: int) -> nn.Module:
    return nn.Sequential(*models.resnet(seed, RESNET18_WIDTHS, 2, kaiming=True), nn.LogSoftmax(1)).eval()


def _narrow(blocks: int, factor: int, seed: int, **options) -> nn.Module:
    return models.resnet(seed, (16 * factor, 32 * factor, 64 * factor), blocks, kaiming=True, **options)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "ResNet-18, Kaiming": models.resnet18,
    "ResNet-18, default": lambda seed: models.resnet(seed, RESNET18_WIDTHS, 2),
    "ResNet-18, Kaiming, statistics of a batch": lambda seed: _warm(models.resnet18(seed)),
    "ResNet-18, default, statistics of a batch": lambda seed: _warm(models.resnet(seed, RESNET18_WIDTHS, 2)),
    "ResNet-18, LeakyReLU": lambda seed: models.resnet(
        seed, RESNET18_WIDTHS, 2, partial(nn.LeakyReLU, 0.2), kaiming=True
    ),
    "ResNet-18, attention pooling": _attention,
    "ResNet-18, LogSoftmax": _log_softmax,
    "ResNet-18, label smoothing": models.resnet18,
    "ResNet-18, unknown scale": models.resnet18,
    "bottlenecks": lambda seed: models.resnet(seed, RESNET18_WIDTHS, 2, expansion=4),
    "VGG, strides": lambda seed: vgg(seed, (64, 128, 256), (2, 2, 3), pool=False),
    "VGG-16, max pooling": vgg,
    "ResNet-20, 32–128, flattened": partial(_narrow, 3, 2, flat_pixels=64),
    "ResNet-20, 32–128, LeakyReLU": partial(_narrow, 3, 2, activation=partial(nn.LeakyReLU, 0.2)),
    **{
        f"ResNet-{6 * blocks + 2}, {16 * factor}–{64 * factor}": partial(_narrow, blocks, factor)
        for blocks in (1, 2, 3)
        for factor in (1, 2, 4)
    },
}
"""Name -> network for images of shape (3, 32, 32), by its seed."""


def sample_walks(
    count: int = 6, seed: int = 0, names: Sequence[str] = tuple(NETWORKS)[:6], source: str = "embedded"
) -> pd.DataFrame:
    """Attacks one image through one of `NETWORKS` after the other, in float32 and float64 by turns.

    A row is ok unless its image is certified as exact and is not what the certificate says. The seed, of the first
    network and of the draw of its image, rises when all names have had their turn; the default names are the ResNet-18
    whose head is no obstacle, and one whose is. Columns: case, network, dtype, verdict, psnr_db, ok, why, seconds,
    memory_gb (of the process at its largest).
    """
    rows = []
    for number in progress(range(count), "attacks"):
        turn, name = divmod(number, len(names))
        dtype = "float64" if (number + turn) % 2 else "float32"
        image, label = load_images(source, 1, (3, 32, 32), seed=seed + turn)
        rows.append(attack_pair(names[name], NETWORKS[names[name]](seed + turn), image, label, dtype))
        rows[-1]["case"] = f"{names[name]}, {dtype}, {seed + turn}"
    return pd.DataFrame(rows)


def attack_pair(name: str, model: nn.Module, image: Tensor, label: Tensor, dtype: str) -> dict:
    """A row of `sample_walks`, for a network in that format."""
    model, image = model.to(getattr(torch, dtype)), image.to(getattr(torch, dtype))
    smoothing = SMOOTHING if "smoothing" in name else 0.0
    gradients = client.client_gradients(model, image, label, "cross_entropy", label_smoothing=smoothing)
    if "scale" in name:
        gradients = [SCALE * g for g in gradients]
    started = time.perf_counter()
    result = reconstruct(model, gradients, tuple(image.shape[1:]), "cross_entropy")
    seconds, quality = time.perf_counter() - started, psnr_db(result.images, image.double()).item()
    certified = result.certified_psnr_db or 0.0
    wrong = result.verdict == "exact" and quality < min(60.0, certified - MAX_OVERSTATED_DB)
    return {
        "network": name, "dtype": dtype, "verdict": result.verdict, "psnr_db": quality, "ok": not wrong,
        "why": result.notes[-1], "seconds": seconds,
        "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip


def walk_features(model: nn.Module, image: Tensor, label: Tensor, dtype: str = "float64") -> pd.DataFrame:
    """What the walk gives of a network's inner tensors, without inverting what lies below it.

    Columns: layers (those that read the tensor), channels, side (of the map), rank (share of the unknowns that the
    equations determine), relative_error (against the truth; NaN where the tensor is open), condition, seconds.
    """
    model, image = model.to(getattr(torch, dtype)).eval(), image.to(getattr(torch, dtype))
    network = prepare_residual(model, tuple(image.shape[1:]))
    gradients = client.client_gradients(model, image, label, "cross_entropy")
    received = receive_gradients(network.graph.parameters, gradients, model=model)
    begun = next(b for cut in network.cuts if not isinstance(b := begin(network, received, cut), str))
    walk, reports = begun[0].run(), [begun[1], *begun[0].reports]
    graph = network.graph
    truth = graph.forward({graph.image: image[0].double()}, list(graph.nodes))
    sources = {node.path: node.sources[0] for node in graph.nodes.values() if node.has_weight}
    rows = []
    for report in reports:
        name = sources[report.name.split(" + ")[0]]
        found = walk.values.get(name) if report.deficit == 0 else None
        error = float("nan") if found is None else ((found.value - truth[name]).norm() / truth[name].norm()).item()
        rows.append({
            "layers": report.name, "channels": truth[name].shape[0], "side": truth[name].shape[1], "dtype": dtype,
            "rank": report.rank / report.unknowns, "relative_error": error, "condition": report.condition,
            "seconds": report.seconds,
        })  # fmt: skip
    return pd.DataFrame(rows)
