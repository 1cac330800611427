"""How many images of a batch peel off, predicted from how often the units of a layer are switched on (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.network.chain import Chain
from rgap.network.layer import Layer

WHOLE_SHARE = 0.95  # share of a batch that peels off from which on it counts as whole


def active_shares(chain: Chain, layer: Layer, images: Tensor) -> Tensor:
    """For every unit of a fully connected layer the share of images (N, …) that switch it on, (h,)."""
    with torch.no_grad():
        x = chain.layer_inputs(images)[layer.name].reshape(len(images), *layer.input_shape)
        z = layer.apply(x) + layer.pre_bias()
    return (z.flatten(1) > 0).double().mean(0)


def predicted_share(active: Tensor, batch: int, seed: int = 0, *, both_ends: bool = True) -> float:
    """The share of a batch that peels off, if units are switched on independently, each with its own probability.

    `active` (h,) is the probability that an image switches a unit on. With `both_ends` a unit shows the only image left
    that does not switch it on, as well as the only one that does.
    """
    on = torch.rand(len(active), batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    on = on < active[:, None]
    left = torch.ones(batch, dtype=torch.bool)
    while left.any():
        count = on[:, left].sum(1)
        alone = on[count == 1].any(0)
        if both_ends:
            alone |= ~on[count == left.sum() - 1].all(0)
        if not (alone & left).any():
            break
        left &= ~alone
    return 1 - left.double().mean().item()


def largest_peeled(active: Tensor, most: int, *, both_ends: bool = True) -> int:
    """The largest batch, of `most` images at most, that is predicted to peel whole; by bisection."""
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        whole = predicted_share(active, middle, both_ends=both_ends) >= WHOLE_SHARE
        low, high = (middle, high) if whole else (low, middle)
    return low
