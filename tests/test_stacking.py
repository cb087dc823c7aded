"""Stacked networks against the loop over modules, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals_the_loop, clones, images, tiny_resnet
from torch import nn

from fastgeo import models, stack


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


class Branching(nn.Module):
    """A forward that torch.fx cannot trace."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(x.flatten(1)) if len(x) > 2 else None


@pytest.mark.parametrize("per_point", [False, True])
def test_what_cannot_be_traced_runs_through_vmap_and_says_so(per_point):
    module = Branching().double()
    assert "torch.fx cannot trace" in stack(module).reason
    assert_equals_the_loop(module, images(), 3, per_point, runs_as="vmap")


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


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize("per_point", [False, True])
def test_every_engine_equals_the_loop(engine, per_point):
    assert_equals_the_loop(tiny_resnet(), images(), 3, per_point, runs_as=engine, engine=engine)


def test_channels_last_changes_nothing_but_the_memory_format():
    module = tiny_resnet()
    stacked, _ = torch.func.stack_module_state(clones(module, 3))
    for inputs, per_point in ((images(), False), (torch.stack([images()] * 3), True)):
        outputs = [
            stack(module, channels_last=channels_last)(stacked, inputs, per_point=per_point)
            for channels_last in (False, True)
        ]
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize("per_point", [False, True])
def test_a_convolution_that_channels_last_breaks_on_a_cpu_is_not_given_it(engine, per_point):
    """oneDNN's weight gradient of the second one is garbage, or the process ends."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 1, stride=2)]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5))
    last = images(channels=3).float().contiguous(memory_format=torch.channels_last)
    x = torch.stack([last, last.flip(0)]).contiguous() if per_point else last
    networks = clones(module, 2)
    stacked, _ = torch.func.stack_module_state(networks)
    got = stack(module, engine=engine, channels_last=True)(stacked, x, per_point=per_point)
    got = torch.autograd.grad(got.square().sum(), list(stacked.values()))
    for i, network in enumerate(networks):
        out = network.double()(x[i].double() if per_point else x.double())
        expected = torch.autograd.grad(out.square().sum(), list(network.parameters()))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one[i].double(), other, rtol=1e-4, atol=1e-4)


def test_explain_says_which_way_each_operation_runs_and_why():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GLU(1), nn.Flatten(), nn.Linear(72, 5))
    lines = stack(module).explain().splitlines()
    assert lines[0] == "Sequential: engine stacked"
    ways = {line.split()[0]: line.split(None, 2)[2] for line in lines[1:]}
    assert ways == {
        "0": "stacked",
        "1": "vmap: it has no stacked form",
        "2": "stacked",
        "3": "stacked",
    }
    assert stack(Branching()).explain().startswith("Branching: engine vmap; torch.fx cannot trace")
    assert stack(module, engine="loop").explain() == "Sequential: engine loop"


class DataDependent(nn.Module):
    """A forward that neither torch.fx nor vmap can follow."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.head(x.flatten(1))
        return x if x.mean().item() > 0 else -x


def test_what_vmap_cannot_follow_runs_in_a_loop_and_says_so():
    module = DataDependent().double()
    stacked, _ = torch.func.stack_module_state(clones(module, 3))
    network = stack(module)
    with pytest.warns(UserWarning, match="runs as loop; vmap failed"):
        got = network(stacked, images())
    expected = torch.stack([net(images()) for net in clones(module, 3)])
    torch.testing.assert_close(got, expected)
    assert network.engine == "loop"
    with pytest.raises(ValueError, match="DataDependent cannot be stacked: torch.fx cannot trace"):
        stack(module, engine="stacked")
    with pytest.raises(RuntimeError, match="vmap"):
        stack(module, engine="vmap")(stacked, images())


def test_an_engine_that_gives_way_leaves_no_running_statistics_behind():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.rest = DataDependent()

        def forward(self, x):
            assert x.sum() > -torch.inf  # torch.fx cannot follow
            return self.rest(self.norm(x))

    module = Normalised().double()
    networks = clones(module, 3)
    params, buffers = torch.func.stack_module_state(networks)
    network = stack(module, batchnorm="recalibrate")
    with pytest.warns(UserWarning, match="runs as loop; vmap failed"):
        got = network(params | buffers, images())
    torch.testing.assert_close(got, torch.stack([net(images()) for net in networks]))
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([net.get_buffer(name) for net in networks]))


def test_one_submodule_that_cannot_be_traced_is_one_operation():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 1, 3, padding=1)
            self.middle = DataDependent()
            self.last = nn.Linear(5, 5)

        def forward(self, x):
            return self.last(self.middle(self.first(x)).relu())

    network = assert_equals_the_loop(Around().double(), images(), 3, False)
    assert "loop: vmap failed" in network.explain()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: p.pop("0.weight"), "params lack 0.weight"),
        (lambda p: p.update(other=torch.zeros(3)), "params hold other, which the module does not"),
        (
            lambda p: p.update({"0.weight": torch.zeros(3, 8, 7)}),
            r"0.weight must be \[N, 8, 64\] with N = 3, got \[3, 8, 7\]",
        ),
        (
            lambda p: p.update({"2.bias": torch.zeros(2, 5)}),
            r"2.bias must be \[N, 5\] with N = 3, got \[2, 5\]",
        ),
        (lambda p: p.clear(), "params must hold the module's parameters, got none"),
    ],
)
def test_parameters_that_do_not_fit_are_named(change, words):
    module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
    params, _ = torch.func.stack_module_state([module] * 3)
    params = {name: params[name] for name in sorted(params, key=lambda name: name != "0.bias")}
    change(params)
    with pytest.raises(ValueError, match=words):
        stack(module)(params, torch.zeros(2, 64))


