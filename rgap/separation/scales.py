"""Separated inputs, completed by the layers above and the loss: ∂ℓ/∂f, label and scale, and a joint refinement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from rgap.client import loss_value
from rgap.head.logistic import margins
from rgap.head.softmax import LabelEquations, log_scales, output_gradient
from rgap.linalg import norm
from rgap.network.layer import Layer

MAX_SCALE_RESIDUAL = 1e-2  # residual, over the gradient's size, above which a root for two classes is none
UNRELATED_RESIDUAL = 0.3  # the same for any number of classes: no image has a gradient with such a residual
OUTPUT_GRADIENT_ERROR = 1e-6  # relative error of ∂ℓ/∂f that weighs the softmax equations; its order matters
MAX_REFINED_IMAGES = 24  # largest batch whose inputs are refined: the Jacobian has B² columns
MAX_REFINEMENTS = 60  # limit on the evaluations of a refinement; from separated inputs two or three are usual


@dataclass(frozen=True)
class FittedInputs:
    """Inputs of the first fully connected layer, fitted to all gradients of these layers."""

    x: Tensor  # (B, n), with their true scale
    dx: Tensor  # gradient of the mean loss by them, (B, n)
    residual: float  # largest ‖g′ − g‖ / ‖g‖ of the fully connected gradients, within the span of the inputs


def output_jacobians(
    layers: Sequence[Layer], inputs: Tensor, W: Tensor | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """For inputs (B, n) of the first layer: every layer's input (B, n_i) and ∂f/∂z_i (B, C, n_{i+1}), and f (B, C).

    W is the first layer's weight where it acts on other coordinates of the inputs.
    """
    received, slopes, f = _forward(layers, inputs, layers[0].weight.flatten(1) if W is None else W)
    jacobians = [torch.eye(f.shape[1], dtype=f.dtype).expand(len(f), -1, -1)]
    for layer, slope in zip(reversed(layers[1:]), reversed(slopes[:-1]), strict=True):
        jacobians.insert(0, slope[:, None] * (jacobians[0] @ layer.weight.flatten(1)))
    return received, jacobians, f


def output_gradients(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], inputs: Tensor, dz: Tensor, *, complete: bool
) -> tuple[Tensor, Tensor]:
    """∂ℓ/∂f of every image, from all gradients together (ours).

    Given the inputs (B, n), every gradient is linear in the B·C numbers c = ∂ℓ/∂f: G_i = Σ_b (∂f_b/∂z_i)ᵀ c_b x_{i,b}ᵀ.
    The normal equations need inner products only, and two steps of iterative refinement against the gradients restore
    the lost digits. Where images of the batch are missing (not `complete`), c follows from `dz` (B, h) of the first
    layer alone, which does not depend on them. Gives c (B, C) and the outputs f (B, C).
    """
    received, jacobians, outputs = output_jacobians(layers, inputs)
    if not len(inputs):
        return outputs, outputs
    c = torch.linalg.lstsq(jacobians[0].mT, dz[:, :, None]).solution[:, :, 0]
    if not complete:
        return c, outputs
    sizes = [max(norm(layer.gradient(gradients)) ** 2, torch.finfo(c.dtype).tiny) for layer in layers]
    bases = [torch.linalg.qr(x.T) for x in received]
    seen = [layer.gradient(gradients).flatten(1) @ Q for layer, (Q, _) in zip(layers, bases, strict=True)]
    gram = c.new_zeros(c.numel(), c.numel())
    for layer, x, J, size in zip(layers, received, jacobians, sizes, strict=True):
        flat, classes = J.flatten(0, 1), c.shape[1]
        same = (x @ x.T + (layer.bias is not None)).repeat_interleave(classes, 0).repeat_interleave(classes, 1)
        gram += flat @ flat.T * same / size
    scale = gram.diagonal().rsqrt()
    scaled = scale[:, None] * gram * scale
    factor = torch.linalg.cholesky(scaled + 1e-14 * len(scaled) * torch.eye(len(scaled), dtype=c.dtype))
    for _ in range(3):
        right = torch.zeros_like(c)
        for layer, (_, R), G, J, size in zip(layers, bases, seen, jacobians, sizes, strict=True):
            dz = torch.einsum("bco,bc->bo", J, c)
            projected = R.T @ (G - dz.T @ R.T).T  # x = Rᵀ Qᵀ
            if layer.bias_name is not None:
                projected = projected + gradients[layer.bias_name] - dz.sum(0)
            right += torch.einsum("bco,bo->bc", J, projected) / size
        step = torch.cholesky_solve((scale * right.flatten())[:, None], factor)[:, 0] * scale
        c = c + step.reshape(c.shape)
    return c, outputs


def scale_hypotheses(loss: str, f: Tensor, c: Tensor, fixed_scale: bool) -> tuple[list[tuple[int, float]], list[str]]:
    """Every (label, α) with which an image α x̂ explains its share of the gradient, the best first, and notes.

    x̂ has the outputs f (C,) and c = ∂ℓ/∂f (C,) of the image's own loss (the batch's, times B). α x̂, α > 0, has the
    outputs α f and, since its share of the gradient is the same, ∂ℓ/∂f = c / α. With biases (`fixed_scale`) x̂ has its
    true length, and α = 1. Raises ValueError if the loss is neither "logistic" nor "cross_entropy".
    """
    if loss not in SCALES:
        raise ValueError(f"a batch with the {loss} loss cannot be taken apart yet; {' and '.join(SCALES)} can")
    if not c.any() or not torch.isfinite(c).all() or (not fixed_scale and not f.any()):
        return [], ["an image whose share of the gradient vanishes has no label and no scale"]
    return ([(label_of(c), 1.0)], []) if fixed_scale else SCALES[loss](f, c, label_of(c))


def label_of(c: Tensor) -> int:
    """The label of an image whose share has ∂ℓ/∂f = c (C,): only the label's own output is to rise."""
    return int(c.argmin()) if len(c) > 1 else int(c[0] < 0)


