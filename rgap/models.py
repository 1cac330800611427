"""The networks of the paper and of gradient attacks, seeded and in eval mode; all but ResNet-18 flat `Sequential`s."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from rgap.arguments import check_count, check_number, check_seed, shown

MAX_UNIFORM_BOUND = 1e6
"""Largest bound of uniform weights."""

LEAKY_SLOPE = 0.2
"""Negative slope of every LeakyReLU here."""

IMAGE_SHAPES = dict.fromkeys(("cnn6", "cnn6_d", "cnn6_batch", "fcn3", "lenet"), (3, 32, 32)) | {"fcn3": (1, 28, 28)}
"""Model name -> the image shape (C, H, W) that it takes, of the models that `rgap.reconstruct` attacks."""

ANALYSIS_SHAPES = IMAGE_SHAPES | {"resnet18": (3, 32, 32)}
"""The same for all models of this module; each of them can be analysed."""

RESNET18_BLOCKS = tuple(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2))
"""The residual blocks of `resnet18`, from the image on."""


def trained_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that a client trains, and whose gradients it therefore shares.

    They are those with `requires_grad`; where none has it, the network was frozen for evaluation, and they are all.

    Example:
        >>> import torch
        >>> from rgap.models import trained_names
        >>> trained_names(torch.nn.Linear(2, 1, bias=False))
        ('weight',)
    """
    every = dict(model.named_parameters())
    return tuple(name for name, p in every.items() if p.requires_grad) or tuple(every)


def cnn6(seed: int = 0, width: int = 36, classes: int = 1, head_bias: bool = False) -> nn.Sequential:
    """CNN6: six convolutions and a linear layer to one logit, for images of shape (3, 32, 32).

    conv 3→12 4×4/2 pad 2, 12→`width` 3×3/2, then 3×3 to 36, 36, 64 (stride 2) and 128, all pad 1; 3200→1.
    LeakyReLU(0.2) between, no biases, torch's default initialisation.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        width: Channels of the second convolution. 36 is the paper's CNN6, 20 its rank-deficient CNN6-d.
        classes: Outputs; 1 is one logit, as in the paper.
        head_bias: Whether the last layer has a bias.

    Example:
        >>> from rgap import models
        >>> models.cnn6(seed=0, width=20)[2].out_channels
        20
    """
    width, classes = check_count("width", width), check_count("classes", classes)
    return _seeded(lambda: nn.Sequential(*_cnn6_layers(width), *_dense_layers((3200, classes), head_bias)), seed)


def cnn6_d(seed: int = 0) -> nn.Sequential:
    """CNN6-d: CNN6 with 20 channels in the second convolution, which leaves it 280 short of full rank.

    Example:
        >>> from rgap import models
        >>> models.cnn6_d()[2].out_channels
        20
    """
    return cnn6(seed, width=20)


def cnn6_batch(
    seed: int = 0, hidden: Sequence[int] = (64,), classes: int = 10, bias: bool = False, width: int = 36
) -> nn.Sequential:
    """CNN6's convolutions followed by two or more fully connected layers, which separate the images of a batch.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        hidden: Units of the fully connected layers before the last, each with LeakyReLU(0.2).
        classes: Outputs; 1 is one logit.
        bias: Whether all layers have biases.
        width: Channels of the second convolution, as in `cnn6`.

    Example:
        >>> from rgap import models
        >>> models.cnn6_batch(hidden=(128, 64))[-1].in_features
        64
    """
    width, sizes = check_count("width", width), (3200, *_widths("hidden", hidden), check_count("classes", classes))
    return _seeded(lambda: nn.Sequential(*_cnn6_layers(width, bias), *_dense_layers(sizes, bias)), seed)


def fcn3(seed: int = 0, widths: tuple[int, ...] = (1000, 100)) -> nn.Sequential:
    """FCN3: 784–1000–100–1, fully connected, LeakyReLU(0.2), no biases, for images of shape (1, 28, 28).

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        widths: Hidden widths.

    Example:
        >>> from rgap import models
        >>> [p.shape[0] for p in models.fcn3().parameters()]
        [1000, 100, 1]
    """
    return _seeded(lambda: nn.Sequential(nn.Flatten(), *_dense_layers((784, *_widths("widths", widths), 1))), seed)


