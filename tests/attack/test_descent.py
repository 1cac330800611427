import math

import pytest
import torch
from cases import TALL, chains, drawn, rand, randn, sequential, small_cnn
from descents import batch_descent, deep_cnn
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.attack.descent import descend
from rgap.attack.reconstruct import MAX_IDENTITY_RESIDUAL
from rgap.head import read_head
from rgap.head.hypothesis import Hypothesis, starts_of
from rgap.linalg import solve
from rgap.shared_gradient import receive

IMAGE = rand(1, 3, 8, 8)


def start(network, label, image=IMAGE):
    """Chain, received and a start of each label."""
    chain = rgap.prepare(network, image.shape[1:])
    received = receive(chain, rgap.client_gradients(network, image, torch.tensor([label])))
    found = read_head("logistic", chain.layers[-1], received).hypotheses
    return chain, received, {int(one.labels): one for one in starts_of(chain, found)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("label", [0, 1])
def test_the_truth_about_the_head_leads_to_the_input_of_every_layer(bias, label):
    network = small_cnn(bias=bias)
    chain, received, _ = start(network, label)
    truth = chain.layer_inputs(IMAGE)
    x = truth["5"][0]
    margin = (2 * label - 1) * network(IMAGE).item()
    dz = torch.tensor([(1 - 2 * label) / (1 + math.exp(margin))], dtype=torch.float64)
    (truly,) = starts_of(chain, [Hypothesis(label, 1 / dz.item(), dz, x)])
    found = descend(chain, received, truly, give_up=MAX_IDENTITY_RESIDUAL)
    assert found.complete and found.mismatch < 1e-12
    assert list(found.layer_inputs) == ["0", "2", "5"]
    for name, expected in truth.items():
        assert_close(found.layer_inputs[name], expected, rtol=0, atol=1e-10)
    assert [(report.name, report.unknowns) for report in found.reports] == [("5", 160), ("2", 192), ("0", 192)]
    assert all(report.deficit == 0 and report.seconds >= 0 for report in found.reports)


def test_the_wrong_label_is_refuted_at_the_first_layer_unless_it_is_followed_to_the_end():
    chain, received, hypotheses = start(small_cnn(), 1)
    wrong = hypotheses[0]
    dropped = descend(chain, received, wrong, give_up=MAX_IDENTITY_RESIDUAL)
    assert not dropped.complete and dropped.mismatch > MAX_IDENTITY_RESIDUAL
    assert list(dropped.layer_inputs) == ["5"] and len(dropped.reports) == 1
    followed = descend(chain, received, wrong)
    assert followed.complete and list(followed.layer_inputs) == ["0", "2", "5"]


def test_grouped_convolutions_are_walked_group_by_group():
    modules = [nn.Conv2d(4, 16, 3, 2, 1, groups=2), nn.LeakyReLU(0.3), nn.Conv2d(16, 16, 3, 1, 1, groups=4)]
    network = sequential(*modules, nn.LeakyReLU(0.5), nn.Flatten(), nn.Linear(256, 1))
    image = rand(1, 4, 8, 8)
    chain, received, hypotheses = start(network, 0, image)
    found = descend(chain, received, hypotheses[0], give_up=MAX_IDENTITY_RESIDUAL)
    assert found.mismatch < 1e-12
    assert_close(found.layer_inputs["0"], image, rtol=0, atol=1e-9)


@pytest.mark.slow
@settings(drawn, max_examples=60)
@given(chains())
def test_a_random_chain_gives_its_image_back_or_says_that_it_does_not(case):
    network, shape, image, label = case
    gradients = rgap.client_gradients(network, image, label)
    result = rgap.reconstruct(network, gradients, shape, virtual_constraints=False, gradient_scale=1.0)
    assert result.verdict != "inconsistent"
    if result.verdict == "exact":
        assert rgap.metrics.psnr_db(result.images, image).item() >= 60
        assert result.labels.equal(label)


def follow(*modules, seed=0, scale=None, image=IMAGE, **options):
    """The result of an attack on the modules with a logit behind them, and its PSNR."""
    size = nn.Sequential(*modules).double().eval()(image).numel()
    network = sequential(*modules, nn.Flatten(), nn.Linear(size, 1), seed=seed, scale=scale).eval()
    gradients = rgap.client_gradients(network, image, torch.tensor([1]))
    result = rgap.reconstruct(network, gradients, image.shape[1:], **options, gradient_scale=1.0)
    return result, rgap.metrics.psnr_db(result.images, image).item()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7)])
