"""Virtual constraints: equations that the layer before supplies to a rank-deficient one."""
