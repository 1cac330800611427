"""Noise of a gradient's entries, estimated from their values alone."""

import pytest
import torch
from cases import rand, randn, small_cnn

import rgap
from rgap import client
from rgap.shared_gradient import entry_noise

SHAPE, IMAGES, LABELS = (3, 8, 8), rand(2, 3, 8, 8), torch.tensor([0, 1])
GRADIENTS = {"w": randn(40, 30), "b": randn(40, seed=1)}


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_the_rounding_of_formats_and_grids_is_estimated(name):
    shared = client.quantise(GRADIENTS, name)
    stds = entry_noise(shared)
    for key, g in GRADIENTS.items():
        assert stds[key].shape == g.shape
        assert rms(shared[key] - g) / 1.6 < rms(stds[key]) < 1.6 * rms(shared[key] - g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saturated_softmax_is_no_coarse_grid_and_no_coarse_format(dtype):
    bias = torch.full((200,), 1e-250 if dtype == torch.float64 else 0.0, dtype=torch.float64)
    bias[3], bias[7] = 1.0, -1.0
    stds = entry_noise({"w": GRADIENTS["w"].to(dtype).double(), "b": bias})
    eps = torch.finfo(dtype).eps
    assert 0.1 * eps < rms(stds["w"]) < 2 * eps and stds["b"].max() < 2 * eps
    assert (entry_noise({"b": bias.sign()})["b"] < 1e-15).all()


def test_a_network_with_a_saturated_softmax_predicts_its_error():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        conv = torch.nn.Conv2d(3, 20, 3, 2, 1)
        modules = [conv, torch.nn.LeakyReLU(0.2), torch.nn.Flatten(), torch.nn.Linear(320, 120)]
        network = torch.nn.Sequential(*modules).double()
        with torch.no_grad():
            network[3].weight.uniform_(-30, 30)
    gradients = rgap.client_gradients(network, IMAGES[:1], torch.tensor([5]), "cross_entropy")
    assert gradients[-1].abs().sort().values[-3:].tolist() == pytest.approx([0, 1, 1], abs=1e-3)
    result = rgap.reconstruct(network, gradients, SHAPE, "cross_entropy")
    rmse = (result.images - IMAGES[:1]).square().mean().sqrt().item()
    assert result.verdict == "exact" and rmse < 1e-8
    assert rmse / 30 < result.candidates[0].predicted_error < 1e-7


def test_zeros_where_none_would_be_are_taken_for_pruning():
    shared = client.prune(GRADIENTS, 0.3)
    stds = entry_noise(shared)
    for key, g in GRADIENTS.items():
        gone = shared[key] == 0
        assert rms(g[gone]) / 1.6 < rms(stds[key][gone]) < 1.6 * rms(g[gone])
        assert (stds[key][~gone] < 1e-12).all()
    few = {"w": GRADIENTS["w"].clone()}
    few["w"][0] = 0.0  # a unit that is dead
    assert (entry_noise(few)["w"] < 1e-12).all()


def test_one_zero_is_proof_where_the_network_makes_none():
    draw = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).double()
    heavy = draw**3  # so heavy-tailed that nothing sets the small entries apart
    light = client.prune({"w": heavy}, 0.03)
    gone = light["w"] == 0
    assert (entry_noise(light)["w"][gone] < 1e-12).all()
    stds = entry_noise(light, has_zeros=False)["w"]
    assert rms(heavy[gone]) / 3 < rms(stds[gone]) < 3 * rms(heavy[gone])
    heavy[3], heavy[:, 7] = 0, 0  # a silent output, a black pixel
    assert not entry_noise({"w": heavy}, has_zeros=False)["w"][heavy == 0].gt(1e-12).any()


def test_declared_noise_is_added_and_zeros_are_exact():
    stds = entry_noise({"w": GRADIENTS["w"], "z": torch.zeros(3)}, {"w": 0.5, "z": 0.5})
    assert rms(stds["w"]) == pytest.approx(0.5) and rms(stds["z"]) == pytest.approx(0.5)
    assert not entry_noise({"z": torch.zeros(3)})["z"].any()


def test_noise_that_came_with_one_gradient_is_added_to_that_one():
    plain, noisy = entry_noise(GRADIENTS), entry_noise(GRADIENTS, {"w": 1e-3})
    assert noisy["b"].equal(plain["b"])
    torch.testing.assert_close(noisy["w"], (plain["w"].square() + 1e-6).sqrt())


def test_the_error_behind_an_update_is_predicted_from_the_weights_rounding():
    network = small_cnn().float()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    gradients = rgap.client_gradients(network, IMAGES[:1], LABELS[:1])
    after = {name: p - 0.1 * g for (name, p), g in zip(before.items(), gradients, strict=True)}
    result = rgap.reconstruct(network, client.gradients_from_update(before, after, 0.1), SHAPE, gradient_scale=1.0)
    error = (result.images - IMAGES[:1]).square().mean().sqrt().item()
    assert result.verdict == "exact" and error / 10 < result.candidates[0].predicted_error < 10 * error
