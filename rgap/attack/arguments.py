"""Checks of the arguments of `rgap.reconstruct`, before any work starts."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor, nn

from rgap.arguments import MAX_SQUARED_NUMBER, check_count, check_labels, check_number, check_pixel_range
from rgap.client import check_label, check_loss, check_smoothing, outputs_fit
from rgap.network.activations import IDENTITY
from rgap.network.chain import Chain, prepare
from rgap.network.forward import select_output
from rgap.network.layer import Layer
from rgap.residual import ResidualNetwork, prepare_residual
from rgap.results import GradientMismatchError, UnsupportedLayerError
from rgap.separation.subspaces import first_dense
from rgap.shared_gradient import SharedGradient
from rgap.tokens import PatchEmbedding, recognise

EFFORTS = ("auto", "full")


def checked_chain(
    model: nn.Module | Chain, image_shape: tuple[int, ...] | None, output: str | int | None = None
) -> Chain:
    """The prepared network, or an error that says what is missing."""
    if isinstance(model, Chain) and image_shape is None:
        return model
    return prepare(model, image_shape, output=output)


def checked_network(
    model, image_shape: tuple[int, ...] | None, output: str | int | None = None, batch_size: int | None = 1
) -> Chain | PatchEmbedding | ResidualNetwork:
    """The network as it is attacked: a chain of layers, patches with learned positions, or blocks below a blind layer.

    A chain that averages its last map away is entered below, too, where one image is asked for; else the chain's
    refusal stands, with the reasons why the network is none of the others.
    """
    if isinstance(model, PatchEmbedding | ResidualNetwork):
        return model
    try:
        chain = checked_chain(model, image_shape, output)
    except UnsupportedLayerError as refusal:
        return _without_chain(select_output(model, output), image_shape, refusal)
    if batch_size == 1 and not isinstance(model, Chain) and chain.averages_away:
        with contextlib.suppress(UnsupportedLayerError):
            return prepare_residual(select_output(model, output), image_shape)
    return chain


def _without_chain(model, image_shape, refusal: UnsupportedLayerError) -> PatchEmbedding | ResidualNetwork:
    found = None
    try:
        found = recognise(model, image_shape)
    except UnsupportedLayerError as error:  # a softmax makes no transformer of a network of convolutions
        refusal = error
    except ValueError as error:
        raise UnsupportedLayerError(f"{refusal}; nor does the network run as a transformer: {error}") from error
    if found is not None:
        return found
    try:
        return prepare_residual(model, image_shape)
    except UnsupportedLayerError as reason:
        both = str(refusal) if str(reason) == str(refusal) else f"{refusal}; {reason}"
        raise UnsupportedLayerError(both) from reason


def check_options(
    loss, batch_size, pixel_range, rcond=None, noise_std=None, gradient_scale=None, label_smoothing=None, effort="auto"
) -> None:
    """Refuses options that are out of range for any network, by name."""
    if effort not in EFFORTS:
        raise ValueError(f"effort is {effort!r}; known: {', '.join(EFFORTS)}")
    check_loss(loss)
    check_smoothing(loss, label_smoothing)
    if gradient_scale is not None:
        check_number("gradient_scale", gradient_scale, open_low=True)
    if batch_size is not None:
        check_count("batch_size", batch_size, hint=", or None to find it from the gradient")
    check_pixel_range(pixel_range)
    if rcond is not None:
        check_number("rcond", rcond, high=1)
    if noise_std is not None:
        check_number("noise_std", noise_std, high=MAX_SQUARED_NUMBER)


def check_arguments(chain: Chain, loss, batch_size, labels) -> None:
    """Refuses what does not fit a chain, by name."""
    head = chain.layers[-1]
    if not outputs_fit(loss, outputs := head.output_shape[0]):
        least = "2 or more" if loss == "cross_entropy" else "1"
        raise UnsupportedLayerError(
            f"the last layer {head.name!r} has {outputs} outputs; the {loss} loss takes {least}"
        )
    if chain.log_softmax and loss != "cross_entropy":
        raise UnsupportedLayerError(
            f"a logarithmic softmax before the {loss} loss cannot be inverted; cross_entropy can"
        )
    if batch_size == 1:
        check_label(labels, loss, outputs)


def check_batch(chain: Chain, loss: str, labels: Tensor | Sequence[int] | None, size: int) -> list[int] | None:
    """Refuses networks through which no batch can be recovered, naming the first layer that prevents it.

    Gives the labels that were given, sorted: their order has no meaning.
    """
    below = first_dense(chain)
    _check_separable(chain.layers[below:], loss)
    for layer in chain.layers[:below]:
        if not layer.activation.one_to_one:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: a batch needs convolutions with invertible activations, and "
                f"{layer.activation.name} is constant on a half-line; single images do not (batch_size=1)"
            )
    return None if labels is None else sorted(check_labels(labels, size).tolist())


def check_shared(chain: Chain, received: SharedGradient) -> None:
    """Refuses gradients of a batch that lack one of a fully connected layer, by which the images are separated."""
    for layer in chain.layers[first_dense(chain) :]:
        missing = layer.bias_name in received.absent or not {layer.weight_name, layer.bias_name} & set(received.usable)
        if missing and not layer.is_fixed:
            absent = [name for name in (layer.weight_name, layer.bias_name) if name in received.absent]
            raise GradientMismatchError(
                f"the gradient of {absent[0]!r} is zero or not shared; a batch is taken apart by the gradients of all "
                "fully connected layers, a single image (batch_size=1) by that of the last one"
            )


def _check_separable(layers: Sequence[Layer], loss: str) -> None:
    """Refuses fully connected layers whose images cannot be separated."""
    if loss == "mse":
        raise UnsupportedLayerError("a batch under the mse loss is not taken apart; logistic and cross_entropy are")
    for layer in layers:
        if layer.is_fixed or layer.shift is not None or layer.output_scale is not None:
            raise UnsupportedLayerError(
                f"layer {layer.name!r} has a normalisation around it: batches are taken apart through fully connected "
                "layers and their activations only"
            )
    if layers[-1].activation is not IDENTITY:
        raise UnsupportedLayerError(
            f"layer {layers[-1].name!r}: a batch is taken apart where the loss reads the last layer's own output, and "
            f"{layers[-1].activation.name} stands between; a single image (batch_size=1) is not held up by it"
        )
    if len(layers) < 2:
        raise UnsupportedLayerError(
            "a batch through a single layer is one sum that many batches have; two layers or more"
        )
    biased = [layer.bias is not None for layer in layers]
    if any(biased) and not biased[0]:
        raise UnsupportedLayerError(
            f"layer {layers[0].name!r} has no bias, and {layers[biased.index(True)].name!r} has one: for a "
            "batch the first layer must have a bias, or none may"
        )
    for layer in layers[:-1]:
        if not layer.activation.homogeneous:
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: a batch is taken apart through LeakyReLU, PReLU or ReLU, "
                f"and its activation is {layer.activation.name}"
            )
