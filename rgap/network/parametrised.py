"""Weights that are computed from other parameters: their values at this moment, and their gradient from the shared one.

A client shares the gradients of the parametrisation's own parameters. Of a weight norm W = g v / ‖v‖ they determine the
weight's: ∂ℓ/∂g is its component along v and ∂ℓ/∂v, times ‖v‖ / g, the rest. Of an entrywise map W = φ(V) they are
∂ℓ/∂W ∘ φ′(V). Both are sums of factors times shared gradients. A spectral norm does not determine its weight's: scaling
V changes nothing, and the component along V is lost (all ours).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rgap.results import UnsupportedLayerError

Terms = tuple[tuple[str, Tensor], ...]  # (parameter name, factor): ∂ℓ/∂W is the sum of factor ∘ ∂ℓ/∂parameter


def current_weight(module: nn.Module) -> Tensor:
    """The module's weight as its next forward pass in eval mode computes it."""
    hook = _hook(module)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module).detach()
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False).detach()
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module).detach()
    if parametrize.is_parametrized(module, "weight"):
        with torch.no_grad():
            return _frozen(module.parametrizations["weight"])().detach()
    return module.weight.detach()


def weight_terms(module: nn.Module, title: str, names: Mapping[int, str]) -> Terms:
    """How the gradient of a computed weight follows from the shared ones, names by id; empty for a plain parameter.

    Raises an UnsupportedLayerError where it does not follow, or the weight is no parameter of the network.
    """
    hook, weight = _hook(module), module.weight
    if id(weight) in names:
        return ()
    if isinstance(hook, WeightNorm):
        g, v = (getattr(module, f"weight_{part}") for part in "gv")
        return _weight_norm(g, v, title, names)
    if isinstance(hook, BasePruningMethod):
        return _entrywise(module.weight_orig, module.weight_mask, "pruning", title, names)
    if parametrize.is_parametrized(module, "weight"):
        plist = module.parametrizations["weight"]
        kind = " and ".join(type(p).__name__.lstrip("_") for p in plist)
        if len(plist) == 1 and isinstance(plist[0], parametrizations._WeightNorm):
            return _weight_norm(plist.original0, plist.original1, title, names)
        if hasattr(plist, "original"):
            return _entrywise(plist.original, _entrywise_slope(plist), kind, title, names)
        raise UnsupportedLayerError(_undetermined(title, kind))
    raise UnsupportedLayerError(
        _undetermined(title, "SpectralNorm")
        if isinstance(hook, SpectralNorm)
        else f"the weight of layer {title} is no parameter of the network"
    )


def _frozen(plist: nn.Module) -> nn.Module:
    """A copy in eval mode: a spectral norm in training mode would change with every call."""
    return copy.deepcopy(plist).eval()


def _hook(module: nn.Module):
    kinds = (WeightNorm, SpectralNorm, BasePruningMethod)
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, kinds) and getattr(hook, "name", getattr(hook, "_tensor_name", "")) == "weight":
            return hook
    return None


def _weight_norm(g: Tensor, v: Tensor, title: str, names: Mapping[int, str]) -> Terms:
    g64, v64 = (t.detach().to("cpu", torch.float64) for t in (g, v))
    over = [axis for axis in range(v.ndim) if g.ndim == 0 or g.shape[axis] == 1]
    norm = v64.square().sum(over, keepdim=True).sqrt()
    if not (g64 != 0).all():
        raise UnsupportedLayerError(f"{_undetermined(title, 'WeightNorm')}: a g is zero, which hides v's gradient")
    return (names[id(v)], norm / g64), (names[id(g)], v64 / norm)


def _entrywise(original: Tensor, slope: Tensor | None, kind: str, title: str, names: Mapping[int, str]) -> Terms:
    if slope is None:
        raise UnsupportedLayerError(_undetermined(title, kind))
    if lost := int((slope == 0).sum()):
        raise UnsupportedLayerError(f"{_undetermined(title, kind)}: {lost} of {slope.numel()} entries are lost")
    return ((names[id(original)], 1 / slope.detach().to("cpu", torch.float64)),)


def _entrywise_slope(plist: nn.Module) -> Tensor | None:
    """φ′ of a parametrisation that acts on every entry by itself, or None."""
    plist = _frozen(plist)
    original = plist.original.detach().to("cpu", torch.float64)
    plist.double().cpu()

    def weight(value: Tensor) -> Tensor:
        return torch.func.functional_call(plist, {"original": value}, ())

    random = torch.randn(original.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        slope, moved = (torch.func.jvp(weight, (original,), (t,))[1] for t in (torch.ones_like(original), random))
    except RuntimeError:  # a map without forward derivatives
        return None
    if slope.shape != original.shape or not torch.allclose(moved, slope * random, rtol=1e-9, atol=1e-12):
        return None
    return slope


def _undetermined(title: str, kind: str) -> str:
    return (
        f"the weight of layer {title} is parametrised ({kind}), and its gradient does not follow from the shared ones"
    )
