import pytest
import torch
from cases import SHAPE, batch, by_name, fcn, gradients, randn
from torch.testing import assert_close

import rgap
from rgap.separation.subspaces import batch_given_as_one, null_of_rows, row_span
from rgap.shared_gradient import receive


@pytest.mark.parametrize("bias", [False, True])
def test_a_gradients_spaces_hold_every_image(bias):
    images, labels = batch(5)
    network = fcn(bias=bias)
    named = by_name(network, gradients(network, images, labels))
    span = row_span(rgap.prepare(network, SHAPE).layers[0], named, 1.2e-7)
    x = images.flatten(1).T
    x = torch.cat([x, torch.ones(1, 5, dtype=x.dtype)]) if bias else x
    assert span.rank == 5 and not span.is_full and span.V.shape == (36 + bias, 5)
    assert (x - span.V @ (span.V.T @ x)).norm() < 1e-5 * x.norm()
    assert span.above_cut > 1e3 * span.below_cut > 0


def test_a_gradient_of_zeros_has_rank_0_and_one_of_full_rank_is_marked():
    network = fcn((3, 2))
    layer = rgap.prepare(network, SHAPE).layers[0]
    assert row_span(layer, {"1.weight": torch.zeros(3, 36).double()}, 1e-7).rank == 0
    full = row_span(layer, {"1.weight": randn(3, 36)}, 1e-7)
    assert full.is_full and full.rank == 3 and full.below_cut == 0


def test_the_null_space_of_rows_is_orthonormal():
    rows = randn(3, 8)
    N = null_of_rows(rows)
    assert_close(N.T @ N, torch.eye(5).double())
    assert (rows @ N).norm() < 1e-13


def test_a_batch_given_as_one_image_is_said():
    model = rgap.models.cnn6_batch(classes=10).double()
    images, labels = rgap.data.load_images(count=4)
    chain = rgap.prepare(model, (3, 32, 32))
    for count, rank in ((1, 0), (3, 3), (4, 3)):  # two of the four show the same photograph
        received = receive(chain, rgap.client_gradients(model, images[:count], labels[:count], "cross_entropy"))
        note = batch_given_as_one(chain, received)
        assert (f"has rank {rank}, which one image's has not" in note) if rank else note == ""
