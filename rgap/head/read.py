"""From the last layer's gradient to hypotheses on label, output gradient and input, for each loss.

For one sample the gradient of a linear layer is the rank-one G = δz xᵀ. The loss makes δz a function of z = W x + b, so
that the length of x also follows from G.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rgap.head.activated import read_activated
from rgap.head.factor import with_factor
from rgap.head.fits import MAX_MISFIT
from rgap.head.hypothesis import HeadGradient, HeadReading
from rgap.head.logistic import read_logistic
from rgap.head.softmax import read_softmax
from rgap.head.squared import read_real_target, read_squared
from rgap.network.activations import IDENTITY
from rgap.network.layer import Layer
from rgap.results import GradientMismatchError
from rgap.shared_gradient.received import MAX_SQUARABLE, SharedGradient

REAL_TARGET_RATIO = 30.0  # noise of the last layer's gradient, times this, by which no label fits a real target
READERS = {"logistic": read_logistic, "cross_entropy": read_softmax, "mse": read_squared}  # loss -> reader of its head


def read_head(
    loss: str, layer: Layer, received: SharedGradient, known: int | Tensor | None = None, *,
    gradient_scale: float | None = 1.0, label_smoothing: float | None = 0.0,
) -> HeadReading:  # fmt: skip
    """Every (label, scale) with which the loss explains the last layer's gradient.

    Gradients that no single sample has (of a batch, altered, noisy) get the nearest possible hypothesis and a note. The
    layer is the last one, its weight's gradient not zero. `known` is the label where it was given, within range, or a
    real-valued target (C,): only its hypotheses are returned. The factor κ of the shared gradient κ ∇ℓ and the ε of the
    client's labels are estimated where they are None.

    Raises GradientMismatchError if the gradient is clearly that of another label than the one given, or that of the
    bias is absent where the loss needs it, or the gradient of a squared error has a size that no sample gives it.
    """
    G = layer.gradient(received.gradients).flatten(1)
    shared = received.usable.get(layer.bias_name)
    bias = shared if shared is not None and shared.any() else None
    if bias is None and layer.bias is not None and layer.bias.any() and loss != "cross_entropy":
        raise GradientMismatchError(
            f"the gradient of the last layer's bias {layer.bias_name!r} is zero or not shared; beside a bias the "
            f"{loss} loss needs it for the label and the scale"
        )
    factor, stds = gradient_scale or 1.0, received.entry_std
    std = layer.gradient_std(stds).flatten(1) / factor
    bias, bias_std = (None, None) if bias is None else (bias / factor, stds[layer.bias_name] / factor)
    known, target = (None, known) if isinstance(known, Tensor) else (known, None)
    head = HeadGradient(layer, G / factor, bias, received.precision, received.tolerance, known, std, bias_std, target)
    if loss == "mse" and not 1 / MAX_SQUARABLE < (largest := head.G.abs().max().item()) < MAX_SQUARABLE:
        raise GradientMismatchError(
            f"the last layer's gradient divided by gradient_scale has entries of {largest:.1e}; that of no squared "
            "error is so: give another gradient_scale, or none to have it estimated"
        )
    found = _read(loss, head, gradient_scale is not None, label_smoothing)
    if loss == "mse" and known is target is None and _is_no_label(head, found):
        found = read_real_target(head)
    return _scaled(found, factor)


def _read(loss: str, head: HeadGradient, given: bool, smoothing: float | None) -> HeadReading:
    """The hypotheses with labels, or with the target that was given."""
    if head.layer.activation is not IDENTITY or head.target is not None:
        return read_activated(loss, head, given=given, smoothing=smoothing or 0.0)
    asserted = {"given": given, "smoothing": smoothing}
    try:
        return with_factor(loss, head, READERS[loss](head), **asserted)
    except GradientMismatchError:
        found = with_factor(loss, head, READERS[loss](replace(head, known=None)), **asserted)
        if min((h.misfit for h in found.hypotheses), default=math.inf) > MAX_MISFIT or given:
            raise
        return found


def _is_no_label(head: HeadGradient, found: HeadReading) -> bool:
    """Whether no label explains the gradient, by more than noise and the client's arithmetic may.

    A single output without a bias has one equation, which labels fulfil, or the gradient's size is that of none.
    """
    if len(head.G) == 1 and head.bias is None:
        return False
    if all(h.length_error == math.inf for h in found.hypotheses):  # two outputs: labels fit with a factor of their own
        return True
    x, dz = found.hypotheses[0].x, found.hypotheses[0].dz
    rest = head.G - torch.outer(head.G @ x, x) / x.square().sum().clamp(min=torch.finfo(x.dtype).tiny)
    output_error = head.precision * (1 + (head.W @ x).norm())  # beside which an output may be close to its target
    noise = (rest.norm() / head.G.norm() + output_error / dz.norm()).item()
    return all(h.residual > max(head.tolerance, REAL_TARGET_RATIO * noise) for h in found.hypotheses)


def _scaled(found: HeadReading, factor: float) -> HeadReading:
    """A reading of a gradient that was divided by a given factor."""
    hypotheses = (replace(h, dz=factor * h.dz, gradient_scale=factor * h.gradient_scale) for h in found.hypotheses)
    return replace(found, hypotheses=tuple(hypotheses))
