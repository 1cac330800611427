"""Range constraints of a batch, in the descents that they close."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import TALL, TANH, rand
from descents import batch_descent, deep_cnn, start_at
from torch import nn

import rgap
from rgap.attack import descent as descent_module
from rgap.attack.descent import close_by_virtual_constraints, descend
from rgap.equations import LayerSolution
from rgap.equations.systems import ReducedSystem
from rgap.linalg import Operator, dense_operator, least_squares
from rgap.results import LayerReport
from rgap.shared_gradient import receive
from rgap.virtual.range import _BatchRows, close_by_range, range_factor


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
    images, _, found = batch_descent(deficient(), 3)
    report = next(r for r in found.reports if r.name == "2")
    assert report.deficit > 0 and report.virtual_constraints == 3 * (12 * 49 - 432) > report.deficit
    assert report.iterations > 1 and not found.open_layers
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).min() > 120


def test_without_them_the_layer_is_named_as_open():
    images, _, found = batch_descent(deficient(), 3, close=None)
    assert found.open_layers == ("2",) and found.complete
    assert rgap.metrics.psnr_db(found.layer_inputs["0"], images).max() < 60


def test_signs_that_are_not_found_are_not_certified(monkeypatch):
    monkeypatch.setattr("rgap.virtual.range.MAX_STEPS", 1)
    _, _, found = batch_descent(deficient(), 3)
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
    _, _, found = batch_descent(deep_cnn(TALL, (3, 3, 2, 1), (16, 3, 1, 1)), 3)
    report = next(r for r in found.reports if r.name == "2")
    assert report.deficit > 3 * (12 * 49 - 432) and found.open_layers == ("2",) and report.virtual_constraints is None


def test_range_constraints_reduce_the_error_where_nothing_is_open(monkeypatch):
    monkeypatch.setattr(descent_module, "MAX_PRECISION_CONDITION", 0.0)
    images, _, sharp = batch_descent(deep_cnn(TALL, (18, 3, 2, 1), (16, 3, 1, 1)), 3, torch.float32)
    _, _, plain = batch_descent(deep_cnn(TALL, (18, 3, 2, 1), (16, 3, 1, 1)), 3, torch.float32, close=None)
    one, other = (rgap.metrics.psnr_db(d.layer_inputs["0"], images) for d in (sharp, plain))
    assert not plain.open_layers and (one >= other - 1).all() and one.mean() > other.mean() + 1


def test_a_layer_with_fewer_outputs_than_inputs_or_with_groups_has_no_range_constraints():
    layers = rgap.prepare(deep_cnn(TALL, (12, 3, 2, 1, 2), (16, 3, 1, 1)), (3, 12, 12)).layers
    assert range_factor(layers[0]).basis.shape == (588, 156) and range_factor(layers[1]) is None
    assert range_factor(layers[3]) is None
