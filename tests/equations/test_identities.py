import pytest
import torch
from cases import conv_layer, conv_layers, drawn, layer_sample, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rgap
from rgap.equations import identities
from rgap.equations.identities import bias_residual, identity_residual


@drawn
@given(conv_layers(), st.integers(0, 1000))
def test_the_identities_between_gradient_and_pre_activation_hold_to_rounding(layer, seed):
    _, G, dz, z = layer_sample(layer, seed=seed)
    assert identity_residual(layer, G, dz, z) < 1e-12
    assert identity_residual(layer, G, -dz, z) == pytest.approx(2.0)


def test_the_identities_of_a_batch_hold_for_the_right_images_together_and_for_no_others():
    layer = conv_layer(nn.Conv2d(4, 6, 3, 2, 1, groups=2), 5, 5)
    _, G, dz, z = layer_sample(layer, 3)
    assert identity_residual(layer, G, dz, z) < 1e-12 < 0.05 < identity_residual(layer, G, dz.flip(0), z)
    bias = dz.sum((0, 2, 3))
    assert bias_residual(layer, bias, dz) < 1e-12 < 0.4 < bias_residual(layer, 2 * bias, dz)


def test_the_identities_of_a_vanishing_gradient_hold():
    layer = conv_layer(nn.Conv2d(2, 3, 3), 5, 5)
    G, dz = torch.zeros_like(layer.weight), layer.weight.new_zeros(layer.output_shape)
    assert identity_residual(layer, G, dz[None], dz[None]) == 0.0


def test_sums_of_many_channels_are_tested_in_their_place(monkeypatch):
    layer = rgap.prepare(nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.Linear(20, 1)).double(), (1, 2, 3)).layers[0]
    x, dz = randn(6, 1, 1), randn(20, 1, 1, seed=1)
    z = layer.apply(x) + layer.pre_bias()
    G = layer.weight_gradient(x, dz)
    every = identity_residual(layer, G, -dz[None], z[None])
    monkeypatch.setattr(identities, "MAX_CHANNELS_TESTED", 8)
    assert identity_residual(layer, G, dz[None], z[None]) < 1e-12
    assert identity_residual(layer, G, -dz[None], z[None]) == pytest.approx(every) == pytest.approx(2.0)
