"""Measurements: each module is one command, prints one table and writes one file of results."""
