import pytest
import torch
import torch.nn.functional as F
from cases import rand, randn
from torch import nn
from torch.testing import assert_close

from rgap.network.pixel_maps import image_shape_of, pixel_map

MAPS = [
    nn.AvgPool2d(2),
    nn.AvgPool2d((3, 2), (1, 2), (1, 0), count_include_pad=False),
    nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    nn.AdaptiveAvgPool2d((3, 4)),
    nn.AdaptiveAvgPool2d(1),
    nn.ZeroPad2d((1, 2, 0, 3)),
    nn.ZeroPad2d((-1, 0, 2, -2)),
    nn.ReflectionPad2d((1, 2, 3, 0)),
    nn.ReplicationPad2d((2, 1, 0, 3)),
    nn.CircularPad2d((1, 2, 3, 1)),
    nn.Upsample(scale_factor=2),
    nn.Upsample((9, 5), mode="bilinear"),
    lambda x: x.mean((2, 3)),
    lambda x: F.pad(x, (1, 0, 2, 0)),
]


@pytest.mark.parametrize("function", MAPS, ids=lambda f: type(f).__name__)
def test_a_map_of_pixels_is_found_with_its_adjoint_rank_and_inverse(function):
    images = randn(2, 3, 6, 7)
    found = pixel_map(function, 3, (6, 7))
    expected = function(images).reshape(2, 3, *found.shape)
    assert_close(found.apply(images), expected, rtol=0, atol=1e-12)
    assert_close(torch.from_numpy(found.matrix() @ images[0, 0].flatten().numpy()), expected[0, 0].flatten())
    x = images.clone().requires_grad_()
    (adjoint,) = torch.autograd.grad(function(x).reshape(2, 3, *found.shape), x, expected)
    assert_close(found.adjoint(expected), adjoint, rtol=0, atol=1e-12)

    P = torch.from_numpy(found.matrix().toarray())
    rank = torch.linalg.matrix_rank(P).item()
    assert found.rank == rank and found.injective == (rank == 42) and found.inputs == (6, 7)
    assert_close(found.solve(expected).flatten(-2), (torch.linalg.pinv(P) @ expected.flatten(-2).mT[..., :, :]).mT)
    N = found.null_basis()
    assert N.shape == (42, 42 - rank)
    assert_close(N.T @ N, torch.eye(42 - rank).double(), rtol=0, atol=1e-10)
    assert_close(P @ N, torch.zeros(len(P), 42 - rank).double(), rtol=0, atol=1e-10)


def test_rows_of_pixels_are_images_of_height_one():
    found = pixel_map(nn.AvgPool1d(2), 3, (8,))
    assert found.inputs == (1, 8) and found.shape == (1, 4)
    x = rand(1, 3, 8)
    assert_close(found.apply(x[:, :, None])[:, :, 0], nn.AvgPool1d(2)(x))


def test_maps_one_after_the_other_are_one():
    first, then = pixel_map(nn.ZeroPad2d(1), 1, (4, 5)), pixel_map(nn.AvgPool2d(2, 1), 1, (6, 7))
    x = rand(1, 4, 5)
    assert_close(then.after(first).apply(x), then.apply(first.apply(x)))
    assert then.after(None) is then


@pytest.mark.parametrize(
    ("function", "padding"),
    [
        (nn.ZeroPad2d((1, 2, 0, 3)), (1, 2, 0, 3)),
        (nn.Identity(), (0, 0, 0, 0)),
        (nn.ReplicationPad2d(1), None),
        (nn.CircularPad2d((1, 0, 0, 0)), None),
        (nn.ZeroPad2d((-1, 2, 0, 0)), None),
        (nn.AvgPool2d(2), None),
    ],
    ids=str,
)
def test_zero_padding_is_recognised(function, padding):
    assert pixel_map(function, 1, (4, 5)).zero_padding() == padding


@pytest.mark.parametrize(
    "function",
    [
        nn.MaxPool2d(2),
        nn.Conv2d(2, 2, 3).double(),
        lambda x: x.mean(1),
        lambda x: x.flip(1),
        lambda x: x.mT,
        lambda x: x.square(),
        lambda x: x + 1,
        lambda x: x * 0,
        lambda x: F.pad(x, (20, 20), mode="reflect"),
        lambda x: x * torch.eye(4, 4),
    ],
)
def test_what_is_no_linear_map_of_pixels_by_axes_is_none(function):
    assert pixel_map(function, 2, (4, 4)) is None


def test_features_are_images():
    assert image_shape_of((3, 4, 5)) == (3, 4, 5)
    assert image_shape_of((3, 5)) == (3, 1, 5)
    assert image_shape_of((7,)) == (7, 1, 1)
    for shape in ((), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="are neither an image nor a row of pixels nor a vector"):
            image_shape_of(shape)
