import math

import pytest
import torch
from cases import drawn, rand, sequential
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.head.hypothesis import HeadGradient
from rgap.head.logistic import C_MINIMUM, MU_AT_MINIMUM, margins, read_logistic


def read(layer, G, bias=None):
    found = read_logistic(HeadGradient(layer, G, bias, 1e-15, 1e-5, None))
    return found.hypotheses, found.notes


def c_of(mu):
    return -mu / (1.0 + math.exp(mu))


def head(weight, bias=None, label=1, x=None, seed=0):
    """A last layer with that weight, and the gradients of one sample by its weight and bias."""
    network = sequential(nn.Flatten(), nn.Linear(len(weight), 1, bias=bias is not None))
    with torch.no_grad():
        network[1].weight.copy_(weight)
        if bias is not None:
            network[1].bias.fill_(bias)
    gradients = rgap.client_gradients(network, x.reshape(1, 1, 1, -1), torch.tensor([label]))
    return rgap.prepare(network, (1, 1, len(weight))).layers[-1], *gradients


@drawn
@given(st.floats(C_MINIMUM + 1e-6, -1e-12))
def test_a_negative_c_has_the_two_roots_of_a_root_finder(c):
    roots, notes = margins(c)
    expected = [
        brentq(lambda mu: c_of(mu) - c, 0.0, MU_AT_MINIMUM, xtol=1e-14),
        brentq(lambda mu: c_of(mu) - c, MU_AT_MINIMUM, 50.0, xtol=1e-14),
    ]
    assert roots == pytest.approx(expected, rel=1e-8) and notes == []


@drawn
@given(st.floats(0, 1e3))
def test_a_c_that_is_not_negative_has_the_one_root_of_a_root_finder(c):
    roots, notes = margins(c)
    assert roots == pytest.approx([brentq(lambda mu: c_of(mu) - c, -2 * c - 1, 1.0, xtol=1e-14)], rel=1e-8, abs=1e-12)
    assert notes == []


def test_the_minimum_of_c_is_where_its_derivative_vanishes():
    assert MU_AT_MINIMUM == pytest.approx(1.2784645427610738, rel=1e-15)
    assert c_of(MU_AT_MINIMUM) == pytest.approx(C_MINIMUM, rel=1e-15)
    assert min(c_of(MU_AT_MINIMUM - 1e-3), c_of(MU_AT_MINIMUM + 1e-3)) > C_MINIMUM


@pytest.mark.parametrize("distance", [1e-13, 0.0, -1e-13, -1e-7])
def test_at_the_minimum_and_just_below_it_there_is_one_margin(distance):
    assert margins(C_MINIMUM + distance) == ([MU_AT_MINIMUM], [])


@pytest.mark.parametrize("c", [C_MINIMUM - 1e-5, -1.0, -1e300, -math.inf])
def test_far_below_the_minimum_the_nearest_margin_comes_with_a_note(c):
    roots, notes = margins(c)
    assert roots == [MU_AT_MINIMUM]
    assert len(notes) == 1 and "below -0.2785, the smallest of any single sample" in notes[0]


@pytest.mark.parametrize("distance", [1e-11, 1e-10, 1e-9])
def test_close_to_the_minimum_the_larger_root_is_as_precise_as_the_smaller(distance):
    c = C_MINIMUM + distance
    expected = brentq(lambda mu: c_of(mu) - c, MU_AT_MINIMUM, 50.0, xtol=1e-14)
    assert margins(c)[0][1] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("mu", [-2000.0, -700.0, 500.0, 708.0])
def test_extreme_margins_are_found(mu):
    roots, notes = margins(c_of(mu) if mu > -600 else -mu)
    assert roots[-1] == pytest.approx(mu) and notes == []


@pytest.mark.parametrize("c", [-5e-324, -1e-320])
def test_a_second_root_close_to_the_smallest_numbers_is_large_or_infinite(c):
    assert margins(c)[0][1] > 735


@drawn
@given(st.floats(-20, 20), st.integers(0, 1), st.integers(0, 100))
def test_one_hypothesis_is_the_sample_itself(margin, label, seed):
    x, weight = rand(6, seed=seed) + 0.1, rand(6, seed=seed + 1)
    weight *= (2 * label - 1) * margin / (weight @ x) if abs(margin) > 1e-3 else 1.0
    layer, G = head(weight, x=x, label=label)
    hypotheses, notes = read(layer, G)
    assert notes == () and {h.label for h in hypotheses} == {0, 1}
    assert min((h.x - x).norm().item() for h in hypotheses if h.label == label) < 1e-5 * x.norm()
    for h in hypotheses:
        assert_close(h.dz[:, None] * h.x, G, rtol=1e-12, atol=0)
        assert_close(h.scale * G[0], h.x, rtol=1e-12, atol=0)
        mu = (2 * h.label - 1) * (weight @ h.x).item()
        assert -(2 * h.label - 1) / (1 + math.exp(mu)) == pytest.approx(h.dz.item(), rel=1e-6)


def test_a_margin_whose_output_gradient_underflows_is_dropped():
    layer, _ = head(torch.tensor([1e-310, 0.0], dtype=torch.float64), x=rand(2))
    hypotheses, _ = read(layer, -torch.ones(1, 2).double())
    assert [h.label for h in hypotheses] == [0, 1] and all(h.dz.abs() == 0.5 for h in hypotheses)


@drawn
@given(st.floats(-5, 5), st.integers(0, 1), st.integers(0, 100))
def test_a_bias_determines_label_margin_and_input(bias, label, seed):
    x, weight = rand(6, seed=seed), rand(6, seed=seed + 1)
    (h,), notes = read(*head(weight, bias, label, x))
    assert h.label == label and all(note.startswith(f"label {label} by the head's equations") for note in notes)
    assert h.residual < 1e-9
    assert_close(h.x, x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [1.0, -1.5, 0.0])
def test_a_bias_gradient_of_no_sample_is_noted(value):
    layer, G, _ = head(rand(3), 0.5, x=rand(3))
    (h,), notes = read(layer, G, torch.tensor([value]).double())
    assert "outside (−1, 1): no single sample has it" in notes[0]
    assert h.x.isfinite().all() and math.isfinite(h.residual) and 0 < abs(h.dz.item()) < 1 and h.label == (value < 0)
