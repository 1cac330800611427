"""Recognition by structure: which entry of which parameter is added to which token, and refusals by name."""

import pytest
import torch
from torch import nn
from vits import SHAPE, small, torchvision_vit

from rgap.results import UnsupportedLayerError
from rgap.tokens import recognise

LAYOUTS = ("timm", "registers", "mean", "lookup", "map", "overlap", "affine", "huggingface")


def test_torchvisions_layout_is_recognised():
    found = recognise(torchvision_vit(), SHAPE)
    assert (found.weight_name, found.bias_name) == ("conv_proj.weight", "conv_proj.bias")
    assert found.position_name == "encoder.pos_embedding"
    assert torch.equal(found.position_entries, torch.arange(48, 17 * 48).reshape(16, 48))  # the class token comes first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_linear_in_the_patches(layout):
    """The statement that everything rests on, against autograd: ∂ℓ/∂E = Δᵀ P and ∂ℓ/∂b = Σ δ."""
    model = small(layout).double()
    found = recognise(model, SHAPE)
    image = torch.rand(1, *SHAPE, dtype=torch.float64)
    loss = nn.functional.cross_entropy(model(image), torch.tensor([2]))
    names = found.weight_name, found.bias_name, found.position_name
    E, b, q = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    delta = q.flatten()[found.position_entries]
    assert torch.allclose(delta.T @ found.patches(image), E.flatten(1), atol=1e-12)
    assert torch.allclose(delta.sum(0), b, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patches_give_the_image_back(layout):
    found = recognise(small(layout), SHAPE)
    image = torch.rand(1, *SHAPE, dtype=torch.float64)
    assert torch.allclose(found.image(found.patches(image)), image, atol=1e-6)


def test_normalisation_belongs_to_the_patches():
    model = small("affine")
    found, image = recognise(model, SHAPE), torch.rand(1, *SHAPE, dtype=torch.float64)
    cut = torch.nn.functional.unfold((image - model.mean) / model.std, 4, stride=4)[0].T
    assert torch.allclose(found.patches(image), cut, atol=1e-6)
    assert torch.allclose(found.scale[0, :16], 1 / model.std[0].double().flatten())


def test_batch_norm_before_the_patches_belongs_to_them():
    model = small()
    model.patch_embed = nn.Sequential(nn.BatchNorm2d(3), model.patch_embed)
    model.patch_embed[0].running_mean.fill_(0.4)
    found = recognise(model.eval(), SHAPE)
    assert found.weight_name == "patch_embed.1.weight"
    assert torch.allclose(found.scale, torch.tensor((1 + 1e-5) ** -0.5, dtype=torch.float64))
    assert torch.allclose(found.shift, -0.4 * found.scale)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("sincos", "'pos_embed' is not trained .a buffer"),
        ("frozen", "'pos_embed' is not trained"),
        ("none", "no learned position embedding"),
    ],
)
def test_transformers_without_position_gradients_are_refused_by_name(layout, words):
    with pytest.raises(UnsupportedLayerError, match=words):
        recognise(small(layout), SHAPE)


def test_a_frozen_patch_embedding_is_refused():
    model = small()
    model.patch_embed.requires_grad_(False)
    with pytest.raises(UnsupportedLayerError, match=r"patch_embed.weight.*not trained"):
        recognise(model, SHAPE)


def test_a_network_frozen_as_a_whole_is_recognised():
    assert recognise(small().requires_grad_(False), SHAPE) is not None


def test_a_stem_of_two_convolutions_is_refused():
    model = small()
    model.patch_embed = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.GELU(), nn.Conv2d(8, 48, 2, 2))
    with pytest.raises(UnsupportedLayerError, match=r"patch_embed.0"):
        recognise(model.eval(), SHAPE)


def test_pixels_that_no_patch_reads_are_refused():
    model = small()
    model.patch_embed = nn.Conv2d(3, 48, 3, 4)
    with pytest.raises(UnsupportedLayerError, match="pixels"):
        recognise(model, SHAPE)


def test_convolutional_networks_are_none_of_its_business():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2), nn.Softmax(1))
    assert recognise(network, SHAPE) is None


def test_a_wrong_image_shape_is_refused():
    with pytest.raises(ValueError, match="image_shape"):
        recognise(torchvision_vit(), (3, 20, 20))


def test_nothing_changes_in_the_network():
    model = torchvision_vit().train()
    state = torch.random.get_rng_state()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    recognise(model, SHAPE)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