def share_residuals(loss: str, f: Tensor, c: Tensor, found: Sequence[tuple[int, float]]) -> Tensor:
    """‖∂ℓ/∂f at (α f, label) − c / α‖ over the norm of the latter: whether one image α x̂ has this share, (N,).

    For f and c (N, C) with a (label, α) each. With biases, or three classes or more, it is an independent test for
    equal images and of the batch size.
    """
    labels, alpha = torch.tensor([label for label, _ in found]), f.new_tensor([alpha for _, alpha in found])[:, None]
    mine, c = torch.func.grad(lambda f: len(f) * loss_value(loss, f, labels.long()))(alpha * f), c / alpha
    return (mine - c).norm(dim=1) / c.norm(dim=1).clamp(min=1e-300)


def _logistic(f: Tensor, c: Tensor, label: int) -> tuple[list[tuple[int, float]], list[str]]:
    roots, notes = margins((c[0] * f[0]).item())
    scales = [(2 * label - 1) * mu / f[0].item() for mu in roots]
    return [(label, alpha) for alpha in scales if 0 < alpha < math.inf], notes


def _softmax(f: Tensor, c: Tensor, label: int) -> tuple[list[tuple[int, float]], list[str]]:
    """The label is the row of the most negative c; α solves the head's equations for a last layer with outputs f."""
    size = c.abs().sum() / 2
    rows = LabelEquations(label, c / size, size * f, torch.zeros_like(f), OUTPUT_GRADIENT_ERROR, 1e-15)
    scales = [size.item() * math.exp(log_scale) for _, log_scale in log_scales(rows)]
    misses = sorted(((alpha * output_gradient(alpha * f, label) - c).abs().max().item(), alpha) for alpha in scales)
    largest = c.abs().max().item()
    if misses[0][0] > UNRELATED_RESIDUAL * largest:
        return [], ["the softmax equations of an image have no root: the gradient was altered, or the batch is larger"]
    limit = max(MAX_SCALE_RESIDUAL * largest if len(f) == 2 else 0.0, 3 * misses[0][0])
    return [(label, alpha) for miss, alpha in misses if miss <= limit], []


