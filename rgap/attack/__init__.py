"""From a shared gradient to the images behind it, and a verdict on them."""

from rgap.attack.reconstruct import reconstruct

__all__ = ["reconstruct"]
