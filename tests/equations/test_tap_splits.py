"""Splits of the taps: which convolutions are determined by their own gradient, against dense linear algebra."""

import itertools

import numpy as np
import pytest
import torch

from rgap.equations.tap_splits import is_blind, tap_splits


def geometry(image, kernel, stride, padding):
    return tuple((n, k, stride, (padding, padding), 1) for n, k in zip(image, kernel, strict=True))


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (1, 0), (2, 2)])
def test_a_split_factors_the_gradient_of_a_convolution(stride, padding):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, 5, generator=generator, dtype=torch.float64)
    weight = torch.zeros(30, 30, 3, 3, dtype=torch.float64, requires_grad=True)
    z = torch.nn.functional.conv2d(x[None], weight, None, stride, padding)
    dz = torch.randn(z.shape, generator=generator, dtype=torch.float64)
    (G,) = torch.autograd.grad(z, weight, dz)
    splits = tap_splits(30, 30, geometry((4, 5), (3, 3), stride, padding))
    assert len({split.taps for split in splits}) > 1
    for split in splits:
        (a, b), extend = split.taps, lambda v: torch.cat([v.flatten(1), v.new_zeros(len(v), 1)], 1)
        left, right = extend(dz[0])[:, split.outputs], extend(x)[:, split.pixels]  # (O, t₁, N), (C, t₂, N)
        product = torch.einsum("otn,cun->otcu", left, right).unflatten(3, (4 - a, 4 - b)).unflatten(1, (a, b))
        for i, j, k, m in itertools.product(range(a), range(b), range(4 - a), range(4 - b)):
            assert torch.allclose(product[:, i, j, :, k, m], G[:, :, i + k, j + m])


def unique(filters, channels, split, generator):
    """Whether the row space of random factors holds one matrix of shifts only, densely."""
    table, units = (split.pixels, channels) if split.of_input else (split.outputs, filters)
    values = generator.standard_normal((units, table.max() + 2)) * (np.arange(table.max() + 2) <= table.max())
    V = np.linalg.svd(values[:, table].transpose(2, 1, 0).reshape(split.positions, -1), full_matrices=False)[2]
    V = V.reshape(split.positions, *table.shape[:1], units)
    shifts = np.zeros((split.positions**2, (table.max() + 1) * units))
    count = np.bincount(table[table >= 0])
    for (t, n), pixel in np.ndenumerate(table):
        if pixel >= 0:
            rows = slice(n * split.positions, (n + 1) * split.positions)
            shifts[rows, pixel * units : (pixel + 1) * units] += V[:, t] / count[pixel] ** 0.5
    return (np.linalg.svd(shifts, compute_uv=False) > 1 - 1e-9).sum() == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_law_finds_the_splits_whose_solution_is_unique(seed):
    generator = np.random.default_rng(seed)
    for _ in range(6):
        kernel, image = generator.integers(1, 4, 2), generator.integers(2, 5, 2)
        stride, padding = (int(v) for v in (generator.integers(1, 3), generator.integers(0, 2)))
        if (kernel > image + 2 * padding).any():
            continue
        filters, channels = (int(v) for v in generator.integers(1, 20, 2))
        for split in tap_splits(filters, channels, geometry(image.tolist(), kernel.tolist(), stride, padding)):
            assert unique(filters, channels, split, generator), (filters, channels, kernel, image, stride, padding)


@pytest.mark.parametrize(
    ("shape", "blind"),
    [
        ((512, 512, (3, 3), (4, 4), 1, 1), True),
        ((40, 40, (3, 3), (8, 8), 1, 1), True),  # fewer filters than positions: 2×2 taps on each side
        ((24, 24, (3, 3), (8, 8), 1, 1), False),
        ((2, 40, (3, 3), (4, 4), 1, 1), True),
        ((1, 40, (3, 3), (4, 4), 1, 1), False),
        ((512, 512, (1, 1), (4, 4), 1, 0), False),  # no shifts
        ((512, 512, (3, 3), (8, 8), 2, 1), False),  # shifts of stride 2 to one side only
        ((80, 80, (5, 5), (8, 8), 2, 2), True),
        ((40, 40, (3, 3), (6, 6), 1, 0), True),
    ],
)
def test_blind_by_shapes(shape, blind):
    assert is_blind(*shape) == blind