def test_activations_that_clip_leave_the_rows_where_they_do_not(activation):
    result, psnr = follow(nn.Conv2d(3, 24, 3, 2, 1), activation, nn.Conv2d(24, 12, 3, 1, 1), activation)
    assert result.verdict == "exact" and psnr > 150
    reports = {report.name: report for report in result.layers}
    assert 0 < reports["0"].saturated < 384 and reports["5"].saturated is None
    assert any(f"{reports['0'].saturated} at '0'" in note for note in result.notes)


def test_relu_without_enough_active_rows_is_rank_deficient():
    result, _ = follow(nn.Conv2d(3, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 12, 3, 1, 1), nn.ReLU())
    assert result.verdict == "rank-deficient"


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.Softplus()])
def test_saturation_is_counted_and_never_infinite(activation):
    result, psnr = follow(nn.Conv2d(3, 24, 3, 2, 1), activation, nn.Conv2d(24, 12, 3, 1, 1), nn.Tanh(), scale=40.0)
    assert torch.isfinite(result.images).all()
    assert any(report.saturated for report in result.layers) and any("saturation" in note for note in result.notes)
    assert result.verdict != "exact" or psnr > 60


def test_virtual_constraints_reach_through_batch_normalisation_and_slopes_of_channels():
    norm, slopes = nn.BatchNorm2d(12), nn.PReLU(12)
    norm.running_mean, norm.running_var = randn(12), 0.5 + rand(12)
    convolutions = [nn.Conv2d(3, 12, 4, 2, 2, bias=False), norm, slopes, nn.Conv2d(12, 6, 3, 2, 1), nn.LeakyReLU(0.2)]
    image = rand(1, 3, 12, 12)
    network = sequential(*convolutions, nn.Conv2d(6, 16, 3, 1, 1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 1)).eval()
    slopes.weight.data, norm.weight.data = 0.1 + rand(12), 0.5 + rand(12, seed=1)
    gradients = rgap.client_gradients(network, image, torch.tensor([0]))
    result = rgap.reconstruct(network, gradients, (3, 12, 12), gradient_scale=1.0)
    reports = {report.name: report for report in result.layers}
    assert reports["3"].deficit == 60 and reports["3"].virtual_constraints >= 60
    assert result.verdict == "exact" and rgap.metrics.psnr_db(result.images, image).item() > 100


def test_a_bias_whose_gradient_does_not_fit_refutes_a_hypothesis():
    chain, received, hypotheses = start(small_cnn(bias=True), 1)
    received.gradients["0.bias"].mul_(-1)
    found = descend(chain, received, hypotheses[1], give_up=MAX_IDENTITY_RESIDUAL)
    assert not found.complete and found.mismatch == pytest.approx(2.0)


# Batches.


SECOND = (TALL, (16, 3, 2, 1), (16, 3, 1, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_image_of_a_batch_comes_back(count, bias):
    images, chain, found = batch_descent(deep_cnn(*SECOND, bias=bias), count)
    psnr = rgap.metrics.psnr_db(found.layer_inputs["0"], images)
    assert psnr.min() > 120 and found.mismatch < 1e-9 and found.complete and not found.open_layers
    assert [report.name for report in found.reports[1:]] == ["4", "2", "0"]
    truth = chain.layer_inputs(images)
    for name, x in found.layer_inputs.items():
        assert_close(x, truth[name], rtol=0, atol=1e-6)


def test_a_second_descent_by_almost_the_same_gradient_takes_the_factors_of_the_first(monkeypatch):
    first, by_neighbour, taken = batch_descent(deep_cnn(*SECOND), 3)[2], solve._by_neighbour, []
    monkeypatch.setattr(solve, "_by_neighbour", lambda *system: taken.append(by_neighbour(*system)) or taken[-1])
    again = batch_descent(deep_cnn(*SECOND), 3, like=first)[2]
    assert [found is not None for found in taken] == [True, True]  # nothing is open
    assert_close(again.layer_inputs["0"], first.layer_inputs["0"], rtol=0, atol=1e-9)
    assert [report.rank for report in again.reports[1:]] == [report.rank for report in first.reports[1:]]


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.01), nn.Identity()])
def test_other_slopes_and_groups(activation):
    images, _, found = batch_descent(deep_cnn(TALL, (24, 3, 2, 1, 2), (16, 3, 1, 1), activation=activation), 2)
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).min() > 120
