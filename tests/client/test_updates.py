import copy

import pytest
import torch
from cases import rand, small_cnn
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.client import LocalTraining, gradients_from_update, gradients_of, loss_value, mean_gradients

SHAPE, IMAGE, LABEL = (3, 8, 8), rand(1, 3, 8, 8), torch.tensor([1])
NETWORK = small_cnn(bias=True)


def updated(network, optimiser, steps=1, images=IMAGE, labels=LABEL, **options):
    """The network after a client's local training."""
    client = copy.deepcopy(network)
    optimiser = optimiser(client.parameters(), **options)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_value("logistic", client(images.to(next(client.parameters()))), labels).backward()
        optimiser.step()
    return client


def forms(network):
    return [network, network.state_dict(), list(network.parameters())]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_one_step_gives_the_gradient_back_in_every_form(weight_decay):
    after = updated(NETWORK, torch.optim.SGD, lr=0.1, weight_decay=weight_decay)
    expected = rgap.client_gradients(NETWORK, IMAGE, LABEL)
    for one, other in zip(forms(NETWORK), forms(after), strict=True):
        found = gradients_from_update(one, other, 0.1, weight_decay=weight_decay)
        for g, shared in zip(found.values(), expected, strict=True):
            assert_close(g, shared, rtol=0, atol=1e-13)
        assert rgap.reconstruct(NETWORK, found, SHAPE, gradient_scale=1.0).verdict == "exact"
    mixed = gradients_from_update(NETWORK, after.state_dict(), 0.1)
    assert list(mixed) == list(dict(NETWORK.named_parameters()))


@pytest.mark.parametrize("rate", [1.0, 1e-2, 1e-4])
def test_the_rounding_of_float32_weights_is_the_gradients_noise(rate):
    network = copy.deepcopy(NETWORK).float()
    found = gradients_from_update(network, updated(network, torch.optim.SGD, lr=rate), rate)
    for g, shared, std in zip(
        found.values(), rgap.client_gradients(network, IMAGE, LABEL), found.noise_std.values(), strict=True
    ):
        error = (g - shared.double()).norm().item() / g.numel() ** 0.5
        assert error < 2 * std and (error > 0.5 * std or g.numel() < 100)


@pytest.mark.parametrize(("rate", "verdict", "least"), [(1.0, "exact", 80), (0.1, "exact", 60), (1e-2, "exact", 40)])
def test_an_update_of_float32_weights_is_attacked_at_the_precision_that_it_has(rate, verdict, least):
    network = copy.deepcopy(NETWORK).float()
    found = gradients_from_update(network, updated(network, torch.optim.SGD, lr=rate), rate)
    result = rgap.reconstruct(network, found, SHAPE, gradient_scale=1.0)
    assert result.verdict == verdict and rgap.metrics.psnr_db(result.images, IMAGE).item() > least
    assert result.notes[0].startswith("the gradient comes from an update of rounded weights; its relative precision is")


def test_what_moved_by_less_than_its_rounding_is_lost_by_name():
    network = copy.deepcopy(NETWORK).float()
    found = gradients_from_update(network, updated(network, torch.optim.SGD, lr=1e-7), 1e-7)
    result = rgap.reconstruct(network, found, SHAPE, gradient_scale=1.0)
    assert result.notes[0].startswith("lost to the rounding of the weights and not used: the gradient of '0.weight'")
    assert result.verdict in ("rank-deficient", "inconsistent")


