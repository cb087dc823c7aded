"""The driver on a device against the CPU: `pytest -m gpu`."""

import json
import os
import re

import pytest
import torch
from conftest import images, tiny_resnet

from fastgeo import Path, evaluate, models, optimize, optimize_static
from fastgeo.app.cli import main
from fastgeo.data.images import load
from fastgeo.step.sources import Drawn, Given
from fastgeo.step.static import StaticStep

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("norm", ["group", "channel"])
@pytest.mark.parametrize("precondition", [False, True])
def test_optimisation_on_the_device_is_that_of_the_cpu(norm, precondition):
    module, x = tiny_resnet(norm=norm), images(32)
    path = Path.linear(tiny_resnet(1, norm), tiny_resnet(2, norm), 9)
    options = dict(steps=5, precondition=precondition)
    expected = optimize(path, module, [x], **options)
    got = optimize(path.to("cuda"), module.cuda(), [x], **options)
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


@pytest.mark.parametrize("how", ["--no-cuda-graph", "--cuda-graph"])
def test_a_run_on_the_device(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["run", "--out", "r", "--device", "cuda", "--augment", "flip-crop", "--steps", "20", how])
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
def test_a_captured_step_is_the_step_that_was_captured(precision, chunk):
    """Steps replayed from a CUDA graph and run one operation after the other, on the same draws."""
    digits, module, path = digits_path()
    paths = []
    for capture in (False, True):
        batches = digits.shuffled(64, torch.Generator().manual_seed(0))
        options = dict(steps=7, read_every=3, precision=precision, chunk=chunk, capture=capture)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True):
            paths.append(optimize_static(path, module, batches, **options))
    torch.testing.assert_close(paths[1].interior, paths[0].interior, rtol=1e-6, atol=1e-6)


def test_captured_steps_are_those_of_optimize():
    digits, module, path = digits_path()
    batches = digits.shuffled(64, torch.Generator().manual_seed(0))
    how = dict(steps=5, momentum=0.9, lr_schedule="linear")
    expected = optimize(path, module, batches, **how, engine="stacked", channels_last=True)
    batches = digits.shuffled(64, torch.Generator().manual_seed(0))
    got = optimize_static(path, module, batches, read_every=2, **how)
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-4, atol=1e-5)


def test_a_replayed_step_never_waits_for_the_device_and_moves_nothing_before_it_is_asked_to():
    digits, module, path = digits_path()
    batches = Drawn(digits.shuffled(64, torch.Generator().manual_seed(0)))
    static = StaticStep(path, module, batches, momentum=0.9, lengths=True)
    static.capture()
    assert torch.equal(static.path().interior["linear.weight"], path.interior["linear.weight"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            static.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (static.energies[:10] > 0).all() and (static.energies[10:] == 0).all()


def test_a_step_in_bf16_transposes_and_copies_no_activations():
    """Names of the kernels of a step of the paper's network: what cuDNN calls its conversions of
    layout is there for the first convolution at most, whose images have three channels."""
    module, a, b = (models.resnet(20, 4).cuda() for _ in range(3))
    images = torch.randn(16, 3, 32, 32, device="cuda")
    static = StaticStep(Path.linear(a, b, 5), module, Given([images]), precision="bf16")
    static.run()
    assert not static.engine.network.not_stacked()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        static.run()
        torch.cuda.synchronize()
    hidden = {
        event.key: event.count
        for event in profile.key_averages()
        if event.device_type.name == "CUDA" and re.search("nchwToNhwc|nhwcToNchw", event.key)
    }
    assert sum(hidden.values()) <= 4, hidden  # there are 20 convolutions
