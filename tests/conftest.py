"""Small networks, data and paths that many tests share."""

import os

import pytest
import torch

from fastgeo import Path, models


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def module():
    """A small ResNet of the digits preset's family, in float64."""
    return tiny_resnet()


@pytest.fixture
def path():
    """Seven points between two of them."""
    return Path.linear(tiny_resnet(seed=1), tiny_resnet(seed=2), 7)


def tiny_resnet(seed: int = 0, norm: str = "group") -> models.ResNet:
    torch.manual_seed(seed)
    return models.resnet(8, 0.25, in_channels=1, num_classes=5, norm=norm).double()


def images(count: int = 12, channels: int = 1, size: int = 8, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Every output tensor holds NaN before the launch."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        result = new_empty(self, *args, **kwargs)
        return result.fill_(torch.nan) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


DESELECTED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    """Leave tests marked `gpu` out where there is no GPU, or Triton only interprets; they count as
    deselected, not passed."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.stash[DESELECTED] = len(on_gpu)


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(DESELECTED, 0)
    if count:
        terminalreporter.write_line(f"{count} tests marked gpu deselected: no GPU here")
