"""Stacked networks against the loop over modules, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import images, tiny_resnet
from torch import nn

from fastgeo import models, stack


def clones(module, count):
    """`count` copies of a module with weights of their own."""
    networks = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        network = copy.deepcopy(module)
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
        networks.append(network)
    return networks


def assert_equals_the_loop(module, x, points, per_point, engine="stacked"):
    """Equal outputs, and equal gradients to every parameter, under a random upstream gradient."""
    networks = clones(module, points)
    network = stack(module)
    assert network.engine == engine, network.reason
    stacked, _ = torch.func.stack_module_state(networks)
    inputs = torch.stack([x + i for i in range(points)]) if per_point else x
    got = network(stacked, inputs, per_point=per_point)
    expected = torch.stack(
        [net(inputs[i] if per_point else inputs) for i, net in enumerate(networks)]
    )
    torch.testing.assert_close(got, expected)

    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(got, list(stacked.values()), upstream)
    expected.backward(upstream)
    for name, gradient in zip(stacked, gradients, strict=True):
        loop = torch.stack([net.get_parameter(name).grad for net in networks])
        torch.testing.assert_close(gradient, loop, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("norm", ["group", "channel"])
@pytest.mark.parametrize("per_point", [False, True])
@pytest.mark.parametrize("points", [2, 3, 25])
def test_stacked_resnet_equals_the_loop(norm, per_point, points):
    assert_equals_the_loop(tiny_resnet(norm=norm), images(), points, per_point)


@pytest.mark.parametrize("per_point", [False, True])
@pytest.mark.parametrize("points", [2, 3, 25])
def test_stacked_mlp_equals_the_loop(per_point, points):
    module = models.mlp(64, (16, 12), 5).double()
    assert_equals_the_loop(module, images(), points, per_point)


def test_one_network_is_a_stack_of_one():
    assert_equals_the_loop(tiny_resnet(), images(), 1, False)


class Unusual(nn.Module):
    """A layer and a function that have no stacked form."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(36, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.pool(self.conv(x))).flatten(1))


class Branching(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(x.flatten(1)) if len(x) > 2 else None


class PlainParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.scale * self.head(x.flatten(1))


@pytest.mark.parametrize(
    "module, words",
    [
        (Unusual(), "pool"),
        (Branching(), "torch.fx cannot trace"),
        (PlainParameter(), "scale"),
        (nn.Sequential(nn.Conv2d(1, 5, 8, padding=1, padding_mode="circular")), "Conv2d"),
    ],
)
@pytest.mark.parametrize("per_point", [False, True])
def test_what_has_no_stacked_form_runs_through_vmap_and_says_so(module, words, per_point):
    module = module.double()
    assert words in stack(module).reason
    assert_equals_the_loop(module, images(), 3, per_point, engine="vmap")


def test_batch_norm_is_refused_by_name():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="layer 1 is BatchNorm.*do not interpolate.*GroupNorm"):
        stack(module)


def test_per_point_input_must_have_n_points():
    networks = clones(models.mlp(64, (8,), 5).double(), 3)
    stacked, _ = torch.func.stack_module_state(networks)
    with pytest.raises(ValueError, match=r"N = 3, got \[12, 1, 8, 8\]"):
        stack(networks[0])(stacked, images(), per_point=True)


def test_evaluation_without_gradient_leaves_the_module_alone():
    module = tiny_resnet()
    before = copy.deepcopy(module.state_dict())
    stacked, _ = torch.func.stack_module_state(clones(module, 3))
    with torch.no_grad():
        stack(module)(stacked, images())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


# --- The models themselves ------------------------------------------------------------------------


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


def test_relu_of_the_models_is_not_in_place():
    x = -torch.ones(2, 1, 8, 8)
    F.relu(x)
    models.resnet(8, 0.25, in_channels=1)(x)
    assert torch.equal(x, -torch.ones(2, 1, 8, 8))
