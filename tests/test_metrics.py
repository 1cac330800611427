import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch.testing import assert_close

from rgap import metrics


def random_images(count=3, shape=(3, 32, 32), seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("noise", [1e-8, 1e-3, 0.5])
def test_mse_and_psnr_agree_with_their_formulas_in_float64(noise):
    x = random_images().double()
    y = x + noise * random_images(seed=1).double()
    expected = [np.mean((a - b) ** 2) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert_close(metrics.mse(x, y), torch.tensor(expected), rtol=1e-12, atol=0)
    assert_close(metrics.psnr_db(x, y), -10 * torch.tensor(expected).log10(), rtol=1e-6, atol=0)


def test_psnr_of_equal_images_is_infinite_for_those_alone():
    x = random_images()
    y = x.clone()
    y[1] += 0.1
    assert metrics.psnr_db(x, y).isinf().tolist() == [True, False, True]
    assert_close(metrics.psnr_db(x, y)[1].item(), 20.0, rtol=1e-6, atol=0)


def test_ssim_agrees_with_scikit_image():
    x, y = torch.full((2, 3, 1, 48, 48), 0.5)
    # A plain frame, because the two mirror an image at its border in different ways.
    x[..., 10:-10, 10:-10], y[..., 10:-10, 10:-10] = (
        random_images(shape=(1, 28, 28)),
        random_images(shape=(1, 28, 28), seed=1),
    )
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    pairs = zip(x[:, 0].double().numpy(), y[:, 0].double().numpy(), strict=True)
    expected = [structural_similarity(a, b, **options)[1].mean() for a, b in pairs]
    assert_close(metrics.ssim(x, y), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 4, 9), (3, 10, 10), (3, 11, 11), (1, 5, 40)])
def test_ssim_is_one_for_equal_images_however_small(shape):
    x = random_images(2, shape)
    assert_close(metrics.ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert (metrics.ssim(x, 1 - x) < 0.9).all()


def test_ssim_refuses_images_without_room_for_a_window():
    with pytest.raises(ValueError, match="at least 3×3"):
        metrics.ssim(torch.rand(1, 1, 2, 8), torch.rand(1, 1, 2, 8))


@pytest.mark.parametrize("metric", [metrics.mse, metrics.psnr_db, metrics.ssim])
def test_metrics_are_float64_per_sample_and_refuse_unequal_shapes(metric):
    x = random_images()
    assert metric(x, x + 0.1).dtype == torch.float64
    assert metric(x[:1], x[:1] + 0.1).shape == (1,)
    for y in (x[:2], x[:, :1], x[0]):
        with pytest.raises(ValueError, match=r"shapes are .* both must be"):
            metric(x, y)
    with pytest.raises(ValueError, match="both must be"):
        metric(x[0], x[0])


def test_rows_of_a_table_are_compared_and_matched_too():
    rows = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    assert metrics.psnr_db(rows, rows + 0.1).sub(20).abs().max() < 1e-4
    assert metrics.match(rows[[2, 0]], rows).tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"the same \(N, C, H, W\)$"):
        metrics.ssim(rows, rows)


def test_match_undoes_a_permutation_even_of_nearly_equal_images():
    references = random_images(1).double() + 1e-9 * random_images(30, seed=1).double()
    permutation = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert metrics.match(references[permutation], references).equal(permutation)
    assert metrics.match(references[permutation[:4]], references).equal(permutation[:4])


def test_match_takes_the_best_sum_not_the_nearest_first():
    images, references = torch.tensor([0.0, 1.0]), torch.tensor([0.9, 3.0])
    index = metrics.match(images.reshape(2, 1, 1, 1), references.reshape(2, 1, 1, 1))
    assert index.tolist() == [0, 1]


def test_match_refuses_more_images_than_references():
    with pytest.raises(ValueError, match="at least one reference per image"):
        metrics.match(random_images(3), random_images(2))
