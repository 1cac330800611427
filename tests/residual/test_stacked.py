"""Several layers' gradient equations for one input, and the same equations for changes of δz, against the truth."""

import copy

import pytest
import torch
from torch import nn

from rgap.residual.stacked import close_by_outputs, solve_changes, solve_stacked
from tests.cases import conv_layer, rand, randn


def layers_with_gradients(*convs, size=8):
    """Layers that read one input (C, H, W), the input, their gradients and δz."""
    layers = [conv_layer(conv, size, size, seed=i) for i, conv in enumerate(convs)]
    x = randn(*layers[0].input_shape, seed=7)
    dzs = [randn(*layer.output_shape, seed=8 + i) for i, layer in enumerate(layers)]
    return layers, x, [layer.weight_gradient(x, dz) for layer, dz in zip(layers, dzs, strict=True)], dzs


CASES = {
    "stride 1": ([nn.Conv2d(3, 8, 3, 1, 1)], 192),
    "stride 1, too few filters": ([nn.Conv2d(3, 5, 3, 1, 1)], 3 * 45),
    "stride 2": ([nn.Conv2d(3, 16, 3, 2, 1)], 192),
    "with its projection": ([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 1, 2)], 3 * (16 + 16 + 16 + 16)),
    "without it": ([nn.Conv2d(3, 8, 3, 2, 1)], 3 * (8 + 16 + 16 + 16)),
    "kernels of two sizes": ([nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(3, 40, 1, 2)], 3 * (36 + 16)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_input_and_its_rank(case):
    convs, rank = copy.deepcopy(CASES[case])
    layers, x, gradients, dzs = layers_with_gradients(*convs)
    found = solve_stacked(layers, gradients, dzs, 1e-5)
    matrix = torch.cat([dense(layer, dz) for layer, dz in zip(layers, dzs, strict=True)])
    assert found.rank == 3 * torch.linalg.matrix_rank(matrix).item() == rank
    assert found.residual < 1e-12
    if found.determined:
        assert torch.allclose(found.x, x, rtol=1e-8, atol=1e-9)


def close(case="stride 1, too few filters", known=0.8, noise=0.0):
    """What the gradient leaves open, by outputs of which a share is known."""
    layers, x, gradients, dzs = layers_with_gradients(*copy.deepcopy(CASES[case][0]))
    found = solve_stacked(layers, gradients, dzs, 1e-5)
    outputs = [(layer, layer.apply(x), rand(*layer.output_shape, seed=3) < known) for layer in layers]
    outputs = [(layer, z + noise * randn(*z.shape, seed=20), mask) for layer, z, mask in outputs]
    return close_by_outputs(found, layers, gradients, dzs, outputs), x


@pytest.mark.parametrize("case", ["stride 1, too few filters", "without it"])
def test_outputs_that_are_known_determine_the_rest(case):
    closed, x = close(case)
    assert closed.determined and closed.residual < 1e-12 and not closed.null
    assert torch.allclose(closed.x, x, rtol=1e-8, atol=1e-9)


def test_too_few_outputs_determine_nothing_and_noise_is_told():
    assert close(known=0.1)[0] is None
    closed, x = close(noise=1e-6)
    assert closed.residual > 1e-8 and 0.1 < (closed.x - x).square().mean().sqrt() / closed.error.mean() < 10


def dense(layer, dz):
    """M of one channel, column by column."""
    pixels = torch.eye(layer.input_shape[1] * layer.input_shape[2], dtype=torch.float64)
    images = torch.zeros(len(pixels), *layer.input_shape, dtype=torch.float64)
    images[:, 0] = pixels.reshape(-1, *layer.input_shape[1:])
    return torch.stack([layer.weight_gradient(image, dz)[:, 0].flatten() for image in images], 1)


def test_the_error_at_every_pixel_is_that_of_the_noise():
    layers, x, gradients, dzs = layers_with_gradients(nn.Conv2d(3, 12, 3, 1, 1))
    size = 1e-6 * gradients[0].square().mean().sqrt()
    ratios = []
    for seed in range(30):
        noisy = gradients[0] + size * randn(*gradients[0].shape, seed=100 + seed)
        found = solve_stacked(layers, [noisy], dzs, 1e-5)
        ratios.append(((found.x - x) / found.error).square().mean(0))
    assert torch.stack(ratios).mean(0).sqrt().sub(1).abs().max() < 0.5


@pytest.mark.parametrize("stride", [1, 2])
def test_changes_of_delta_by_the_layers_own_gradient(stride):
    (layer,), x, (G,), (dz,) = layers_with_gradients(nn.Conv2d(3, 6, 3, stride, 1))
    places = torch.zeros(layer.output_shape, dtype=torch.bool)
    places[0, 1, 2] = places[0, 3, 3] = places[4, 0, 0] = True
    wrong = dz + places * randn(*dz.shape, seed=3)
    changes, errors = solve_changes(layer, G - layer.weight_gradient(x, wrong), x, places)
    assert torch.allclose(wrong + changes, dz, rtol=1e-9, atol=1e-10)
    assert not changes[~places].any() and errors.max() < 1e-10


def test_changes_need_more_equations_than_places():
    (layer,), x, (G,), _ = layers_with_gradients(nn.Conv2d(3, 6, 3, 1, 1))
    assert solve_changes(layer, G, x, torch.ones(layer.output_shape, dtype=torch.bool)) is None
