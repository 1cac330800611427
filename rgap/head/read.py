"""The head: from the last layer's gradient to hypotheses on label, output gradient and input.

For one sample the gradient of a linear layer is the rank-one G = δz xᵀ. The loss ties δz to z = W x + b, so that the
length of x, too, follows from G. One module a loss.
"""

from __future__ import annotations

from rgap.head.hypothesis import HeadReading, Hypothesis
from rgap.head.logistic import C_MINIMUM, MU_AT_MINIMUM, logistic_hypotheses, margins, read_logistic
from rgap.head.softmax import read_softmax
from rgap.head.squared import read_squared
from rgap.network.layer import Layer
from rgap.shared_gradient import SharedGradient

__all__ = ["C_MINIMUM", "MU_AT_MINIMUM", "HeadReading", "Hypothesis", "logistic_hypotheses", "margins", "read_head"]


def read_head(loss: str, layer: Layer, received: SharedGradient, known: int | None = None) -> HeadReading:
    """Every (label, scale) with which the loss explains the last layer's gradient.

    Gradients that no single sample has (of a batch, altered, noisy) get the nearest possible hypothesis and a note.

    Args:
        loss: A name in `rgap.client.LOSSES`, one that fits the layer's outputs.
        layer: The last layer.
        received: The gradients and their precision; the weight's is not zero.
        known: The label where it was given, within range; only its hypotheses are returned.

    Returns:
        The `HeadReading`.

    Raises:
        GradientMismatchError: If the gradient is plainly that of another label than the one given.
    """
    G = received.gradients[layer.weight_name].flatten(1)
    bias_gradient = received.gradients[layer.bias_name] if layer.bias_name else None
    read = {"logistic": read_logistic, "cross_entropy": read_softmax, "mse": read_squared}[loss]
    return read(layer, G, bias_gradient, received.precision, received.tolerance, known)
