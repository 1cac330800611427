"""From the last layer's gradient to hypotheses on label, output gradient and input, for each loss.

For one sample the gradient of a linear layer is the rank-one G = δz xᵀ. The loss makes δz a function of z = W x + b, so
that the length of x also follows from G.
"""

from __future__ import annotations

import math
from dataclasses import replace

from rgap.head.activated import read_activated
from rgap.head.factor import with_factor
from rgap.head.fits import MAX_MISFIT
from rgap.head.hypothesis import HeadGradient, HeadReading
from rgap.head.logistic import read_logistic
from rgap.head.softmax import read_softmax
from rgap.head.squared import read_squared
from rgap.network.activations import IDENTITY
from rgap.network.layer import Layer
from rgap.results import GradientMismatchError
from rgap.shared_gradient import SharedGradient

READERS = {"logistic": read_logistic, "cross_entropy": read_softmax, "mse": read_squared}
"""Loss -> reader of its head."""


def read_head(
    loss: str,
    layer: Layer,
    received: SharedGradient,
    known: int | None = None,
    *,
    gradient_scale: float | None = 1.0,
    label_smoothing: float | None = 0.0,
) -> HeadReading:
    """Every (label, scale) with which the loss explains the last layer's gradient.

    Gradients that no single sample has (of a batch, altered, noisy) get the nearest possible hypothesis and a note.

    Args:
        loss: A name in `rgap.client.LOSSES`, one that fits the layer's outputs.
        layer: The last layer.
        received: The gradients and their precision; the weight's is not zero.
        known: The label where it was given, within range; only its hypotheses are returned.
        gradient_scale: Factor κ of the shared gradient κ ∇ℓ; None to estimate it.
        label_smoothing: ε of the client's labels; None to estimate it, where the equations ask for it.

    Returns:
        The `HeadReading`.

    Raises:
        GradientMismatchError: If the gradient is clearly that of another label than the one given, or that of the bias
            is absent where the loss needs it.
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
    head = HeadGradient(layer, G / factor, bias, received.precision, received.tolerance, known, std, bias_std)
    if layer.activation is not IDENTITY:
        found = read_activated(loss, head, given=gradient_scale is not None, smoothing=label_smoothing or 0.0)
        return _scaled(found, factor)
    asserted = {"given": gradient_scale is not None, "smoothing": label_smoothing}
    try:
        found = with_factor(loss, head, READERS[loss](head), **asserted)
    except GradientMismatchError:
        found = with_factor(loss, head, READERS[loss](replace(head, known=None)), **asserted)
        if min((h.misfit for h in found.hypotheses), default=math.inf) > MAX_MISFIT or asserted["given"]:
            raise
    return _scaled(found, factor)


def _scaled(found: HeadReading, factor: float) -> HeadReading:
    """A reading of a gradient that was divided by a given factor."""
    hypotheses = (replace(h, dz=factor * h.dz, gradient_scale=factor * h.gradient_scale) for h in found.hypotheses)
    return replace(found, hypotheses=tuple(hypotheses))
