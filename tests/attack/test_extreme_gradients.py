"""Clean gradients at the limits of the format, of saturated networks, and of layers that see nothing."""

import pytest
import torch
from cases import rand, sequential, small_cnn
from torch import nn

import rgap

SHAPE = (3, 8, 8)
IMAGE, LABEL = rand(1, *SHAPE), torch.tensor([1])


@pytest.mark.parametrize("factor", [1e300, 1e160, 1e-160, 1e-300])
def test_gradients_whose_squares_are_no_numbers_are_scaled_and_it_is_said(factor):
    model = small_cnn(bias=True)
    gradients = [factor * g for g in rgap.client_gradients(model, IMAGE, LABEL)]
    found = rgap.reconstruct(model, gradients, SHAPE)
    assert found.verdict == "exact" and rgap.metrics.psnr_db(found.images, IMAGE).item() > 100
    assert any("squares of the entries are no numbers" in note for note in found.notes)
    asserted = rgap.reconstruct(model, gradients, SHAPE, gradient_scale=1.0)
    assert asserted.verdict == "inconsistent" and asserted.images.isfinite().all()


def test_a_batchs_gradients_of_1e300_end_in_a_verdict():
    model = sequential(nn.Flatten(), nn.Linear(192, 20), nn.LeakyReLU(0.2), nn.Linear(20, 3))
    images = rand(3, *SHAPE)
    gradients = rgap.client_gradients(model, images, torch.tensor([0, 1, 2]), "cross_entropy")
    found = rgap.reconstruct(model, [1e300 * g for g in gradients], SHAPE, "cross_entropy", batch_size=3)
    order = rgap.metrics.match(found.images, images)
    right = rgap.metrics.psnr_db(found.images, images[order]).min().item() > 100
    assert found.images.isfinite().all() and (found.verdict != "exact" or right)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize("gain", [1e2, 1e4, 1e8])
def test_saturated_networks_end_in_a_verdict(activation, gain):
    model = sequential(
        nn.Conv2d(3, 6, 3), activation(), nn.Flatten(), nn.Linear(216, 12), activation(), nn.Linear(12, 3)
    )
    with torch.no_grad():
        model[0].weight.mul_(gain)
        model[3].weight.mul_(gain)
    gradients = rgap.client_gradients(model, IMAGE, LABEL, "cross_entropy")
    found = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy")
    assert found.verdict != "exact" and found.images.isfinite().all()


def test_a_convolution_that_reads_only_padding_is_refused_by_name():
    model = sequential(nn.Conv2d(3, 4, 1, stride=19, padding=9), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 1))
    gradients = rgap.client_gradients(model, IMAGE, LABEL)
    with pytest.raises(
        rgap.UnsupportedLayerError, match="layer '0' reads only padding: its output is the same for every"
    ):
        rgap.reconstruct(model, gradients, SHAPE)
    assert rgap.rank_analysis(model, SHAPE).layers[0].deficit == 192
