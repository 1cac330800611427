"""The gradient as the attack receives it: checked, in float64, with its precision and the noise of every entry."""

from rgap.shared_gradient.received import FLOAT64_FLOOR, SharedGradient, receive, receive_gradients
from rgap.shared_gradient.rounding import entry_noise

__all__ = ["FLOAT64_FLOOR", "SharedGradient", "entry_noise", "receive", "receive_gradients"]
