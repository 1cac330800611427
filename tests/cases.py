"""What several tests draw: random layers and chains, batches through fully connected networks, layers short of rank."""

import copy
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

import rgap
from rgap.equations.weights import weight_matrix
from rgap.head import read_head
from rgap.network.activations import Activation, leaky_relu
from rgap.shared_gradient import receive
from rgap.virtual.inference import DeficientLayer
from rgap.virtual.previous import previous_factors

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
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 4))
    conv = nn.Conv2d(*channels, pair(1, 3), pair(1, 3), pair(0, 1), pair(1, 2), groups, draw(st.booleans()))
    return conv_layer(conv, *pair(5, 8), seed=draw(st.integers(0, 1000)))


@st.composite
def chains(draw):
    """A chain of one to four layers on an image of 8 to 16 pixels: (network, image, label)."""
    shape = (draw(st.sampled_from([1, 3])), draw(st.integers(8, 16)), draw(st.integers(8, 16)))
    bias, seed = draw(st.booleans()), draw(st.integers(0, 10_000))
    modules, channels, pixels = [], *shape[:1], shape[1:]
    for _ in range(draw(st.integers(0, 2))):
        kernel, stride, padding = map(draw, (st.integers(1, min(4, *pixels)), st.integers(1, 2), st.integers(0, 2)))
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


# Fully connected networks and batches.

SHAPE = (1, 6, 6)


def fcn(widths=(120, 30), outputs=1, bias=False, slope=0.2, seed=0, activation=None):
    """A float64 network for images of shape (1, 6, 6)."""
    modules = [nn.Flatten()]
    for inputs, count in pairwise((36, *widths, outputs)):
        modules += [nn.Linear(inputs, count, bias=bias), activation or nn.LeakyReLU(slope)]
    return sequential(*modules[:-1], seed=seed)


def batch(count, classes=2, seed=0):
    """Images that switch different units, and labels of every class."""
    images = rand(count, *SHAPE, seed=seed) ** 4
    return images, torch.arange(count) % classes


def gradients(network, images, labels, loss="logistic", dtype=torch.float32):
    return [g.to(dtype) for g in rgap.client_gradients(network, images, labels, loss)]


def by_name(network, tensors):
    return {n: g.double() for (n, _), g in zip(network.named_parameters(), tensors, strict=True)}


def directions(images):
    flat = images.double().flatten(1)
    return flat / flat.norm(dim=1, keepdim=True)


RELU = Activation("relu", torch.relu, torch.relu, lambda z: (z > 0).to(z.dtype), homogeneous=True)


# Networks with layers short of full rank, and the problem that such a layer poses to the layer before it.

TANH = Activation("tanh", torch.tanh, torch.atanh, lambda z: 1 - torch.tanh(z) ** 2)
ELU = Activation(
    "elu", F.elu, lambda x: torch.where(x > 0, x, torch.log1p(x.clamp(max=0))), lambda z: z.clamp(max=0).exp()
)
ASINH = Activation("asinh", torch.asinh, torch.sinh, lambda z: (1 + z * z) ** -0.5)

TALL = (12, 4, 2, 2)  # on images of 3×12×12: 588 outputs of 432 inputs
SECOND = (TALL, (6, 3, 2, 1), (16, 3, 1, 1))  # the second convolution lacks 60


def conv_stack(specs, size, bias=False, activation=None, slope=0.2):
    """Convolutions (channels, kernel, stride, padding[, groups]) for (3, size, size), flattened; and the features."""
    modules, channels = [], 3
    for outputs, kernel, stride, padding, *groups in specs:
        modules.append(nn.Conv2d(channels, outputs, kernel, stride, padding, 1, *(groups or [1]), bias=bias))
        modules.append(activation or nn.LeakyReLU(slope))
        channels, size = outputs, (size + 2 * padding - kernel) // stride + 1
    return [*modules, nn.Flatten()], channels * size * size


def convs(*specs, seed=0, bias=False, size=12, slope=0.2):
    """A `conv_stack` with LeakyReLU, and a logit."""
    modules, features = conv_stack(specs, size, bias, nn.Identity() if slope == 1 else None, slope)
    return sequential(*modules, nn.Linear(features, 1, bias=bias), seed=seed)