@pytest.mark.parametrize(
    "options, words",
    [(dict(engine="fast"), "auto, stacked, vmap, loop"), (dict(batchnorm="yes"), "recalibrate")],
)
def test_unknown_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        stack(tiny_resnet(), **options)


class Rotary(nn.Module):
    """The usual cache of what depends on the length only, here in a dict, too."""

    def __init__(self):
        super().__init__()
        self.cosines, self.known, self.shift = None, {}, nn.Parameter(torch.zeros(6))

    def forward(self, x):
        if self.cosines is None:
            self.cosines = torch.arange(x.shape[-1]) * 2.0
            self.known[0] = self.cosines
        return x + self.cosines + self.known[0] + self.shift


class Storing(nn.Module):
    """Keeps its last features, and counts."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.maps = nn.Linear(6, 5), 0, []
        self.register_buffer("last", torch.zeros(5))

    def forward(self, x):
        self.features = self.layer(x)
        self.calls += 1
        self.maps.append(self.features)
        self.last = self.features[0]
        return self.features.sin()


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("around", [nn.Sequential, lambda *layers: layers[-1]])
@pytest.mark.parametrize("layer", [Rotary, Storing])
def test_what_a_forward_assigns_is_not_left_in_the_module(engine, around, layer):
    module = around(nn.Linear(6, 6), layer()).double()
    before = [dict(vars(part)) for part in module.modules()]
    x, networks = torch.randn(4, 6).double(), clones(module, 3)
    params, _ = torch.func.stack_module_state(networks)
    got = stack(module, engine=engine)(params, x)
    torch.testing.assert_close(got, torch.stack([network(x) for network in networks]))
    for part, attributes in zip(module.modules(), before, strict=True):
        assert vars(part) == attributes
    assert not any(getattr(part, "maps", []) for part in module.modules())
    assert not any(getattr(part, "known", {}) for part in module.modules())
    assert type(module(x)) is torch.Tensor


class Reversed(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def _without_gradient(layer, x):
    with torch.no_grad():
        return layer(x).tanh()


def _in_bf16(layer, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(x.float(), layer.weight.float()).double()


class Between(nn.Module):
    """A function of a layer and features, before a linear head."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.head, self.function = nn.Linear(64, 6), nn.Linear(6, 5), function

    def forward(self, x):
        return self.head(self.function(self.layer, x.flatten(1)))


reverse = Reversed.apply


@pytest.mark.parametrize(
    "function",
    [
        _without_gradient,
        lambda layer, x: Reversed.apply(layer(x)),
        lambda layer, x: reverse(layer(x) * 2),
        lambda layer, x: StraightThrough.apply(layer(x)),
        _in_bf16,
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_gradients_and_types_that_a_graph_does_not_record_are_not_lost(function, inside):
    module = Between(function)
    module = nn.Sequential(module, nn.Tanh()) if inside else module
    network = stack(module.double())
    assert (network.engine == "stacked") == inside
    x, networks = images(), clones(module, 3)
    params, _ = torch.func.stack_module_state(networks)
    got, expected = network(params, x), torch.stack([net(x) for net in networks])
    tolerance = dict(rtol=1e-2, atol=1e-2) if function is _in_bf16 else {}
    torch.testing.assert_close(got, expected, **tolerance)
    upstream = torch.randn_like(expected)
    for name in params:
        own = [net.get_parameter(name) for net in networks]
        got_gradient, gradients = (
            torch.autograd.grad(outputs, to, upstream, retain_graph=True, materialize_grads=True)
            for outputs, to in ((got, [params[name]]), (expected, own))
        )
        torch.testing.assert_close(got_gradient[0], torch.stack(gradients), **tolerance)


def test_what_is_not_traced_takes_its_surroundings_along_no_further():
    """torch.fx's own record of where it is must survive a submodule that fails."""
    block = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(Reads(), nn.ReLU()), nn.Tanh())
    module = nn.Sequential(block, nn.Flatten(), nn.Linear(128, 5)).double()
    network = assert_equals_the_loop(module, images(), 3, False)
    ways = [line.split()[:3] for line in network.explain().splitlines()[1:]]
    assert [(place, way) for place, _, way in ways] == [
        ("0.0", "stacked"),
        ("0.1.0", "vmap:"),
        ("0.1.1", "stacked"),
        ("0.2", "stacked"),
        ("1", "stacked"),
        ("2", "stacked"),
    ]


class Reads(nn.Module):
    """A branch on a shape."""

    def forward(self, x):
        return x * 2 if x.shape[-1] > 3 else x
