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
    assert result.verdict == "exact" and result.certified_psnr_db == result.candidates[0].certified_psnr_db > 54
    assert result.labels.tolist() == [2] and quality >= least and result.layers[0].deficit == 0
    assert 0.2 < (result.images - photograph()).square().mean().sqrt() / result.layers[0].predicted_error < 3


@pytest.mark.parametrize(("loss", "classes"), [("cross_entropy", 5), ("mse", 5), ("mse", 1), ("logistic", 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_labels(loss, classes, bias):
    for label in range(max(classes, 2)):
        model = torchvision_vit(classes=classes)
        if not bias:
            model.heads.head.register_parameter("bias", None)
        result, quality = attack(model, photograph(1), label, loss)
        assert result.labels.tolist() == [label] and result.verdict == "exact" and quality > 75


@pytest.mark.parametrize("width", [10, 14, 16])
def test_width_at_most_the_number_of_patches_is_short_of_rank(width):
    result, _ = attack(torchvision_vit(width=width).double(), photograph(), virtual_constraints=False)
    assert result.verdict == "rank-deficient" and "lack" in result.notes[-1]
    assert result.layers[0].deficit == (16 - (width - 1)) * 48


@pytest.mark.slow
@pytest.mark.parametrize(("width", "deficit"), [(16, 12), (14, 36)])
def test_the_layers_above_close_a_small_deficit(width, deficit):
    model, image = torchvision_vit(width, seed=2, size=8, patch=2).double(), photograph()[..., 4:12, 4:12]
    gradients = rgap.client_gradients(model, image.double(), torch.tensor([2]), "cross_entropy")
    result = reconstruct_tokens(recognise(model, (3, 8, 8)), gradients)
    assert result.verdict == "exact" and psnr_db(result.images, image).item() > 150
    report = result.layers[0]
    assert report.deficit == deficit < report.virtual_constraints and result.candidates[0].open_layers == ()


def test_patches_with_more_entries_than_a_token_are_not_closed():
    """E maps 48 entries to 16: part of what is open changes nothing above it, and any image has that gradient."""
    result, _ = attack(torchvision_vit(width=16).double(), photograph())
    assert result.verdict == "rank-deficient" and result.layers[0].virtual_constraints is None


def test_one_more_is_enough():
    result, quality = attack(torchvision_vit(width=18).double(), photograph())
    assert result.verdict == "exact" and quality > 150


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
    assert len(result.candidates) == 2 and quality > 10
    assert any("the smoothest image and ridge regression" in note for note in result.notes)


@pytest.mark.parametrize(("seed", "count"), [(1, 1), (0, 2)], ids=["another network's weights", "two images averaged"])
def test_what_the_patches_equations_do_not_see_is_not_certified(seed, count):
    """They know nothing of the weights above: the image is right, and nothing proves it."""
    images, labels = torch.cat([photograph(0), photograph(1)])[:count], torch.tensor([2, 3])[:count]
    gradients = rgap.client_gradients(torchvision_vit(seed=seed), images, labels, "cross_entropy")
    assert reconstruct_tokens(recognise(torchvision_vit(), SHAPE), gradients).verdict == "inconsistent"


def few_surplus_equations():
    """A network and image of which 16 patches of 4 grey pixels have 4 surplus equations."""
    torch.manual_seed(0)
    model = small(width=18).double()
    model.patch_embed = nn.Conv2d(1, 18, 2, 2).double()
    return model, photograph()[:, :1, 4:12, 4:12].double()


@pytest.mark.parametrize("relative", [1e-8, 1e-7, 1e-6])
def test_noise_that_no_surplus_equations_show_is_found_in_the_images_own_gradient(relative):
    """float32 gradients with noise below the tolerance of their residual, magnified to a wrong image."""
    model, image = few_surplus_equations()
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        gradients = [
            (g + 10 * relative * g.square().mean().sqrt() * torch.randn(g.shape, generator=generator)).float()
            for g in rgap.client_gradients(model, image, torch.tensor([2]), "cross_entropy")
        ]
        result = rgap.reconstruct(model, gradients, (1, 8, 8), "cross_entropy")
        error = (result.images - image).square().mean().sqrt().item()
        assert result.verdict != "exact" or error < 5 * result.candidates[0].predicted_error


@pytest.mark.parametrize("scale", [7.0, 1e-3])
def test_a_scaled_loss_leaves_image_and_label_and_is_named(scale):
    result, quality = attack(torchvision_vit(), photograph(), defend=lambda gradients: [scale * g for g in gradients])
    assert quality > 75 and result.labels.tolist() == [2]
    assert result.verdict == "exact" and result.gradient_scale == pytest.approx(scale, rel=1e-4)
    assert f"is {scale:.4g} times the image's own" in result.notes[-2]


@pytest.mark.parametrize("scale", [1e300, 1e-250])
def test_a_hugely_scaled_gradient_keeps_an_asserted_factor(scale):
    model = torchvision_vit().double()
    gradients = [scale * g for g in rgap.client_gradients(model, photograph(), torch.tensor([2]), "cross_entropy")]
    for options in ({}, {"gradient_scale": scale}):
        result = rgap.reconstruct(model, gradients, tuple(photograph().shape[1:]), "cross_entropy", **options)
        assert result.verdict == "exact" and result.gradient_scale / scale == pytest.approx(1, rel=1e-6)


def test_a_regressions_target_is_found_by_the_heads_bias():
    model, target = torchvision_vit(classes=5).double(), torch.tensor([[0.3, -1.2, 0.8, 2.0, 0.1]]).double()
    gradients = rgap.client_gradients(model, photograph(), target, "mse")
    for options in ({}, {"labels": target, "gradient_scale": 1.0}):
        result = rgap.reconstruct(model, gradients, tuple(photograph().shape[1:]), "mse", **options)
        assert result.verdict == "exact" and (result.labels - target).abs().max() < 1e-8


def test_dropout_and_batch_norm_in_training_leave_network_and_random_state():
    model = torchvision_vit()
    model.encoder.dropout = nn.Sequential(nn.BatchNorm1d(17), nn.Dropout(0.1))
    gradients = rgap.client_gradients(model.train(), photograph(), torch.tensor([2]), "cross_entropy")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    result = reconstruct_tokens(recognise(model, SHAPE), gradients)
    assert psnr_db(result.images, photograph()).item() > 75
    assert result.verdict == "inconsistent"  # dropout cannot be replayed
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda g: g.to("meta")], ids=["sparse", "meta"])
def test_gradients_without_dense_values_are_refused(change):
    with pytest.raises(GradientMismatchError, match=r"class_token.*dense"):
        attack(torchvision_vit(), photograph(), defend=lambda gradients: [change(g) for g in gradients])


def test_a_network_without_values_is_refused():
    model = torchvision_vit()
    with pytest.raises(ValueError, match=r"class_token.*meta device"):
        rgap.reconstruct(model.to("meta"), [], SHAPE)


def test_a_network_that_gives_no_tensor_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torchvision_vit()

        def forward(self, x):
            return {"logits": self.inner(x)}

    gradients = rgap.client_gradients(torchvision_vit(), photograph(), torch.tensor([2]), "cross_entropy")
    with pytest.raises(UnsupportedLayerError, match="gives a dict"):
        reconstruct_tokens(recognise(Named(), SHAPE), gradients)


def without_positions(gradients):
    """The gradients, that of the position embedding zero."""
    names = [name for name, _ in torchvision_vit().named_parameters()]
    return [g * (name != "encoder.pos_embedding") for name, g in zip(names, gradients, strict=True)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 2}, UnsupportedLayerError, "sum over the images"),
        ({"defend": without_positions}, GradientMismatchError, "pos_embedding"),
        *(({"labels": labels}, ValueError, "labels are") for labels in ([7], [0, 1], [-1], ["a"], [None])),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        attack(torchvision_vit(), photograph(), **options)


def test_a_head_of_zeros_is_refused():
    model = torchvision_vit()
    nn.init.zeros_(model.heads.head.weight)
    with pytest.raises(UnsupportedLayerError, match=r"heads.head.weight.*is zero: no gradient reaches the image"):
        attack(model, photograph())


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
    before = torchvision_vit().double()
    after = local_steps(torchvision_vit().double(), photograph().double(), steps, momentum)
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


def test_a_network_that_cannot_run_keeps_the_chains_refusal():
    """Batch norm of one value a channel, in training."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(14), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    ).train()
    gradients = [torch.ones_like(p) for p in network.parameters()]
    with pytest.raises(UnsupportedLayerError, match=r"MaxPool2d.*more than 1 value"):
        rgap.reconstruct(network, gradients, SHAPE, "cross_entropy")
    assert network[2].num_batches_tracked == 0
