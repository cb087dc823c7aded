"""Data: images by name, a user's own loaders, and what networks take and give."""

from fastgeo.data.images import Dataset, load

__all__ = ["Dataset", "load"]
