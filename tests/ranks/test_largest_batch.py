import sys

import pytest
import torch
from cases import SHAPE, batch, fcn, sequential
from torch import nn

import rgap
from rgap.equations import rank_laws, solve_layer
from rgap.models import cnn6
from rgap.ranks.largest_batch import largest_batch

rank_batch = sys.modules["rgap.ranks.largest_batch"]  # the package's face has the function under this name


def with_head(*widths, width=36):
    """CNN6's convolutions with fully connected layers of their own."""
    modules, inputs = list(cnn6(width=width))[:-1], 3200
    for outputs in widths:
        modules += [nn.Linear(inputs, outputs, bias=False), nn.LeakyReLU(0.2)]
        inputs = outputs
    return nn.Sequential(*modules[:-1])


def limits(found):
    return {limit.name: limit for limit in found.limits}


def test_the_second_convolution_of_cnn6_takes_four_images_and_more_with_virtual_constraints():
    found = largest_batch(with_head(64, 10), (3, 32, 32))
    assert (found.alone, found.batch_size) == (4, 9) and "rank 9 at most" in found.reason
    second = limits(found)["2"]
    assert (second.alone, second.limit) == (4, 16) and "virtual constraints" in second.reason


def test_a_third_fully_connected_layer_lifts_the_limit_of_the_classes():
    found = largest_batch(with_head(128, 64, 10), (3, 32, 32))
    assert found.batch_size == limits(found)["8"].limit == 10
    assert limits(found)["13"].limit == 62 and limits(found)["15"].limit == 63


@pytest.mark.parametrize(
    ("model", "loss", "limit", "why"),
    [
        (with_head(16, 10), "cross_entropy", 8, "10 classes and 16 hidden units, by the softmax"),
        (with_head(4, 10), "cross_entropy", 4, "10 classes and 4 hidden units, by the softmax"),
        (with_head(16, 6), "cross_entropy", 5, "rank 5 at most"),
        (with_head(8, 6), "cross_entropy", 4, "6 classes and 8 hidden units, by the softmax"),
        (with_head(16, 10), "mse", 6, "16 hidden units, two an image and 4 to spare"),
        (with_head(4, 1), "logistic", 1, "4 hidden units, two an image"),
        (with_head(64, 6), "cross_entropy", 5, "rank 5 at most"),
        (with_head(64, 6), "mse", 6, "rank 6 at most"),
        (with_head(64, 10, width=20), "cross_entropy", 1, "before 792 virtual constraints"),
        (cnn6(), "logistic", 1, "one fully connected layer alone"),
        (rgap.models.fcn3(), "logistic", 99, "rank 99 at most"),
    ],
)
def test_the_layer_that_limits_is_named_with_its_reason(model, loss, limit, why):
    found = largest_batch(model, rgap.models.IMAGE_SHAPES["fcn3" if isinstance(model[0], nn.Flatten) else "cnn6"], loss)
    assert found.batch_size == limit and why in found.reason and "'" in found.reason


def small(channels, groups=1):
    modules = [nn.Conv2d(2, channels, 3, 2, 1, groups=groups), nn.LeakyReLU(0.2), nn.Flatten()]
    return sequential(*modules, nn.Linear(16 * channels, 80), nn.LeakyReLU(0.2), nn.Linear(80, 40))


@pytest.mark.parametrize("channels", [5, 6, 7])
def test_prediction_and_the_dense_rank_agree_at_the_limit(channels):
    model = small(channels)
    alone = limits(largest_batch(model, (2, 8, 8)))["0"].alone
    layer = rgap.prepare(model, (2, 8, 8)).layers[0]
    for count in (max(alone, 1), alone + 1):
        generator = torch.Generator().manual_seed(0)
        dz = torch.randn(count, *layer.output_shape, generator=generator, dtype=torch.float64)
        deficit = solve_layer(layer, 0 * layer.weight, dz, 0 * dz, rcond=1e-6).report.deficit
        assert (deficit == 0) == (count <= alone)


def test_without_a_law_numbers_decide_and_beyond_them_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(rank_batch, "layer_laws", lambda layer, batch=1: rank_laws.RankLaws(None, None, None))
    found = largest_batch(small(6), (2, 8, 8))
    assert limits(found)["0"].limit is not None
    monkeypatch.setattr(rank_batch, "MAX_UNKNOWNS", 10)
    unknown = largest_batch(small(6), (2, 8, 8))
    assert limits(unknown)["0"].limit is None and "no rank is known for '0'" in unknown.reason


def test_pooling_loses_every_batch_behind_an_activation_and_counts_behind_a_convolution():
    conv, head = (
        [nn.Conv2d(2, 6, 3, 1, 1), nn.LeakyReLU(0.2)],
        [nn.Linear(96, 40), nn.LeakyReLU(0.2), nn.Linear(40, 20)],
    )
    pooled = sequential(*conv, nn.AvgPool2d(2), nn.Flatten(), *head)
    assert [limit.limit for limit in largest_batch(pooled, (2, 8, 8)).limits][1] == 0
    joined = sequential(conv[0], nn.AvgPool2d(2), nn.LeakyReLU(0.2), nn.Flatten(), *head)
    plain = sequential(*conv, nn.Flatten(), nn.Linear(384, 40), *head[1:])
    first, whole = (limits(largest_batch(network, (2, 8, 8)))["0"].alone for network in (joined, plain))
    assert first < whole


def test_beside_the_usual_size_there_are_a_bound_and_a_safe_size():
    found = largest_batch(with_head(64, 10), (3, 32, 32))
    assert (found.safe, found.batch_size, found.bound) == (9, 9, 10)  # a convolution limits
    single = largest_batch(cnn6(), (3, 32, 32), "logistic")
    assert (single.safe, single.batch_size, single.bound) == (1, 1, 1)
    mlp = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    wide = largest_batch(mlp, (1, 28, 28))
    assert (wide.safe, wide.batch_size, wide.bound) == (64, 126, 256)


@pytest.mark.parametrize(("outputs", "count"), [(1, 4), (5, 6)])
def test_more_images_than_usual_may_come_back_and_none_beyond_the_bound(outputs, count):
    network = fcn((60, 20), outputs=outputs, bias=True)
    loss = "logistic" if outputs == 1 else "cross_entropy"
    found = largest_batch(network, SHAPE, loss)
    images, labels = batch(count, max(outputs, 2))
    result = rgap.reconstruct(
        network, rgap.client_gradients(network, images, labels, loss), SHAPE, loss, batch_size=count
    )
    assert len(result.images) <= found.bound and found.safe <= found.batch_size <= found.bound == 37


def test_a_frozen_convolution_gives_its_weights_alone():
    model = small(7)
    before = limits(largest_batch(model, (2, 8, 8)))["0"]
    model[0].requires_grad_(False)
    after = limits(largest_batch(model, (2, 8, 8)))["0"]
    assert after.alone == 0 < before.alone
