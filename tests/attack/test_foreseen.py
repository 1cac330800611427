import math
import time

import pytest
import torch
from cases import rand
from torch import nn

import rgap
from rgap.attack.candidates import Attack
from rgap.attack.descent import close_by_virtual_constraints
from rgap.attack.foreseen import foreseen_deficits
from rgap.shared_gradient import receive


def foreseen(model, shape, loss="cross_entropy", close=close_by_virtual_constraints):
    gradients = rgap.client_gradients(model, rand(1, *shape), torch.tensor([1]), loss)
    chain = rgap.prepare(model, shape)
    return foreseen_deficits(Attack(chain, receive(chain, gradients), loss, close))


def narrow(width=6):
    """A LeNet whose first layer is too narrow: 3,072 unknowns, 256·width + 75·width equations."""
    return rgap.models.lenet(widths=(width, 12, 12), bias=True).double()


def test_a_hopeless_network_is_told_at_once_with_its_deficits_and_without_solving():
    model, image = narrow(), rand(1, 3, 32, 32)
    gradients = rgap.client_gradients(model, image, torch.tensor([1]), "cross_entropy")
    rgap.models.lenet()  # what is loaded on first use is not the attack's
    begin = time.process_time()
    result = rgap.reconstruct(model, gradients, (3, 32, 32), "cross_entropy")
    assert time.process_time() - begin < 1
    assert result.verdict == "rank-deficient" and result.labels.tolist() == [1]
    assert result.images.shape == image.shape and (result.images == 0.5).all()
    assert {r.name: r.deficit for r in result.layers} == {"7": 0, "4": 0, "2": 0, "0": 3072 - 6 * (256 + 75) + 36}
    assert any("'0' by 1122" in note for note in result.notes)
    assert any("rank laws say so before any system is solved; effort='full'" in note for note in result.notes)


def test_unbounded_pixels_have_no_middle():
    model = narrow()
    gradients = rgap.client_gradients(model, rand(1, 3, 32, 32), torch.tensor([1]), "cross_entropy")
    unbounded = {"pixel_range": (-math.inf, math.inf)}
    result = rgap.reconstruct(model, gradients, (3, 32, 32), "cross_entropy", **unbounded)
    assert result.verdict == "rank-deficient" and not result.images.any()


def test_an_unknown_effort_is_refused():
    with pytest.raises(ValueError, match="effort is 'some'; known: auto, full"):
        rgap.reconstruct(narrow(), [], (3, 32, 32), effort="some")


@pytest.mark.parametrize(("width", "deficit"), [(14, 1018), (15, None), (16, None), (20, None)])
def test_what_the_layer_before_may_close_is_not_given_up(width, deficit):
    """CNN6-d: the range of layer 1 supplies 396 equations and its gradient 564."""
    found = foreseen(rgap.models.cnn6(width=width).double(), (3, 32, 32), "logistic")
    assert found == (None if deficit is None else {"2": deficit})


def test_the_time_that_layers_below_the_hopeless_one_take_counts_too():
    """Closing layer '2' by 64 takes less than a second; layer '0' lacks 488 of 3,072."""
    assert foreseen(rgap.models.lenet(widths=(8, 8, 8), bias=True).double(), (3, 32, 32)) == {"2": 64}


def test_without_virtual_constraints_and_behind_pooling_nothing_closes():
    assert "2" in foreseen(rgap.models.cnn6_d().double(), (3, 32, 32), "logistic", close=None)
    modules = [nn.Conv2d(3, 16, 5, 1, 2), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Conv2d(16, 4, 3), nn.LeakyReLU(0.2)]
    model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(4 * 14 * 14, 4)).double()
    assert foreseen(model, (3, 32, 32))


def test_frozen_layers_have_their_weights_alone():
    model = rgap.models.lenet(widths=(12, 12, 12), bias=True).double()
    assert foreseen(model, (3, 32, 32)) is None
    model[2].weight.requires_grad_(False)
    assert foreseen(model, (3, 32, 32)) == {"2": 3072 - 768}


def test_small_networks_are_solved_for_what_is_determined():
    modules = [nn.Conv2d(3, 2, 3), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(2 * 36, 4)]
    assert foreseen(nn.Sequential(*modules).double(), (3, 8, 8)) is None


def test_a_layer_that_takes_minutes_to_close_is_left_open_and_what_is_amplified_below_is_no_picture():
    """Behind ReLU layers of three channels the third layer lacks 160 unknowns; the second leaves 2,048 further open."""
    modules, channels = [], 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for width, stride, act in [(12, 2, nn.LeakyReLU(0.2)), (16, 2, nn.LeakyReLU(0.2)), *[(3, 1, nn.ReLU())] * 4]:
            modules += [nn.Conv2d(channels, width, 5, stride, 2), act]
            channels = width
        model = nn.Sequential(*modules, nn.Flatten(), nn.Linear(192, 10))
        for p in model.parameters():
            nn.init.uniform_(p, -0.5, 0.5)
    model = model.double()
    images, _ = rgap.data.load_images("embedded", index=[0], image_shape=(3, 32, 32))
    gradients = rgap.client_gradients(model, images.double(), torch.tensor([0]), "cross_entropy")
    begin = time.process_time()
    result = rgap.reconstruct(model, gradients, (3, 32, 32), "cross_entropy", gradient_scale=1.0)
    assert time.process_time() - begin < 4
    assert result.verdict == "rank-deficient" and result.images.abs().max() < 1000
