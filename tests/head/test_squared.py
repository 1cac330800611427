import pytest
import torch
from cases import drawn, last_layer, rand, read_sample
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.head import read_head
from rgap.head.hypothesis import REAL_TARGET
from rgap.shared_gradient import receive


def with_output(f, label, bias=False):
    """One output f on an image, and what the head says of its gradient."""
    model, image = last_layer(1, 20, bias, seed=2), rand(1, 1, 1, 20)
    with torch.no_grad():
        model[1].weight += (f - model(image)) * image.flatten() / image.square().sum()
    found, gradients = read_sample(model, image, label, "mse")
    return model, image.flatten(), found, gradients


@drawn
@given(st.floats(-4, 4), st.integers(0, 1))
def test_one_output_has_two_roots_for_either_label(f, label):
    mu = (2 * label - 1) * f
    if abs(mu - 0.5) < 1e-2 or min(abs(mu), abs(mu - 1)) < 1e-3:
        return  # roots that meet, or a twin at infinity
    model, x, found, (G,) = with_output(f, label)
    assert min((h.x - x).norm() for h in found.hypotheses if h.label == label) < 1e-6 * x.norm()
    assert "the target was taken for a class" in found.notes[0]
    for h in found.hypotheses:
        y = 2 * h.label - 1
        output = (model[1].weight @ h.x).item()
        assert output * y == pytest.approx(mu, abs=1e-9) or output * y == pytest.approx(1 - mu, abs=1e-9)
        assert 2 * (output - y) == pytest.approx(h.dz.item(), abs=1e-9)
        assert_close(h.dz[:, None] * h.x, G, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("f", "same_label"), [(0.3, True), (0.8, True), (1.7, False), (-0.4, False), (-3.0, False)])
def test_twins_have_one_sign_of_scale_and_may_differ_in_label(f, same_label):
    _, x, found, _ = with_output(f, 1)
    truth = min(found.hypotheses, key=lambda h: (h.x - x).norm())
    (twin,) = [h for h in found.hypotheses if h.scale * truth.scale > 0 and h is not truth]
    assert (twin.label == truth.label) is same_label
    assert_close(twin.x / twin.scale, truth.x / truth.scale, rtol=1e-9, atol=0)


def test_where_the_roots_meet_there_is_one_for_each_label():
    _, x, found, _ = with_output(0.5, 1)
    assert min((h.x - x).norm() for h in found.hypotheses) < 1e-5


def test_below_the_smallest_c_the_nearest_output_is_taken_with_a_note():
    model, _, _, (G,) = with_output(0.5, 1)
    chain = rgap.prepare(model, (1, 1, 20))
    found = read_head("mse", chain.layers[-1], receive(chain, [3 * G]))
    assert "below -0.5, the smallest of any single sample" in found.notes[0]
    assert sorted(h.dz.item() for h in found.hypotheses) == pytest.approx([-1.0, 1.0])
    assert all(h.residual > 0.1 for h in found.hypotheses)


@pytest.mark.parametrize("f", [-0.4, 0.3, 2.0])
@pytest.mark.parametrize("label", [0, 1])
def test_a_bias_determines_label_and_input_of_one_output(f, label):
    _, x, found, _ = with_output(f, label, bias=True)
    (h,) = found.hypotheses
    assert h.label == label and "by the head's equations" in found.notes[0]
    assert_close(h.x, x, rtol=1e-9, atol=0)


