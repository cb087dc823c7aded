"""Norm, residual sum and ReLU become one operation where that changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals_the_loop, clones, images, tiny_resnet
from torch import nn

from fastgeo import stack
from fastgeo.models import ChannelNorm
from fastgeo.stacking import fusion


@pytest.fixture
def kernels(monkeypatch):
    """(norm, whether a residual joined it, whether a ReLU did) of each call of a norm's kernel."""
    seen = []

    def recorded(name):
        run = getattr(fusion, f"{name}_norm_twice")

        def kernel(*args, residual=None, relu=False):
            seen.append((name, residual is not None, relu))
            return run(*args, residual=residual, relu=relu)

        return kernel

    for name in ("group", "channel"):
        monkeypatch.setattr(fusion, f"{name}_norm_twice", recorded(name))
    run = fusion.stacked_layer_norm
    layer = lambda *args: seen.append(("layer", False, False)) or run(*args)  # noqa: E731
    monkeypatch.setattr(fusion, "stacked_layer_norm", layer)
    return seen


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_every_norm_of_a_resnet_is_in_a_run(norm, kernels):
    module = tiny_resnet(norm=norm)
    params, _ = torch.func.stack_module_state([module] * 2)
    stack(module)(params, images())
    # A shortcut's norm is the residual of another one, and has nothing behind it.
    alone = 2
    assert kernels.count((norm, False, False)) == alone
    assert kernels.count((norm, True, True)) == 3 and len(kernels) == 9
    assert kernels.count((norm, False, True)) == 4


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


def _changed_itself(z, y):
    a = F.relu(z)
    z += 1.5
    return a - z


def _in_place_and_again(z, y):
    z += y
    a = z * 2
    F.relu(z, inplace=True)
    return a + z


def _residual_changed_later(z, y):
    y = y * 1.0
    a = z + y
    y += 3.0
    return F.relu(a) * y


def _shared_residual_changed_later(z, y):
    shared = torch.ones(z.shape).double()
    a = z + shared
    shared.mul_(5.0)
    return F.relu(a) * y


def _without_gradient(z, y):
    with torch.no_grad():
        a = F.relu(z)
    return a + y


def _norm_without_gradient(z, y):
    with torch.no_grad():
        a = F.group_norm(y, 1)
    return F.relu(a) * y


FUSED = {
    "relu": lambda z, y: F.relu(z),
    "relu method": lambda z, y: z.relu(),
    "sum": lambda z, y: z + y,
    "sum from the left, method": lambda z, y: y.add(z).relu(),
    "in place": lambda z, y: F.relu(z + y, inplace=True),
    "sum in place": lambda z, y: z.add_(y).relu_(),
    "used twice": lambda z, y: F.relu(z) + z,
    "sum used twice": lambda z, y: (F.relu(z + y)) * (z + y) + z,
}
LEFT = {
    "a sum that broadcasts": lambda z, y: torch.relu(z + y.mean((2, 3), keepdim=True)),
    "a sum with what is shared": lambda z, y: F.relu(z + torch.ones(1).double()),
    "a scaled sum": lambda z, y: torch.add(z, y, alpha=2),
    "a number": lambda z, y: z + 1,
    "twice itself": lambda z, y: z + z,
    "another function": lambda z, y: F.gelu(z),
    "a sum that is larger": lambda z, y: (z + y[:, None])[:, 0],
    "its shape": lambda z, y: y * z.shape[1] * len(z) * z.requires_grad + z.abs(),
}
CHANGED = [
    _changed_itself,
    _in_place_and_again,
    _residual_changed_later,
    _shared_residual_changed_later,
    _without_gradient,
    _norm_without_gradient,
]


@pytest.mark.parametrize("kind", ["group", "channel"])
@pytest.mark.parametrize("name", [*FUSED, *LEFT])
def test_whatever_is_behind_a_norm_equals_the_loop(kind, name, kernels):
    module = Around((FUSED | LEFT)[name], kind).double()
    assert_equals_the_loop(module, images(3, channels=2), 3, False)
    assert any(sum or relu for _, sum, relu in kernels) == (name in FUSED)
    assert {kernel for kernel, _, _ in kernels} == {kind}


@pytest.mark.parametrize("kind", ["group", "channel"])
@pytest.mark.parametrize("behind", CHANGED)
def test_a_norm_that_waits_is_what_it_was_when_it_was_called(kind, behind):
    assert_equals_the_loop(Around(behind, kind).double(), images(3, channels=2), 3, False)


@pytest.mark.parametrize("kind", ["group", "channel"])
def test_what_a_norm_was_computed_of_may_change_before_it_is_looked_at(kind):
    module = Around(lambda z, y: z + y.mul_(2.0), kind).double()
    networks, x = clones(module, 3), images(3, channels=2)
    params, _ = torch.func.stack_module_state(networks)
    with torch.no_grad():
        torch.testing.assert_close(stack(module)(params, x), torch.stack([n(x) for n in networks]))


def test_several_groups_do_not_wait(kernels):
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()).double()
    assert_equals_the_loop(module, images(), 3, False)
    assert kernels == []


def test_a_layer_norm_of_images_whose_channels_stay_last_is_one(kernels):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.LayerNorm(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)))

    assert_equals_the_loop(Last().double(), images(), 3, False)
    assert kernels == [("layer", False, False)]


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_on_a_cpu_a_run_gives_the_bits_of_what_it_replaces(monkeypatch, norm):
    module, x = tiny_resnet(norm=norm), images()
    params, _ = torch.func.stack_module_state(clones(module, 2))
    got = stack(module)(params, x)
    monkeypatch.setattr(fusion, "joins", lambda value: False)
    assert torch.equal(got, stack(module)(params, x))
