"""The driver on a device against the CPU: `pytest -m gpu`."""

import json
import os

import pytest
import torch
from conftest import images, tiny_resnet

from fastgeo import Path, evaluate, optimize
from fastgeo.cli import main
from fastgeo.data import load

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


def test_a_run_on_the_device(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["run", "--out", "r", "--device", "cuda", "--augment", "flip-crop", "--steps", "20"])
    report = json.load(open("r/report.json"))
    assert "NVIDIA" in report["environment"]["device"] or "AMD" in report["environment"]["device"]
    energy = {name: path["energy"] for name, path in report["paths"].items()}
    assert energy["geodesic"] < energy["matched"] < energy["linear"]
    assert os.path.getsize("r/path_loss.png") > 1000
