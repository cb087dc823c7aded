"""The paper's networks."""

import pytest
import torch
from conftest import images

from fastgeo import models


def test_resnet20_width_4_is_the_published_network():
    module = models.resnet(20, 4)
    assert sum(p.numel() for p in module.parameters()) == 4_327_754
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["block_groups.1.blocks.0.shortcut.0.weight"] == (128, 64, 1, 1)
    assert shapes["block_groups.2.blocks.2.norm2.bias"] == (256,)
    expected = {"conv1.weight", "norm1.weight", "norm1.bias", "linear.weight", "linear.bias"}
    for group in range(3):
        for block in range(3):
            prefix = f"block_groups.{group}.blocks.{block}"
            expected |= {f"{prefix}.conv{i}.weight" for i in (1, 2)}
            expected |= {f"{prefix}.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        if group:
            prefix = f"block_groups.{group}.blocks.0.shortcut"
            expected |= {f"{prefix}.0.weight", f"{prefix}.1.weight", f"{prefix}.1.bias"}
    assert set(shapes) == expected


def test_channel_norm_normalises_each_pixel():
    x = images(3, channels=6)
    out = models.ChannelNorm(6).double()(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(
        out, (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    )
    shortcut = models.resnet(8, 1, norm="channel").block_groups[1].blocks[0].shortcut
    assert shortcut[0].kernel_size == (3, 3)


@pytest.mark.parametrize(
    "options, words",
    [(dict(depth=9), "6 k"), (dict(width=0.01), "channel"), (dict(norm="batch"), "'batch'")],
)
def test_impossible_resnets_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        models.resnet(**options)
