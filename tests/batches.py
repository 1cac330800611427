"""Fully connected networks and batches that the tests of mini-batches draw."""

from itertools import pairwise

import torch
from networks import rand, sequential
from torch import nn

import rgap
from rgap.activations import Activation

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
