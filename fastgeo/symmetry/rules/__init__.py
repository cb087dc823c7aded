"""What operations do to the axes that permutations act on."""

from fastgeo.symmetry.rules import arithmetic, layers, shapes

__all__ = ["arithmetic", "layers", "shapes"]