def test_without_the_bias_gradient_it_is_refused_and_beside_a_bias_of_zero_read():
    model, image = last_layer(3, 10, True, seed=0), rand(1, 1, 1, 10)
    chain = rgap.prepare(model, (1, 1, 10))
    G, b = rgap.client_gradients(model, image, torch.tensor([1]), "mse")
    with pytest.raises(rgap.GradientMismatchError, match=r"'1.bias' is zero or not shared; beside a bias the mse"):
        read_head("mse", chain.layers[-1], receive(chain, [G, 0 * b]))
    torch.nn.init.zeros_(model[1].bias)
    chain = rgap.prepare(model, (1, 1, 10))
    G, _ = rgap.client_gradients(model, image, torch.tensor([1]), "mse")
    found = read_head("mse", chain.layers[-1], receive(chain, [G, None]))
    assert_close(found.hypotheses[0].x, image.flatten(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("classes", [2, 5])
def test_outputs_next_to_their_target_are_read(gap, classes):
    model, image = last_layer(classes, 20, False, seed=4), rand(1, 1, 1, 20)
    x, target = image.flatten(), torch.eye(classes).double()[1]
    with torch.no_grad():
        wanted = target + gap * (model(image)[0] + 0.3)
        model[1].weight += (wanted - model(image)[0])[:, None] * x / (x @ x)
    found, _ = read_sample(model, image, 1, "mse")
    assert min((h.x - x).norm() for h in found.hypotheses if h.label == 1) < 1e-5 * x.norm()


def test_a_layer_whose_output_is_zero_is_read():
    model, image = last_layer(4, 20, False, seed=4), rand(1, 1, 1, 20)
    with torch.no_grad():
        model[1].weight.zero_()
    found, _ = read_sample(model, image, 2, "mse")
    h = min(found.hypotheses, key=lambda h: h.residual)
    assert h.label == 2
    assert_close(h.x, image.flatten(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("activation", [None, nn.Tanh()])
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_real_valued_target_follows_from_the_bias_gradient(outputs, activation):
    model, image = last_layer(outputs, 20, True, seed=3), rand(1, 1, 1, 20)
    network = nn.Sequential(*model, *([] if activation is None else [activation]))
    target = torch.tensor([[0.3, -1.2, 2.5][:outputs]]).double()
    gradients = rgap.client_gradients(network, image, target, "mse")
    chain = rgap.prepare(network, (1, 1, 20))
    (h,) = (
        read_head("mse", chain.layers[-1], receive(chain, gradients)).hypotheses
        if outputs > 1
        else read_head("mse", chain.layers[-1], receive(chain, gradients), gradient_scale=1.0).hypotheses
    )
    assert h.label == REAL_TARGET and h.length_error < 1e-10
    assert_close(h.x, image.flatten(), rtol=1e-9, atol=0)
    assert_close(h.target, target[0], rtol=1e-9, atol=1e-9)


def test_without_a_bias_every_length_has_its_own_target_and_a_given_one_decides():
    model, image = last_layer(3, 20, False, seed=3), rand(1, 1, 1, 20)
    target = torch.tensor([[0.3, -1.2, 2.5]]).double()
    chain = rgap.prepare(model, (1, 1, 20))
    received = receive(chain, rgap.client_gradients(model, image, target, "mse"))
    found = read_head("mse", chain.layers[-1], received)
    assert all(h.label == REAL_TARGET and h.length_error == torch.inf for h in found.hypotheses)
    for h in found.hypotheses:  # each is a sample with this gradient
        dz = 2 / 3 * (chain.layers[-1].weight.reshape(3, 20) @ h.x - h.target)
        assert_close(torch.outer(dz, h.x), received.gradients["1.weight"], rtol=1e-9, atol=1e-12)
    (h,) = read_head("mse", chain.layers[-1], received, target[0]).hypotheses
    assert_close(h.x, image.flatten(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("factor", [1e200, 1e-250])
def test_sizes_that_no_squared_error_has_are_refused(factor):
    model, image = last_layer(3, 10, True, seed=0), rand(1, 1, 1, 10)
    chain = rgap.prepare(model, (1, 1, 10))
    gradients = [factor * g for g in rgap.client_gradients(model, image, torch.tensor([1]), "mse")]
    received = receive(chain, gradients)
    with pytest.raises(rgap.GradientMismatchError, match="that of no squared error is so: give another gradient_scale"):
        read_head("mse", chain.layers[-1], received, gradient_scale=received.unit)
