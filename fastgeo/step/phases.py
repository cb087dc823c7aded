"""The phases of an optimisation step, as a profiler sees them."""

from torch.profiler import record_function

PHASES = ("data", "forward", "divergence", "backward", "update")


def phase(name: str) -> record_function:
    """A context whose time is that of one of `PHASES`."""
    return record_function(f"fastgeo.{name}")
