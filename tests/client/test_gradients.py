import pytest
import torch
import torch.nn.functional as F
from cases import drawn, rand, randn, small_cnn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.client import gradients_of, loss_value

IMAGES, LABELS = rand(3, 3, 8, 8), torch.tensor([1, 0, 1])


@drawn
@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(0, 1)), min_size=1, max_size=5))
def test_the_logistic_loss_is_the_mean_binary_cross_entropy_of_the_output(pairs):
    outputs, labels = torch.tensor([[f] for f, _ in pairs]).double(), torch.tensor([y for _, y in pairs])
    expected = F.binary_cross_entropy_with_logits(outputs[:, 0], labels.double())
    assert_close(loss_value("logistic", outputs, labels), expected)


@pytest.mark.parametrize("classes", [2, 10])
def test_the_other_losses_are_torchs(classes):
    outputs, labels = randn(4, classes), torch.tensor([0, 1, classes - 1, 1])
    assert loss_value("cross_entropy", outputs, labels) == F.cross_entropy(outputs, labels)
    onehot = torch.eye(classes, dtype=torch.float64)[labels]
    assert_close(loss_value("mse", outputs, labels), (outputs - onehot).square().mean())
    y = torch.tensor([-1.0, 1.0, 1.0]).double()
    assert_close(loss_value("mse", outputs[:3, :1], torch.tensor([0, 1, 1])), (outputs[:3, 0] - y).square().mean())


def test_gradients_are_those_of_backward_in_the_order_of_parameters():
    network = small_cnn(bias=True).float()
    gradients = rgap.client_gradients(network, IMAGES, LABELS)
    F.binary_cross_entropy_with_logits(network(IMAGES.float())[:, 0], LABELS.float()).backward()
    for gradient, parameter in zip(gradients, network.parameters(), strict=True):
        assert gradient.dtype == torch.float32 and not gradient.requires_grad
        assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-8)


def test_a_batchs_gradient_is_the_mean_of_its_images():
    network = small_cnn()
    single = [rgap.client_gradients(network, IMAGES[i : i + 1], LABELS[i : i + 1]) for i in range(3)]
    for together, *apart in zip(rgap.client_gradients(network, IMAGES, LABELS), *single, strict=True):
        assert_close(together, torch.stack(apart).mean(0))


def test_gradients_are_taken_at_the_given_values():
    network = small_cnn().float()
    doubled = {name: 2 * p.detach().double() for name, p in network.named_parameters()}
    found = gradients_of(network, doubled, IMAGES, LABELS, "logistic")
    other = small_cnn().float()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    for gradient, expected in zip(found.values(), rgap.client_gradients(other, IMAGES, LABELS), strict=True):
        assert gradient.dtype == torch.float64
        assert_close(gradient, expected.double(), rtol=1e-4, atol=1e-7)


def test_a_parameter_that_is_not_used_or_frozen_has_zeros():
    network = small_cnn().float()
    network.register_parameter("unused", nn.Parameter(torch.ones(2)))
    network[0].weight.requires_grad_(False)
    gradients = dict(zip(dict(network.named_parameters()), rgap.client_gradients(network, IMAGES, LABELS), strict=True))
    assert gradients["unused"].equal(torch.zeros(2))
    assert gradients["0.weight"].equal(torch.zeros(12, 3, 3, 3)) and gradients["2.weight"].any()
    assert not network[0].weight.requires_grad
    network.requires_grad_(False)
    assert rgap.client_gradients(network, IMAGES, LABELS)[1].any()  # frozen as a whole, for evaluation


@pytest.mark.parametrize("training", [False, True])
def test_the_model_its_gradients_its_mode_and_the_generator_stay(training):
    network = small_cnn().float().train(training)
    marks = [torch.ones_like(p) for p in network.parameters()]
    for p, mark in zip(network.parameters(), marks, strict=True):
        p.grad = mark
    before, state = [p.clone() for p in network.parameters()], torch.get_rng_state()
    rgap.client_gradients(network, IMAGES, LABELS)
    for p, mark, value in zip(network.parameters(), marks, before, strict=True):
        assert p.grad is mark and mark.equal(torch.ones_like(p)) and p.equal(value) and p.requires_grad
    assert network.training is training and torch.get_rng_state().equal(state)


def test_running_statistics_in_training_mode_stay():
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 1)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    rgap.client_gradients(network, IMAGES, LABELS)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_gradients_are_computed_where_autograd_is_off():
    with torch.no_grad():
        gradients = rgap.client_gradients(small_cnn(), IMAGES, LABELS)
    assert all(g.any() for g in gradients)


@pytest.mark.parametrize(
    ("images", "labels", "loss", "message"),
    [
        (IMAGES[:0], LABELS[:0], "logistic", "images are an empty batch; give at least one"),
        (IMAGES, LABELS[:2], "logistic", r"labels are .* of shape \(2,\); give an integer for each image, 3"),
        (IMAGES, LABELS[:, None], "logistic", r"labels are .* of shape \(3, 1\)"),
        (IMAGES, LABELS.float(), "logistic", "labels are .* torch.float32; they must be integers"),
        (IMAGES, [0, 1, 2], "logistic", r"are 0 or 1, and \[0, 1, 2\] were given; load_images\(..., classes=2\)"),
        (IMAGES, [0, 1, -1], "logistic", r"are 0 or 1, and \[-1, 0, 1\] were given"),
        (IMAGES, LABELS, "hinge", "unknown loss 'hinge'; known: logistic"),
        (
            IMAGES,
            LABELS,
            "cross_entropy",
            r"cross_entropy loss takes outputs \(B, classes\), classes ≥ 2, and .* \(3, 1\)",
        ),
        (IMAGES, [0, 1, 2], "mse", r"labels of the mse loss are 0 or 1, and \[0, 1, 2\]"),
    ],
)
def test_bad_batches_are_refused(images, labels, loss, message):
    with pytest.raises(ValueError, match=message):
        rgap.client_gradients(small_cnn(), images, labels, loss)


@pytest.mark.parametrize("shape", [(3, 2), (3,), (3, 1, 1)])
def test_the_logistic_loss_refuses_what_is_not_one_output(shape):
    with pytest.raises(ValueError, match=r"takes outputs \(B, 1\), and the network gives"):
        loss_value("logistic", torch.zeros(shape), LABELS)


def test_real_valued_targets_are_torchs_mse():
    outputs, targets = randn(2, 3), randn(2, 3, seed=1)
    assert loss_value("mse", outputs, targets).equal(F.mse_loss(outputs, targets))
    assert loss_value("mse", outputs, targets.numpy()).equal(F.mse_loss(outputs, targets))
    for loss, wrong in (("cross_entropy", targets), ("mse", targets[:, :2])):
        with pytest.raises(ValueError, match=r"labels are real-valued, of shape .* as targets of the mse loss"):
            loss_value(loss, outputs, wrong)
    with pytest.raises(ValueError, match=r"of shape \(2, 3\); such targets are \(1, outputs\)"):
        loss_value("mse", outputs[:1], targets)
    with pytest.raises(ValueError, match="real-valued targets must be finite"):
        loss_value("mse", outputs, targets * torch.inf)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ValueError, match=r"labels of the cross_entropy loss are 0 to 9, and \[0, 1, 10\] were given$"):
        loss_value("cross_entropy", torch.zeros(3, 10), torch.tensor([0, 1, 10]))