@pytest.mark.parametrize(
    ("optimiser", "steps", "images", "options"),
    [
        (torch.optim.SGD, 2, 1, {"lr": 0.1}),
        (torch.optim.SGD, 3, 1, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, 1, 1, {"lr": 0.2}),
        (torch.optim.SGD, 1, 1, {"lr": 0.1, "weight_decay": 0.1}),
        (torch.optim.Adam, 1, 1, {"lr": 0.001}),
        (torch.optim.SGD, 1, 3, {"lr": 0.1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_single_plain_step_is_flagged_by_the_attack(optimiser, steps, images, options, dtype):
    network = copy.deepcopy(NETWORK).to(dtype)
    after = updated(network, optimiser, steps, rand(images, *SHAPE), torch.arange(images) % 2, **options)
    result = rgap.reconstruct(network, gradients_from_update(network, after, 0.1), SHAPE, gradient_scale=1.0)
    assert result.verdict == "inconsistent"


def test_running_statistics_and_counters_are_left_out():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 1)).train()
    after = updated(network, torch.optim.SGD, lr=0.1)
    assert not after[1].running_mean.equal(network[1].running_mean)
    for one, other in [(network, after), (network.state_dict(), after.state_dict()), (network.state_dict(), after)]:
        assert list(gradients_from_update(one, other, 0.1)) == [n for n, _ in network.named_parameters()]


def test_other_buffers_are_left_out_where_a_module_tells_them():
    network = copy.deepcopy(NETWORK)
    network.register_buffer("mean", torch.ones(3))
    after = updated(network, torch.optim.SGD, lr=0.1)
    assert "mean" not in gradients_from_update(network, after.state_dict(), 0.1)


STATE = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
MOVED = {"w": torch.ones(2, 3) * 0.9, "b": torch.ones(2)}


@pytest.mark.parametrize(
    ("before", "after", "options", "message"),
    [
        (STATE, MOVED, {"learning_rate": 0}, "learning_rate is 0; it must be above 0"),
        (STATE, MOVED, {"learning_rate": -0.1}, "learning_rate is -0.1"),
        (STATE, MOVED, {"learning_rate": float("nan")}, "learning_rate is nan"),
        (STATE, MOVED, {"steps": 5}, "steps is 5; only one local step"),
        (STATE, MOVED, {"momentum": 0.9}, "momentum is 0.9; it mixes in gradients of earlier steps"),
        (STATE, MOVED, {"weight_decay": -1.0}, "weight_decay is -1.0"),
        (STATE, {"w": MOVED["w"]}, {}, r"differ in names: missing after \['b'\], unknown before \[\]"),
        (STATE, {**MOVED, "c": torch.ones(1)}, {}, r"missing after \[\], unknown before \['c'\]"),
        (list(STATE.values()), [MOVED["w"]], {}, r"missing after \[1\]"),
        (STATE, {**MOVED, "w": torch.ones(3, 2)}, {}, r"'w' has shape \(2, 3\) before, \(3, 2\) after"),
        (STATE, {**MOVED, "b": torch.tensor([1.0, torch.nan])}, {}, "parameter 'b' holds NaN or infinity"),
        (STATE, dict(STATE), {}, "before and after are equal: no step was made"),
        (torch.ones(3), MOVED, {}, r"before \(a module, its state dict .*\): a Tensor; give a list or a mapping"),
        (STATE, 3, {}, r"after \(a module, .*\): a int"),
        (STATE, {**MOVED, "b": [1.0]}, {}, "'b' is a list; it must be a tensor"),
        ([], [], {}, "before holds no floating-point parameter"),
    ],
)
def test_what_is_no_update_is_refused_by_name(before, after, options, message):
    with pytest.raises(ValueError, match=message):
        gradients_from_update(before, after, **{"learning_rate": 0.1, **options})


@pytest.mark.parametrize(
    "training", [LocalTraining(0.1, 3), LocalTraining(0.05, 4, 0.9), LocalTraining(0.1, 3, 0.5, 0.01)]
)
def test_local_training_is_torchs_sgd_and_its_update_a_mean_of_gradients(training):
    options = {"momentum": training.momentum, "weight_decay": training.weight_decay}
    after = updated(NETWORK, torch.optim.SGD, steps=training.steps, lr=training.learning_rate, **options)
    start = {name: p.detach() for name, p in NETWORK.named_parameters()}
    mine = training.run(NETWORK, start, IMAGE, LABEL, "logistic")
    for name, w in after.named_parameters():
        assert_close(mine[name], w.detach(), rtol=0, atol=1e-14)
    weights, mean = training.coefficients[1], dict.fromkeys(start, 0.0)
    for step, d in enumerate(weights):
        before = (
            LocalTraining(training.learning_rate, step, **options).run(NETWORK, start, IMAGE, LABEL, "logistic")
            if step
            else start
        )
        for name, g in gradients_of(NETWORK, before, IMAGE, LABEL, "logistic").items():
            mean[name] = mean[name] + d / training.total * g
    for name, g in mean_gradients(NETWORK, after, training).items():
        assert_close(g, mean[name], rtol=0, atol=1e-12)


def test_the_gradient_at_the_mean_weights_is_the_mean_gradient_to_second_order():
    start = {name: p.detach() for name, p in NETWORK.named_parameters()}
    misses = []
    for rate in (1e-3, 1e-4):
        training = LocalTraining(rate, 3, 0.5, 1e-3)
        mean = mean_gradients(NETWORK, training.run(NETWORK, start, IMAGE, LABEL, "logistic"), training)
        there = training.mean_weights(start, mean)
        mine = gradients_of(NETWORK, there, IMAGE, LABEL, "logistic")
        misses.append(max(((mine[name] - g).norm() / g.norm()).item() for name, g in mean.items()))
    assert misses[1] < 0.02 * misses[0] < 1e-4
    assert LocalTraining(0.1, 2).positive_shares == (0.0, 0.5, 1.0)
