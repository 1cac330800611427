"""From an `nn.Module` to the chain of layers that the recursion walks: its traced operations, folded one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from rgap.arguments import check_image_shape, check_model
from rgap.isolation import isolated
from rgap.models import trained_names
from rgap.network.folding import Folder, parameter_copy
from rgap.network.forward import select_output
from rgap.network.layer import Chain, Layer
from rgap.network.operations import is_log_softmax
from rgap.network.steps import Step
from rgap.network.tracing import trace
from rgap.results import UnsupportedLayerError

__all__ = ["Chain", "Layer", "prepare"]


@isolated()
def prepare(model: nn.Module | Chain, image_shape: tuple[int, ...], *, output: str | int | None = None) -> Chain:
    """Makes the chain that `rgap.reconstruct` walks; pass it instead of the model to attack many gradients.

    Args:
        model: A chain of convolutions and linear layers with activations between them, and with the pooling, padding
            and normalisation that `rgap.network.folding` folds into these. A `Chain` is returned as it is.
        image_shape: (C, H, W) of one image; (C, L) and (n,) are taken too.
        output: Name or place of the output that the loss is taken on, where the network gives several; the first tensor
            by default.

    Returns:
        A `Chain` with float64 copies of the weights. It keeps factorisations, which are computed on first use.

    Raises:
        UnsupportedLayerError: If the network is no such chain; the message has the first offending step and the reason.
        ValueError: If the image shape does not fit the network, or a parameter has no values.

    Example:
        >>> import rgap
        >>> chain = rgap.prepare(rgap.models.cnn6(seed=0), image_shape=(3, 32, 32))
        >>> len(chain.layers), chain.layers[0].input_shape
        (7, (3, 32, 32))
    """
    if not isinstance(model, Chain):
        check_model(model)
    image_shape = check_image_shape(image_shape)
    if isinstance(model, Chain):
        if image_shape != model.image_shape:
            raise ValueError(f"image_shape is {image_shape}; the chain was prepared for images {model.image_shape}")
        return model
    if len(image_shape) > 3:
        raise ValueError(f"image_shape is {image_shape}; it must be (channels, height, width) or (channels, length)")
    model = select_output(model, output)
    return chain_of_steps(model, image_shape, trace(model, image_shape))


def chain_of_steps(model: nn.Module, image_shape: tuple[int, ...], traced: Sequence[Step]) -> Chain:
    """The chain of a network that was traced; errors as from `prepare`."""
    steps = [step for step in traced if step.used]
    constants = {step.name for step in steps if step.kind == "constant"}
    main = [step for step in steps if step.kind != "constant"]
    end, dim = main[-1], (*main[-1].arguments, None)[0]
    log_softmax = is_log_softmax(end.module or end.operation, end.options.get("dim", dim))
    names = {id(p): name for name, p in model.named_parameters()}
    folder, previous = Folder(names, trained_names(model), []), None
    for step in main[: -1 if log_softmax else None]:
        sources = tuple(name for name in step.sources if name not in constants)
        if step.kind == "unsupported":
            raise UnsupportedLayerError(f"layer {step.title} cannot be inverted: {step.reason}")
        if previous is not None and sources != (previous,):
            raise UnsupportedLayerError(
                f"layer {step.title} does not follow the one before it: branches and skip connections are not chains"
            )
        previous = step.name
        folder.take(step)
    layers = folder.finish()
    if blind := [layer.name for layer in layers if not _reads_a_pixel(layer)]:
        raise UnsupportedLayerError(f"layer {blind[0]!r} reads only padding: its output is the same for every image")
    _check_parameters(layers, steps, folder.names)
    last = layers[-1]
    if not last.is_dense or last.is_fixed or last.output_scale is not None or folder.order is not None:
        raise UnsupportedLayerError(
            f"the last layer {last.name!r} must be a Linear, with nothing but activations between it and the loss"
        )
    parameters = {name: parameter_copy(p) for name, p in model.named_parameters()}
    return Chain(model, image_shape, tuple(layers), parameters, log_softmax)


def _reads_a_pixel(layer: Layer) -> bool:
    """Whether a convolution's kernel meets its input anywhere, and not only the zeros around."""
    if layer.is_dense or layer.before is not None:
        return True
    ones, kernel = (torch.ones(1, 1, *sides) for sides in (layer.input_shape[1:], layer.weight.shape[2:]))
    met = F.conv2d(F.pad(ones, layer.padding), kernel, stride=layer.stride, dilation=layer.dilation)
    return bool(met.any())


def _check_parameters(layers: list[Layer], steps: list[Step], names: dict[int, str]) -> None:
    """A weight must be used once: a shared one gets the sum of several gradients. Parameters without use have none."""
    if all(layer.is_fixed for layer in layers):
        raise UnsupportedLayerError("the network has no linear layer and so no gradient to attack")
    read = [step.module.parameters() if step.module is not None else [step.value] for step in steps]
    uses = Counter(id(value) for values in read for value in values)
    weights = {name for layer in layers for name in (*layer.weight_names, layer.bias_name) if name}
    for key, name in names.items():
        if uses[key] > 1 and name in weights:
            raise UnsupportedLayerError(f"parameter {name!r} is used by {uses[key]} layers; it must be one")
