"""Identities of a layer's own gradient with (z, δz): a wrong label misses them before anything is solved (ours)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from rgap.network.layer import Layer

MAX_CHANNELS_TESTED = 32  # channels up to which every one is tested against the layer's identities
RANDOM_SUMS = 4  # sums of channels that are tested where there are more


def identity_residual(layer: Layer, G: Tensor, dz: Tensor, z: Tensor, known: Tensor | None = None) -> float:
    """How badly (z, δz) of all images fit the layer's own gradient, before anything is solved.

    ⟨G[o], W[o′]⟩ = Σ_b ⟨δz_b[o], z_b[o′] − b[o′]⟩ holds for every pair of channels of a group; the right pair (z, δz)
    fulfils it to rounding, one of the wrong label misses it by about its own size. Where z is not known everywhere, δz
    vanishes, and the identities with o = o′ still hold. Of more than `MAX_CHANNELS_TESTED` channels o, a few sums with
    random signs are tested.

    Args:
        layer: The layer.
        G: Gradient of the mean loss by the weight, shaped as the weight.
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).
        z: Pre-activations, (B, O, H′, W′).
        known: Mask of the entries of z that are known, (B, O, H′, W′), None for all.

    Returns:
        ‖left − right‖ / max(‖left‖, ‖right‖), the largest of the layer's groups; 0 where both sides vanish.
    """
    by_channel = (t.transpose(0, 1).flatten(1) for t in (dz, z - layer.pre_bias()))
    groups = (t.chunk(layer.groups) for t in (G.flatten(1), layer.weight.flatten(1), *by_channel))
    return max(_group_residual(*group, known is not None) for group in zip(*groups, strict=True))


def _group_residual(G: Tensor, W: Tensor, dz: Tensor, inputs: Tensor, same_channel: bool) -> float:
    """Of one group; all tensors have a row for each channel."""
    if same_channel:
        return _relative_gap((G * W).sum(1), (dz * inputs).sum(1))
    if len(G) > MAX_CHANNELS_TESTED:
        signs = _random_signs(len(G))
        G, dz = signs @ G, signs @ dz
    return _relative_gap(G @ W.T, dz @ inputs.T)


@cache
def _random_signs(channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2.0 * torch.randint(2, (RANDOM_SUMS, channels), generator=generator).to(torch.float64) - 1.0


def bias_residual(layer: Layer, gradient: Tensor, dz: Tensor) -> float:
    """How badly δz of all images fits the bias's own gradient, ∂ℓ/∂b[o] = Σ_b Σ_p δz_b[o, p].

    Args:
        layer: The layer.
        gradient: Of the mean loss by the bias, (O,).
        dz: Gradient of the mean loss by each image's pre-activation, (B, O, H′, W′).

    Returns:
        ‖left − right‖, relative to the larger of both and a thousandth of Σ |δz|, for both may vanish by cancellation.
    """
    dz = layer.conv_gradient(dz)
    if layer.output_scale is not None:
        dz = dz * layer.output_scale[:, None, None]
    return _relative_gap(gradient, dz.sum((0, 2, 3)), 1e-3 * dz.abs().sum((0, 2, 3)).norm().item())


def _relative_gap(left: Tensor, right: Tensor, floor: float = 0.0) -> float:
    scale = max(left.norm().item(), right.norm().item(), floor)
    return (left - right).norm().item() / scale if scale > 0 else 0.0
