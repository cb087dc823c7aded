"""Networks permuted, or rotated, towards each other."""
