import numpy as np
import pytest
from cases import conv_layer
from numpy.testing import assert_allclose
from torch import nn

from rgap.virtual.previous import previous_factors
from rgap.virtual.smooth_prior import smooth_image_rows


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
