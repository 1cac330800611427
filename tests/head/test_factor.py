import pytest
import torch
from cases import last_layer, rand

import rgap
from rgap.head import read_head
from rgap.shared_gradient import receive


def read(model, image, label, loss, factor=1.0, smoothing=0.0, **options):
    """The reading of a gradient with a factor and smoothed labels, in the network's own format."""
    gradients = rgap.client_gradients(model, image, torch.tensor([label]), loss, label_smoothing=smoothing)
    chain = rgap.prepare(model, image.shape[1:])
    received = receive(chain, [factor * g for g in gradients])
    options = {"gradient_scale": None, "label_smoothing": None} | options
    return read_head(loss, chain.layers[-1], received, **options)


@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0])
@pytest.mark.parametrize(
    ("loss", "classes", "bias"),
    [("logistic", 1, True), ("mse", 1, True), ("mse", 5, True), ("mse", 5, False)]
    + [("cross_entropy", classes, bias) for classes in (5, 20) for bias in (True, False)],
)
def test_a_factor_is_found_and_the_input_with_it(loss, classes, bias, factor):
    model, image = last_layer(classes, 20, bias, seed=3), rand(1, 1, 1, 20)
    for dtype, accuracy in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        found = read(model.to(dtype), image.to(dtype), 1 if classes == 1 else 3, loss, factor)
        h = found.hypotheses[0]
        if loss != "mse" or classes > 1:  # one output beyond ±1 may be of either label, with another factor
            assert h.gradient_scale == pytest.approx(factor, rel=accuracy) and (factor != 1 or h.gradient_scale == 1)
        miss = ((h.x - image.flatten()).norm() / image.norm()).item()
        assert miss < accuracy and miss < 30 * max(h.length_error, 1e-15)
        assert h.misfit < 10 and h.length_error < 0.02


@pytest.mark.parametrize(("factor", "smoothing"), [(1.0, 0.1), (0.25, 0.05), (2.0, 0.2)])
@pytest.mark.parametrize("bias", [True, False])
def test_smoothed_labels_are_found_beside_a_factor(factor, smoothing, bias):
    model, image = last_layer(8, 20, bias, seed=3), rand(1, 1, 1, 20)
    for options in ({}, {"label_smoothing": smoothing}, {"gradient_scale": factor}):
        (h,) = read(model, image, 6, "cross_entropy", factor, smoothing, **options).hypotheses
        assert h.gradient_scale == pytest.approx(factor, rel=1e-6) and h.label == 6
        assert h.label_smoothing == pytest.approx(smoothing, abs=1e-6)
        assert (h.x - image.flatten()).norm() < 1e-6 * image.norm()


def test_one_output_without_bias_leaves_the_length_open():
    model, image = last_layer(1, 20, False, seed=3), rand(1, 1, 1, 20)
    for factor in (1.0, 3.0):
        found = read(model, image, 1, "logistic", factor)
        assert all(h.length_error == float("inf") for h in found.hypotheses)
        known = read(model, image, 1, "logistic", factor, gradient_scale=factor).hypotheses
        assert min((h.x - image.flatten()).norm() for h in known) < 1e-9 and all(h.length_error < 1e-9 for h in known)


def test_two_classes_without_bias_leave_it_open_too_and_three_do_not():
    for classes, is_open in ((2, True), (3, False)):
        model, image = last_layer(classes, 20, False, seed=3), rand(1, 1, 1, 20)
        found = read(model, image, 1, "cross_entropy")
        assert all((h.length_error > 0.02) == is_open for h in found.hypotheses)
        given = read(model, image, 1, "cross_entropy", gradient_scale=1.0).hypotheses
        assert all(h.length_error < 1e-9 for h in given)


def test_equations_of_no_loss_have_a_misfit():
    model, image = last_layer(8, 20, True, seed=3), rand(2, 1, 1, 20)
    gradients = rgap.client_gradients(model, image, torch.tensor([2, 5]), "cross_entropy")
    chain = rgap.prepare(model, (1, 1, 20))
    found = read_head(
        "cross_entropy", chain.layers[-1], receive(chain, gradients), gradient_scale=None, label_smoothing=None
    )
    assert min(h.misfit for h in found.hypotheses) > 1e3