def attack(network, seed=0, size=12, dtype=torch.float32, **options):
    """The true image, what comes back, its PSNR, and the report of every layer."""
    image = rand(1, 3, size, size, seed=seed)
    network = network.to(dtype)
    gradients = rgap.client_gradients(network, image, torch.tensor([seed % 2]))
    result = rgap.reconstruct(network, gradients, (3, size, size), **options, gradient_scale=1.0)
    psnr = rgap.metrics.psnr_db(result.images, image).item()
    return image, result, psnr, {report.name: report for report in result.layers}


def matrix(rows, columns, singular_values, seed=0):
    """A matrix with those singular values."""
    count = min(rows, columns)
    U, V = torch.linalg.qr(randn(rows, count, seed=seed))[0], torch.linalg.qr(randn(columns, count, seed=seed + 1))[0]
    return U * torch.as_tensor(singular_values, dtype=torch.float64) @ V.T


def open_problem(count, activation=None, conv=None, size=8, seed=0, noise=1e-13):
    """x = σ(W x′ + b), of which `count` random directions are open: the `DeficientLayer` and the true x."""
    layer = conv_layer(conv or nn.Conv2d(3, 12, 4, 2, 2, bias=False), size, size, seed)
    activation = activation or leaky_relu(0.2)
    image, dx = randn(*layer.input_shape, seed=seed), randn(*layer.output_shape, seed=seed + 1)
    z = layer.apply(image) + layer.pre_bias()
    previous, x = previous_factors(layer), activation.forward(z).flatten().numpy()
    G = (activation.derivative(z) * dx).flatten(1).numpy() @ previous.patches(image.flatten().numpy()).T
    N = torch.linalg.qr(randn(len(x), count, seed=seed + 2))[0].numpy()
    G = G.reshape(layer.weight.shape)
    return DeficientLayer(x - N @ (N.T @ x), N, N[0, :0], activation, previous, G, dx.numpy(), noise), x


# One layer's equations for B images, by autograd and dense.


