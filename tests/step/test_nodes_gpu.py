"""Captured steps on curves against those one by one on a device: `pytest -m gpu`."""

import pytest
import torch
from conftest import images, tiny_resnet
from test_nodes import METHODS, labels, start

from fastgeo import Descent, Forward, optimize

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", METHODS)
def test_replayed_steps_are_those_of_the_cpu(method):
    path, how = start(method, 9, inner=2), Descent(lr=0.05, **METHODS[method])
    batches = [(images(seed=seed), labels()) for seed in range(3)]
    options = dict(steps=7, descent=how, forward=Forward(engine="stacked"))
    torch.manual_seed(0)
    expected = optimize(path, tiny_resnet(), batches, cuda_graph=False, **options)
    torch.manual_seed(0)
    module = tiny_resnet().cuda()
    got = optimize(path.to("cuda"), module, batches, cuda_graph=True, **options)
    torch.testing.assert_close(got.to("cpu").interior, expected.interior, rtol=1e-6, atol=1e-9)
    for one, other in zip(got.history, expected.history, strict=True):
        assert {**one, "seconds": 0} == pytest.approx({**other, "seconds": 0}, rel=1e-6)
