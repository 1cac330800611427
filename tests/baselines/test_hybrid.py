import pandas as pd
import pytest
import torch
from cases import SECOND, convs, rand, small_cnn

import rgap
from rgap.baselines import hybrid
from rgap.metrics import psnr_db

IMAGE, LABEL = rand(1, 3, 8, 8, seed=11), torch.tensor([1])


def test_where_the_closed_form_is_exact_the_hybrid_is_the_closed_form():
    model = small_cnn().float()
    gradients = rgap.client_gradients(model, IMAGE, LABEL)
    closed, found = (
        rgap.reconstruct(model, gradients, (3, 8, 8), gradient_scale=1.0),
        hybrid(model, gradients, (3, 8, 8)),
    )
    assert found.images.equal(closed.images) and found.verdict == closed.verdict and found.notes == closed.notes
    assert found.history["step"].tolist() == [0] and isinstance(found.history, pd.DataFrame)


def test_the_hybrid_fills_the_null_space_and_certifies_nothing():
    model, image = convs(*SECOND), rand(1, 3, 12, 12, seed=11)
    gradients = rgap.client_gradients(model, image, LABEL)
    closed = rgap.reconstruct(model, gradients, (3, 12, 12), virtual_constraints=False, gradient_scale=1.0)
    found = hybrid(model, gradients, (3, 12, 12), steps=200)
    assert closed.verdict == found.verdict == "rank-deficient"
    assert psnr_db(found.images, image).item() > psnr_db(closed.images, image).item() + 20
    assert any("open unknowns of layer '2' by gradient matching" in note for note in found.notes)
    assert found.layers and found.candidates[0].open_layers == ("2",)


def test_the_hybrid_helps_under_noise_and_says_that_it_cannot_tell():
    model = small_cnn().float()
    clean = rgap.client_gradients(model, IMAGE, LABEL)
    std = 1e-2 * torch.cat([g.flatten() for g in clean]).std().item()
    noisy = [g + std * torch.randn(g.shape, generator=torch.Generator().manual_seed(1)) for g in clean]
    closed = rgap.reconstruct(model, noisy, (3, 8, 8), noise_std=std, gradient_scale=1.0)
    found = hybrid(model, noisy, (3, 8, 8), noise_std=std, steps=60)
    assert found.candidates[0].gradient_residual <= closed.candidates[0].gradient_residual
    assert found.verdict != "exact"


def test_a_negative_weight_of_the_total_variation_is_refused():
    with pytest.raises(ValueError, match="tv_weight is"):
        hybrid(small_cnn(), rgap.client_gradients(small_cnn(), IMAGE, LABEL), (3, 8, 8), tv_weight=-1.0)


@pytest.mark.slow
def test_a_hypothesis_whose_image_was_amplified_does_not_come_first():
    """CNN6-d, the second photograph: the other root of the loss has a smaller residual and a huge image."""
    images, labels = rgap.data.load_images("embedded", index=[1], image_shape=(3, 32, 32), classes=2)
    model = rgap.models.cnn6_d()
    gradients = rgap.client_gradients(model, images, labels)
    plain = rgap.reconstruct(
        model, gradients, (3, 32, 32), virtual_constraints=False, effort="full", gradient_scale=1.0
    )
    assert plain.verdict == "rank-deficient"
    assert plain.candidates[0].images.std() > 0.1
    assert psnr_db(hybrid(model, gradients, (3, 32, 32), steps=100).images, images).item() > 60
