import math

import pytest
import torch
from cases import drawn, last_layer, rand, randn, read_sample
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.head import read_head
from rgap.head.logistic import MU_AT_MINIMUM, margins
from rgap.head.softmax import sign_misfits
from rgap.shared_gradient import receive


def with_margin(mu, classes=2, inputs=20, dtype=torch.float64):
    """A bias-free last layer and an image of which class 0 has the margin log p / (1 − p) = mu, and its gradient."""
    model, image = last_layer(classes, inputs, False, seed=5), rand(1, 1, 1, inputs)
    x = image.flatten()
    with torch.no_grad():
        W = model[1].weight
        z = W @ x
        W[0] += (mu + z[1:].logsumexp(0) - z[0]) * x / (x @ x)
    model = model.to(dtype)
    gradients = rgap.client_gradients(model, image, torch.tensor([0]), "cross_entropy")
    chain = rgap.prepare(model, (1, 1, inputs))
    return chain, image.to(dtype).double().flatten(), receive(chain, gradients)


@pytest.mark.parametrize("mu", [-30.0, -2.0, -0.1, 0.3, 1.2, 1.27, 1.29, 1.4, 3.0, 20.0, 36.0])
def test_two_classes_are_the_logistic_case_two_labels_and_its_roots(mu):
    chain, x, received = with_margin(mu)
    found = read_head("cross_entropy", chain.layers[-1], received)
    roots, _ = margins(-mu / (1 + math.exp(mu)))
    for label in (0, 1):
        outputs = [chain.layers[-1].weight[:, :, 0, 0] @ h.x for h in found.hypotheses if h.label == label]
        found_margins = sorted((z[label] - z[1 - label]).item() for z in outputs)
        rounded = label == 1 and mu > 15  # the row that label 1 rests on is p − 1 of label 0
        loose = abs(mu - MU_AT_MINIMUM) < 0.1 or rounded
        assert found_margins == pytest.approx(sorted(roots), rel=1e-2 if loose else 1e-6)
    assert min((h.x - x).norm() for h in found.hypotheses if h.label == 0) < 1e-5 * x.norm()
    assert len({h.scale > 0 for h in found.hypotheses if h.label == 0}) == 1
    assert found.notes == ()


def test_at_the_minimum_the_roots_meet():
    chain, x, received = with_margin(MU_AT_MINIMUM)
    found = read_head("cross_entropy", chain.layers[-1], received)
    for h in found.hypotheses:
        assert (h.x.abs() - x).norm() < 1e-3 * x.norm()


@settings(drawn, max_examples=30)
@given(st.floats(-20, 14), st.integers(3, 20))
def test_more_classes_have_one_root_and_its_scale_is_accurate_from_float32(mu, classes):
    chain, x, received = with_margin(mu, classes, dtype=torch.float32)
    (h,) = read_head("cross_entropy", chain.layers[-1], received).hypotheses
    assert h.label == 0 and (h.x - x).norm() < 1e-5 * x.norm()


def test_a_confident_clients_rounding_of_the_labels_entry_is_reported():
    chain, x, received = with_margin(13.0, 5, dtype=torch.float32)
    (h,) = read_head("cross_entropy", chain.layers[-1], received).hypotheses
    assert h.residual < h.rounding == pytest.approx(1.2e-7 * math.exp(13.0), rel=0.1)
    assert (h.x - x).norm() < 1e-5 * x.norm()


@pytest.mark.parametrize("mu", [20.0, 60.0])
def test_a_labels_entry_may_be_rounded_to_zero(mu):
    chain, x, received = with_margin(mu, 5, dtype=torch.float32)
    found = read_head("cross_entropy", chain.layers[-1], received)
    h = min(found.hypotheses, key=lambda h: (h.x - x).norm())
    assert h.label == 0 and (h.x - x).norm() < 1e-4 * x.norm()


def test_rows_of_equal_weights_leave_the_two_roots_of_their_sum():
    model, image = last_layer(4, 20, False, seed=5), rand(1, 1, 1, 20)
    with torch.no_grad():
        model[1].weight[1:] = model[1].weight[1]
        model[1].weight[0] += (2.5 + 1.1) * image.flatten() / image.square().sum() - model[1].weight[0]
        model[1].weight[1:] -= (model[1].weight[1] @ image.flatten()) * image.flatten() / image.square().sum()
    found, _ = read_sample(model, image, 0, "cross_entropy")
    mine = [h for h in found.hypotheses if h.label == 0]
    assert len(mine) == 2 and min((h.x - image.flatten()).norm() for h in mine) < 1e-6


def test_probabilities_that_underflow_are_rows_of_zero():
    model, image = last_layer(6, 20, False, seed=1), rand(1, 1, 1, 20)
    x = image.flatten()
    with torch.no_grad():
        model[1].weight[2] -= 200 * x / (x @ x)
    found, gradients = read_sample(model, image, 4, "cross_entropy", torch.float32)
    assert not gradients[0][2].any()
    (h,) = found.hypotheses
    assert h.label == 4 and (h.x - x).norm() < 1e-5 * x.norm()


def test_signs_of_a_label_are_counted():
    u = torch.tensor([0.3, -1.0, 0.7, 0.0]).double()
    size = u.norm().item()
    expected = [math.sqrt(0.49) / size, 0.0, 0.3 / size, math.sqrt(0.09 + 0.49) / size]
    assert sign_misfits(u).tolist() == pytest.approx(expected)
    assert sign_misfits(-u).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bias_gradient", [[0.4, -1.0, 0.6], [0.4, 0.2, -0.6], [-0.3, -0.2, 0.5], [2.0, -3.0, 1.0]])
def test_a_bias_gradient_of_no_sample_is_noted(bias_gradient):
    model, image = last_layer(3, 10, True, seed=0), rand(1, 1, 1, 10)
    chain = rgap.prepare(model, (1, 1, 10))
    G, _ = rgap.client_gradients(model, image, torch.tensor([1]), "cross_entropy")
    found = read_head("cross_entropy", chain.layers[-1], receive(chain, [G, torch.tensor(bias_gradient).double()]))
    assert "it was altered or belongs to a batch" in found.notes[0]
    assert all(h.x.isfinite().all() for h in found.hypotheses)


def test_without_the_bias_gradient_the_weights_alone_are_read():
    model, image = last_layer(5, 10, True, seed=0), rand(1, 1, 1, 10)
    chain = rgap.prepare(model, (1, 1, 10))
    G, b = rgap.client_gradients(model, image, torch.tensor([3]), "cross_entropy")
    found = read_head("cross_entropy", chain.layers[-1], receive(chain, [G, 0 * b]))
    assert found.hypotheses[0].label == 3
    assert_close(found.hypotheses[0].x, image.flatten(), rtol=1e-9, atol=0)


def test_a_thousand_classes_are_read():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1000, bias=False)).double()
    with torch.no_grad():
        model[1].weight.copy_(randn(1000, 64) / 8)
    image = rand(1, 1, 1, 64)
    found, _ = read_sample(model, image, 777, "cross_entropy", torch.float32)
    (h,) = found.hypotheses
    assert h.label == 777 and (h.x - image.flatten()).norm() < 1e-5 * image.norm()
