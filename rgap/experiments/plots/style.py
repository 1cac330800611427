"""Colours and markers of every figure; seaborn's palette for colour-blind readers, and a marker for each line."""

PALETTE = "colorblind"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
