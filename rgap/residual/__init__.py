"""Residual and pooling networks: a convolution read from its own gradient alone, and what follows from it."""

from rgap.residual.cut import ResidualNetwork, prepare_residual
from rgap.residual.reconstruct import reconstruct_residual

__all__ = ["ResidualNetwork", "prepare_residual", "reconstruct_residual"]
