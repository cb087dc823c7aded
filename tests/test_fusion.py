"""Norm, residual sum and ReLU become one operation where that changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals_the_loop, images, tiny_resnet
from torch import nn

from fastgeo import stack
from fastgeo.fusion import channel_norm_run, fuse, group_norm_run
from fastgeo.models import ChannelNorm
from fastgeo.tracing import trace


def targets(module):
    graph = trace(module).graph
    fuse(graph)
    graph.lint()
    return [node.target for node in graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_every_norm_of_a_resnet_is_in_a_run(norm):
    found = targets(tiny_resnet(norm=norm))
    run = group_norm_run if norm == "group" else channel_norm_run
    left = (F.group_norm, F.layer_norm, F.relu, "permute")
    # A shortcut's GroupNorm has nothing behind it that is its own.
    norms = found.count(run) + found.count(F.group_norm)
    assert norms == 9 and found.count(run) == (7 if norm == "group" else 9)
    assert [t for t in found if t in left] == [F.group_norm] * (2 if norm == "group" else 0)


class Around(nn.Module):
    """One norm, with something behind it."""

    def __init__(self, behind, kind="group"):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(1, 4) if kind == "group" else ChannelNorm(4)
        self.behind = behind

    def forward(self, x):
        y = self.conv(x)
        return self.behind(self.norm(y), y)


FUSED = {
    "relu": lambda z, y: F.relu(z),
    "sum": lambda z, y: z + y,
    "sum from the left, method": lambda z, y: y.add(z).relu(),
    "in place": lambda z, y: F.relu(z + y, inplace=True),
    "a sum that broadcasts": lambda z, y: torch.relu(z + y.mean((2, 3), keepdim=True)),
    "a sum with what is shared": lambda z, y: F.relu(z + torch.ones(1).double()),
}
LEFT = {
    "used twice": lambda z, y: F.relu(z) + z,
    "a scaled sum": lambda z, y: torch.add(z, y, alpha=2),
    "a number": lambda z, y: z + 1,
    "twice itself": lambda z, y: z + z,
    "another function": lambda z, y: F.gelu(z),
}


@pytest.mark.parametrize("kind", ["group", "channel"])
@pytest.mark.parametrize("name", [*FUSED, *LEFT])
def test_whatever_is_behind_a_norm_equals_the_loop(kind, name):
    module = Around((FUSED | LEFT)[name], kind).double()
    assert_equals_the_loop(module, images(3, channels=2), 3, False)
    run = group_norm_run if kind == "group" else channel_norm_run
    if kind == "group":
        assert (run in targets(module)) == (name in FUSED)


def test_several_groups_are_left_alone():
    module = nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())
    assert targets(module) == [F.group_norm, F.relu]


def test_on_a_cpu_a_run_gives_the_bits_of_what_it_replaces(monkeypatch):
    module, x = tiny_resnet(), images()
    params = {name: torch.stack([p, 1.1 * p]) for name, p in module.named_parameters()}
    got = stack(module)(params, x)
    monkeypatch.setattr("fastgeo.stacking.fuse", lambda graph: None)
    assert torch.equal(got, stack(module)(params, x))


def test_explain_names_the_layer_of_a_run():
    lines = stack(tiny_resnet()).explain().splitlines()
    assert any(line.split()[:2] == ["norm1", "group_norm_run"] for line in lines)
