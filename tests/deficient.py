"""Small networks with layers short of full rank, and the problem that one such layer poses to the layer before it."""

import torch
from networks import conv_layer, rand, randn, sequential
from torch import nn

import rgap
from rgap.activations import Activation, leaky_relu
from rgap.beliefs import Open
from rgap.previous import previous_factors

TANH = Activation("tanh", torch.tanh, torch.atanh, lambda z: 1 - torch.tanh(z) ** 2)
ELU = Activation(
    "elu",
    nn.functional.elu,
    lambda x: torch.where(x > 0, x, torch.log1p(x.clamp(max=0))),
    lambda z: z.clamp(max=0).exp(),
)
ASINH = Activation("asinh", torch.asinh, torch.sinh, lambda z: (1 + z * z) ** -0.5)

TALL = (12, 4, 2, 2)  # on images of 3×12×12: 588 outputs of 432 inputs
SECOND = (TALL, (6, 3, 2, 1), (16, 3, 1, 1))  # the second convolution lacks 60


def convs(*specs, seed=0, bias=False, size=12, slope=0.2):
    """Convolutions (channels, kernel, stride, padding[, groups]) with LeakyReLU, and a logit, for (3, size, size)."""
    modules, channels = [], 3
    for outputs, kernel, stride, padding, *groups in specs:
        modules.append(nn.Conv2d(channels, outputs, kernel, stride, padding, 1, *(groups or [1]), bias=bias))
        modules.append(nn.LeakyReLU(slope) if slope != 1 else nn.Identity())
        channels, size = outputs, (size + 2 * padding - kernel) // stride + 1
    return sequential(*modules, nn.Flatten(), nn.Linear(channels * size * size, 1, bias=bias), seed=seed)


def attack(network, seed=0, size=12, dtype=torch.float32, **options):
    """The true image, what comes back, its PSNR, and the report of every layer."""
    image = rand(1, 3, size, size, seed=seed)
    network = network.to(dtype)
    gradients = rgap.client_gradients(network, image, torch.tensor([seed % 2]))
    result = rgap.reconstruct(network, gradients, (3, size, size), **options)
    psnr = rgap.metrics.psnr_db(result.images, image).item()
    return image, result, psnr, {report.name: report for report in result.layers}


def open_problem(count, activation=None, conv=None, size=8, seed=0, noise=1e-13):
    """x = σ(W x′ + b), of which `count` random directions are open: the `Open` and the true x."""
    layer = conv_layer(conv or nn.Conv2d(3, 12, 4, 2, 2, bias=False), size, size, seed)
    activation = activation or leaky_relu(0.2)
    image, dx = randn(*layer.input_shape, seed=seed), randn(*layer.output_shape, seed=seed + 1)
    z = layer.apply(image) + layer.pre_bias()
    previous, x = previous_factors(layer), activation.forward(z).flatten().numpy()
    G = (activation.derivative(z) * dx).flatten(1).numpy() @ previous.patches(image.flatten().numpy()).T
    N = torch.linalg.qr(randn(len(x), count, seed=seed + 2))[0].numpy()
    G = G.reshape(layer.weight.shape)
    return Open(x - N @ (N.T @ x), N, N[0, :0], activation, previous, G, dx.numpy(), noise), x