SCALES = {"logistic": _logistic, "cross_entropy": _softmax}  # losses whose equations are known -> their scales


def refine_inputs(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], x: Tensor, labels: Tensor, loss: str,
    weights: Tensor | None = None,
) -> FittedInputs:  # fmt: skip
    """Fits the inputs of the first fully connected layer, all together, to all gradients of these layers (ours).

    The search finds one input after the other, and each scale by itself. Together they are B² numbers, the coordinates
    of B linearly independent inputs x (B, n) in their span, and the fully connected gradients are smooth functions of
    these between the kinks: a few trust-region steps remove the errors of the separate solutions.
    """
    Q, R = torch.linalg.qr(x.T)
    W = layers[0].weight.flatten(1) @ Q
    target = [layers[0].gradient(gradients).flatten(1) @ Q]
    target += [layer.gradient(gradients).flatten(1) for layer in layers[1:]]
    target += [gradients[layer.bias_name] for layer in layers if layer.bias_name is not None]
    sizes = [g.norm().clamp(min=torch.finfo(g.dtype).tiny) for g in target]

    def misses(T: Tensor) -> list[Tensor]:
        mine, _ = _gradients(layers, W, T.reshape(R.shape), labels, loss, weights)
        return [((a - b) / size).flatten() for a, b, size in zip(mine, target, sizes, strict=True)]

    def residuals(T: NDArray) -> NDArray:
        return torch.cat(misses(torch.from_numpy(T))).numpy()

    def jacobian(T: NDArray) -> NDArray:  # that of r -> Jᵀ r, transposed: B² passes instead of one per residual
        miss, pull = torch.func.vjp(lambda t: torch.cat(misses(t)), torch.from_numpy(T))
        return torch.func.jacrev(lambda r: pull(r)[0])(torch.zeros_like(miss)).T.numpy()

    T = R.T.flatten()
    if len(x) <= MAX_REFINED_IMAGES and torch.cat(misses(T)).isfinite().all():
        from scipy.optimize import least_squares  # slow to import, and only batches need it

        options = {"ftol": 1e-3, "xtol": 1e-13, "gtol": None, "max_nfev": MAX_REFINEMENTS}
        T = torch.from_numpy(least_squares(residuals, T.numpy(), jacobian, **options).x)
    _, dz = _gradients(layers, W, T.reshape(R.shape), labels, loss, weights)
    dx = dz @ layers[0].weight.flatten(1)
    return FittedInputs(T.reshape(R.shape) @ Q.T, dx, max(part.norm().item() for part in misses(T)))


def _gradients(
    layers: Sequence[Layer], W: Tensor, T: Tensor, labels: Tensor, loss: str, weights: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """The gradients of all weights, then of all biases, for first inputs T (B, B) and weight W, and ∂ℓ/∂z_1 (B, h)."""
    received, slopes, f = _forward(layers, T, W)
    dz = torch.func.grad(lambda f: loss_value(loss, f, labels, weights=weights))(f)
    of_weights, of_biases = [], []
    for number in reversed(range(len(layers))):
        of_weights.insert(0, dz.T @ received[number])
        if layers[number].bias_name is not None:
            of_biases.insert(0, dz.sum(0))
        if number:
            dz = slopes[number - 1] * (dz @ layers[number].weight.flatten(1))
    return of_weights + of_biases, dz


def _forward(layers: Sequence[Layer], x: Tensor, W: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Every layer's input and slopes, and the outputs, for first inputs x (B, k) and W (h, k) as the first weight."""
    received, slopes = [], []
    for number, layer in enumerate(layers):
        received.append(x)
        z = x @ (layer.weight.flatten(1) if number else W).T
        z = (z if layer.bias is None else z + layer.bias).reshape(len(x), *layer.output_shape)
        slopes.append(layer.activation.derivative(z).flatten(1))
        x = layer.activation.forward(z).flatten(1)
    return received, slopes, x
