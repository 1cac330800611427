"""Chains of layers: the networks of the paper and of gradient attacks, as flat `Sequential`s."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from rgap.arguments import check_count, check_number, check_seed, shown

MAX_UNIFORM_BOUND = 1e6  # largest bound of uniform weights
LEAKY_SLOPE = 0.2  # negative slope of every LeakyReLU here


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
    return seeded(lambda: nn.Sequential(*_cnn6_layers(width), *_dense_layers((3200, classes), head_bias)), seed)


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
    return seeded(lambda: nn.Sequential(*_cnn6_layers(width, bias), *_dense_layers(sizes, bias)), seed)


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
    return seeded(lambda: nn.Sequential(nn.Flatten(), *_dense_layers((784, *_widths("widths", widths), 1))), seed)


def lenet(
    seed: int = 0, classes: int = 10,
    activation: Callable[[], nn.Module] | Sequence[Callable[[], nn.Module]] = nn.Sigmoid,
    widths: Sequence[int] = (12, 12, 12), strides: Sequence[int] | None = None, bias: bool = False,
    uniform: float | None = None,
) -> nn.Sequential:  # fmt: skip
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

    return seeded(layers, seed)


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


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """What `build` makes, in eval mode, with weights of the seed; the global generator is left as it was."""
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
