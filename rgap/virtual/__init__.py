"""Virtual constraints: equations that the layer before supplies to a rank-deficient one."""

from rgap.virtual.closure import close_by_previous
from rgap.virtual.range import close_by_range

__all__ = ["close_by_previous", "close_by_range"]
