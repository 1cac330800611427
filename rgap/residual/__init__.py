"""Residual and pooling networks: a convolution read from its own gradient alone, and what follows from it."""
