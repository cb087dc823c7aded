"""How control points lie in memory on a GPU, where the update of all parameters is one kernel, and
what it says of their distances."""

import pytest
import torch
from conftest import images, plain, settings
from test_captured import Tied, captured

from fastgeo import Path, optimize
from fastgeo.step.step import Step


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr("fastgeo.step.step._on_gpu", lambda path: True)


@pytest.mark.parametrize("options", [{}, dict(channels_last=True, momentum=0.9)], ids=str)
def test_what_lies_behind_a_parameter_changes_no_step(path, module, on_gpu, monkeypatch, options):
    how = dict(steps=4, cuda_graph=True, **settings(**options))
    batches = [images(), images(seed=4)]
    got = optimize(path, module, batches, **how)
    monkeypatch.undo()
    expected = optimize(path, module, batches, **how)
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_parameter_of_every_point_begins_at_a_multiple(path, module, on_gpu, channels_last):
    velocity = {
        name: torch.randn_like(path.interior[name]) for name, _ in module.named_parameters()
    }
    step = Step(path, module, plain(momentum=0.9), velocity, channels_last=channels_last)
    step.keep_half(["conv1.weight"])
    own = [step.path.interior[name] for name in step.trained]
    for tensor in (*own, step.evaluated.interior["conv1.weight"]):
        assert tensor.storage_offset() % 16 == 0 and tensor.stride(0) % 16 == 0
    assert all(tensor.shape[1] % 16 == 0 for tensor in step.memory())
    torch.testing.assert_close(step.copied_path().interior, path.interior, rtol=0, atol=0)
    torch.testing.assert_close(step.velocity(), velocity, rtol=0, atol=0)


@pytest.mark.parametrize("with_update", [True, False])
def test_an_update_says_how_long_the_path_was(path, module, monkeypatch, with_update):
    """What is not trained counts as well, and tied parameters under both names."""
    module.conv1.weight.requires_grad_(False)
    if not with_update:
        module, a, b = (Tied().double() for _ in range(3))
        path = Path.linear(a, b, 5)
    measured = []
    monkeypatch.setattr(Path, "euclidean", counted(Path.euclidean, measured))
    batch = images() if with_update else dict(x=images().flatten(1)[:, :6], y=torch.zeros(6))
    steps = captured(path, module, [batch], plain(momentum=0.9), measured=True)
    known = len(measured)
    lengths, found = [], []
    for _ in range(2):
        lengths.append(steps.length())
        found.append(steps.take([0.1]).lengths.item())
    assert found == pytest.approx(lengths, rel=1e-9)
    assert lengths[1] != pytest.approx(lengths[0], rel=1e-7)
    assert len(measured) - known - 2 == (0 if with_update else 2)


def counted(function, calls):
    return lambda *args: calls.append(None) or function(*args)
