"""Residual networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from rgap.arguments import check_count
from rgap.models.chains import seeded

RESNET18_BLOCKS = tuple(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2))
"""The residual blocks of `resnet18`, from the image on."""


def resnet18(seed: int = 0, cut: tuple[str, ...] = (), classes: int = 10) -> nn.Module:
    """ResNet-18 for images of shape (3, 32, 32), on torchvision's basic blocks; chosen skip connections can be cut.

    The stem is the usual one for small images: a 3×3 convolution of stride 1, no pooling. A block whose skip is cut
    becomes the chain of its own convolutions.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        cut: Names of the blocks to cut, among `RESNET18_BLOCKS`.
        classes: Outputs.

    Raises:
        ValueError: If a name is not one of a block.

    Example:
        >>> import torch
        >>> from rgap import models
        >>> models.resnet18()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    from torchvision.models.resnet import BasicBlock, ResNet  # slow to import, and only needed here

    classes, blocks = check_count("classes", classes), isinstance(cut, Collection) and not isinstance(cut, str | bytes)
    if not blocks or (unknown := [name for name in cut if name not in RESNET18_BLOCKS]):
        raise ValueError(f"cut has {unknown if blocks else cut!r}; the blocks are {', '.join(RESNET18_BLOCKS)}")

    def network():
        model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        for name in cut:
            stage, index = name.split(".")
            getattr(model, stage)[int(index)] = _without_skip(model.get_submodule(name))
        return model

    return seeded(network, seed)


class ResidualBlock(nn.Module):
    """σ(path(x) + skip(x)): two 3×3 convolutions, or 1×1, 3×3 and 1×1 around a bottleneck, each with batch norm."""

    def __init__(self, inputs: int, width: int, stride: int, activation: Callable[[], nn.Module], expansion: int = 0):
        """A block of `width` outputs, or of `expansion` times as many with a bottleneck where that is not 0."""
        super().__init__()
        outputs = width * (expansion or 1)
        # inputs, outputs, kernel, stride, padding
        convs = [(inputs, width, 3, stride, 1), (width, width, 3, 1, 1)]
        if expansion:
            convs = [(inputs, width, 1, 1, 0), (width, width, 3, stride, 1), (width, outputs, 1, 1, 0)]
        units = [[nn.Conv2d(*conv, bias=False), nn.BatchNorm2d(conv[1]), activation()] for conv in convs]
        self.path = nn.Sequential(*[module for unit in units for module in unit][:-1])
        same = stride == 1 and inputs == outputs
        projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if same else nn.Sequential(*projection)
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""
        return self.activation(self.path(x) + self.skip(x))


def resnet(
    seed: int = 0, widths: Sequence[int] = (16, 32, 64), blocks: int = 1, activation: Callable[[], nn.Module] = nn.ReLU,
    expansion: int = 0, flat_pixels: int = 0, classes: int = 10, kaiming: bool = False,
) -> nn.Sequential:  # fmt: skip
    """A ResNet as for CIFAR: a 3×3 stem, stages of residual blocks of which all but the first halve the map, a head.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        widths: Channels of each stage, times `expansion` with bottlenecks. (16, 32, 64) are ResNet-8, 14 and 20's.
        blocks: Blocks of each stage: 1, 2 and 3 in ResNet-8, 14 and 20.
        activation: Makes each activation.
        expansion: 0 for basic blocks, 4 for bottlenecks as in ResNet-50.
        flat_pixels: Pixels of the last map where the head reads all of it; 0 for global average pooling.
        classes: Outputs.
        kaiming: Whether convolutions are drawn as He et al. do (fan out), else by torch's default.

    Example:
        >>> import torch
        >>> from rgap import models
        >>> resnet20 = models.resnet(blocks=3)
        >>> resnet20(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def network():
        modules = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), activation()]
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                modules.append(ResidualBlock(inputs, width, stride, activation, expansion))
                inputs = width * (expansion or 1)
        pool = [] if flat_pixels else [nn.AdaptiveAvgPool2d(1)]
        model = nn.Sequential(*modules, *pool, nn.Flatten(), nn.Linear(inputs * max(flat_pixels, 1), classes))
        for module in model.modules() if kaiming else ():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model

    return seeded(network, seed)


def _without_skip(block: nn.Module) -> nn.Sequential:
    """The main path of a basic block."""
    path = {name: getattr(block, name) for name in ("conv1", "bn1", "relu", "conv2", "bn2")}
    return nn.Sequential(OrderedDict(path, relu2=nn.ReLU()))
