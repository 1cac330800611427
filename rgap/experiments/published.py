"""Notebook 12: the networks of published attacks on single images, attacked here, beside what their sources print."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from rgap import client, models
from rgap.attack.reconstruct import reconstruct
from rgap.experiments.common import cpu_timed, progress, seeded
from rgap.experiments.drawing import PALETTE, finish
from rgap.experiments.vision_transformers import with_head
from rgap.metrics import psnr_db

R_CONV_SEED = 50  # of the weights in R-CONV's notebooks, which draw all of them from ±0.5 in float64


@dataclass(frozen=True)
class Published:
    """One result as its source prints it."""

    attack: str  # name of the published attack
    network: str  # its network, in a few words
    psnr_db: float  # what the source prints, in dB for a peak of 1
    source: str  # where it is printed
    build: Callable[[], nn.Module]  # makes the network
    dtype: str = "float32"  # name of the torch dtype in which the source computes
    image_size: int = 32  # side of the images in pixels
    differs: str = ""  # what is not as in the source; the image never is


def dlg_convnet(width: int = 64, classes: int = 10) -> nn.Sequential:
    """The ConvNet of breaching's DLG: eight 3×3 convolutions with batch norm, pooled after the sixth and eighth."""
    widths = [width, 2 * width, 2 * width, *[4 * width] * 5]
    modules: list[nn.Module] = []
    with seeded(0):
        for place, (before, after) in enumerate(zip([3, *widths], widths, strict=False), start=1):
            modules += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            modules += [nn.MaxPool2d(3)] if place in (6, 8) else []
        return nn.Sequential(*modules, nn.Flatten(), nn.Linear(9 * widths[-1], classes)).eval()


def vit_s_16(classes: int = 1000) -> nn.Module:
    """ViT-S/16 of torchvision's class with random weights, its head drawn, in eval mode."""
    from torchvision.models import VisionTransformer  # slow to import, and only needed here

    with seeded(0):
        return with_head(VisionTransformer(224, 16, 12, 6, 384, 4 * 384, num_classes=classes))


def r_conv_network(widths: Iterable[int], relu_from: int, classes: int = 100) -> nn.Sequential:
    """A network of R-CONV with its own weights: 5×5 convolutions with padding, the first two of stride 2.

    Convolutions before number `relu_from` are followed by LeakyReLU(0.2), the others by ReLU.
    """
    modules: list[nn.Module] = []
    with seeded(R_CONV_SEED):
        before = 3
        for place, width in enumerate(widths):
            modules.append(nn.Conv2d(before, width, 5, 2 if place < 2 else 1, 2, dtype=torch.float64))
            modules.append(nn.LeakyReLU(0.2) if place < relu_from else nn.ReLU())
            before = width
        model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(64 * before, classes, dtype=torch.float64))
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model.eval()


def r_conv(network: str, mse: float, notebook: str, *arguments) -> Published:
    """A result of R-CONV, whose notebooks print 48 dB more: a peak of 255 over the MSE of images in [0, 1]."""
    source = f"github.com/tamertaras91/RR-CONV, {notebook}"
    return Published("R-CONV", network, -10 * math.log10(mse), source, lambda: r_conv_network(*arguments), "float64")


BREACHING = "github.com/JonasGeiping/breaching, examples"

PUBLISHED = (
    Published("R-GAP, as ported", "CNN6, ten classes", 49.0, f"{BREACHING}/R-GAP",
              lambda: models.cnn6(classes=10, head_bias=True), differs="weights; their attack is given the label"),
    Published("DLG", "ConvNet, 8 convolutions, batch norm", 23.4, f"{BREACHING}/Deep Leakage from Gradients",
              dlg_convnet, differs="weights"),
    Published("APRIL", "ViT-S/16, 224 × 224", 26.3, f"{BREACHING}/APRIL", vit_s_16, image_size=224,
              differs="random weights for pretrained ones; their first block is without layer norm and skip"),
    r_conv("LeNet, 4 convolutions", 1.396e-15, "LetNet.ipynb", (12, 16, 12, 12), 2),
    r_conv("LeNet, fewer filters", 1.126e-18, "LetNet_O.ipynb", (12, 16, 3, 3), 2),
    r_conv("six convolutions", 4.396e-18, "O_CNN6.ipynb", (12, 16, 3, 3, 3, 3), 2, 10),
    r_conv("LeNet, three ReLU", 2.290e-22, "LetNet_4_Relu.ipynb", (12, 22, 3, 3), 1),
    r_conv("LeNet, all ReLU", 5.200e-25, "LetNet_All_Relu.ipynb", (77, 22, 3, 3), 0),
)  # fmt: skip
"""What sources print that name the network and the number; the first three print to the digit given here."""


def compare(results: Iterable[Published], images: Mapping[int, Tensor], count: int) -> pd.DataFrame:
    """Attacks the network of every published result, with other images than the source's.

    Images are side in pixels -> images (N, 3, side, side) in [0, 1], of which `count` are taken for each network of
    32×32, one for others and for networks beyond a million parameters. Returns attack, network, dtype, published_db,
    ours_db (smallest), gain_db, exact (share certified), images, differs, source, seconds (median, of the processor).
    """
    rows = []
    for result in progress(list(results), "networks"):
        model, its_images = result.build(), images[result.image_size]
        large = result.image_size > 32 or sum(p.numel() for p in model.parameters()) > 1e6
        its_images = its_images[: 1 if large else count].to(getattr(torch, result.dtype))
        model = model.to(its_images.dtype)
        qualities, verdicts, seconds = [], [], []
        for place, image in enumerate(its_images):
            gradients = client.client_gradients(model, image[None], torch.tensor([place]), "cross_entropy")
            found, took = cpu_timed(
                reconstruct, model, gradients, tuple(image.shape), "cross_entropy", gradient_scale=1.0
            )
            qualities.append(psnr_db(found.images[:1], image[None].double()).item())
            verdicts.append(found.verdict == "exact")
            seconds.append(took)
        rows.append({
            "attack": result.attack, "network": result.network, "dtype": result.dtype, "published_db": result.psnr_db,
            "ours_db": min(qualities), "gain_db": min(qualities) - result.psnr_db,
            "exact": sum(verdicts) / len(verdicts), "images": len(verdicts), "differs": result.differs,
            "source": result.source, "seconds": pd.Series(seconds).median(),
        })  # fmt: skip
    return pd.DataFrame(rows)


def plot_comparison(table: pd.DataFrame) -> Figure:
    """A line a network from the published PSNR to ours."""
    names = table["attack"] + ": " + table["network"] + ", " + table["dtype"]
    figure, axis = plt.subplots(figsize=(7.5, 0.45 * len(table) + 1.2))
    places = range(len(table))[::-1]
    ours, theirs = sns.color_palette(PALETTE)[:2]
    axis.hlines(places, table["published_db"], table["ours_db"], color="0.75", lw=2, zorder=1)
    axis.scatter(table["published_db"], places, color=theirs, marker="D", label="published", zorder=2)
    axis.scatter(table["ours_db"], places, color=ours, marker="o", label="here, smallest PSNR", zorder=2)
    axis.set(xlabel="PSNR (dB, peak 1)", xlim=(0, None))
    axis.set_yticks(places, names)
    axis.set_title(f"{(table['gain_db'] > 0).sum()} of {len(table)} published results are exceeded on their networks")
    axis.legend(loc="upper right", frameon=True)
    return finish(figure, "x")
