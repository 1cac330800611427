"""One image of a transformer's gradient, with a verdict that is never wrong about `exact`."""

import pytest
import torch
from torch import nn
from vits import SHAPE, small, torchvision_vit

import rgap
from rgap.client import gaussian_noise, gradients_from_update, prune, quantise
from rgap.metrics import psnr_db
from rgap.results import GradientMismatchError, UnsupportedLayerError
from rgap.tokens import recognise, reconstruct_tokens


def photograph(index=0):
    return rgap.data.load_images("embedded", image_shape=SHAPE, index=index)[0]


def attack(model, image, label=2, loss="cross_entropy", defend=None, **options):
    """The result and its PSNR."""
    some = next(model.parameters())
    gradients = rgap.client_gradients(model, image.to(some), torch.tensor([label]), loss)
    gradients = gradients if defend is None else defend(gradients)
    result = reconstruct_tokens(recognise(model, SHAPE), gradients, loss, **options)
    return result, psnr_db(result.images, image).item()


@pytest.mark.parametrize("layout", ["timm", "registers", "mean", "lookup", "map", "overlap", "affine", "huggingface"])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 75), (torch.float64, 150)])
def test_layouts(layout, dtype, least):
    result, quality = attack(small(layout).to(dtype), photograph())
    assert result.verdict == "exact"
    assert result.labels.tolist() == [2]
    assert quality >= least
    assert result.layers[0].deficit == 0
    assert 0.2 < (result.images - photograph()).square().mean().sqrt() / result.layers[0].predicted_error < 3


