import pytest
import torch
from cases import conv_layers, drawn, randn, sequential
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import rgap
from rgap.equations.gradient import solve_gradients
from rgap.equations.systems import spread, weight_columns, weight_gram, weights_on
from rgap.equations.weights import weight_matrix
from rgap.linalg import BorderedGram


def dense(layer, V):
    """W (I ⊗ V_b) of all images by the sparse W."""
    W = torch.from_numpy(weight_matrix(layer).toarray())
    return torch.cat([W @ torch.kron(torch.eye(layer.input_shape[0]).double(), image) for image in V])


@settings(drawn, max_examples=40)
@given(conv_layers(), st.integers(1, 2), st.integers(1, 4), st.integers(0, 1000))
def test_the_operator_is_that_of_the_dense_matrix(layer, images, count, seed):
    for part in layer.split_groups():
        V = randn(images, part.input_shape[1] * part.input_shape[2], count, seed=seed)
        A, operator = dense(part, V), weights_on(part, V)
        Y, R = randn(A.shape[1], 3, seed=seed + 1), randn(len(A), 2, seed=seed + 2)
        assert_close(operator.gram, A.T @ A, rtol=0, atol=1e-11)
        assert_close(operator.apply(Y), A @ Y, rtol=0, atol=1e-11)
        assert_close(operator.adjoint(R), A.T @ R, rtol=0, atol=1e-11)
        assert_close(operator.matrix(), A, rtol=0, atol=1e-11)
        assert_close(torch.cat([weight_columns(part, image) for image in V]), A, rtol=0, atol=1e-12)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("case", [(3, 2, 1, 5), (1, 1, 0, 6), (1, 2, 0, 6), (2, 2, 0, 4)])
def test_what_one_tap_alone_reads_stands_apart(case, images):
    kernel, stride, padding, outputs = case
    conv = nn.Conv2d(4, outputs, kernel, stride, padding, bias=False)
    positions = conv(torch.zeros(1, 4, 9, 9)).numel()
    network = sequential(conv, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(positions, 1))
    layer = rgap.prepare(network, (4, 9, 9)).layers[0]
    found = solve_gradients(layer, randn(*layer.weight.shape), randn(images, *layer.output_shape), 1e-5, 0.05)
    A, operator = dense(layer, found.V), weights_on(layer, found.V, found.apart)
    assert 0 < found.apart < found.V.shape[2] or kernel == stride == 1
    assert_close(operator.gram, A.T @ A, rtol=0, atol=1e-11)
    damping, v = torch.full((4, found.V.shape[2]), 0.5).double(), randn(A.shape[1], 2)
    damping[:, found.V.shape[2] - found.apart :] = 0
    inverse = operator.made_gram.factored(damping.flatten())
    assert_close(operator.made_gram @ v, A.T @ (A @ v), rtol=0, atol=1e-11)
    assert_close(inverse(A.T @ (A @ v) + damping.reshape(-1, 1).square() * v), v, rtol=0, atol=1e-9)


def test_a_block_that_is_not_positive_definite_has_no_factors():
    R, none = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    assert BorderedGram(R, none, torch.eye(2).double()).factored(torch.zeros(4).double()) is None
    assert BorderedGram(torch.eye(2).double(), none, none).factored(torch.zeros(4).double()) is None


@pytest.mark.parametrize("channels", [2, 12])
@pytest.mark.parametrize("behind", [False, True])
def test_maps_of_pixels_before_and_behind_are_part_of_it(behind, channels):
    conv = nn.Conv2d(channels, 3, 3)
    body = [conv, nn.AvgPool2d(2)] if behind else [nn.ReflectionPad2d(1), conv]
    outputs = nn.Sequential(*body, nn.LeakyReLU(0.2), nn.Flatten())(torch.zeros(1, channels, 8, 8)).shape[1]
    network = sequential(*body, nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(outputs, 1))
    layer, V = rgap.prepare(network, (channels, 8, 8)).layers[0], randn(1, 64, 5)
    A = dense(layer, V)
    assert_close(weight_gram(layer, V), A.T @ A, rtol=0, atol=1e-11)


def test_spread_is_the_kronecker_product():
    V, Y = randn(2, 16, 5), randn(15, 2)
    expected = torch.stack([torch.kron(torch.eye(3).double(), image) @ Y for image in V])
    assert_close(spread(V, Y, 3), expected)
