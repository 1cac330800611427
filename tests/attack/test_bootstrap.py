import pytest
import torch
from test_batch import SHAPE, network, quality, shared

import rgap
from rgap.attack import bootstrap, verdict
from rgap.shared_gradient import SharedGradient, receive


def strict(monkeypatch, tolerance):
    """What the format allows, made so small that a right candidate misses it."""
    monkeypatch.setattr(SharedGradient, "tolerance", property(lambda self: tolerance))


def test_a_right_candidate_is_certified_by_what_noise_makes_of_its_own_gradient(monkeypatch):
    model = network(dtype=torch.float32)
    images, labels, gradients = shared(model)
    plain = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    assert plain.candidates[0].predicted_error is None
    strict(monkeypatch, 1e-9)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    (joint,) = result.candidates
    assert result.verdict == "exact" and quality(result, images, labels) > 90
    assert 1e-9 < joint.gradient_residual <= joint.residual_allowed < 1e-3
    order = rgap.metrics.match(result.images, images)
    error = (result.images - images[order]).flatten(1).square().mean(1).sqrt().max().item()
    assert 0.1 < joint.predicted_error / error < 10
    assert any("the gradient's noise explains an error of" in note for note in result.notes)


def test_an_altered_gradient_is_not_explained(monkeypatch):
    model = network(dtype=torch.float32)
    _, _, gradients = shared(model)
    gradients[0] = gradients[0] * 1.02
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    (joint,) = result.candidates
    assert joint.gradient_residual < bootstrap.MAX_NOISE_RESIDUAL and joint.predicted_error is not None
    assert result.verdict == "inconsistent" and any("is allowed" in note for note in result.notes)


def test_an_error_that_blurs_the_images_is_not_certified(monkeypatch):
    model = network(dtype=torch.float32)
    _, _, gradients = shared(model)
    strict(monkeypatch, 1e-9)
    monkeypatch.setattr(verdict, "MAX_CERTIFIED_ERROR_BATCH", 1e-9)
    result = rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", batch_size=3)
    assert result.candidates[0].consistent and result.verdict == "inconsistent"


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 0.0), (torch.float64, 0.0), (torch.float64, 1e-6)])
def test_the_gradient_that_is_tried_out_has_the_errors_of_the_shared_one(dtype, noise):
    model = network(dtype=dtype)
    images, labels, gradients = shared(model)
    gradients = [g + noise * g.abs().max() * torch.randn_like(g) for g in gradients]
    chain = rgap.prepare(model, SHAPE)
    std = noise * max(g.abs().max().item() for g in gradients)
    received = receive(chain, gradients, noise_std=std or None)
    tried = bootstrap._as_shared(chain, received, images, labels, "cross_entropy")
    for name, g in tried.items():
        miss = ((g - received.gradients[name]).norm() / g.norm()).item()
        assert miss < max(1e-12 if dtype == torch.float64 else 1e-5, 1e3 * noise)
        assert g.dtype == torch.float64 and (not noise or miss > noise)