@pytest.mark.parametrize(("loss", "classes"), [("cross_entropy", 5), ("mse", 5), ("mse", 1), ("logistic", 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_labels(loss, classes, bias):
    for label in range(max(classes, 2)):
        model = torchvision_vit(classes=classes)
        if not bias:
            model.heads.head.register_parameter("bias", None)
        result, quality = attack(model, photograph(1), label, loss)
        assert result.labels.tolist() == [label]
        assert result.verdict == "exact"
        assert quality > 75


@pytest.mark.parametrize("width", [10, 14, 16])
def test_width_at_most_the_number_of_patches_is_short_of_rank(width):
    result, _ = attack(torchvision_vit(width=width).double(), photograph(), virtual_constraints=False)
    assert result.verdict == "rank-deficient"
    assert result.layers[0].deficit == (16 - (width - 1)) * 48
    assert "lack" in result.notes[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "deficit"), [(16, 12), (14, 36)])
def test_the_layers_above_close_a_small_deficit(width, deficit):
    model, image = torchvision_vit(width, seed=2, size=8, patch=2).double(), photograph()[..., 4:12, 4:12]
    gradients = rgap.client_gradients(model, image.double(), torch.tensor([2]), "cross_entropy")
    result = reconstruct_tokens(recognise(model, (3, 8, 8)), gradients)
    assert result.verdict == "exact"
    assert psnr_db(result.images, image).item() > 150
    report = result.layers[0]
    assert report.deficit == deficit
    assert report.virtual_constraints > deficit
    assert result.candidates[0].open_layers == ()


def test_patches_with_more_entries_than_a_token_are_not_closed():
    """E maps 48 entries to 16: part of what is open changes nothing above it, and any image has that gradient."""
    result, _ = attack(torchvision_vit(width=16).double(), photograph())
    assert result.verdict == "rank-deficient"
    assert result.layers[0].virtual_constraints is None


def test_one_more_is_enough():
    result, quality = attack(torchvision_vit(width=18).double(), photograph())
    assert result.verdict == "exact"
    assert quality > 150


@pytest.mark.parametrize(
    "defend",
    [
        lambda g: gaussian_noise(g, 1e-3 * g[0].square().mean().sqrt().item()),
        lambda g: prune(g, 0.3),
        lambda g: quantise(g, "bfloat16"),
        lambda g: quantise(g, "int8"),
    ],
    ids=["noise", "pruned", "bfloat16", "int8"],
)
def test_under_noise_nothing_is_exact_and_two_candidates_come_back(defend):
    result, quality = attack(torchvision_vit(), photograph(), defend=defend)
    assert result.verdict in ("inconsistent", "rank-deficient")  # noise may drown some directions alone
    assert len(result.candidates) == 2
    assert any("the smoothest image and ridge regression" in note for note in result.notes)
    assert quality > 10


def test_another_networks_weights_are_not_certified():
    """The patches' equations know nothing of the weights above: the image is right, and nothing proves it."""
    gradients = rgap.client_gradients(torchvision_vit(seed=1), photograph(), torch.tensor([2]), "cross_entropy")
    model = torchvision_vit()
    result = reconstruct_tokens(recognise(model, SHAPE), gradients)
    assert result.verdict == "inconsistent"


def test_two_images_averaged_are_not_certified():
    images = torch.cat([photograph(0), photograph(1)])
    gradients = rgap.client_gradients(torchvision_vit(), images, torch.tensor([2, 3]), "cross_entropy")
    model = torchvision_vit()
    assert reconstruct_tokens(recognise(model, SHAPE), gradients).verdict == "inconsistent"


def test_batches_are_refused():
    with pytest.raises(UnsupportedLayerError, match="sum over the images"):
        attack(torchvision_vit(), photograph(), batch_size=2)


def test_a_head_of_zeros_is_refused():
    model = torchvision_vit()
    nn.init.zeros_(model.heads.head.weight)
    with pytest.raises(UnsupportedLayerError, match=r"heads.head.weight.*is zero: no gradient reaches the image"):
        attack(model, photograph())


def test_gradients_of_zeros_are_refused():
    def without_positions(gradients):
        names = [name for name, _ in torchvision_vit().named_parameters()]
        return [g * (name != "encoder.pos_embedding") for name, g in zip(names, gradients, strict=True)]

    with pytest.raises(GradientMismatchError, match="pos_embedding"):
        attack(torchvision_vit(), photograph(), defend=without_positions)


@pytest.mark.parametrize("labels", [[7], [0, 1], [-1]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(ValueError, match="labels are"):
        attack(torchvision_vit(), photograph(), labels=labels)


def local_steps(model, image, steps, momentum):
    """The network after some steps of SGD on one image."""
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=momentum)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(image), torch.tensor([2])).backward()
        optimiser.step()
    return model


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (5, 0.0), (5, 0.9)])
def test_updates_of_several_steps_give_the_image(steps, momentum):
    """The patches do not drift: Σ_j c_j Δ_jᵀ P is linear in the same P."""
    image = photograph().double()
    before = torchvision_vit().double()
    after = local_steps(torchvision_vit().double(), image, steps, momentum)
    update = gradients_from_update(before, after, 0.05)
    result = reconstruct_tokens(recognise(before, SHAPE), update)
    assert psnr_db(result.images, photograph()).item() > 120
    assert result.verdict == ("exact" if steps == 1 else "inconsistent")
    if steps > 1:
        assert "several steps" in result.notes[-1]


def test_the_same_call_as_for_chains():
    model, image = torchvision_vit(), photograph()
    gradients = rgap.client_gradients(model, image, torch.tensor([2]), "cross_entropy")
    named = dict(zip(dict(model.named_parameters()), gradients, strict=True))
    prepared = recognise(model, SHAPE)
    results = [
        rgap.reconstruct(model, gradients, SHAPE, "cross_entropy"),
        rgap.reconstruct(prepared, named, loss="cross_entropy", labels=[2]),
    ]
    assert all(result.verdict == "exact" for result in results)
    assert torch.equal(results[0].images, results[1].images)
    assert results[0].to_frame()["name"].tolist() == ["conv_proj"]


def test_what_is_neither_a_chain_nor_a_transformer_keeps_the_chains_refusal():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 49, 1))
    gradients = rgap.client_gradients(network, photograph(), torch.tensor([1]))
    with pytest.raises(UnsupportedLayerError, match="MaxPool2d"):
        rgap.reconstruct(network, gradients, SHAPE)


@pytest.mark.parametrize(("name", "value"), [("rcond", 2.0), ("noise_std", -1.0), ("pixel_range", (1.0, 0.0))])
def test_options_out_of_range_are_refused(name, value):
    model = torchvision_vit()
    gradients = rgap.client_gradients(model, photograph(), torch.tensor([2]), "cross_entropy")
    with pytest.raises(ValueError, match=name):
        rgap.reconstruct(model, gradients, SHAPE, "cross_entropy", **{name: value})
