"""A copy of a network with another width or stride of one convolution, and what follows adapted to it."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn

from rgap.network.steps import Step
from rgap.network.tracing import trace
from rgap.ranks.steps import is_layer
from rgap.results import UnsupportedLayerError

CONVOLUTIONS = {nn.Conv1d: nn.LazyConv1d, nn.Conv2d: nn.LazyConv2d, nn.Conv3d: nn.LazyConv3d}
NORMS = {nn.BatchNorm1d: nn.LazyBatchNorm1d, nn.BatchNorm2d: nn.LazyBatchNorm2d, nn.BatchNorm3d: nn.LazyBatchNorm3d}


def chain_steps(model: nn.Module, image_shape: tuple[int, ...]) -> list[Step]:
    """The steps of a network that is a chain, in order; none where paths part or meet, or a layer is used twice."""
    steps = [step for step in trace(model, image_shape) if step.output_shape]
    follows = all(after.sources == (before.name,) for before, after in itertools.pairwise(steps))
    once = len({id(step.module) for step in steps if is_layer(step)}) == sum(map(is_layer, steps))
    return steps if follows and once else []


def with_convolution(
    model: nn.Module, image_shape: tuple[int, ...], path: str, *, out_channels: int | None = None,
    stride: int | None = None, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """Copies a network that is a chain, with another width or stride of the convolution at `path`, in eval mode.

    The next layer and the normalisations before it take the new channels, the first linear layer the new number of
    features. Changed layers get torch's default initialisation from the seed, all others share their weights with the
    model, which stays unchanged.

    Raises:
        UnsupportedLayerError: If the network is no chain, the path is no convolution without groups, or something that
            follows cannot be adapted.
        ValueError: If the changed shapes do not fit together.
    """
    steps = chain_steps(model, image_shape)
    places = [i for i, step in enumerate(steps) if step.path == path and type(step.module) in CONVOLUTIONS]
    if not places or steps[places[0]].module.groups != 1:
        raise UnsupportedLayerError(f"{path!r} is no convolution without groups in a chain of layers")
    new = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new.set_submodule(path, _lazy_layer(steps[places[0]], out_channels, stride))
        _adapt(new, steps[places[0] + 1 :], channels=out_channels is not None, sizes=stride is not None)
        parameter = steps[places[0]].module.weight
        with torch.no_grad():
            try:
                new(torch.zeros(1, *image_shape, dtype=parameter.dtype, device=parameter.device))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{path!r} does not fit the network with this change: {reason}") from error
    return new.eval()


def _adapt(model: nn.Module, following: Sequence[Step], *, channels: bool, sizes: bool) -> None:
    """Replaces what depends on new channels or sizes by lazy modules, which infer theirs in their first run."""
    for step in following:
        if is_layer(step):
            is_linear = isinstance(step.module, nn.Linear)
            if channels or (sizes and is_linear):
                model.set_submodule(step.path, _lazy_layer(step))
            channels, sizes = False, sizes and not is_linear
        elif channels and step.module is not None and any(p.numel() > 1 for p in step.module.parameters()):
            model.set_submodule(step.path, _lazy_norm(step))


def _lazy_norm(step: Step) -> nn.Module:
    old = step.module
    if type(old) not in NORMS:
        raise UnsupportedLayerError(f"{step.title} has a weight for each channel and cannot be adapted here")
    return NORMS[type(old)](eps=old.eps, momentum=old.momentum, affine=old.affine, **_placed(old))


def _lazy_layer(step: Step, out_channels: int | None = None, stride: int | None = None) -> nn.Module:
    old = step.module
    options = {"bias": old.bias is not None, **_placed(old)}
    if isinstance(old, nn.Linear):
        if math.prod(step.input_shape) != old.in_features:
            raise UnsupportedLayerError(f"{step.title} works on several places at once and cannot be adapted here")
        return nn.LazyLinear(old.out_features, **options)
    if type(old) not in CONVOLUTIONS or old.groups != 1:
        raise UnsupportedLayerError(f"{step.title} has groups and cannot be adapted here")
    shape = (out_channels or old.out_channels, old.kernel_size, stride or old.stride, old.padding, old.dilation)
    return CONVOLUTIONS[type(old)](*shape, padding_mode=old.padding_mode, **options)


def _placed(module: nn.Module) -> dict:
    parameter = next(module.parameters())
    return {"dtype": parameter.dtype, "device": parameter.device}
