import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import TALL, TANH, chains, drawn, rand, randn, sequential, small_cnn
from hypothesis import given, settings
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.attack import descent as descent_module
from rgap.attack.descent import close_by_virtual_constraints, descend
from rgap.attack.reconstruct import MAX_IDENTITY_RESIDUAL
from rgap.equations import LayerSolution
from rgap.equations.systems import ReducedSystem
from rgap.head import read_head
from rgap.head.hypothesis import Hypothesis, Start, Twin, starts_of
from rgap.linalg import Operator, dense_operator, least_squares, solve
from rgap.results import LayerReport
from rgap.shared_gradient import receive
from rgap.virtual.range import _BatchRows, close_by_range, range_factor

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


def deep_cnn(*specs, bias=False, activation=None, classes=5):
    """Convolutions (channels, kernel, stride, padding[, groups]) for (3, 12, 12), then two linear layers."""
    modules, channels, size = [], 3, 12
    for outputs, kernel, stride, padding, *groups in specs:
        modules.append(nn.Conv2d(channels, outputs, kernel, stride, padding, 1, *(groups or [1]), bias=bias))
        modules.append(activation or nn.LeakyReLU(0.2))
        channels, size = outputs, (size + 2 * padding - kernel) // stride + 1
    head = [nn.Linear(channels * size * size, 30, bias=bias), nn.LeakyReLU(0.2), nn.Linear(30, classes, bias=bias)]
    return sequential(*modules, nn.Flatten(), *head)


def start_at(layer, x, dx):
    """All images at a layer, whatever their labels."""
    labels = torch.zeros(len(x), dtype=torch.int64)
    return Start(layer, labels, x, dx, ((Twin(0),),) * len(x), (LayerReport("head", x[0].numel()),), batch_size=len(x))


def attack(model, count, dtype=torch.float64, close=close_by_virtual_constraints, **options):
    """True images, the chain, and the descent from what autograd in the client's precision has at the head."""
    images, labels = rand(count, 3, 12, 12), torch.arange(count) % 5
    model = model.to(dtype)
    cut = next(i for i, m in enumerate(model) if isinstance(m, nn.Flatten)) + 1
    features = model[:cut](images.to(dtype)).detach().requires_grad_()
    nn.functional.cross_entropy(model[cut:](features), labels).backward()
    gradients = rgap.client_gradients(model, images.to(dtype), labels, loss="cross_entropy")
    chain = rgap.prepare(model, (3, 12, 12))
    below = next(i for i, layer in enumerate(chain.layers) if layer.is_dense)
    x, dx = features.detach().double(), features.grad.double()
    return images, chain, descend(chain, receive(chain, gradients), start_at(below, x, dx), close=close, **options)


SECOND = (TALL, (16, 3, 2, 1), (16, 3, 1, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_image_of_a_batch_comes_back(count, bias):
    images, chain, found = attack(deep_cnn(*SECOND, bias=bias), count)
    psnr = rgap.metrics.psnr_db(found.layer_inputs["0"], images)
    assert psnr.min() > 120 and found.mismatch < 1e-9 and found.complete and not found.open_layers
    assert [report.name for report in found.reports[1:]] == ["4", "2", "0"]
    truth = chain.layer_inputs(images)
    for name, x in found.layer_inputs.items():
        assert_close(x, truth[name], rtol=0, atol=1e-6)


def test_a_second_descent_by_almost_the_same_gradient_takes_the_factors_of_the_first(monkeypatch):
    first, by_neighbour, taken = attack(deep_cnn(*SECOND), 3)[2], solve._by_neighbour, []
    monkeypatch.setattr(solve, "_by_neighbour", lambda *system: taken.append(by_neighbour(*system)) or taken[-1])
    again = attack(deep_cnn(*SECOND), 3, like=first)[2]
    assert [found is not None for found in taken] == [True, True]  # nothing is open
    assert_close(again.layer_inputs["0"], first.layer_inputs["0"], rtol=0, atol=1e-9)
    assert [report.rank for report in again.reports[1:]] == [report.rank for report in first.reports[1:]]


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.01), nn.Identity()])
def test_other_slopes_and_groups(activation):
    images, _, found = attack(deep_cnn(TALL, (24, 3, 2, 1, 2), (16, 3, 1, 1), activation=activation), 2)
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).min() > 120


