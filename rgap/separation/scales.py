"""Labels and scales of separated inputs: what the layers above the separated one and the loss say about each image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from rgap.client import loss_value
from rgap.head.read import margins
from rgap.network.layer import Layer

UNLIKELY = 1e-2
"""Residual, relative to the gradient's size, above which a root of the softmax equations is no hypothesis."""


def output_jacobians(layers: Sequence[Layer], inputs: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Every layer's input for a batch of first inputs, and ∂f/∂z of every layer.

    Args:
        layers: Fully connected layers, in order; the last gives the outputs f.
        inputs: Inputs of the first, (B, n).

    Returns:
        Inputs of each layer, (B, n_i) each; ∂f/∂z_i, (B, C, n_{i+1}) each; and f (B, C).
    """
    received, slopes, x = [], [], inputs
    for layer in layers:
        received.append(x)
        z = x @ layer.weight.flatten(1).T + (0.0 if layer.bias is None else layer.bias)
        z = z.reshape(len(x), *layer.output_shape)
        slopes.append(layer.activation.derivative(z).flatten(1))
        x = layer.activation.forward(z).flatten(1)
    jacobians = [torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)]
    for layer, slope in zip(reversed(layers[1:]), reversed(slopes[:-1]), strict=True):
        jacobians.insert(0, slope[:, None] * (jacobians[0] @ layer.weight.flatten(1)))
    return received, jacobians, x


def output_gradients(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], inputs: Tensor, dz: Tensor, *, complete: bool
) -> tuple[Tensor, Tensor]:
    """∂ℓ/∂f of every image, from all gradients together (ours).

    Given the inputs, every gradient is linear in the B·C numbers c = ∂ℓ/∂f: G_i = Σ_b (∂f_b/∂z_i)ᵀ c_b x_{i,b}ᵀ. The
    normal equations need inner products only, and two steps of refinement against the gradients themselves restore what
    they lose.

    Args:
        layers: Fully connected layers, in order; the last gives the outputs.
        gradients: Parameter name -> gradient of the batch's loss, float64.
        inputs: Inputs of the first layer, (B, n).
        dz: ∂ℓ/∂z of the first layer, (B, h).
        complete: Whether these are all images of the batch. Otherwise only `dz` counts, which is free of the others.

    Returns:
        c (B, C) and the outputs f (B, C).
    """
    received, jacobians, outputs = output_jacobians(layers, inputs)
    if not len(inputs):
        return outputs, outputs
    c = torch.linalg.lstsq(jacobians[0].mT, dz[:, :, None]).solution[:, :, 0]
    if not complete:
        return c, outputs
    batch, classes = c.shape
    gram = c.new_zeros(batch * classes, batch * classes)
    for layer, x, J in zip(layers, received, jacobians, strict=True):
        flat = J.reshape(batch * classes, -1)
        same = x @ x.T + (layer.bias is not None)
        same = same.repeat_interleave(classes, 0).repeat_interleave(classes, 1)
        gram += flat @ flat.T * same / _size(layer, gradients)
    scale = gram.diagonal().rsqrt()
    scaled = scale[:, None] * gram * scale
    factor = torch.linalg.cholesky(scaled + 1e-14 * len(scaled) * torch.eye(len(scaled), dtype=c.dtype))
    for _ in range(3):
        right = torch.zeros_like(c)
        for layer, x, J in zip(layers, received, jacobians, strict=True):
            share = torch.einsum("bco,bc->bo", J, c)
            left = gradients[layer.weight_name].flatten(1) - share.T @ x
            projected = x @ left.T
            if layer.bias_name is not None:
                projected = projected + gradients[layer.bias_name] - share.sum(0)
            right += torch.einsum("bco,bo->bc", J, projected) / _size(layer, gradients)
        step = torch.cholesky_solve((scale * right.flatten())[:, None], factor)[:, 0] * scale
        c = c + step.reshape(c.shape)
    return c, outputs


def _size(layer: Layer, gradients: Mapping[str, Tensor]) -> Tensor:
    return gradients[layer.weight_name].square().sum().clamp(min=torch.finfo(torch.float64).tiny)


def scale_hypotheses(loss: str, f: Tensor, c: Tensor, fixed_scale: bool) -> tuple[list[tuple[int, float]], list[str]]:
    """Every (label, α) with which an image α x̂ explains its share of the gradient.

    x̂ has the outputs f and c = ∂ℓ/∂f; α x̂, α > 0, has the outputs α f and, since the share stays, ∂ℓ/∂f = c / α.

    Args:
        loss: "logistic" or "cross_entropy".
        f: Outputs of x̂, (C,).
        c: ∂ℓ/∂f of x̂ for this image's own loss (the batch's, times B), (C,).
        fixed_scale: Whether x̂ has its true length (with biases it has), so that α = 1.

    Returns:
        The hypotheses, and notes on what no image can have.

    Raises:
        ValueError: If the loss is another one.
    """
    if loss not in SCALES:
        raise ValueError(f"a batch with the {loss} loss cannot be taken apart yet; {' and '.join(SCALES)} can")
    if not c.any() or not torch.isfinite(c).all() or (not fixed_scale and not f.any()):
        return [], ["an image whose share of the gradient vanishes has no label and no scale"]
    return SCALES[loss](f.numpy(), c.numpy(), fixed_scale)


def share_residual(loss: str, f: Tensor, c: Tensor, label: int, alpha: float) -> float:
    """‖∂ℓ/∂f at (α f, label) − c / α‖ over the norm of the latter: whether one image α x̂ has this share.

    With biases, or three classes or more, it is an independent test: of equal images, and of the batch size.

    Args:
        loss: A loss that `scale_hypotheses` knows.
        f: Outputs of x̂, (C,).
        c: ∂ℓ/∂f of x̂ for this image's own loss, (C,).
        label: The label.
        alpha: The scale α.
    """
    outputs = (alpha * f)[None].detach().requires_grad_()
    with torch.enable_grad():
        (mine,) = torch.autograd.grad(loss_value(loss, outputs, torch.tensor([label])), outputs)
    return ((mine[0] - c / alpha).norm() / (c / alpha).norm().clamp(min=1e-300)).item()


def _logistic(f: np.ndarray, c: np.ndarray, fixed_scale: bool) -> tuple[list[tuple[int, float]], list[str]]:
    label = int(c[0] < 0)
    if fixed_scale:
        return [(label, 1.0)], []
    roots, notes = margins(float(c[0] * f[0]))
    found = [(label, (2 * label - 1) * mu / float(f[0])) for mu in roots]
    return [(label, alpha) for label, alpha in found if 0 < alpha < math.inf], notes


def _softmax(f: np.ndarray, c: np.ndarray, fixed_scale: bool) -> tuple[list[tuple[int, float]], list[str]]:
    """The label is the row of the most negative c; α(1 − p_y(α f)) = −c_y has few roots, and the other rows choose."""
    label = int(c.argmin())
    if fixed_scale:
        return [(label, 1.0)], []

    def shares(alpha):
        p = np.exp(alpha * (f - f.max()))
        p /= p.sum()
        p[label] = -(np.delete(p, label).sum())  # 1 − p_y without cancellation
        return alpha * p

    def own_row(log_alpha):
        return shares(math.exp(log_alpha))[label] - c[label]

    # p_y lies in (0, 1), so that α > −c_y; beyond 60 / spread of f the softmax has settled.
    low = math.log(max(-c[label], 1e-300))
    high = max(low, math.log(1e3 * max(-c[label], 1e-300)), math.log(60.0 / max(np.ptp(f), 1e-12))) + 1.0
    grid = np.linspace(low, high, 400)
    values = np.array([own_row(g) for g in grid])
    turns = np.flatnonzero(values[:-1] * values[1:] <= 0)
    roots = {math.exp(brentq(own_row, grid[i], grid[i + 1], xtol=1e-14)) for i in turns}
    if not roots:
        return [], ["the softmax equations of an image have no root: the gradient was altered, or the batch is larger"]
    misses = sorted((np.abs(shares(alpha) - c).max() / np.abs(c).max(), alpha) for alpha in roots)
    limit = max(UNLIKELY if len(f) == 2 else 0.0, 3 * misses[0][0])
    return [(label, alpha) for miss, alpha in misses if miss <= limit], []


SCALES = {"logistic": _logistic, "cross_entropy": _softmax}
"""Losses whose heads are known -> their hypotheses."""
