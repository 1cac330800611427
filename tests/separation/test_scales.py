import math

import pytest
import torch
from cases import SHAPE, batch, by_name, fcn, randn
from torch.testing import assert_close

import rgap
from rgap.separation.scales import (
    MAX_REFINED_IMAGES,
    output_gradients,
    output_jacobians,
    refine_inputs,
    scale_hypotheses,
    share_residuals,
)

CASES = [(loss, outputs, bias) for loss, outputs in (("logistic", 1), ("cross_entropy", 2), ("cross_entropy", 5))
         for bias in (False, True)]  # fmt: skip


def true_output_gradients(network, images, labels, loss):
    f = network(images).detach().requires_grad_()
    return torch.autograd.grad(rgap.client.loss_value(loss, f, labels), f)[0], f.detach()


def dz_of_first(network, images, labels, loss):
    layers = rgap.prepare(network, SHAPE).layers
    c, _ = true_output_gradients(network, images, labels, loss)
    return torch.einsum("bco,bc->bo", output_jacobians(layers, images.flatten(1))[1][0], c)


def test_jacobians_are_those_of_autograd():
    network, (images, _) = fcn((9, 7), outputs=3, bias=True), batch(4)
    received, jacobians, f = output_jacobians(rgap.prepare(network, SHAPE).layers, images.flatten(1))
    assert_close(f, network(images))
    assert [x.shape[1] for x in received] == [36, 9, 7] and [J.shape[2] for J in jacobians] == [9, 7, 3]
    z = network[:2](images[:1])
    for k in range(3):
        (expected,) = torch.autograd.grad(network[2:](z)[0, k], z, retain_graph=True)
        assert_close(jacobians[0][0, k], expected[0])


@pytest.mark.parametrize(("loss", "outputs", "bias"), CASES)
@pytest.mark.parametrize("complete", [True, False])
def test_output_gradients_follow_from_the_inputs(loss, outputs, bias, complete):
    network, (images, labels) = fcn(outputs=outputs, bias=bias), batch(6, max(outputs, 2))
    named = by_name(network, rgap.client_gradients(network, images, labels, loss))
    layers = rgap.prepare(network, SHAPE).layers
    expected, f = true_output_gradients(network, images, labels, loss)
    dz = dz_of_first(network, images, labels, loss)
    rough = dz * (1 + 1e-3) if complete else dz  # all gradients together correct the error of dz
    c, outputs_found = output_gradients(layers, named, images.flatten(1), rough, complete=complete)
    assert_close(c, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
    assert_close(outputs_found, f)


@pytest.mark.parametrize(("loss", "outputs", "bias"), CASES)
def test_label_and_scale_are_among_the_hypotheses_and_their_shares_fit(loss, outputs, bias):
    network, (images, labels) = fcn(outputs=outputs, bias=bias, seed=5), batch(8, max(outputs, 2))
    c, f = true_output_gradients(network, images, labels, loss)
    for f_b, c_b, label in zip(f, 8 * c, labels, strict=True):
        alpha = 1.0 if bias else 3.7
        found, notes = scale_hypotheses(loss, f_b / alpha, c_b * alpha, bias)
        assert not notes and all(one[0] == label for one in found)
        assert min(abs(one[1] / alpha - 1) for one in found) < 1e-7
        shares = (t.expand(len(found), -1) for t in (f_b / alpha, c_b * alpha))
        assert (share_residuals(loss, *shares, found) < 1e-6).all()
        assert len(found) == 1 or outputs <= 2


def test_a_logistic_image_has_a_twin_and_both_are_returned():
    f, mu = torch.tensor([0.5]).double(), 0.8
    c = -1 / (1 + math.exp(mu)) * torch.ones(1).double()  # label 1, true scale mu / f
    found, _ = scale_hypotheses("logistic", f, c * mu / 0.5, False)
    assert len(found) == 2 and min(abs(alpha - mu / 0.5) for _, alpha in found) < 1e-12
    other = next(alpha for _, alpha in found if abs(alpha - mu / 0.5) > 1e-6)
    assert -other * 0.5 / (1 + math.exp(other * 0.5)) == pytest.approx(-mu / (1 + math.exp(mu)))


def test_shares_that_no_image_has_are_noted():
    one = torch.ones(1).double()
    assert "vanishes" in scale_hypotheses("logistic", one, 0 * one, False)[1][0]
    assert "below" in scale_hypotheses("logistic", one, -one, False)[1][0]
    f, c = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([0.5, 0.3, 0.2]).double()
    found, notes = scale_hypotheses("cross_entropy", f, c, False)
    assert not found and "no root" in notes[0]
    with pytest.raises(ValueError, match="a batch with the mse loss cannot be taken apart yet; logistic and cross"):
        scale_hypotheses("mse", f, c, False)


def off_by(error, count, bias=False):
    """A batch of ten classes: layers, gradients, the true inputs, and mixtures of them that are off by this error."""
    network, (images, labels) = fcn((60, 40), 10, bias), batch(count, 10)
    layers = rgap.prepare(network, SHAPE).layers
    named = by_name(network, rgap.client_gradients(network, images, labels, "cross_entropy"))
    x = images.flatten(1)
    return layers, named, x, x + error * randn(count, count) @ x, labels


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("error", [1e-6, 1e-3])
def test_refinement_reaches_the_true_inputs_across_kinks(error, bias):
    layers, named, x, start, labels = off_by(error, 10, bias)
    switched = (layers[0].weight.flatten(1) @ (start - x).T).abs() > (layers[0].weight.flatten(1) @ x.T).abs()
    assert switched.any() or error < 1e-3
    found = refine_inputs(layers, named, start, labels, "cross_entropy")
    assert found.residual < 1e-12
    assert_close(found.x, x, rtol=0, atol=1e-9)
    c, _ = true_output_gradients(fcn((60, 40), 10, bias), x.reshape(-1, *SHAPE), labels, "cross_entropy")
    dz = torch.einsum("bco,bc->bo", output_jacobians(layers, x)[1][0], c)
    assert_close(found.dx, dz @ layers[0].weight.flatten(1), rtol=0, atol=1e-9)


def test_large_batches_stay_as_they_were_found():
    layers, named, _, start, labels = off_by(1e-6, MAX_REFINED_IMAGES + 1)
    found = refine_inputs(layers, named, start, labels, "cross_entropy")
    assert_close(found.x, start)
    assert 1e-9 < found.residual < 1e-3
