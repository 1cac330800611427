"""Least squares with its rank, decompositions, Krylov methods and norms; knows no network."""

from rgap.linalg.krylov import Iterated, conjugate_gradients, largest_eigenvalue
from rgap.linalg.matrices import (
    BorderedGram,
    distance,
    gram_matrix,
    largest_entry,
    leading_svd,
    norm,
    orthonormal,
    rms,
    svd,
)
from rgap.linalg.solve import GRAM_RESOLUTION, least_squares
from rgap.linalg.systems import LeastSquares, Operator, dense_operator

__all__ = [
    "GRAM_RESOLUTION", "BorderedGram", "Iterated", "LeastSquares", "Operator", "conjugate_gradients", "dense_operator",
    "distance", "gram_matrix", "largest_eigenvalue", "largest_entry", "leading_svd", "least_squares", "norm",
    "orthonormal", "rms", "svd",
]  # fmt: skip
