"""Networks permuted towards each other."""
