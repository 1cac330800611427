"""From gradient to images: read the head, descend, weigh, judge."""

from rgap.attack.reconstruct import reconstruct

__all__ = ["reconstruct"]
