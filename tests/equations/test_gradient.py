import pytest
import torch
from cases import conv_layer, conv_layers, drawn, layer_sample, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations import gradient as equations
from rgap.equations.gradient import (
    bias_residual,
    blocks,
    gradient_matrix,
    gradient_values,
    identity_residual,
    solve_gradients,
)
from rgap.equations.weights import weight_matrix


def weight_gradient(layer, x, dz):
    """∂⟨δz, W x⟩/∂W by autograd."""
    left, right, top, bottom = layer.padding
    weight = layer.weight.clone().requires_grad_()
    padded = nn.functional.pad(x[None], (left, right, top, bottom))
    z = nn.functional.conv2d(padded, weight, None, layer.stride, 0, layer.dilation, layer.groups)
    return torch.autograd.grad((z[0] * dz).sum(), weight)[0]


def drawn_pair(layer, seed):
    """An input and a gradient by the pre-activation."""
    return randn(*layer.input_shape, seed=seed), randn(*layer.output_shape, seed=seed + 1)


def whole_gradient_matrix(layer, dz):
    """M with all its blocks in place, (rows, H·W)."""
    rows = []
    for block in blocks(layer):
        M = dz.new_zeros(len(dz) * len(block.taps), layer.input_shape[1] * layer.input_shape[2])
        M[:, block.pixels] = gradient_matrix(layer, block, dz)
        rows.append(M)
    return torch.cat(rows)


@drawn
@given(conv_layers(), st.integers(0, 1000))
def test_every_block_of_the_gradient_matrix_maps_the_input_to_autograds_gradient(layer, seed):
    x, dz = drawn_pair(layer, seed)
    parts = layer.split_groups()
    G = weight_gradient(layer, x, dz)
    for part, x_part, G_part, dz_part in zip(parts, *(t.chunk(len(parts)) for t in (x, G, dz)), strict=True):
        taps = []
        for block in blocks(part):
            M = gradient_matrix(part, block, dz_part)
            assert_close(
                M @ x_part.flatten(1)[:, block.pixels].T, gradient_values(part, block, G_part), rtol=0, atol=1e-12
            )
            taps += block.taps.tolist()
        assert sorted(taps) == list(range(part.weight[0, 0].numel()))


@drawn
@given(conv_layers(), st.integers(0, 1000))
def test_the_rank_of_the_gradient_constraints_is_that_of_one_channel_times_the_channels(layer, seed):
    part = layer.split_groups()[0]
    _, dz = drawn_pair(part, seed)
    size = part.unknowns
    rows = [weight_gradient(part, unit.reshape(part.input_shape), dz).flatten() for unit in torch.eye(size).double()]
    K, M = torch.stack(rows, 1), whole_gradient_matrix(part, dz)
    assert torch.linalg.matrix_rank(K) == part.input_shape[0] * torch.linalg.matrix_rank(M)


@pytest.mark.parametrize(("stride", "expected"), [(1, 1), (2, 4), (3, 9), ((1, 2), 2), ((2, 3), 6)])
def test_a_stride_splits_the_pixels_into_independent_blocks(stride, expected):
    layer = conv_layer(nn.Conv2d(1, 2, 3, stride), 9, 9)
    pixels = torch.cat([block.pixels for block in blocks(layer)])
    assert len(blocks(layer)) == expected
    assert len(pixels.unique()) == len(pixels)


@pytest.mark.parametrize(("name", "rows", "rank_gradients"), [("cnn6", 2916, 2928), ("cnn6_d", 1620, 1968)])
def test_the_second_convolution_has_the_rows_and_the_rank_of_the_table(name, rows, rank_gradients):
    layer = rgap.prepare(getattr(rgap.models, name)(), (3, 32, 32)).layers[1]
    M = whole_gradient_matrix(layer, randn(*layer.output_shape))
    assert 12 * torch.linalg.matrix_rank(M).item() == rank_gradients
    assert layer.unknowns == 3468 and weight_matrix(layer).shape == (rows, 3468)


def test_singular_vectors_and_a_cholesky_factor_give_the_same_inverse():
    layer = conv_layer(nn.Conv2d(3, 30, 3, 2, 1), 9, 9)
    x, dz = randn(3, 9, 9), randn(*layer.output_shape, seed=1)
    dz[1:] *= 1e-3  # σ_min / σ_max is small, and not below the cutoff
    for rcond in (1e-7, 1e-6):  # by a decomposition of M, and by its Gram matrix
        found = solve_gradients(layer, layer.weight_gradient(x, 1e-160 * dz), 1e-160 * dz[None], rcond, 0.02)
        assert found.V.shape[2] == 0 and found.rank == 81 and found.residual < 1e-12
        assert_close(found.x0, x[None], rtol=0, atol=1e-9)
        assert_close(found.sensitivity(layer.weight_gradient(x, 1e-160 * dz)), x[None], rtol=0, atol=1e-6)


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
    monkeypatch.setattr(equations, "MAX_CHANNELS_TESTED", 8)
    assert identity_residual(layer, G, dz[None], z[None]) < 1e-12
    assert identity_residual(layer, G, -dz[None], z[None]) == pytest.approx(every) == pytest.approx(2.0)
