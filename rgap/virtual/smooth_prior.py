"""A prior on photographs, for the first steps where the equations alone are too few to start from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from rgap.virtual.previous import PreviousLayer


def smooth_image_rows(previous: PreviousLayer, count: int = 1000) -> tuple[NDArray, NDArray, NDArray]:
    """Rows F x′ ≈ target of unit variance: a prior on photographs, whose spectrum falls as 1/f; made once.

    The `count` rows of smallest variance of a cosine basis with variance 40 / (1 + k²)^1.25 in luminance, 15 and 60
    times less in the opponent colours. They take part in the first steps only; no certificate rests on them.

    Args:
        previous: Factors of the layer that reads the image.
        count: How many rows.

    Returns:
        F with columns in `order` (count, n_x), target (count,), and F W⁺ (count, n_z).
    """
    return previous.layer.cached(f"smooth_image_rows {count}", lambda: _smooth_rows(previous, count))


def _smooth_rows(previous: PreviousLayer, count: int) -> tuple[NDArray, NDArray, NDArray]:
    channels, height, width = previous.layer.input_shape
    frequency = np.add.outer((np.arange(height) * 32 / height) ** 2, (np.arange(width) * 32 / width) ** 2)
    share = np.array([1, 1 / 15, 1 / 60])[:channels] if channels <= 3 else np.ones(channels)
    variance = np.multiply.outer(share, 40 / (1 + frequency) ** 1.25).ravel()
    colour = linalg.qr(np.array([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]).T)[0].T if channels == 3 else np.eye(channels)
    cosines = [_cosine_basis(n) for n in (height, width)]
    stiffest = np.argsort(variance, kind="stable")[:count]
    rows = np.kron(colour, np.kron(*cosines))[stiffest] / np.sqrt(variance[stiffest])[:, None]
    ordered = np.ascontiguousarray(rows[:, previous.order])
    return ordered, rows @ np.full(rows.shape[1], 0.5), ordered @ previous.pinv


def _cosine_basis(n: int) -> NDArray:
    basis = np.cos(np.pi * np.outer(np.arange(n), np.arange(n) + 0.5) / n) * np.sqrt(2 / n)
    basis[0] /= np.sqrt(2)
    return basis