def layer_sample(layer, count=1, seed=0):
    """x, G, δz and z of several images that belong together; G by autograd."""
    x, dz = randn(count, *layer.input_shape, seed=seed), randn(count, *layer.output_shape, seed=seed + 1)
    weight = layer.weight.clone().requires_grad_()
    padded = F.pad(x, layer.padding)
    z = F.conv2d(padded, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    (G,) = torch.autograd.grad((z * dz).sum(), weight)
    return x, G, dz, z.detach()


def dense_system(layer, dz):
    """W and K of an ungrouped layer over all images, dense; K by autograd from the unit vectors."""
    W = torch.block_diag(*[torch.from_numpy(weight_matrix(layer).toarray())] * len(dz))
    weight, columns = layer.weight.clone().requires_grad_(), []
    for image in dz:
        for unit in torch.eye(layer.unknowns, dtype=dz.dtype).reshape(-1, *layer.input_shape):
            padded = F.pad(unit, layer.padding)[None]
            z = F.conv2d(padded, weight, None, layer.stride, 0, layer.dilation)
            columns.append(torch.autograd.grad((z[0] * image).sum(), weight)[0].flatten())
    return W, torch.stack(columns, 1)


def rendered(figure):
    """A figure's axes, once everything in it has been drawn."""
    figure.canvas.draw()
    return figure.axes


# Networks that are their last layer, and what its gradient allows.


def last_layer(classes, inputs, bias, seed, size=1.0):
    """A float64 network that is one linear layer, with logits of about that size."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes, bias=bias)).double()
    with torch.no_grad():
        model[1].weight.copy_(randn(classes, inputs, seed=seed) * size * (3 / inputs) ** 0.5)
        if bias:
            model[1].bias.copy_(randn(classes, seed=seed + 1) * size)
    return model


def read_sample(model, image, label, loss, dtype=torch.float64, known=None):
    """The head's reading of one sample's gradient, computed and shared in that format, and the gradient."""
    client = copy.deepcopy(model).to(dtype)
    gradients = rgap.client_gradients(client, image, torch.tensor([label]), loss)
    chain = rgap.prepare(client, image.shape[1:])
    return read_head(loss, chain.layers[-1], receive(chain, gradients), known), gradients


def easy_to_match(seed=0, classes=4, bias=True):
    """A network in float32 on which optimisers succeed: one convolution, sigmoids, wide weights."""
    modules = [nn.Conv2d(3, 12, 3, 2, 1, bias=bias), nn.Sigmoid(), nn.Flatten(), nn.Linear(192, classes, bias=bias)]
    return sequential(*modules, seed=seed, scale=2.0).float()


# Batches through convolutions and fully connected layers.

CNN_SHAPE = (3, 8, 8)
FULL = ((12, 4, 2, 1), (16, 3, 1, 1))


def batch_cnn(specs=FULL, head=(40, 5), bias=False, activation=None, dtype=torch.float64, size=8):
    """A `conv_stack`, then fully connected layers."""
    modules, features = conv_stack(specs, size, bias, activation)
    for inputs, outputs in pairwise((features, *head)):
        modules += [nn.Linear(inputs, outputs, bias=bias), nn.LeakyReLU(0.2)]
    return sequential(*modules[:-1]).to(dtype)


def shared_batch(model, count=3, classes=5, loss="cross_entropy"):
    images, labels = rand(count, *CNN_SHAPE) ** 2, torch.arange(count) % classes
    dtype = next(model.parameters()).dtype
    return images, labels, rgap.client_gradients(model, images.to(dtype), labels, loss)


def quality(result, images, labels):
    order = rgap.metrics.match(result.images, images)
    assert torch.equal(result.labels, labels[order])
    return rgap.metrics.psnr_db(result.images, images[order]).min()


def alike(count, dtype=torch.float64, bias=True):
    """A network in which biases dominate, so that all images switch the same units."""
    torch.manual_seed(0)
    modules = [nn.Conv2d(3, 12, 4, 2, 1, bias=bias), nn.LeakyReLU(0.2), nn.Conv2d(12, 16, 3, 1, 1, bias=bias)]
    modules += [nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 24, bias=bias), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*modules, nn.Linear(24, 8, bias=bias)).to(dtype)
    images, labels = 0.4 + 0.2 * rand(count, *CNN_SHAPE), torch.arange(count)
    return model, images, labels, rgap.client_gradients(model, images.to(dtype), labels, "cross_entropy")


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def dense_group(filters, channels, batch, kernel, stride, padding, dilation, image, seed):
    """(W, K) of one group on the stacked unknowns (image, channel, pixel), by applying torch's convolution to bases."""
    generator = torch.Generator().manual_seed(seed)
    taps, pixels = math.prod(kernel), math.prod(image)
    basis = torch.eye(channels * pixels, dtype=torch.float64).reshape(-1, channels, *image)
    basis = F.pad(basis, [n for pair in reversed(padding) for n in pair])
    every_weight = torch.eye(channels * taps, dtype=torch.float64).reshape(-1, channels, *kernel)
    reads = CONVOLUTIONS[len(image)](basis, every_weight, None, stride, 0, dilation).flatten(2)  # (n, C·t, P)
    weight = torch.randn(filters, channels * taps, generator=generator, dtype=torch.float64)
    dz = torch.randn(batch, filters, reads.shape[2], generator=generator, dtype=torch.float64)
    W = torch.einsum("ow,nwp->opn", weight, reads).flatten(0, 1)
    K = torch.einsum("bop,nwp->owbn", dz, reads).flatten(0, 1).flatten(1)
    return torch.block_diag(*[W] * batch), K


def random_layer(rng, usual, unknowns=140):
    """In one, two or three dimensions; of a network's usual shapes, or with any unequal numbers."""
    while True:
        axes, groups, batch = (int(rng.choice(v)) for v in ([1, 2, 2, 2, 3], [1, 1, 1, 2, 3], [1, 1, 2, 4]))
        count = 1 if usual else axes
        kernel, stride, dilation = (tuple(rng.integers(1, top, count).tolist()) * (axes // count) for top in (6, 4, 4))
        if usual:
            dilation = (int(rng.choice([1, 1, 2])),) * axes
            ends = [d * (k - 1) // 2 + 1 for k, d in zip(kernel, dilation, strict=True)]
            padding = tuple((int(rng.integers(0, end)),) * 2 for end in ends)
        else:
            padding = tuple(tuple(pair) for pair in rng.integers(0, 4, (axes, 2)).tolist())
        image = tuple(rng.integers(2, {1: 20, 2: 10, 3: 5}[axes], axes).tolist())
        channels, filters = groups * int(rng.integers(1, 5)), groups * int(rng.integers(1, 9))
        fits = all(n + sum(p) > d * (k - 1) for n, p, d, k in zip(image, padding, dilation, kernel, strict=True))
        if fits and batch * channels // groups * math.prod(image) <= unknowns:
            geometry = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "image": image}
            return {"in_channels": channels, "out_channels": filters, "groups": groups, "batch": batch} | geometry
