import pytest
import torch
from cases import CNN_SHAPE, alike, batch_cnn, quality, rand, randn
from torch.testing import assert_close

import rgap
from rgap.separation.joint_softmax import _likely_labels, fit_joint_softmax
from rgap.separation.subspaces import row_span
from rgap.shared_gradient import receive


@pytest.mark.parametrize("labels", [[3, 7, 1, 4], [2, 2, 5, 6], [8, 8, 8, 0]])
@pytest.mark.parametrize("bias", [False, True])
def test_labels_are_guessed_from_the_rows_of_the_last_gradient(labels, bias):
    model = batch_cnn(head=(6, 10), bias=bias)
    layer = rgap.prepare(model, CNN_SHAPE).layers[-1]
    hidden = torch.cat([rand(3, 6, seed=1), 0.2 * rand(1, 6)])  # one image has a smaller hidden vector than the others
    share = ((0.01 * randn(4, 10)).softmax(1) - torch.eye(10)[labels].double()) / 4
    gradients = {layer.weight_name: share.T @ hidden, layer.bias_name: share.sum(0)}
    guesses = [guess.tolist() for guess in _likely_labels(layer, gradients, 4)]
    assert sorted(labels) in guesses and len(guesses) <= 3


@pytest.mark.parametrize("hidden", [4, 6])
def test_fewer_hidden_units_than_the_search_needs(hidden):
    model = batch_cnn(head=(hidden, 10))
    images, labels = rand(4, *CNN_SHAPE) ** 2, torch.tensor([9, 2, 5, 4])
    gradients = rgap.client_gradients(model, images, labels, "cross_entropy")
    assert rgap.largest_batch(model, CNN_SHAPE).limits[-1].limit >= 4 > (hidden - 4) // 2
    result = rgap.reconstruct(model, gradients, CNN_SHAPE, "cross_entropy", batch_size=None)
    assert result.verdict == "exact" and quality(result, images, labels) > 120


@pytest.mark.parametrize("known", [False, True])
def test_images_of_one_class_are_separated(known):
    model, images, *_ = alike(3)
    labels = torch.tensor([4, 1, 4])
    chain = rgap.prepare(model, CNN_SHAPE)
    received = receive(chain, rgap.client_gradients(model, images, labels, "cross_entropy"))
    layers, features = chain.layers[2:], chain.layer_inputs(images)["5"]
    span = row_span(layers[0], received.gradients, received.precision)
    given = [4, 4, 1] if known else None
    found, head = fit_joint_softmax(layers, received.gradients, span, labels=given, precision=received.precision)
    nearest = torch.cdist(features, head.x).argmin(1)
    assert sorted(found.tolist()) == [1, 4, 4] and sorted(nearest.tolist()) == [0, 1, 2]
    assert_close(head.x[nearest], features, rtol=0, atol=1e-7)
    assert torch.equal(found[nearest], labels)
