"""Images behind the gradients of residual networks, by `rgap.reconstruct`: exact ones, and none certified wrongly."""

from functools import partial

import pytest
import torch
from torch import nn

import rgap
from rgap import models
from rgap.client import client_gradients
from rgap.residual import prepare_residual, reconstruct_residual
from tests.cases import rand, sequential
from tests.network.test_graph import PreActivation, warmed


def vgg(seed=0, head=None):
    """Convolutions with biases and ReLU, averaged away."""
    head = head or (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    modules = [nn.Conv2d(3, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU()]
    return sequential(*modules, nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), *head, seed=seed)


class AttentionPool(nn.Module):
    """A head that weighs the pixels by themselves, and gives log-probabilities."""

    def __init__(self, channels, classes):
        super().__init__()
        self.query, self.head = nn.Linear(channels, 1), nn.Linear(channels, classes)

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        weights = torch.softmax(self.query(pixels), 1)
        return torch.log_softmax(self.head((weights * pixels).sum(1)), 1)


NETWORKS = {
    "basic blocks": lambda: models.resnet(0, (24, 48)),
    "LeakyReLU": lambda: models.resnet(1, (24, 48), activation=partial(nn.LeakyReLU, 0.2), kaiming=True),
    "ELU": lambda: models.resnet(2, (24, 48), activation=nn.ELU),
    "flattened": lambda: models.resnet(3, (24, 48), flat_pixels=16),
    "chain without branches": vgg,
    "attention pooling": lambda: vgg(1, (AttentionPool(32, 4),)),
}


def shared(network, image, label=2, dtype=torch.float64):
    """The gradient of one image, (C, H, W)."""
    network = network.to(dtype)
    return client_gradients(network, image[None].to(dtype), torch.tensor([label]), "cross_entropy")


def rms_error(result, image):
    return (result.images[0] - image).square().mean().sqrt().item()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_an_image_comes_back_exactly(name, dtype, limit):
    network, image = warmed(NETWORKS[name]()).to(dtype), rand(3, 8, 8)
    result = rgap.reconstruct(network, shared(network, image, dtype=dtype), (3, 8, 8), "cross_entropy")
    assert result.verdict == "exact" and result.labels.tolist() == [2]
    assert rms_error(result, image) < limit
    assert rms_error(result, image) < 10 * result.candidates[0].predicted_error + 1e-14
    first = next(iter(result.candidates[0].layer_inputs.values()))
    assert torch.equal(first, result.images)


@pytest.mark.slow
def test_what_lies_below_is_inverted_as_a_whole():
    network, image = models.resnet(0, (16, 32), 2, expansion=4).double(), rand(3, 8, 8)
    result = rgap.reconstruct(network, shared(network, image), (3, 8, 8), "cross_entropy")
    assert result.verdict == "exact" and rms_error(result, image) < 1e-10
    assert result.layers[-1].name == "0" and result.layers[-1].iterations > 1
    assert any("numbers are known for every pixel value" in note for note in result.notes)


def test_neither_loss_nor_scale_is_needed():
    network, image = vgg(), rand(3, 8, 8)
    out = network(image[None])
    smoothed = nn.functional.cross_entropy(out, torch.tensor([2]), label_smoothing=0.1)
    result = rgap.reconstruct(network, torch.autograd.grad(smoothed, list(network.parameters())), (3, 8, 8),
                              "cross_entropy")  # fmt: skip
    assert result.verdict == "exact" and rms_error(result, image) < 1e-12
    assert "another loss, label or scale" in result.notes[-2]
    scaled = [0.3 * g for g in shared(network, image)]
    result = rgap.reconstruct(network, scaled, (3, 8, 8), "cross_entropy")
    assert result.verdict == "exact" and "is 0.3 times the image's own" in result.notes[-2]


def test_a_regressions_target_and_an_asserted_factor_of_any_size_are_taken():
    network, image = vgg().double(), rand(3, 8, 8)
    target = 3 * rand(*network(image[None]).shape) - 1
    gradients = rgap.client_gradients(network, image[None], target, "mse")
    result = rgap.reconstruct(network, gradients, (3, 8, 8), "mse")
    assert result.verdict == "exact" and (result.labels - target).abs().max() < 1e-8
    scaled = [1e300 * g for g in shared(network, image)]
    result = rgap.reconstruct(network, scaled, (3, 8, 8), "cross_entropy", gradient_scale=1e300)
    assert result.verdict == "exact" and result.gradient_scale == pytest.approx(1e300)
    assert "reproduces the whole one" in result.notes[-2]


@pytest.mark.parametrize("place", range(6))
def test_a_tampered_gradient_certifies_no_wrong_image(place):
    network, image = vgg(), rand(3, 8, 8)
    gradients = shared(network, image)
    gradients[place] = gradients[place] * (1 + 0.01 * rand(*gradients[place].shape, seed=place))
    result = rgap.reconstruct(network, gradients, (3, 8, 8), "cross_entropy")
    assert result.verdict != "exact" or rms_error(result, image) < 1e-7


def test_two_images_are_not_taken_for_one():
    network = vgg()
    gradients = client_gradients(network, rand(2, 3, 8, 8), torch.tensor([0, 1]), "cross_entropy")
    result = rgap.reconstruct(network, gradients, (3, 8, 8), "cross_entropy")
    assert result.verdict == "rank-deficient"
    assert any("is no place to enter" in note for note in result.notes)


def test_known_noise_is_weighed():
    network, image = vgg(), rand(3, 8, 8)
    generator = torch.Generator().manual_seed(0)
    noisy = [g + 1e-8 * torch.randn(g.shape, generator=generator) for g in shared(network, image)]
    result = rgap.reconstruct(network, noisy, (3, 8, 8), "cross_entropy", noise_std=1e-8)
    assert rms_error(result, image) < 10 * result.candidates[0].predicted_error < 1e-2


def test_layers_that_are_not_shared_are_not_used():
    network, image = models.resnet(0, (24, 48)).double(), rand(3, 8, 8)
    gradients = shared(network, image)
    gradients[-1] = None
    assert rgap.reconstruct(network, gradients, (3, 8, 8), "cross_entropy").verdict == "exact"
    gradients[3] = None  # a convolution on the way down
    result = rgap.reconstruct(network, gradients, (3, 8, 8), "cross_entropy")
    assert result.verdict != "exact" or rms_error(result, image) < 1e-7


def test_a_prepared_network_serves_many_gradients():
    network, images = models.resnet(0, (24, 48)).double(), rand(2, 3, 8, 8)
    prepared = prepare_residual(network, (3, 8, 8))
    for image in images:
        result = rgap.reconstruct(prepared, shared(network, image), loss="cross_entropy")
        assert result.verdict == "exact" and rms_error(result, image) < 1e-12


REFUSED = {
    "too many positions": (lambda: models.resnet(0, (8,)), {}, "16×16 positions are too many for 8 channels"),
    "training mode": (lambda: models.resnet(0, (24, 48)).train(), {}, "call model.eval\\(\\) first"),
    "batch": (lambda: models.resnet(0, (24, 48)), {"batch_size": 2}, "for a batch it is a sum over the images"),
    "no bias": (
        lambda: nn.Sequential(nn.Conv2d(3, 300, 3, 1, 1, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(76800, 2)),
        {},
        "neither a bias nor a batch norm",
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 9, 3), nn.GroupNorm(3, 9), nn.Conv2d(9, 300, 3), nn.Flatten(),
                              nn.Linear(43200, 2)),
        {},
        "'1' lies below it, and its statistics depend on the image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_networks_without_an_entrance_are_refused_by_name(name):
    build, options, message = REFUSED[name]
    network = build()
    gradients = [torch.zeros_like(p) for p in network.parameters()]
    with pytest.raises(rgap.UnsupportedLayerError, match=message):
        rgap.reconstruct(network, gradients, (3, 16, 16), "cross_entropy", **options)


def test_pre_activation_blocks_and_pooling_are_walked_as_far_as_they_go():
    network, image = warmed(PreActivation()), rand(3, 8, 8)
    result = reconstruct_residual(prepare_residual(network, (3, 8, 8)), shared(network, image))
    assert result.verdict != "exact" or rms_error(result, image) < 1e-7
