"""The driver on a device against the CPU: `pytest -m gpu`."""

import json
import os
import re

import pytest
import torch
from conftest import images, plain, settings, tiny_resnet

from fastgeo import Forward, Path, evaluate, models, optimize
from fastgeo.data.images import load
from fastgeo.data.inputs import Passes
from fastgeo.step.capture import Replay
from fastgeo.step.steps import Steps

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("norm", ["group", "channel"])
@pytest.mark.parametrize("precondition", [False, True])
def test_optimisation_on_the_device_is_that_of_the_cpu(norm, precondition):
    module, x = tiny_resnet(norm=norm), images(32)
    path = Path.linear(tiny_resnet(1, norm), tiny_resnet(2, norm), 9)
    options = dict(steps=5, precondition=precondition)
    expected = optimize(path, module, [x], **settings(**options))
    got = optimize(path.to("cuda"), module.cuda(), [x], **settings(**options))
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.to("cpu").interior, expected.interior, rtol=1e-6, atol=1e-9)


def test_evaluation_on_the_device_is_that_of_the_cpu(path, module):
    x, y = images(40), torch.arange(40) % 5
    expected = evaluate(path, module, {"train": (x, y)})
    got = evaluate(path.to("cuda"), module.cuda(), {"train": (x, y)})
    for key in ("energy", "sqrt_jsd", "fisher_rao", "fisher_rao_lower_bound", "euclidean"):
        assert getattr(got, key) == pytest.approx(getattr(expected, key), rel=1e-6), key
    assert got.splits["train"].loss == pytest.approx(expected.splits["train"].loss, rel=1e-6)


def test_augmentation_on_the_device_is_that_of_the_cpu():
    digits, index = load("digits", augment="flip-crop"), torch.arange(100)
    expected = digits.inputs(index, torch.Generator().manual_seed(0))
    got = digits.to("cuda").inputs(index.cuda(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(got.cpu(), expected)


@pytest.mark.parametrize("how", ["False", "True"])
def test_a_run_on_the_device(how, tmp_path, monkeypatch):
    pytest.importorskip("tyro", reason="the command line needs it")
    from fastgeo.app.cli import main

    monkeypatch.chdir(tmp_path)
    main(
        [
            "run",
            "--out",
            "r",
            "--device",
            "cuda",
            "--augment",
            "flip-crop",
            "--steps",
            "20",
            "--cuda-graph",
            how,
        ]
    )
    report = json.load(open("r/report.json"))
    assert "NVIDIA" in report["environment"]["device"] or "AMD" in report["environment"]["device"]
    energy = {name: path["energy"] for name, path in report["paths"].items()}
    assert energy["geodesic"] < energy["matched"] < energy["linear"]
    assert os.path.getsize("r/path_loss.png") > 1000


def digits_path():
    digits = load("digits", augment="flip-crop").to("cuda")
    module, a, b = (models.resnet(8, 0.5, in_channels=1).cuda() for _ in range(3))
    return digits, module, Path.linear(a, b, 9)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_captured_step_is_the_step_that_was_captured(monkeypatch, precision, chunk):
    """Steps replayed from a CUDA graph and run one operation after the other, on the same draws."""
    digits, module, path = digits_path()
    paths = []
    for capture in (False, True):
        if not capture:
            monkeypatch.setattr(Replay, "_capture", lambda self: None)
        batches = digits.shuffled(64, torch.Generator().manual_seed(0))
        how = settings(precision=precision, chunk=chunk)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            paths.append(optimize(path, module, batches, steps=7, cuda_graph=True, **how))
        monkeypatch.undo()
    torch.testing.assert_close(paths[1].interior, paths[0].interior, rtol=1e-6, atol=1e-6)


def test_captured_steps_are_those_of_optimize():
    digits, module, path = digits_path()
    batches = digits.shuffled(64, torch.Generator().manual_seed(0))
    how = dict(steps=5, momentum=0.9, lr_schedule="linear")
    expected = optimize(
        path,
        module,
        batches,
        cuda_graph=False,
        **settings(engine="stacked", channels_last=True, **how),
    )
    batches = digits.shuffled(64, torch.Generator().manual_seed(0))
    got = optimize(path, module, batches, cuda_graph=True, **settings(**how))
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-4, atol=1e-5)


def captured(path, module, batches, descent=plain(), forward=Forward()) -> Steps:  # noqa: B008
    how = dict(capture=True, device=path.device, most=len(path) - 2, on_choice=None)
    found = Steps(module.eval(), Passes(batches, repeat=True), descent, forward, **how)
    found.begin(path, {})
    return found


def test_a_replayed_step_never_waits_for_the_device_and_moves_nothing_before_it_is_asked_to():
    digits, module, path = digits_path()
    images, _ = next(digits.shuffled(64, torch.Generator().manual_seed(0)))
    found = captured(path, module, [images], plain(momentum=0.9))
    found.take([0.0])
    now = found.step.copied_path().interior["linear.weight"]
    assert torch.equal(now, path.interior["linear.weight"])
    replayed = found._way.__self__
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            replayed.replay.again()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (replayed._energies[:11] > 0).all() and (replayed._energies[11:] == 0).all()


def test_a_step_in_bf16_transposes_and_copies_no_activations():
    """Names of the kernels of a step of the paper's network: what cuDNN calls its conversions of
    layout is there for the first convolution at most, whose images have three channels."""
    module, a, b = (models.resnet(20, 4).cuda() for _ in range(3))
    images = torch.randn(16, 3, 32, 32, device="cuda")
    found = captured(Path.linear(a, b, 5), module, [images], forward=Forward(precision="bf16"))
    found.take([0.0])
    assert not found.choice.chosen.network.not_stacked()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found.take([0.0])
        torch.cuda.synchronize()
    hidden = {
        event.key: event.count
        for event in profile.key_averages()
        if event.device_type.name == "CUDA" and re.search("nchwToNhwc|nhwcToNchw", event.key)
    }
    assert sum(hidden.values()) <= 4, hidden  # there are 20 convolutions
