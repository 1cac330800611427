"""Random layers and networks that the engine's tests draw, and the settings they draw with."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import rgap

drawn = settings(deadline=None, derandomize=True, max_examples=40)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequential(*modules, seed=0, scale=None):
    """A float64 network with weights from the seed, each weight times `scale` where that is given."""
    network = nn.Sequential(*modules).double()
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            fan = p[0].numel() if p.ndim > 1 else 10
            p.copy_(randn(*p.shape, seed=seed + i) * fan**-0.5)
            if scale is not None and p.ndim > 1:
                p.mul_(scale)
    return network


def conv_layer(conv, height, width, seed=0):
    """The prepared `Layer` of one convolution on images of that size."""
    outputs = conv(torch.zeros(1, conv.in_channels, height, width)).numel()
    network = sequential(conv, nn.Flatten(), nn.Linear(outputs, 1), seed=seed)
    return rgap.prepare(network, (conv.in_channels, height, width)).layers[0]


def small_cnn(seed=0, bias=False, slope=0.2, scale=None):
    """For images of shape (3, 8, 8), every layer of full rank."""
    modules = [nn.Conv2d(3, 12, 3, 2, 1, bias=bias), nn.LeakyReLU(slope), nn.Conv2d(12, 10, 3, 1, 1, bias=bias)]
    modules += [nn.LeakyReLU(slope), nn.Flatten(), nn.Linear(160, 1, bias=bias)]
    return sequential(*modules, seed=seed, scale=scale)


@st.composite
def conv_layers(draw):
    """Convolutions with unequal kernels, strides, paddings and dilations, groups too, on 4 to 8 pixels."""

    def pair(low, high):
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    conv = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 4)),
        pair(1, 3),
        pair(1, 3),
        pair(0, 1),
        pair(1, 2),
        groups,
        draw(st.booleans()),
    )
    return conv_layer(conv, *pair(5, 8), seed=draw(st.integers(0, 1000)))


@st.composite
def chains(draw):
    """A chain of one to four layers on an image of 8 to 16 pixels: (network, image, label)."""
    shape = (draw(st.sampled_from([1, 3])), draw(st.integers(8, 16)), draw(st.integers(8, 16)))
    bias, seed = draw(st.booleans()), draw(st.integers(0, 10_000))
    modules, channels, pixels = [], *shape[:1], shape[1:]
    for _ in range(draw(st.integers(0, 2))):
        kernel, stride, padding = (
            draw(st.integers(1, min(4, *pixels))),
            draw(st.integers(1, 2)),
            draw(st.integers(0, 2)),
        )
        modules.append(nn.Conv2d(channels, channels := draw(st.integers(4, 12)), kernel, stride, padding, bias=bias))
        modules.append(nn.LeakyReLU(draw(slopes)))
        pixels = [(n + 2 * padding - kernel) // stride + 1 for n in pixels]
    modules.append(nn.Flatten())
    features = channels * pixels[0] * pixels[1]
    for _ in range(draw(st.integers(0, 1))):
        modules += [nn.Linear(features, features := draw(st.integers(1, 40)), bias=bias), nn.LeakyReLU(draw(slopes))]
    network = sequential(*modules, nn.Linear(features, 1, bias=bias), seed=seed)
    return network, shape, rand(1, *shape, seed=seed), torch.tensor([draw(st.integers(0, 1))])


slopes = st.one_of(st.sampled_from([0.01, 0.2, 1.0]), st.floats(1e-2, 5))
