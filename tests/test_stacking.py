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


class Body(nn.Module):
    """A convolution and a linear head around some function of the features [B, 4, 6, 6]."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.layer = layer or nn.Identity()
        self.head = nn.Linear(144, 5)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.conv(x), self.layer).flatten(1))


@pytest.mark.parametrize(
    "function, layer",
    [
        (lambda x, layer: x + x.mean(0), None),  # [B, C, H, W] + [C, H, W]
        (lambda x, layer: x + x.mean((2, 3), keepdim=True), None),
        (lambda x, layer: x + x.mean((-1, -2), True), None),
        (lambda x, layer: x + x.mean(), None),
        (lambda x, layer: torch.mean(x, dim=1, keepdim=True) + x, None),
        (lambda x, layer: 2 + (x + 1), None),
        (lambda x, layer: torch.flatten(input=x, start_dim=2), None),
        (lambda x, layer: layer(input=x), nn.GroupNorm(2, 4)),
        (lambda x, layer: layer(x.flatten(2)), nn.GroupNorm(2, 4)),
        (lambda x, layer: layer(x) + x, nn.ReLU()),
    ],
)
@pytest.mark.parametrize("points", [3, 12])  # 12 is also the batch, so a wrong broadcast would fit
def test_shapes_and_arguments_behind_n(function, layer, points):
    assert_equals_the_loop(Body(function, layer).double(), images(), points, False)


@pytest.mark.parametrize(
    "function, layer, words",
    [
        (lambda x, layer: layer(x) + x, nn.ReLU(inplace=True), "in place"),
        (lambda x, layer: F.relu(x, inplace=True) + x, None, "in place"),
        (lambda x, layer: torch.add(x, x, alpha=2), None, "alpha"),
        (lambda x, layer: x + x.mean(1, True, dtype=torch.float64), None, "dtype"),
    ],
)
def test_uses_that_are_not_covered_run_through_vmap(function, layer, words):
    module = Body(function, layer).double()
    assert words in stack(module).reason
    assert_equals_the_loop(module, images(), 3, False, engine="vmap")


class Accumulating(nn.Module):
    """torchvision's residual addition: out += identity."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return self.head(out.flatten(1))


def test_a_residual_added_in_place_is_stacked():
    assert_equals_the_loop(Accumulating().double(), images(), 3, False)


def test_hooks_and_replaced_forwards_are_honoured():
    hooked = tiny_resnet()
    hooked.norm1.register_forward_hook(lambda module, inputs, output: 2 * output)
    replaced = tiny_resnet()
    replaced.linear.forward = lambda x: F.linear(x, replaced.linear.weight)
    for module, name in ((hooked, "norm1"), (replaced, "linear")):
        network = stack(module)
        assert network.engine == "vmap" and name in network.reason
        stacked = {k: v.detach()[None] for k, v in module.state_dict().items()}
        torch.testing.assert_close(network(stacked, images())[0], module(images()))


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match="must be an nn.Module, got dict"):
        stack({})


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
