import numpy as np
import pytest
import torch
from cases import conv_layer, randn, sequential
from numpy.testing import assert_allclose
from torch import nn

import rgap
from rgap.equations import SolverLimits
from rgap.equations.weights import weight_matrix
from rgap.virtual.previous import previous_factors, smooth_image_rows

LAYERS = {
    "tall": (lambda: nn.Conv2d(3, 12, 4, 2, 2), (6, 7)),
    "tall, dilated": (lambda: nn.Conv2d(2, 9, (3, 2), 1, (2, 1), 2), (5, 6)),
    "wide": (lambda: nn.Conv2d(4, 5, 3, 2, 1), (7, 6)),
    "wide, with pixels that no tap reads": (lambda: nn.Conv2d(2, 3, 2, 3), (7, 7)),
    "square": (lambda: nn.Conv2d(3, 12, 2, 2, bias=False), (6, 6)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    conv, size = LAYERS[request.param]
    return conv_layer(conv(), *size, seed=3)


def dense(layer):
    return weight_matrix(layer).toarray()


def test_the_factors_are_those_of_the_dense_matrix(layer):
    W, found = dense(layer), previous_factors(layer)
    rows, columns = W.shape
    assert sorted(found.order) == list(range(columns))
    assert_allclose(found.pinv, np.linalg.pinv(W)[found.order], atol=1e-9)
    assert found.left.shape == (rows, max(rows - columns, 0)) and found.null.shape == (columns, max(columns - rows, 0))
    assert_allclose(found.left.T @ W, 0, atol=1e-10)
    assert_allclose(W[:, found.order] @ found.null, 0, atol=1e-10)
    for basis in (found.left, found.null):
        assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-12)


def test_lift_undoes_the_layer(layer):
    found, x = previous_factors(layer), randn(layer.unknowns).numpy()
    z = (layer.apply(torch.from_numpy(x).reshape(layer.input_shape)) + layer.pre_bias()).flatten().numpy()
    assert_allclose(found.lift(z, found.null.T @ x[found.order]), x, atol=1e-9)
    assert_allclose(found.invert(z[:, None], rough=True), found.invert(z[:, None]), rtol=0, atol=1e-3 * abs(x).max())
    other = found.lift(z, randn(found.null.shape[1], seed=1).numpy())
    assert_allclose(dense(layer) @ other + found.bias, z, atol=1e-9)
    assert found.bias.shape == z.shape and found.bias.any() == (layer.bias is not None)


def test_weak_directions_of_an_ill_conditioned_layer_are_unknowns_with_equations_of_their_own():
    """Layers of LeNet's kind are square, with condition numbers of 10⁶ and more."""
    layer = conv_layer(nn.Conv2d(3, 12, 5, 2, 2), 16, 16, seed=0)
    W, found, x = dense(layer), previous_factors(layer), randn(layer.unknowns).numpy()
    sigmas = np.linalg.svd(W, compute_uv=False)
    assert sigmas[0] / sigmas[-1] > 1e4 and found.spare == 0
    assert found.null.shape[1] == found.left.shape[1] >= (sigmas < 5e-3 * sigmas[0]).sum() > 0
    assert np.linalg.norm(found.pinv, 2) < 3 / (1e-2 * sigmas[0])
    z = W @ x + found.bias
    y = np.linalg.lstsq(found.null, x[found.order] - found.pinv @ (z - found.bias), rcond=None)[0]
    assert_allclose(found.left.T @ (z - found.bias), found.gains @ y, atol=1e-9)
    assert_allclose(found.lift(z, y), x, atol=1e-9)
    assert_allclose(found.invert(z[:, None] - found.bias[:, None]), found.pinv @ (z - found.bias)[:, None], atol=1e-9)
    plain = previous_factors(layer, weak_ratio=0)
    assert plain.left.shape[1] == plain.null.shape[1] == 0 and np.linalg.norm(plain.pinv, 2) > 1e3 / sigmas[0]


@pytest.mark.parametrize("channels", [slice(None), slice(1, 3)])
def test_gradient_rows_are_the_gradient_by_the_weights(layer, channels):
    found, dz = previous_factors(layer), randn(*layer.output_shape, seed=1)
    images = randn(4, *layer.input_shape, seed=2)
    weight = layer.weight.clone().requires_grad_()
    expected = []
    for image in images:
        padded = nn.functional.pad(image[None], layer.padding)
        z = nn.functional.conv2d(padded, weight, None, layer.stride, 0, layer.dilation)[0]
        expected.append(torch.autograd.grad((z * dz).sum(), weight)[0][channels].flatten())
    rows = found.gradient_rows(dz[channels].numpy(), images.flatten(1).numpy().T[found.order])
    assert_allclose(rows, torch.stack(expected, 1).numpy(), atol=1e-12)


def test_the_rank_of_the_gradient_rows(layer):
    found, dz = previous_factors(layer), randn(*layer.output_shape, seed=1).numpy()
    for some in (dz, dz[:2], 0 * dz):
        K = found.gradient_rows(some, np.eye(layer.unknowns))
        assert found.gradient_rank(some) == np.linalg.matrix_rank(K)


def test_patches_are_the_inputs_of_the_weights(layer):
    found, x = previous_factors(layer), randn(*layer.input_shape)
    patches = found.patches(x.flatten().numpy())
    assert_allclose(layer.weight.flatten(1).numpy() @ patches, layer.apply(x).flatten(1).numpy(), atol=1e-12)
    dz = randn(*layer.output_shape, seed=1).flatten(1).numpy()
    rows = found.gradient_rows(dz.reshape(layer.output_shape), x.flatten().numpy()[found.order, None])
    assert_allclose((dz @ patches.T).ravel(), rows[:, 0], atol=1e-12)


def test_a_linear_layer_has_factors_too():
    network = sequential(nn.Flatten(), nn.Linear(8, 12), nn.Linear(12, 1))
    layer = rgap.prepare(network, (2, 2, 2)).layers[0]
    found = previous_factors(layer)
    assert_allclose(found.pinv @ dense(layer), np.eye(8)[found.order], atol=1e-10)
    assert found.left.shape == (12, 4) and found.patches(np.arange(8.0)).shape == (8, 1)


def test_factors_are_made_once(layer):
    assert previous_factors(layer) is previous_factors(layer)


def test_groups_have_no_factors():
    assert previous_factors(conv_layer(nn.Conv2d(2, 12, 4, 2, 2, groups=2), 6, 6)) is None


def test_a_layer_too_large_has_none():
    layer = conv_layer(nn.Conv2d(3, 4, 3, 2, 1), 6, 6)  # 36 outputs, 108 inputs
    assert previous_factors(layer, SolverLimits(max_pinv_side=107)) is None
    assert previous_factors(layer, SolverLimits(max_pinv_side=108)) is not None


@pytest.mark.parametrize("shape", [(2, 12), (4, 2)])
@pytest.mark.parametrize("how", ["two equal", "two nearly equal", "zero"])
def test_rank_deficient_weights_have_none(shape, how):
    layer = conv_layer(nn.Conv2d(*shape, 3, padding=1), 5, 5)
    if how == "zero":
        layer.weight.zero_()
    else:
        layer.weight[:, 1], layer.weight[1] = layer.weight[:, 0], layer.weight[0]
        if how == "two nearly equal":
            layer.weight.add_(1e-7 * randn(*layer.weight.shape))
    assert previous_factors(layer) is None


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_rows_of_smooth_images_are_an_orthogonal_basis_around_grey(channels):
    found = previous_factors(conv_layer(nn.Conv2d(channels, 8 * channels, 4, 2, 2), 6, 8))
    F, target, FP = smooth_image_rows(found)
    n = 48 * channels
    assert F.shape == (n, n) and target.shape == (n,) and FP.shape == (n, len(found.left))
    assert_allclose(F @ np.full(n, 0.5), target, atol=1e-12)
    assert_allclose(F @ found.pinv, FP)
    gram = F @ F.T
    assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9 * gram.max())
    variance = 1 / np.diag(gram)
    assert (np.diff(variance) > -1e-12).all() and variance.max() == pytest.approx(40)
    assert all(a is b for a, b in zip(smooth_image_rows(found), (F, target, FP), strict=True))


def test_only_the_stiffest_rows_of_large_images_are_kept():
    found = previous_factors(conv_layer(nn.Conv2d(3, 12, 4, 2, 2), 20, 20))
    F, target, FP = smooth_image_rows(found, 700)
    assert len(smooth_image_rows(found, 10)[1]) == 10
    assert (F.shape, target.shape, FP.shape) == ((700, 1200), (700,), (700, 1452))
    stripes, blob = np.indices((20, 20)).sum(0) % 2, np.hypot(*(np.indices((20, 20)) - 9.5)) / 14
    stiff, soft = (np.sum((F @ np.tile(x.ravel(), 3)[found.order] - target) ** 2) for x in (stripes, blob))
    assert stiff > 20 * soft