@pytest.mark.parametrize("channels", [18, 13])
def test_smooth_activations_have_range_constraints_too(monkeypatch, channels):
    monkeypatch.setattr(descent_module, "MAX_PRECISION_CONDITION", 0.0)
    specs = (TALL, (channels, 3, 2, 1), (16, 3, 1, 1))
    smooth, stand_in = deep_cnn(*specs, activation=nn.Tanh()), deep_cnn(*specs)
    chain = rgap.prepare(stand_in, (3, 12, 12))
    layers = [replace(layer, activation=TANH) if layer.weight.shape[2] > 1 else layer for layer in chain.layers]
    images, labels = rand(3, 3, 12, 12), torch.arange(3)
    features = smooth[:7](images).detach().requires_grad_()
    nn.functional.cross_entropy(smooth[7:](features), labels).backward()
    received = receive(chain, rgap.client_gradients(smooth, images, labels, loss="cross_entropy"))
    start = start_at(3, features.detach(), features.grad)
    found = descend(replace(chain, layers=tuple(layers)), received, start, close=close_by_virtual_constraints)
    report = next(r for r in found.reports if r.name == "2")
    assert report.virtual_constraints == 3 * 156 and report.iterations is not None
    assert (report.deficit > 0) == (channels == 13) and not found.open_layers
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).min() > 120


def test_a_belief_outside_the_range_of_an_activation_certifies_nothing():
    layer = replace(rgap.prepare(deficient(), (3, 12, 12)).layers[0], activation=TANH)
    x = torch.full((2, *layer.output_shape), 2.0, dtype=torch.float64)
    same = Operator(None, None, lambda v: v, None)
    y = x.flatten()
    system = ReducedSystem(x.flatten(1), None, lambda X: X.flatten(0, 1), None, None, same, 0 * y, None, 1.0, None)
    own = least_squares(dense_operator(torch.eye(len(y)).double()), y, 1e-4)
    solution = LayerSolution(x, LayerReport("2", len(y), deficit=1), None, ((system, own),))
    found = close_by_range(layer, SimpleNamespace(precision=1e-7, rcond=1e-4), solution)
    assert not found.certified and torch.equal(found.x, x.flatten(1)) and found.iterations == 0


def deficient():
    return deep_cnn(TALL, (13, 3, 2, 1), (16, 3, 1, 1))


def test_range_constraints_close_what_a_batch_leaves_open():
    images, _, found = attack(deficient(), 3)
    report = next(r for r in found.reports if r.name == "2")
    assert report.deficit > 0 and report.virtual_constraints == 3 * (12 * 49 - 432) > report.deficit
    assert report.iterations > 1 and not found.open_layers
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).min() > 120


def test_without_them_the_layer_is_named_as_open():
    images, _, found = attack(deficient(), 3, close=None)
    assert found.open_layers == ("2",) and found.complete
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).max() < 60


def test_signs_that_are_not_found_are_not_certified(monkeypatch):
    monkeypatch.setattr("rgap.virtual.range.MAX_STEPS", 1)
    _, _, found = attack(deficient(), 3)
    report = next(r for r in found.reports if r.name == "2")
    assert report.iterations == 2 and found.open_layers == ("2",)  # one in the null space alone, one together


def test_an_undetermined_sign_is_no_change():
    layer = rgap.prepare(deficient(), (3, 12, 12)).layers[0]
    x, nothing = rand(2, 588) + 0.1, torch.zeros(588, 0).double()
    x[0, 0] = 1e-9
    moved = x.clone()
    moved[0, 0] = -1e-9
    system = ReducedSystem(x, None, None, None, lambda image, L, entries: (slice(None), L), *[None] * 5)
    for noise, change in ((1e-8, 0.0), (1e-10, 1.0)):
        rows = _BatchRows(layer, nothing, system, noise)
        assert rows.move(x) and rows.change(moved) == change


def test_range_constraints_that_are_too_few_certify_nothing():
    _, _, found = attack(deep_cnn(TALL, (3, 3, 2, 1), (16, 3, 1, 1)), 3)
    report = next(r for r in found.reports if r.name == "2")
    assert report.deficit > 3 * (12 * 49 - 432) and found.open_layers == ("2",) and report.virtual_constraints is None


def test_range_constraints_reduce_the_error_where_nothing_is_open(monkeypatch):
    monkeypatch.setattr(descent_module, "MAX_PRECISION_CONDITION", 0.0)
    images, _, sharp = attack(deep_cnn(TALL, (18, 3, 2, 1), (16, 3, 1, 1)), 3, torch.float32)
    _, _, plain = attack(deep_cnn(TALL, (18, 3, 2, 1), (16, 3, 1, 1)), 3, torch.float32, close=None)
    one, other = (rgap.metrics.psnr_db(d.layer_inputs["0"], images) for d in (sharp, plain))
    assert not plain.open_layers and (one >= other - 1).all() and one.mean() > other.mean() + 1


def test_a_layer_with_fewer_outputs_than_inputs_or_with_groups_has_no_range_constraints():
    layers = rgap.prepare(deep_cnn(TALL, (12, 3, 2, 1, 2), (16, 3, 1, 1)), (3, 12, 12)).layers
    assert range_factor(layers[0]).basis.shape == (588, 156) and range_factor(layers[1]) is None
    assert range_factor(layers[3]) is None
