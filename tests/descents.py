"""Batches through convolutions on (3, 12, 12), and their descent from the fully connected layers."""

import torch
import torch.nn.functional as F
from cases import batch_cnn, rand
from torch import nn

import rgap
from rgap.attack.descent import close_by_virtual_constraints, descend
from rgap.head.hypothesis import Start, Twin
from rgap.results import LayerReport
from rgap.separation.subspaces import first_dense
from rgap.shared_gradient import receive


def deep_cnn(*specs, bias=False, activation=None, classes=5):
    """Convolutions for (3, 12, 12), then two linear layers."""
    return batch_cnn(specs, (30, classes), bias, activation, size=12)


def batch_descent(model, count, dtype=torch.float64, close=close_by_virtual_constraints, **options):
    """True images, the chain, and the descent from what autograd in the client's precision has at the head."""
    images, labels = rand(count, 3, 12, 12), torch.arange(count) % 5
    model = model.to(dtype)
    cut = next(i for i, m in enumerate(model) if isinstance(m, nn.Flatten)) + 1
    features = model[:cut](images.to(dtype)).detach().requires_grad_()
    F.cross_entropy(model[cut:](features), labels).backward()
    gradients = rgap.client_gradients(model, images.to(dtype), labels, loss="cross_entropy")
    chain = rgap.prepare(model, (3, 12, 12))
    start = start_at(first_dense(chain), features.detach().double(), features.grad.double())
    return images, chain, descend(chain, receive(chain, gradients), start, close=close, **options)


def start_at(layer, x, dx):
    """All images at a layer, whatever their labels."""
    labels = torch.zeros(len(x), dtype=torch.int64)
    return Start(layer, labels, x, dx, ((Twin(0),),) * len(x), (LayerReport("head", x[0].numel()),), batch_size=len(x))