def lenet(
    seed: int = 0,
    classes: int = 10,
    activation: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]] = nn.Sigmoid,
    widths: Sequence[int] = (12, 12, 12),
    strides: Sequence[int] | None = None,
    bias: bool = False,
    uniform: float | None = None,
) -> nn.Sequential:
    """LeNet as gradient attacks use it, for images of shape (3, 32, 32): 5×5 convolutions and a linear layer.

    conv 3→12 and 12→12 with stride 2, 12→12 with stride 1, all pad 2; 768→`classes`.

    Args:
        seed: Seed of the weights; the global generator is left as it was.
        classes: Outputs; 1 is one logit.
        activation: Makes the activation after each convolution; or one for each.
        widths: Channels of the convolutions.
        strides: Their strides; by default 2, 2 and then 1.
        bias: Whether convolutions and linear layer have biases.
        uniform: Draws weights and biases from ±`uniform`; None leaves torch's default initialisation.

    Raises:
        ValueError: If the numbers of widths, strides and activations differ.

    Example:
        >>> import torch
        >>> from rgap import models
        >>> models.lenet(activation=torch.nn.ReLU, bias=True)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    widths, classes = _widths("widths", widths), check_count("classes", classes)
    strides = (2, 2, *[1] * len(widths))[: len(widths)] if strides is None else _widths("strides", strides)
    if isinstance(activation, nn.Module):
        raise ValueError(f"activation is a {type(activation).__name__}; give a function that makes one, its class")
    makers = [activation] * len(widths) if callable(activation) else activation
    if not isinstance(makers, Sequence) or not all(isinstance(make, Callable) for make in makers):
        raise ValueError(f"activation is {shown(activation)}; give a function that makes a module, or one for each")
    if uniform is not None:
        check_number("uniform", uniform, high=MAX_UNIFORM_BOUND)
    if not len(widths) == len(strides) == len(makers):
        given = f"{len(widths)} widths, {len(strides)} strides, {len(makers)} activations"
        raise ValueError(f"{given}; give the same number of each")

    def layers():
        modules, channels, size = [], 3, 32
        for width, stride, make in zip(widths, strides, makers, strict=True):
            modules += [nn.Conv2d(channels, width, 5, stride, 2, bias=bias), make()]
            channels, size = width, (size - 1) // stride + 1
        network = nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * size * size, classes, bias=bias))
        if uniform is not None:
            for parameter in network.parameters():
                nn.init.uniform_(parameter, -uniform, uniform)
        return network

    return _seeded(layers, seed)


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

    return _seeded(network, seed)


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
    seed: int = 0,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 1,
    activation: Callable[[], nn.Module] = nn.ReLU,
    expansion: int = 0,
    flat_pixels: int = 0,
    classes: int = 10,
    kaiming: bool = False,
) -> nn.Sequential:
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

    return _seeded(network, seed)


def _without_skip(block: nn.Module) -> nn.Sequential:
    """The main path of a basic block."""
    path = {name: getattr(block, name) for name in ("conv1", "bn1", "relu", "conv2", "bn2")}
    return nn.Sequential(OrderedDict(path, relu2=nn.ReLU()))


def _cnn6_layers(width: int, bias: bool = False) -> list[nn.Module]:
    # inputs, outputs, kernel, stride, padding
    shapes = [(3, 12, 4, 2, 2), (12, width, 3, 2, 1), (width, 36, 3, 1, 1)]
    shapes += [(36, 36, 3, 1, 1), (36, 64, 3, 2, 1), (64, 128, 3, 1, 1)]
    modules = [m for shape in shapes for m in (nn.Conv2d(*shape, bias=bias), nn.LeakyReLU(LEAKY_SLOPE))]
    return [*modules, nn.Flatten()]


def _dense_layers(sizes: Sequence[int], bias: bool = False) -> list[nn.Module]:
    """Linear layers from size to size with LeakyReLU between them."""
    pairs = itertools.pairwise(sizes)
    modules = [m for i, o in pairs for m in (nn.Linear(i, o, bias=bias), nn.LeakyReLU(LEAKY_SLOPE))]
    return modules[:-1]


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    seed = check_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return build().eval()
        except RuntimeError as error:  # the allocator's
            reason = str(error).partition("\n")[0]
            raise ValueError(f"a network of these widths (hidden, classes) cannot be built: {reason}") from error


def _widths(name: str, widths: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers of at least 1, one a layer."""
    if isinstance(widths, Sequence) and not isinstance(widths, str | bytes):
        return tuple(check_count(name, width) for width in widths)
    raise ValueError(f"{name} is {shown(widths)}; give a sequence of whole numbers, one a layer")


def load_model(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Finds a network by name.

    Args:
        name: A name in `ANALYSIS_SHAPES`, or `module:attribute` with a network, or with a function that returns one
            when called without arguments; modules in the working directory are found, too.
        seed: Of the weights; a function is called with torch's generator at this seed, which is restored afterwards.

    Returns:
        The network, and the image shape that it takes if it is one of this module, else None.

    Raises:
        ValueError: If there is no network of this name; the message says what there is instead.

    Example:
        >>> from rgap import models
        >>> network, shape = models.load_model("cnn6")
        >>> shape
        (3, 32, 32)
    """
    if not isinstance(name, str):
        raise ValueError(f"model's name is {shown(name)}; give a text, such as cnn6")
    check_seed(seed)
    if name in ANALYSIS_SHAPES:
        return globals()[name](seed=seed), ANALYSIS_SHAPES[name]
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        known = ", ".join(ANALYSIS_SHAPES)
        raise ValueError(f"model is {name!r}; give {known}, or module:function, e.g. torchvision.models:resnet18")
    found = _imported(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"model is {name!r}; {module} has no {attribute!r}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, nn.Module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                found = found()
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise ValueError(f"model is {name!r}; calling it without arguments failed: {reason}") from error
    if not isinstance(found, nn.Module):
        raise ValueError(f"model is {name!r}; that is a {type(found).__name__}, and a torch.nn.Module is needed")
    return found, None


def _imported(module: str):
    """A module by name, looked for in the working directory first."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"module {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
