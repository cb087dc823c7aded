"""Geodesics between trained networks: every network on the path in one pass."""
