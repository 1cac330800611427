"""Images with the same activation pattern: told apart by the softmax, all at once (ours).

Where two images have the same signs, every mixture of them lies in the row and column spaces of both gradients, and no
search of these spaces separates them. But ∂ℓ/∂f of an image is softmax(f) − onehot, and f follows from the image:
B·(C − 1) equations for the B² coordinates of B inputs in the row space of the first gradient. Near the initialisation
the features of all images are alike, and so are their outputs: guesses of these give the starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rgap.network.layer import Layer
from rgap.separation.scales import FittedInputs, output_jacobians, refine_inputs
from rgap.separation.subspaces import Span

MAX_STARTS = 12  # starts, each with other guesses of the outputs; where all labels differ one usually suffices
GUESS_STD = 0.1  # standard deviation of the guessed outputs
MAX_LABEL_GUESSES = 3  # guesses of the labels that are tried at each start
REFIT_RESIDUALS = (1e-13, 1e-5)  # residuals of a fit between which its inputs are computed once more, from its ∂ℓ/∂z_1
OUTPUT_ALTERNATIONS = 6  # rounds in which inputs and outputs are updated in turn before they are fitted together


def fit_joint_softmax(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], span: Span, *, labels: Sequence[int] | None,
    precision: float, seed: int = 0,
) -> tuple[Tensor, FittedInputs] | None:  # fmt: skip
    """All inputs of the fully connected layers and their labels (B,) under cross-entropy.

    None where no start reproduces the layers' gradients, or there are no surplus equations. B is the rank of `span`,
    the first layer's `row_span`; `labels` are given in any order, if they are known.
    """
    count, classes = span.rank, layers[-1].output_shape[0]
    if count >= classes - 1:
        return None
    guesses = [torch.tensor(labels)] if labels is not None else _likely_labels(layers[-1], gradients, count)
    guesses = [guess for guess in guesses if len(guess) == count]
    generator = torch.Generator().manual_seed(seed)
    for number in range(MAX_STARTS):
        noise = torch.randn(count, classes, generator=generator, dtype=torch.float64)
        for chosen in guesses:
            different = len(chosen.unique()) == count
            starts = _starts(layers, span, chosen, GUESS_STD * (number / MAX_STARTS if different else 1.0) * noise)
            if not (different or number):
                starts += _starts_within_classes(layers, gradients, span, chosen, noise)
            for x in starts:
                head = fit_and_refit(layers, gradients, x, chosen)
                if head.residual <= max(1e-9, 30 * precision):
                    return chosen, head
    return None


def fit_and_refit(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], x: Tensor, labels: Tensor, weights: Tensor | None = None,
) -> FittedInputs:  # fmt: skip
    """Refines inputs x (B, n) under cross-entropy, and once more from the inputs that follow from their ∂ℓ/∂z_1.

    The fit stays in the span of x, whose directions with small singular values are inaccurate; the fitted ∂ℓ/∂z_1 are
    more accurate than these, and with them the gradient gives better inputs.
    """
    head = refine_inputs(layers, gradients, x, labels, "cross_entropy", weights)
    if REFIT_RESIDUALS[0] < head.residual < REFIT_RESIDUALS[1]:
        dz = _pre_activation_gradients(layers, head.x, labels, output_jacobians(layers, head.x)[2])
        dz = dz if weights is None else dz * weights
        G = layers[0].gradient(gradients).flatten(1)
        x = torch.linalg.lstsq(dz, G, driver="gelsd").solution
        again = refine_inputs(layers, gradients, x, labels, "cross_entropy", weights)
        head = min(head, again, key=lambda one: one.residual)
    return head


def _starts_within_classes(
    layers: Sequence[Layer], gradients: Mapping[str, Tensor], span: Span, labels: Tensor, noise: Tensor
) -> list[Tensor]:
    """Starts for images of one class: first fitted as if they were equal, then moved apart along the rest of the span.

    Their ∂ℓ/∂z_1 are nearly parallel: they differ along a direction of the span with a small singular value, in which
    the residual is stationary where the images are equal.
    """
    Q, found = torch.linalg.qr(span.V[: layers[0].unknowns])[0], []
    for start in _starts(layers, span, labels, torch.zeros_like(noise)):
        x = refine_inputs(layers, gradients, start, labels, "cross_entropy").x
        unused = torch.linalg.svd(x @ Q)[2][len(labels.unique()) :]
        moves = noise[:, : len(unused)].clone()
        for label in labels.unique():
            moves[labels == label] -= moves[labels == label].mean(0)
        size = (x - x.mean(0)).norm() / moves.norm()
        found.append(x + size * moves @ unused @ Q.T)
    return found


def _likely_labels(last: Layer, gradients: Mapping[str, Tensor], count: int) -> list[Tensor]:
    """Labels from the rows of the last gradient, the likeliest first, for outputs that differ little among images.

    The rows of classes without an image are then nearly equal, a multiple of the mean hidden vector. The distances of
    the others from that row show which classes are present, and their components along it how many images each has.
    """
    G = last.gradient(gradients).flatten(1)
    classes = len(G)
    between = torch.cdist(G, G).fill_diagonal_(torch.inf)
    absent = G[list(divmod(int(between.argmin()), classes))].mean(0)
    far = (G - absent).norm(dim=1)
    if last.bias_name is not None:
        counts = count * (1 / classes - gradients[last.bias_name])
    else:
        counts = count * ((absent - G) @ absent) / (classes * absent.square().sum())
    order = far.argsort(descending=True)
    gaps = far[order][:count] / far[order][1 : count + 1].clamp(min=torch.finfo(G.dtype).tiny)
    ranked = gaps.argsort(descending=True).tolist()[:MAX_LABEL_GUESSES]
    numbers = [one for k in ranked for one in _whole_numbers(counts, order[: k + 1], count)]
    return [torch.repeat_interleave(torch.arange(classes), one) for one in numbers[:MAX_LABEL_GUESSES]]


def _whole_numbers(counts: Tensor, present: Tensor, total: int) -> list[Tensor]:
    """The numbers of images, at least one of each present class, nearest to these counts, and the second nearest."""
    whole = torch.zeros(len(counts), dtype=torch.int64)
    whole[present] = 1
    for _ in range(total - len(present)):
        whole[present[(counts - whole)[present].argmax()]] += 1
    cost = (whole - counts)[present]
    change = torch.where(whole[present] > 1, 1 - 2 * cost, torch.inf)[:, None] + 1 + 2 * cost  # one image from a to b
    change.fill_diagonal_(torch.inf)
    a, b = divmod(int(change.argmin()), len(present))
    if change[a, b] == torch.inf:
        return [whole]
    return [whole, whole - F.one_hot(present[a], len(whole)) + F.one_hot(present[b], len(whole))]


def _starts(layers: Sequence[Layer], span: Span, labels: Tensor, outputs: Tensor) -> list[Tensor]:
    """Inputs (B, n) that follow from guessed outputs (B, C), for either sign of the component that all inputs share."""
    n = layers[0].unknowns
    V, K = span.V[:n], span.U * span.S
    if layers[0].bias is not None:
        common = [span.V[-1] / span.V[-1].square().sum()]
    else:
        common = [torch.eye(span.rank, dtype=V.dtype)[0] * sign for sign in (1.0, -1.0)]
    found = []
    for t in common:
        x, f = (V @ t).expand(len(labels), -1), outputs
        for _ in range(OUTPUT_ALTERNATIONS):
            dz = _pre_activation_gradients(layers, x, labels, f)
            x = torch.linalg.lstsq(dz, K, driver="gelsd").solution @ V.T
            f = output_jacobians(layers, x)[2]
        if torch.isfinite(x).all():
            found.append(x)
    return found


def _pre_activation_gradients(layers: Sequence[Layer], x: Tensor, labels: Tensor, outputs: Tensor) -> Tensor:
    """∂ℓ/∂z_1 of inputs (B, n) with these outputs (B, C), as columns, (h, B)."""
    c = (outputs.softmax(1) - F.one_hot(labels, outputs.shape[1]).to(outputs)) / len(labels)
    return torch.einsum("bc,bch->hb", c, output_jacobians(layers, x)[1][0])
