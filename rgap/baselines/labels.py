"""Labels from the last layer's gradient, in the way of iDLG, where they are not known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rgap.baselines.matching import Matching


def label_choices(problem: Matching, labels: Tensor | Sequence[int] | None) -> list[Tensor]:
    """The labels to try: those that were given, or what the last layer's gradient allows for a single image.

    For softmax cross-entropy the gradient by the outputs is negative at the label alone (Zhao et al. 2020, iDLG): with
    a bias it is the bias's gradient, without one the label's row of G = δz xᵀ is the one that points against the
    others. A single output leaves two labels, unless its bias's gradient tells the sign.

    Args:
        problem: The gradients.
        labels: Labels if they are known, (B,).

    Returns:
        One or more tensors (B,), int64.

    Raises:
        ValueError: If labels are given in another number, or are needed and missing.
    """
    count = problem.shape[0]
    if labels is not None:
        known = torch.as_tensor(labels)
        if known.shape != (count,) or known.is_floating_point():
            raise ValueError(f"labels are {known.tolist()}; give an integer for each of the {count} images, or None")
        return [known.to(problem.device)]
    if count > 1:
        raise ValueError(f"labels are missing; of {count} images in one gradient they are not inferred, give them")
    found = _from_head(problem)
    if not found:
        raise ValueError(f"labels are missing; the {problem.loss} loss of this network does not tell them, give them")
    return [torch.tensor([label], device=problem.device) for label in found]


def _from_head(problem: Matching) -> list[int]:
    *_, last = problem.received.gradients.values()
    bias = last if last.ndim == 1 else None
    weights = [g for g in problem.received.gradients.values() if g.ndim == 2]
    G = weights[-1] if weights else last
    outputs = len(G)
    if bias is not None and len(bias) != outputs:
        bias = None
    if outputs == 1:
        return [0, 1] if bias is None or problem.loss == "mse" else [int(bias.item() < 0)]
    if problem.loss != "cross_entropy":
        return []
    if bias is not None:
        return [int(bias.argmin())]
    if outputs == 2:
        return [0, 1]  # two rows that point against each other
    unit = G / G.abs().max()
    products = unit @ unit.T
    return [int((products.sum(1) - products.diagonal()).argmin())]
