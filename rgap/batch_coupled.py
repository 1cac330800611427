"""Images that switch the same hidden units: told apart by the softmax, all at once (ours).

Where two images have the same signs, every mixture of them fits the spaces of both gradients, and no search through
these finds them. But ∂ℓ/∂f of an image is softmax(f) − onehot, and f follows from the image: B·(C − 1) equations for
the B² coordinates of B inputs in the row space of the first gradient. Near the initialisation, where features of all
images look alike, the outputs do too, and that is where a start comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.batch_heads import output_jacobians
from rgap.batch_refine import Head, refine_head
from rgap.batch_spans import Span
from rgap.chain import Layer

STARTS = 12
"""Starts, each with other guesses of the outputs; one where all labels differ is usual."""

SPREAD = 0.1
"""Standard deviation of the guessed outputs."""

SETTLE = 6
"""Rounds in which outputs and inputs are guessed in turn before they are fitted together."""


def fit_together(
    layers: Sequence[Layer],
    gradients: Mapping[str, Tensor],
    span: Span,
    *,
    labels: Sequence[int] | None,
    precision: float,
    seed: int = 0,
) -> tuple[Tensor, Head] | None:
    """Finds all inputs of the fully connected layers and their labels under cross-entropy.

    Args:
        layers: The fully connected layers, in order.
        gradients: Parameter name -> gradient of the mean loss, float64.
        span: `row_span` of the first layer; its rank is the number of images.
        labels: Labels if they are known, in any order.
        precision: Relative error of the gradients' entries.
        seed: Of the starts.

    Returns:
        Labels (B,) and the `Head`, or None where no start reproduces these layers' gradients, or the equations are no
        more than the unknowns.
    """
    count, classes = span.rank, layers[-1].output_shape[0]
    if count >= classes - 1:
        return None
    chosen = torch.tensor(labels) if labels is not None else _likely_labels(layers[-1], gradients, count)
    if len(chosen) != count:
        return None
    generator = torch.Generator().manual_seed(seed)
    for number in range(STARTS):
        spread = SPREAD * number / STARTS if len(chosen.unique()) == count else SPREAD
        guess = spread * torch.randn(count, classes, generator=generator, dtype=torch.float64)
        for x in _starts(layers, span, chosen, guess):
            head = refine_head(layers, gradients, x, chosen, "cross_entropy")
            if head.residual <= max(1e-9, 30 * precision):
                return chosen, head
    return None


def _likely_labels(last: Layer, gradients: Mapping[str, Tensor], count: int) -> Tensor:
    """Labels by the rows of the last gradient, for outputs that differ little among images and classes."""
    G = gradients[last.weight_name].flatten(1)
    if last.bias_name is not None:
        mean = gradients[last.bias_name]
    else:  # along what the hidden vectors have in common
        common = torch.linalg.svd(G, full_matrices=False)[2][0]
        rows = G @ common
        rows = rows if (rows > 0).sum() * 2 > len(rows) else -rows
        mean = rows / (len(rows) * rows[rows > 0].mean())
    counts = (count * (1 / len(mean) - mean)).clamp(min=0)
    whole = counts.floor().long()
    missing = max(count - int(whole.sum()), 0)
    whole[(counts - whole).argsort(descending=True)[:missing]] += 1
    return torch.repeat_interleave(torch.arange(len(mean)), whole)


def _starts(layers: Sequence[Layer], span: Span, labels: Tensor, outputs: Tensor) -> list[Tensor]:
    """Inputs (B, n) that guessed outputs (B, C) lead to, for both directions of what the inputs have in common."""
    n, onehot = layers[0].unknowns, F.one_hot(labels, outputs.shape[1]).to(outputs)
    V, K = span.V[:n], span.U * span.S
    if layers[0].bias is not None:
        common = [span.V[-1] / span.V[-1].square().sum()]
    else:
        common = [torch.eye(span.rank, dtype=V.dtype)[0] * sign for sign in (1.0, -1.0)]
    found = []
    for t in common:
        x, f = (V @ t).expand(len(labels), -1), outputs
        for _ in range(SETTLE):
            share = (f.softmax(1) - onehot) / len(labels)
            delta = torch.einsum("bc,bch->hb", share, output_jacobians(layers, x)[1][0])
            x = torch.linalg.lstsq(delta, K, driver="gelsd").solution @ V.T
            f = output_jacobians(layers, x)[2]
        if torch.isfinite(x).all():
            found.append(x)
    return found
