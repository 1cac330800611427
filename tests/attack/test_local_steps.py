"""Updates of several local steps: autograd's own SGD is the client."""

import copy

import pytest
import torch
from cases import rand, sequential
from torch import nn
from vits import SHAPE as VIT_SHAPE
from vits import Small

import rgap
from rgap.baselines.matching import gradient_objective
from rgap.client import loss_value
from rgap.metrics import psnr_db

MLP_SHAPE, CHAIN_SHAPE = (3, 4, 4), (3, 8, 8)


def mlp(seed=0, width=60):
    layers = nn.Linear(48, width), nn.ReLU(), nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, 5)
    return sequential(nn.Flatten(), *layers, seed=seed)


def chain(activation):
    convolutions = nn.Conv2d(3, 8, 3, padding=1), activation, nn.Conv2d(8, 8, 3, padding=1), activation
    return sequential(*convolutions, nn.Flatten(), nn.Linear(512, 1))


def trained(network, images, labels, loss, steps, optimiser=torch.optim.SGD, **options):
    """The network after a client's local steps by torch's own optimiser."""
    after = copy.deepcopy(network)
    optimiser = optimiser(after.parameters(), **options)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_value(loss, after(images.to(next(after.parameters()))), labels).backward()
        optimiser.step()
    return after


def attacked(network, images, labels, loss="cross_entropy", steps=3, known=(), **options):
    after = trained(network, images, labels, loss, steps, **options)
    training = {"learning_rate": options["lr"], "steps": steps, "batch_size": len(images)}
    training |= {key: value for key, value in options.items() if key != "lr"} | dict(known)
    return rgap.reconstruct_update(network, after, tuple(images.shape[1:]), loss, **training)


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_biased_first_layer_gives_the_image_after_any_steps(steps, momentum):
    image, label = rand(1, *MLP_SHAPE), torch.tensor([3])
    result = attacked(mlp(), image, label, steps=steps, lr=0.05, momentum=momentum, weight_decay=1e-3)
    assert result.verdict == "exact" and result.labels.tolist() == [3]
    assert psnr_db(result.images, image).item() > 200


def test_patches_give_the_image_after_several_steps():
    torch.manual_seed(0)
    image, label = rand(1, *VIT_SHAPE), torch.tensor([1])
    result = attacked(Small().double(), image, label, steps=3, lr=0.02, momentum=0.9)
    assert result.verdict == "exact" and psnr_db(result.images, image).item() > 150


def test_a_smooth_chain_gives_the_image_by_a_fixed_point():
    image, label = rand(1, *CHAIN_SHAPE), torch.tensor([1])
    result = attacked(chain(nn.ELU()), image, label, "logistic", steps=2, lr=0.01)
    assert result.verdict == "exact" and psnr_db(result.images, image).item() > 150
    assert any("fixed point" in note for note in result.notes)


def test_a_chain_with_kinks_gives_the_image_at_small_rates():
    image, label = rand(1, *CHAIN_SHAPE), torch.tensor([1])
    result = attacked(chain(nn.LeakyReLU(0.2)), image, label, "logistic", steps=3, lr=1e-4)
    assert result.verdict == "exact" and psnr_db(result.images, image).item() > 100


@pytest.mark.parametrize(("steps", "momentum", "rate"), [(2, 0.0, 3e-3), (3, 0.9, 1e-3)])
def test_units_that_flip_between_the_steps_are_read_as_mean_slopes(steps, momentum, rate):
    image, label, network = rand(1, *CHAIN_SHAPE, seed=2), torch.tensor([1]), chain(nn.LeakyReLU(0.2))
    after = trained(network, image, label, "logistic", steps, lr=rate, momentum=momentum)
    units = [rgap.prepare(one, CHAIN_SHAPE).layer_inputs(image) for one in (network, after)]
    assert any(bool(((units[0][n] > 0) != (units[1][n] > 0)).any()) for n in units[0])
    result = attacked(network, image, label, "logistic", steps=steps, lr=rate, momentum=momentum)
    assert result.verdict == "exact" and psnr_db(result.images, image).item() > 150


def test_a_chain_with_kinks_is_refused_honestly():
    image, label = rand(1, *CHAIN_SHAPE), torch.tensor([1])
    result = attacked(chain(nn.LeakyReLU(0.2)), image, label, "logistic", steps=5, lr=0.3, momentum=0.9)
    assert result.verdict == "inconsistent"
    assert any("flip between the steps" in note for note in result.notes)


@pytest.mark.parametrize(
    "known", [{"steps": 4}, {"steps": 2}, {"learning_rate": 0.1}, {"momentum": 0.9}, {"weight_decay": 0.1}]
)
def test_other_steps_than_the_clients_are_not_certified(known):
    image, label = rand(1, *MLP_SHAPE), torch.tensor([3])
    result = attacked(mlp(), image, label, lr=0.05, known=known)
    assert result.verdict == "inconsistent"
    assert "weight_decay" in known or psnr_db(result.images, image).item() > 150  # the image needs no number but λ
    assert any("other steps, or other images" in note for note in result.notes)


def test_an_unknown_number_of_steps_is_found():
    image, label = rand(1, *MLP_SHAPE), torch.tensor([3])
    result = attacked(mlp(), image, label, steps=3, lr=0.05, known={"steps": None})
    assert result.verdict == "exact" and any("3 local steps" in note for note in result.notes)


def test_one_step_is_a_gradient():
    image, label = rand(1, *MLP_SHAPE), torch.tensor([3])
    result = attacked(mlp(), image, label, steps=1, lr=0.05)
    assert result.verdict == "exact" and psnr_db(result.images, image).item() > 150


