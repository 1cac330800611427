"""Label, scale and input of the last layer from its gradient, one module a loss."""

from rgap.head.hypothesis import Hypothesis
from rgap.head.read import read_head

__all__ = ["Hypothesis", "read_head"]
