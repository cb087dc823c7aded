"""How cuDNN is asked for its plans before a capture."""

import pytest
import torch
from conftest import images
from test_captured import captured

from fastgeo.step.capture import Replay, plans_measured


def test_plans_are_measured_before_a_capture_and_never_again(path, module, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", False)
    seen = []
    replay = Replay(lambda batch: seen.append(cudnn.benchmark), torch.device("cpu"), [])
    replay(torch.zeros(1))
    replay.warm_up()
    assert seen == [False, True, True, True] and not cudnn.benchmark
    with pytest.raises(ZeroDivisionError), plans_measured():
        seen = 1 / 0
    assert not cudnn.benchmark

    def refused(_, batch):
        seen.append(cudnn.benchmark)
        raise KeyError

    seen = []
    monkeypatch.setattr("fastgeo.step.steps.Steps.prepare", refused)
    with pytest.raises(KeyError):
        captured(path, module, [images()]).take([0.1])
    assert seen == [True] and not cudnn.benchmark


@pytest.mark.parametrize("asked", ["deterministic", "algorithms"])
def test_plans_are_not_measured_where_results_are_to_repeat(monkeypatch, asked):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", False)
    if asked == "deterministic":
        monkeypatch.setattr(cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with plans_measured():
        assert not cudnn.benchmark
    monkeypatch.setattr(cudnn, "benchmark", True)
    with plans_measured():
        assert cudnn.benchmark
