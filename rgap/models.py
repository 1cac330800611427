"""The networks of the paper, seeded and bias-free, as flat `nn.Sequential`s in eval mode."""

from __future__ import annotations

import itertools

import torch
from torch import nn

SLOPE = 0.2
"""Negative slope of every LeakyReLU here."""

IMAGE_SHAPES = {"cnn6": (3, 32, 32), "cnn6_d": (3, 32, 32), "fcn3": (1, 28, 28)}
"""Model name -> the image shape (C, H, W) that it takes."""


def cnn6(seed: int = 0, width: int = 36) -> nn.Sequential:
    """CNN6: six convolutions and a linear layer to one logit, for images of shape (3, 32, 32).

    conv 3→12 4×4/2 pad 2, 12→`width` 3×3/2, then 3×3 to 36, 36, 64 (stride 2) and 128, all pad 1; 3200→1.
    LeakyReLU(0.2) between, no biases, torch's default initialisation.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        width: Channels of the second convolution. 36 is the paper's CNN6, 20 its rank-deficient CNN6-d.
    """
    return _seeded(lambda: _cnn6_layers(width), seed)


def cnn6_d(seed: int = 0) -> nn.Sequential:
    """CNN6-d: CNN6 with 20 channels in the second convolution, which leaves it 280 short of full rank."""
    return cnn6(seed, width=20)


def fcn3(seed: int = 0, widths: tuple[int, ...] = (1000, 100)) -> nn.Sequential:
    """FCN3: 784–1000–100–1, fully connected, LeakyReLU(0.2), no biases, for images of shape (1, 28, 28).

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        widths: Hidden widths.
    """

    def layers():
        sizes = (784, *widths, 1)
        modules: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            modules += [nn.Linear(inputs, outputs, bias=False), nn.LeakyReLU(SLOPE)]
        return modules[:-1]

    return _seeded(layers, seed)


def _cnn6_layers(width: int) -> list[nn.Module]:
    shapes = [(3, 12, 4, 2, 2), (12, width, 3, 2, 1), (width, 36, 3, 1, 1)]
    shapes += [(36, 36, 3, 1, 1), (36, 64, 3, 2, 1), (64, 128, 3, 1, 1)]
    modules: list[nn.Module] = []
    for inputs, outputs, kernel, stride, padding in shapes:
        modules += [nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False), nn.LeakyReLU(SLOPE)]
    return [*modules, nn.Flatten(), nn.Linear(3200, 1, bias=False)]


def _seeded(layers, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*layers()).eval()
