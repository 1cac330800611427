import pytest
import torch
from cases import drawn, last_layer, randn
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import rgap
from rgap.head.hypothesis import (
    HeadGradient,
    Hypothesis,
    least_squares_input,
    rank_one,
    reading,
    reading_with_bias,
    relative,
)


@drawn
@given(st.integers(2, 20), st.integers(1, 40), st.sampled_from([1e-290, 1.0, 1e290]), st.integers(0, 1000))
def test_factors_are_those_of_the_singular_value_decomposition(rows, columns, size, seed):
    dz, x = randn(rows, seed=seed), randn(columns, seed=seed + 1)
    dz[0] *= 1e-8
    found = rank_one(size * dz[:, None] * x)
    assert found.u.abs().sum().item() == pytest.approx(2) and found.noise < 1e-14
    assert_close(found.u[:, None] * (found.v / size), dz[:, None] * x, rtol=1e-12, atol=0)
    assert least_squares_input(size * dz[:, None] * x, size * dz).sub(x).norm() < 1e-12 * x.norm()


def test_noise_is_that_of_us_entries():
    u, v, noise = randn(6), randn(200, seed=1), 1e-3 * randn(6, 200, seed=2)
    found = rank_one(u[:, None] * v + noise)
    size = u.abs().sum() / 2
    assert found.noise == pytest.approx((1e-3 / v.norm() / size).item(), rel=0.2)
    assert (found.u.abs() - u.abs() / size).abs().max() < 5 * found.noise


def test_the_leading_factor_of_several_samples_is_found():
    G = 3 * randn(5)[:, None] * randn(30, seed=1) + randn(5, seed=2)[:, None] * randn(30, seed=3)
    found, S = rank_one(G), torch.linalg.svdvals(G)
    assert (G - found.u[:, None] * found.v).norm().item() == pytest.approx(S[1].item(), rel=0.1)


def test_relative_difference_does_not_overflow():
    assert relative(2e300 * torch.eye(2)[0].double(), 1e300 * torch.eye(2)[0].double()) == pytest.approx(1)


def head(known, tolerance):
    return HeadGradient(None, None, None, 1e-15, tolerance, known)


def hypothesis(label, residual):
    return Hypothesis(label, 1.0, torch.ones(1), torch.ones(2), residual)


@pytest.mark.parametrize(
    ("misfits", "notes"),
    [
        ({0: 0.0, 1: 0.0}, ()),
        ({0: 1e-9, 1: 1e-7}, ()),
        ({0: 1e-7, 1: 0.4}, ("label 0 by the head's equations, missed by 1e-07; with label 1, the next best, by 0.4",)),
    ],
)
def test_a_label_counts_as_decided_where_the_next_best_misses(misfits, notes):
    found = [hypothesis(label, misfit) for label, misfit in misfits.items()]
    assert reading(head(None, 1e-3), found, misfits, []).notes == notes


def test_a_known_label_that_fits_worse_is_noted():
    found = [hypothesis(0, 0.002), hypothesis(1, 0.2)]
    given_label = reading(head(1, 0.3), found, {0: 0.002, 1: 0.2}, [])
    assert given_label.notes == () and [h.label for h in given_label.hypotheses] == [1]
    (note,) = reading(head(1, 0.1), found, {0: 0.002, 1: 0.2}, ["out of range"]).notes[1:]
    assert note == "label 1 was given, and the head's equations are missed by 0.2 with it; with label 0 by 0.002"


def test_a_given_label_that_was_not_found_gets_the_same_input():
    layer = rgap.prepare(last_layer(3, 5, True, seed=0), (1, 1, 5)).layers[0]
    G, dz = randn(3, 5), torch.tensor([0.4, -1.0, 0.6]).double()

    def output_gradient(z, label):
        return dz * (1 + 0.1 * label)

    for known, expected in ((None, [(0, 0.0)]), (0, [(0, 0.0)]), (2, [(2, 0.2)])):
        given = HeadGradient(layer, G, dz, 1e-15, 0.5, known)
        found = reading_with_bias(given, dz, output_gradient, [])
        assert [h.label for h in found.hypotheses] == [label for label, _ in expected]
        assert [h.residual for h in found.hypotheses] == pytest.approx([residual for _, residual in expected])
        assert_close(found.hypotheses[0].x, least_squares_input(G, dz))