def test_a_one_step_reading_of_several_steps_is_never_exact():
    image, label = rand(1, *MLP_SHAPE), torch.tensor([3])
    assert attacked(mlp(), image, label, steps=5, lr=0.05, known={"steps": 1}).verdict == "inconsistent"


def test_images_that_move_units_alone_are_found_in_batches():
    images, labels = rand(3, *MLP_SHAPE, seed=5), torch.tensor([3, 0, 3])
    result = attacked(mlp(width=200), images, labels, lr=0.01)
    assert result.verdict == "exact" and len(result.per_image) == 3
    assert sorted(result.labels.tolist()) == [0, 3, 3]
    own = images[rgap.metrics.match(result.images, images)]
    assert psnr_db(result.images, own).min().item() > 150


def test_images_that_share_all_their_units_are_counted_as_missing():
    images, labels = rand(1, *MLP_SHAPE).repeat(6, 1, 1, 1) + 0.01 * rand(6, *MLP_SHAPE, seed=1), torch.arange(6) % 5
    result = attacked(mlp(), images, labels, lr=0.01)
    assert result.verdict == "rank-deficient" and len(result.images) < 6
    assert any("of 6" in note for note in result.notes)


def test_weights_in_float32_say_how_accurate_the_image_is():
    image, label = rand(1, *MLP_SHAPE), torch.tensor([3])
    result = attacked(mlp().float(), image, label, lr=0.05)
    error = (result.images - image).square().mean().sqrt().item()
    assert result.verdict == "exact" and error < 5 * result.candidates[0].predicted_error < 1e-3


def test_the_unrolled_optimiser_matches_the_update():
    image, label, network = rand(1, *CHAIN_SHAPE), torch.tensor([1]), chain(nn.ELU())
    training = rgap.client.LocalTraining(0.05, 3, 0.9, 1e-3)
    after = trained(network, image, label, "logistic", 3, lr=0.05, momentum=0.9, weight_decay=1e-3)
    update = rgap.client.mean_gradients(network, after, training)
    options = {"labels": label, "steps": 1, "training": training, "dtype": torch.float64}
    arguments = (CHAIN_SHAPE, "logistic", 1, (0.0, 1.0), None, torch.float64, None, training)
    found = gradient_objective(network, update, *arguments).distances(image.requires_grad_(), label)
    assert found.residual < 1e-10 and found.squared.item() < 1e-20
    assert (
        rgap.baselines.inverting_gradients(network, update, CHAIN_SHAPE, "logistic", **options).images.isfinite().all()
    )


def test_what_is_no_such_update_is_refused_by_name():
    network, image = chain(nn.ELU()), rand(2, *CHAIN_SHAPE)
    after = trained(network, image, torch.tensor([0, 1]), "logistic", 2, lr=0.1)
    options = {"learning_rate": 0.1, "steps": 2}

    def attack(**changed):
        rgap.reconstruct_update(network, after, CHAIN_SHAPE, "logistic", **options | changed)

    with pytest.raises(ValueError, match="optimizer is 'adam'; only 'sgd'"):
        attack(optimizer="adam")
    with pytest.raises(rgap.UnsupportedLayerError, match="2 images and several local steps"):
        attack(batch_size=2)
    with pytest.raises(ValueError, match="batch_size is None"):
        attack(batch_size=None)
    with pytest.raises(ValueError, match="steps is 0"):
        attack(steps=0)
    with pytest.raises(ValueError, match=r"momentum is 1\.0; it must be at least 0 and below 1"):
        attack(momentum=1.0)
    with pytest.raises(ValueError, match="weight_decay is -1"):
        attack(weight_decay=-1)
    with pytest.raises(rgap.GradientMismatchError, match="before and after are equal"):
        rgap.reconstruct_update(network, network, CHAIN_SHAPE, "logistic", **options)
    silent = mlp()
    with torch.no_grad():
        silent[1].bias.fill_(-1e3)  # no unit of the first layer is ever switched on
    shared = dict(silent.named_parameters())
    moved = {name: p - 0.1 * (name != "1.bias") for name, p in shared.items()}
    with pytest.raises(rgap.GradientMismatchError, match=r"the update of the bias '1\.bias' is zero"):
        rgap.reconstruct_update(silent, moved, MLP_SHAPE, "cross_entropy", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "believed", "verdict"), [
    (nn.ELU, 0.001, "exact"), (nn.ReLU, 0.0001, "exact"), (nn.ELU, 0.002, "inconsistent"),
])  # fmt: skip
def test_several_steps_of_a_residual_network_are_walked_at_the_mean_weights(activation, believed, verdict):
    network = rgap.models.resnet(0, (48, 96), activation=activation).double().eval()
    image, label = rand(1, 3, 8, 8), torch.tensor([1])
    rate = 0.0001 if activation is nn.ReLU else 0.001
    found = attacked(network, image, label, steps=2, lr=rate, known={"learning_rate": believed})
    assert found.verdict == verdict and "walks through the network" in found.notes[0]
    assert verdict != "exact" or psnr_db(found.images, image).item() > 180


def test_a_residual_network_whose_image_is_open_is_not_certified_and_a_batch_is_refused():
    network, image, label = rgap.models.resnet(0, (6, 48)).double().eval(), rand(1, 3, 8, 8), torch.tensor([1])
    found = attacked(network, image, label, steps=2, lr=1e-4)
    assert found.verdict == "inconsistent" and "the fixed point does not contract" in found.notes[1]
    with pytest.raises(rgap.UnsupportedLayerError, match="2 images and several local steps"):
        attacked(network, rand(2, 3, 8, 8), torch.tensor([1, 0]), steps=2, lr=1e-4)
