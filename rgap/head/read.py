"""From the last layer's gradient to hypotheses on label, output gradient and input, for each loss.

For one sample the gradient of a linear layer is the rank-one G = δz xᵀ. The loss makes δz a function of z = W x + b, so
that the length of x also follows from G.
"""

from __future__ import annotations

from rgap.head.hypothesis import HeadGradient, HeadReading
from rgap.head.logistic import read_logistic
from rgap.head.softmax import read_softmax
from rgap.head.squared import read_squared
from rgap.network.layer import Layer
from rgap.results import GradientMismatchError
from rgap.shared_gradient import SharedGradient

READERS = {"logistic": read_logistic, "cross_entropy": read_softmax, "mse": read_squared}
"""Loss -> reader of its head."""


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
    return READERS[loss](HeadGradient(layer, G, bias, received.precision, received.tolerance, known))
