"""Data: images and text by name, a user's own loaders, and what networks take and give."""

from fastgeo.data.images import Dataset, load
from fastgeo.data.text import Text, load_text

__all__ = ["Dataset", "Text", "load", "load_text"]
