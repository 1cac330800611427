"""How close a reconstruction is to the original, sample by sample."""

import torch
from scipy.optimize import linear_sum_assignment

from rgap.arguments import check_tensor
from rgap.artifact import from_extra


def mse(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean squared error, mean over channels and pixels.

    Args:
        x: Images (N, C, H, W), or rows of a table (N, n).
        y: The same shape.

    Returns:
        float64 (N,), in squared pixel units.

    Raises:
        ValueError: If the shapes differ or are others.

    Example:
        >>> import torch
        >>> from rgap import metrics
        >>> x = torch.zeros(1, 1, 4, 4)
        >>> round(metrics.mse(x, x + 0.1).item(), 4)
        0.01
    """
    x, y = _pair(x, y, rows=True)
    return (x - y).square().flatten(1).mean(1)


def psnr_db(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, -10 log10(MSE), for images of range [0, 1].

    Args:
        x: Images (N, C, H, W), or rows of a table (N, n); values outside the range are not clipped.
        y: The same shape.

    Returns:
        float64 (N,), in decibels; infinite where x equals y exactly.

    Raises:
        ValueError: If the shapes differ or are others.

    Example:
        >>> import torch
        >>> from rgap import metrics
        >>> x = torch.zeros(1, 1, 4, 4)
        >>> round(metrics.psnr_db(x, x + 0.1).item(), 2)
        20.0
    """
    return -10 * mse(x, y).log10()


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) for images of range [0, 1].

    The Gaussian window has the usual 11×11 pixels (standard deviation 1.5), the border is mirrored. Images with a side
    under 11 get the largest odd window that fits, its deviation reduced in proportion; such values are comparable only
    with each other.

    Args:
        x: Images (N, C, H, W) with H and W at least 3.
        y: Images of the same shape.

    Returns:
        float64 (N,), 1 where x equals y.

    Raises:
        ValueError: If the shapes differ, are not (N, C, H, W), or the images are smaller than 3×3.

    Example:
        >>> import torch
        >>> from rgap import metrics
        >>> x = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16)
        >>> round(metrics.ssim(x, x).item(), 4)
        1.0
    """
    x, y = _pair(x, y)
    if min(x.shape[2:]) < 3:
        raise ValueError(f"images are {tuple(x.shape[2:])} pixels; SSIM needs at least 3×3")
    sigma = min(1.5, (min(x.shape[2:]) - 1) // 2 / 3.5)  # torchmetrics' window has 2·int(3.5·sigma + 0.5) + 1 pixels
    # Takes longer to import than everything else here, torch included.
    library = from_extra("torchmetrics.functional.image")
    values = library.structural_similarity_index_measure(x, y, sigma=sigma, data_range=1.0, reduction="none")
    return values.reshape(len(x))


def match(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Pairs each image with its own reference so that the sum of mean squared errors is smallest (Hungarian method).

    Args:
        images: Images (N, C, H, W), or rows of a table (N, n), in any order.
        references: M ≥ N of the same shape.

    Returns:
        int64 (N,): `references[match(images, references)]` stands in the order of `images`.

    Raises:
        ValueError: If there are more images than references, or their shapes differ.

    Example:
        >>> import torch
        >>> from rgap import metrics
        >>> references = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1)
        >>> metrics.match(references[[2, 0]] + 0.01, references).tolist()
        [2, 0]
    """
    images, references = (
        check_tensor(name, value, finite=True) for name, value in (("images", images), ("references", references))
    )
    if images.ndim not in (2, 4) or images.shape[1:] != references.shape[1:] or len(images) > len(references):
        given = f"cannot match images {tuple(images.shape)} with references {tuple(references.shape)}"
        needed = "both must be (N, C, H, W), or (N, n), with equal C, H, W or n and at least one reference per image"
        raise ValueError(f"{given}; {needed}")
    # The matrix-product form of cdist would lose images that differ by less than 1e-8.
    distance = torch.cdist(
        images.double().flatten(1), references.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return torch.from_numpy(linear_sum_assignment(distance.square().cpu().numpy())[1])


def _pair(x, y, rows=False):
    x, y = check_tensor("x", x), check_tensor("y", y)
    if (x.ndim != 4 and not (rows and x.ndim == 2)) or x.shape != y.shape:
        needed = "(N, C, H, W)" + " or (N, n)" * rows
        raise ValueError(f"shapes are {tuple(x.shape)} and {tuple(y.shape)}; both must be the same {needed}")
    return x.detach().double(), y.detach().double()
