"""What an architecture gives away, before any attack."""

from rgap.ranks.analysis import rank_analysis
from rgap.ranks.largest_batch import LargestBatch, largest_batch

__all__ = ["LargestBatch", "largest_batch", "rank_analysis"]
