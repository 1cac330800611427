"""The images of a batch, separated in its fully connected layers."""

from rgap.separation.read import read_batch
from rgap.separation.search import separate
from rgap.separation.subspaces import find_batch_size

__all__ = ["find_batch_size", "read_batch", "separate"]
