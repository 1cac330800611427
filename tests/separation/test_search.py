from dataclasses import replace

import pytest
import torch
from cases import RELU, SHAPE, batch, by_name, directions, fcn, gradients
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.network.activations import IDENTITY, Activation
from rgap.separation.search import separate

PRECISION = {torch.float32: 1.2e-7, torch.float64: 2.2e-16}


def separated(network, images, labels, dtype=torch.float32, activation=None, **options):
    layers = rgap.prepare(network, SHAPE).layers
    if activation is not None:
        layers = [replace(layer, activation=activation) for layer in layers]
    named = by_name(network, gradients(network, images, labels, dtype=dtype))
    return separate(*layers[:2], named, precision=PRECISION[dtype], **options), named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_every_direction_is_found_with_few_starts(count, dtype):
    images, labels = batch(count)
    found, _ = separated(fcn(), images, labels, dtype)
    cosine = found.inputs @ directions(images).T
    assert sorted(cosine.argmax(1).tolist()) == list(range(count))
    assert cosine.max(1).values.min() > 1 - (1e-9 if dtype == torch.float32 else 1e-14)
    assert found.first.rank == found.second.rank == count and found.starts <= 3 * count + 6
    assert found.residuals.shape == (count, 2) and found.residuals.max() < 1e-4


@pytest.mark.parametrize("bias", [False, True])
def test_the_shares_add_up_to_the_gradient_and_are_each_images_own(bias):
    network, (images, labels) = fcn(bias=bias), batch(6)
    found, named = separated(network, images, labels, torch.float64)
    assert_close(found.dz.T @ found.inputs, named["1.weight"], rtol=0, atol=1e-12)
    order = (directions(found.inputs) @ directions(images).T).argmax(1)
    for x, dz, image, label in zip(found.inputs, found.dz, images[order], labels[order], strict=True):
        alone = by_name(network, rgap.client_gradients(network, image[None], label[None]))["1.weight"] / 6
        assert_close(torch.outer(dz, x), alone, rtol=0, atol=1e-10)


def test_with_biases_inputs_have_their_length():
    images, labels = batch(8)
    found, _ = separated(fcn(bias=True), images, labels)
    order = rgap.metrics.match(found.inputs.reshape(-1, *SHAPE), images)
    assert_close(found.inputs, images[order].flatten(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_relu_gives_every_image_too(bias):
    network, (images, labels) = fcn((200, 40), bias=bias, seed=3), batch(10)
    relu = fcn((200, 40), bias=bias, seed=3, activation=nn.ReLU())
    layers = [replace(layer, activation=RELU) for layer in rgap.prepare(network, SHAPE).layers]
    named = by_name(relu, gradients(relu, images, labels))
    found = separate(*layers[:2], named, precision=1.2e-7)
    cosine = directions(found.inputs) @ directions(images).T
    assert sorted(cosine.argmax(1).tolist()) == list(range(10)) and cosine.max(1).values.min() > 1 - 1e-9


@pytest.mark.parametrize("bias", [False, True])
def test_shares_find_more_images_than_the_second_layer_has_outputs(bias):
    images, labels = batch(12)
    found, _ = separated(fcn((200, 10), bias=bias), images, labels)
    assert found.first.rank == 12 and found.second.rank == 9
    cosine = directions(found.inputs) @ directions(images).T
    assert sorted(cosine.argmax(1).tolist()) == list(range(12)) and cosine.max(1).values.min() > 1 - 1e-6


def test_two_images_with_one_activation_pattern_in_the_second_layer_are_both_found():
    network, (images, labels) = fcn((200, 40)), batch(6)
    images[1] = 0.9 * images[0] + 0.1 * images[1]
    switched = network[:4](images) > 0
    assert switched[0].equal(switched[1])
    found, _ = separated(network, images, labels, torch.float64)
    assert found.first.rank == 6 and found.second.rank == 5
    cosine = found.inputs @ directions(images).T
    assert sorted(cosine.argmax(1).tolist()) == list(range(6)) and cosine.max(1).values.min() > 1 - 1e-9


def test_what_is_not_found_is_missing_and_nothing_false_is_returned():
    images, labels = batch(12)
    found, _ = separated(fcn((120, 3)), images, labels)  # the second gradient holds 3 of 12
    assert found.second.rank == 3 and len(found.inputs) < 12
    if len(found.inputs):
        assert (found.inputs @ directions(images).T).max(1).values.min() > 1 - 1e-6


def test_a_first_layer_too_narrow_for_two_tests_is_not_searched():
    images, labels = batch(14)
    found, _ = separated(fcn((30, 30)), images, labels)
    assert found.starts == 0 and len(found.inputs) == 0


def test_mixtures_of_images_with_one_activation_pattern_are_not_taken_for_images():
    images, labels = batch(4)
    images[1] = 0.9 * images[0] + 1e-3 * images[1]  # almost the same direction: no unit between them
    found, _ = separated(fcn((40, 20), bias=True), images, labels, torch.float64)
    if len(found.inputs):
        assert torch.cdist(found.inputs, images.flatten(1)).min(1).values.max() < 1e-3


def test_the_seed_decides_the_starts_and_equal_seeds_agree():
    images, labels = batch(5)
    one, again, other = (separated(fcn(), images, labels, seed=s)[0] for s in (1, 1, 2))
    assert one.inputs.equal(again.inputs) and one.steps == again.steps
    cosine = one.inputs @ other.inputs.T
    assert cosine.max(1).values.min() > 1 - 1e-9


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (IDENTITY, "layer '1' has a linear activation"),
        (Activation("tanh", torch.tanh, torch.atanh, torch.cos), "layer '1': inputs of a batch .* activation is tanh"),
    ],
)
def test_activations_that_cannot_be_separated_are_refused(activation, message):
    images, labels = batch(3)
    with pytest.raises(rgap.UnsupportedLayerError, match=message):
        separated(fcn(), images, labels, activation=activation)
