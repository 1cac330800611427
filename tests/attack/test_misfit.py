import math
from dataclasses import replace

import pytest
import torch
from cases import rand, sequential, small_cnn
from torch import nn

import rgap
from rgap import client
from rgap.attack import misfit as module
from rgap.attack.misfit import misfit, spectral_norm
from rgap.metrics import psnr_db
from rgap.shared_gradient import receive

SHAPE = (3, 8, 8)
SMOOTH = [nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.Softplus(), nn.Softsign()]


def mlp(activation, seed=0):
    modules = [nn.Flatten(), nn.Linear(192, 48), activation, nn.Linear(48, 24), activation, nn.Linear(24, 6)]
    return sequential(*modules, seed=seed)


def cnn(seed=0):
    return sequential(*[*small_cnn(bias=True)][:-1], nn.Linear(160, 6), seed=seed)


def gradients(model, images, label=2, dtype=torch.float32):
    labels = torch.full((len(images),), label)
    return [g.to(dtype) for g in rgap.client_gradients(model, images, labels, "cross_entropy")]


def attacked(model, shared, **options):
    return rgap.reconstruct(model, shared, SHAPE, "cross_entropy", **options)


@pytest.mark.parametrize("activation", SMOOTH, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_two_images_averaged_and_given_as_one_are_never_exact(activation, dtype):
    images = rand(2, *SHAPE, seed=3)
    result = attacked(mlp(activation), gradients(mlp(activation), images, dtype=dtype))
    assert result.verdict == "inconsistent" and result.certified_psnr_db is None
    alone = attacked(mlp(activation), gradients(mlp(activation), images[:1], dtype=dtype))
    assert alone.verdict == "exact" or torch.finfo(dtype).eps > 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_a_forward_pass_in_bfloat16_certifies_no_wrong_image(seed):
    model, image, labels = cnn(seed).float(), rand(1, *SHAPE, seed=seed).float(), torch.tensor([2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(image)
    loss = client.loss_value("cross_entropy", outputs.float(), labels)
    result = attacked(model, torch.autograd.grad(loss, list(model.parameters())))
    error = (result.images - image).square().mean().sqrt().item()
    assert result.verdict != "exact" or error < 3 * result.candidates[0].predicted_error < 0.03
    assert result.candidates[0].residual_allowed <= module.MAX_ALLOWED_RESIDUAL == 0.1


@pytest.mark.parametrize("tensor", range(6))
@pytest.mark.parametrize("factor", [1.03, 1.2])
def test_one_tensor_scaled_in_float16_is_seen_in_that_tensor(tensor, factor):
    model, image = mlp(nn.Tanh()), rand(1, *SHAPE)
    shared = gradients(model, image, dtype=torch.float16)
    shared[tensor] = shared[tensor] * factor
    assert attacked(model, shared).verdict == "inconsistent"


@pytest.mark.parametrize("declared", [True, False])
def test_noise_is_declared_or_confirmed(declared):
    model, image = mlp(nn.Tanh()), rand(1, *SHAPE)
    std = 1e-5
    noisy = client.gaussian_noise(gradients(model, image, dtype=torch.float64), std, seed=1)
    result = attacked(model, noisy, noise_std=std if declared else None)
    error = (result.images - image).square().mean().sqrt().item()
    assert result.verdict == "exact" and error / 3 < result.candidates[0].predicted_error < 10 * error
    assert result.certified_psnr_db < psnr_db(result.images, image).item() + 10


def test_noise_in_one_tensor_alone_is_not_confirmed():
    model, image = mlp(nn.Tanh()), rand(1, *SHAPE)
    shared = gradients(model, image, dtype=torch.float64)
    shared[4] = shared[4] + 1e-4 * torch.randn(shared[4].shape, generator=torch.Generator().manual_seed(0))
    result = attacked(model, shared)
    assert result.verdict == "inconsistent"


def weighed(miss, **options):
    """The misfit of a gradient of one tensor 20 × 30 of rank one from noise of size 1e-3 on it."""
    model = sequential(nn.Flatten(), nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 4))
    chain = rgap.prepare(model, (1, 5, 6))
    shared = [g.double() for g in rgap.client_gradients(model, rand(1, 1, 5, 6), torch.tensor([1]), "cross_entropy")]
    received = receive(chain, shared, noise_std=1e-3)
    name = chain.layers[0].weight_name
    mine = {**received.gradients, name: received.gradients[name] + miss}
    return misfit(received, mine, mine, **options), received


def test_a_misfit_is_measured_by_its_structure_and_not_its_size_alone():
    noise = 1e-3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    white, _ = weighed(noise)
    assert white.residual < white.allowed and white.excess < 1.5
    u, v = torch.linalg.qr(rand(20, 20))[0][:, :1], torch.linalg.qr(rand(30, 30))[0][:, :1]
    second, _ = weighed(3 * noise.norm() * u @ v.T)
    assert second.residual > second.allowed
    assert spectral_norm(3 * noise.norm() * u @ v.T) == pytest.approx(3 * noise.norm().item())


def test_noise_that_was_inferred_must_be_in_every_tensor():
    noise = 1e-3 * torch.randn(20, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one, _ = weighed(noise, inferred=True)
    assert "is not confirmed" in one.doubt and one.residual > one.allowed
    assert "times what white noise would leave" in one.doubt or "it takes 2" in one.doubt


def test_a_spectral_norm_neither_overflows_nor_underflows():
    A = rand(5, 7)
    expected = torch.linalg.matrix_norm(A, 2).item()
    assert spectral_norm(A) == pytest.approx(expected)
    assert spectral_norm(1e-200 * A) == pytest.approx(1e-200 * expected)
    assert spectral_norm(rand(300, 280)) == pytest.approx(torch.linalg.matrix_norm(rand(300, 280), 2).item(), rel=1e-3)
    assert spectral_norm(torch.zeros(3)) == 0 and math.isinf(spectral_norm(torch.full((2, 2), math.inf)))


def test_the_heads_rounding_counts_where_the_client_computed_so():
    _, received = weighed(0.0)
    half = replace(received, white_noise=0.0, precision=1e-2)
    assert half.is_half and half.client_rounding < 1e-4 and replace(half, coarse=True).client_rounding == 1
    assert received.client_rounding == 1
