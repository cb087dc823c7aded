"""Stacked networks against the loop over modules, in float64."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from conftest import (
    assert_equals_the_loop,
    assert_trains_like_the_loop,
    clones,
    images,
    plain,
    tiny_resnet,
)
from torch import nn

from fastgeo import Path, models, optimize, permutation_spec, stack


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
    """A forward that looks at shapes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        assert x.ndim == 4 and isinstance(x, torch.Tensor)
        h = self.head(x.flatten(1))
        return h[:, : h.shape[-1]] if len(x) > 2 and h.size(1) == len(h[0]) else None


@pytest.mark.parametrize("per_point", [False, True])
def test_branches_on_shapes_are_those_of_one_network(per_point):
    assert_equals_the_loop(Branching().double(), images(), 3, per_point)


def test_hooks_and_replaced_forwards_are_honoured():
    hooked = tiny_resnet()
    hooked.norm1.register_forward_hook(lambda module, inputs, output: 2 * output)
    hooked.linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    replaced = tiny_resnet()
    replaced.linear.forward = lambda x: F.linear(x, replaced.linear.weight)
    for module in (hooked, replaced):
        network = stack(module)
        for _ in range(2):  # a hook that is added later is seen, too
            stacked = {k: torch.stack([v.detach()] * 2) for k, v in module.state_dict().items()}
            torch.testing.assert_close(network(stacked, images())[1], module(images()))
            assert network.engine == "stacked"
            module.norm1.register_forward_hook(lambda module, inputs, output: output.relu() - 1)


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
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GLU(1), nn.Flatten(), nn.Linear(144, 5))
    module[1] = Renorm()
    x, network = torch.randn(2, 1, 8, 8), stack(module)
    assert network.explain() == "Sequential: engine stacked"  # it has not run
    lines = network.explain(x).splitlines()
    parameters = "765 parameters: 100% stacked"
    assert lines[0] == f"Sequential: engine stacked; 4 calls: 75% stacked, 25% loop; {parameters}"
    ways = [tuple(line.split(None, 2)) for line in lines[1:]]
    assert ways == [
        ("0", "conv2d", "stacked"),
        ("1", "renorm", "loop: it has no stacked form"),
        ("2", "flatten", "stacked"),
        ("3", "linear", "stacked"),
    ]
    assert stack(module, engine="loop").explain(x) == "Sequential: engine loop"


class Renorm(nn.Module):
    def forward(self, x):
        return torch.renorm(x, 2, 0, 1.0)


def test_recording_is_done_once():
    """The record is of the first pass, and a later one finds every way known."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), Renorm(), nn.Flatten(), nn.Linear(144, 5))
    params, _ = torch.func.stack_module_state([module] * 3)
    network = stack(module)
    network(params, torch.randn(2, 1, 8, 8))
    record = network._last.record
    network(params, torch.randn(2, 1, 8, 8))
    assert network._last.record is record


class DataDependent(nn.Module):
    """A forward that decides by numbers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = self.head(x.flatten(1))
        return x if x.mean().item() > 0 else -x


def test_what_depends_on_numbers_runs_in_a_loop_and_says_which_line_asked():
    module = DataDependent().double()
    stacked, _ = torch.func.stack_module_state(clones(module, 3))
    network = stack(module)
    line = r"item\(\) of a value that differs .*test_stacking.py:\d+: return x if x.mean\(\).item"
    with pytest.warns(UserWarning, match=f"DataDependent runs as loop: .*{line}"):
        got = network(stacked, images())
    expected = torch.stack([net(images()) for net in clones(module, 3)])
    torch.testing.assert_close(got, expected)
    assert network.engine == "loop" and "item() of a value" in network.explain()
    with pytest.raises(ValueError, match=f"DataDependent cannot be stacked: .*{line}"):
        stack(module, engine="stacked")(stacked, images())
    with pytest.raises(RuntimeError, match="vmap"):
        stack(module, engine="vmap")(stacked, images())


def test_a_question_on_which_all_networks_agree_is_answered():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 5)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            x = self.head(x.flatten(1))
            assert not x.isnan().any() and int(self.calls) == self.calls.item() == 0
            return x * (2 if x.abs().max() > 0 else 3)

    assert_equals_the_loop(Asks().double(), images(), 3, False)


def test_an_engine_that_gives_way_leaves_no_running_statistics_behind():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.rest = DataDependent()

        def forward(self, x):
            x = self.norm(x)
            return self.rest(x if x[0, 0, 0, 0] > 0 else -x)

    module = Normalised().double()

    networks = clones(module, 3)
    params, buffers = torch.func.stack_module_state(networks)
    network = stack(module, batchnorm="recalibrate")
    networks[1].norm.weight.data *= -1
    params, buffers = torch.func.stack_module_state(networks)
    with pytest.warns(UserWarning, match="Normalised runs as loop: "):
        got = network(params | buffers, images())
    torch.testing.assert_close(got, torch.stack([net(images()) for net in networks]))
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([net.get_buffer(name) for net in networks]))


def test_one_submodule_that_cannot_be_followed_runs_in_a_loop():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(1, 1, 3, padding=1)
            self.middle = DataDependent()
            self.last = nn.Linear(5, 5)

        def forward(self, x):
            return self.last(self.middle(self.first(x)).relu())

    network = assert_equals_the_loop(Around().double(), images(), 3, False)
    lines = network.explain().splitlines()
    assert "4 calls: 75% stacked, 25% loop; 365 parameters: 11% stacked, 89% loop" in lines[0]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["first", "conv2d", "stacked"],
        ["middle", "DataDependent", "loop:"],
        ["relu", "stacked"],
        ["last", "linear", "stacked"],
    ]
    assert "test_stacking.py" in lines[2]


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
def test_gradients_and_types_are_those_of_one_network(function, inside):
    module = Between(function)
    module = nn.Sequential(module, nn.Tanh()) if inside else module
    network = stack(module.double())
    x, networks = images(), clones(module, 3)
    params, _ = torch.func.stack_module_state(networks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got, expected = network(params, x), torch.stack([net(x) for net in networks])
    own_backward = function not in (_without_gradient, _in_bf16)
    assert ("has a backward of its own" in network.explain()) == own_backward
    assert network.engine == ("loop" if own_backward and not inside else "stacked")
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


class Squared(torch.autograd.Function):
    """With three times the gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 6 * ctx.saved_tensors[0] * gradient


def assert_gradients(network, params, networks, x):
    got, expected = network(params, x).sum(), sum(net(x).sum() for net in networks)
    own = [parameter for net in networks for parameter in net.parameters()]
    loop = torch.autograd.grad(expected, own)
    for i, gradient in enumerate(torch.autograd.grad(got, list(params.values()))):
        torch.testing.assert_close(gradient, torch.stack(loop[i :: len(params)]))


@pytest.mark.filterwarnings("ignore:.*in a loop|.*runs as loop:UserWarning")
def test_no_later_pass_loses_a_gradient_that_the_first_one_did_not_have():
    function = lambda layer, x: Squared.apply(layer(x)) if len(x) > 6 else layer(x).square()  # noqa: E731
    networks = clones(nn.Sequential(Between(function), nn.Tanh()).double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    network, detached = stack(networks[0]), {name: t.detach() for name, t in params.items()}
    network(detached, images(4))  # nothing requires a gradient
    assert_gradients(network, params, networks, images(4))
    assert_gradients(network, params, networks, images(12))  # the other branch
    for net in networks:
        net[1].register_full_backward_hook(lambda *given: None)
    assert_gradients(network, params, networks, images(12))


class Routed(nn.Module):
    """Decides by numbers, and leaves something behind for others."""

    def __init__(self, leave):
        super().__init__()
        self.layer, self.leave, self.kept = nn.Linear(6, 6), leave, []

    def forward(self, x):
        y = self.layer(x)
        self.leave(self, y)
        return y if y.sum().item() > 0 else -y


@pytest.mark.filterwarnings("ignore:.*in a loop|.*runs as loop:UserWarning")
@pytest.mark.parametrize(
    "leave, found",
    [
        (lambda layer, y: setattr(layer, "aux", y.mean()), lambda layer: layer.aux),
        (lambda layer, y: layer.kept.append(y.mean()), lambda layer: layer.kept[-1]),
    ],
)
def test_what_a_layer_in_a_loop_leaves_in_attributes_is_each_networks_own(leave, found):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.routed, self.head = Routed(leave), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.routed(x.flatten(1)[:, :6])) * found(self.routed)

    networks = clones(Around().double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    network = stack(networks[0])
    for _ in range(2):
        assert_gradients(network, params, networks, images())


@pytest.mark.filterwarnings("ignore:.*in a loop|.*runs as loop:UserWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_a_pass_that_is_tried_again_counts_once(whole):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.decides, self.calls = nn.Linear(64, 5), DataDependent(), 0
            self.decides.head = nn.Linear(5, 5)
            self.register_buffer("seen", torch.zeros((), dtype=torch.double))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            y = self.layer(x.flatten(1))
            y = y if not whole or y.sum().item() > 0 else -y
            return self.decides(y) * self.calls * self.seen

    module = Counts().double().eval()
    for given in (True, False):
        networks = clones(module, 3)
        params, buffers = torch.func.stack_module_state(networks)
        network = stack(module)
        for calls in (1, 2):
            got = network(params | (buffers if given else {}), images())
            for net in networks:
                net.calls, net.seen = 0, torch.tensor(calls - 1.0 if given else 0.0).double()
            torch.testing.assert_close(got, torch.stack([net(images()) for net in networks]))
        assert module.calls == 0 and module.seen == 0


def test_masks_that_the_networks_share_are_changed_in_place_for_each():
    def function(layer, x):
        mask = x[:, :6] > 0
        mask &= layer(x) > 0
        mask |= layer(x) > 0.5
        return layer(x) * mask

    assert_equals_the_loop(Between(function).double(), images(), 3, False)


def test_a_stack_within_a_forward_runs_by_itself():
    inner = nn.Linear(4, 4).double()
    of_inner = {name: torch.stack([p.detach()] * 3) for name, p in inner.named_parameters()}

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 4)

        def forward(self, x):
            return stack(inner)(of_inner, self.layer(x.flatten(1)).tanh()).sum(0)

    networks = clones(Ensemble().double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    with pytest.warns(UserWarning, match="evaluates a stack of its own"):
        got = stack(networks[0])(params, images())
    torch.testing.assert_close(got, torch.stack([net(images()) for net in networks]))


def test_threads_do_not_see_each_others_parameters():
    module = tiny_resnet()
    network, x = stack(module), images()
    several = [torch.func.stack_module_state([tiny_resnet(i), tiny_resnet(i)])[0] for i in range(4)]
    expected = [network(params, x) for params in several]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda params: network(params, x), several * 5))
    for i, got in enumerate(found):
        torch.testing.assert_close(got, expected[i % 4])


def test_gradient_checkpointing_is_refused():
    """Its second forward pass would have the module's own parameters."""
    checkpoint = torch.utils.checkpoint.checkpoint
    function = lambda layer, x: checkpoint(lambda h: layer(h).tanh(), x, use_reentrant=False)  # noqa: E731
    networks = clones(nn.Sequential(Between(function), nn.Tanh()).double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    with pytest.raises(TypeError, match="turn gradient checkpointing off"):
        stack(networks[0])(params, images())
    line = Path.linear(*networks[:2], 4)
    with pytest.raises(TypeError, match="turn gradient checkpointing off"):
        optimize(line, networks[0], [images()], steps=1, descent=plain())


def _where_gradients_are_enabled(layer, x):
    return layer(x) * (2 if torch.is_grad_enabled() else 3)


def _length(x):
    try:
        return len(x)
    except Exception:
        return 0


def _truth(x):
    try:
        return 1 if x.sum() > 0 else 2
    except Exception:
        return 3


def _number(x):
    try:
        return float(x.mean())
    except Exception:
        return 0.0


def _first(x):
    try:
        return next(iter(x))
    except Exception:
        return 0.0


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        _where_gradients_are_enabled,
        lambda layer, x: layer(x) * _length(x),
        lambda layer, x: layer(x) * _truth(x),
        lambda layer, x: layer(x) + _number(x),
        lambda layer, x: layer(x + _first(x)),
        lambda layer, x: layer(x) * (2 if hasattr(x, "tensors") else 1),
        lambda layer, x: layer(x) * _length(layer(x)) * _truth(layer(x)),
        lambda layer, x: layer(x) + _number(layer(x)),
        lambda layer, x: layer(x) + _first(layer(x)),
    ],
    ids="grad len bool float iter hasattr own-bool own-float own-iter".split(),
)
def test_what_a_forward_asks_is_answered_as_in_one_network(function, inside):
    module = Between(function)
    module = nn.Sequential(module, nn.Tanh()) if inside else module
    x, networks = images(), clones(module.double().eval(), 3)
    params, _ = torch.func.stack_module_state(networks)
    network = stack(module)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it runs as loop where networks differ
            got = network(params, x)
            torch.testing.assert_close(got, torch.stack([net(x) for net in networks]))


def _in_place(layer, x):
    y = layer(x).to(torch.bfloat16)
    y += x[:, :6].float() / 3
    return y.to(x.dtype)


def _in_place_by_name(layer, x):
    y = layer(x).to(torch.bfloat16)
    return y.mul_(x[:, :6].float() / 3).to(x.dtype)


@pytest.mark.parametrize("function", [_in_place, _in_place_by_name])
@pytest.mark.parametrize("inside", [False, True])
def test_operations_in_place_keep_their_dtype(function, inside):
    module = Between(function)
    module = nn.Sequential(module, nn.Tanh()) if inside else module
    x, networks = images(), clones(module.double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    network = stack(module)
    got = network(params, x)
    assert network.engine == "stacked"
    torch.testing.assert_close(got, torch.stack([net(x) for net in networks]))


class HookedInside(nn.Module):
    """Clips the gradient of its features; where `reads`, after a branch."""

    def __init__(self, reads):
        super().__init__()
        self.layer, self.reads = nn.Linear(64, 5), reads

    def forward(self, x):
        h = self.layer(x.flatten(1))
        if self.reads and x.shape[0] > 100:
            return h
        if torch.is_grad_enabled():
            h.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
        return h


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_gradient_hooks_of_a_forward_are_called_or_refused(engine, inside, reads):
    module = HookedInside(reads)
    module = nn.Sequential(module, nn.Tanh()) if inside else module
    x, networks = images(), clones(module.double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if engine == "vmap":
            with pytest.raises(RuntimeError, match="gradient hook"):
                stack(module, engine=engine)(params, x)
            return
        got = stack(module, engine=engine)(params, x)
    expected = torch.stack([net(x) for net in networks])
    upstream = torch.randn_like(expected)
    gradients, loop = (
        torch.autograd.grad(outputs, parameters, upstream)
        for outputs, parameters in (
            (got, list(params.values())),
            (expected, [parameter for net in networks for parameter in net.parameters()]),
        )
    )
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, torch.stack(loop[i :: len(params)]))


class Named(nn.Module):
    """Branches on what it is given besides tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 3)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, tokens, mask=None, scale=1.0, causal=False, gain=None):
        x = self.embed(tokens)
        if mask is None:
            x = x * 0.5
        if causal:
            x = x.cumsum(1)
        if torch.is_tensor(scale):
            x = x + 1
        if isinstance(self.gain, torch.Tensor) and gain != "none":
            x = x * self.gain
        return self.head(F.scaled_dot_product_attention(x, x, x, attn_mask=mask) * scale)


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"mask": None},
        {"mask": torch.ones(5, 5).tril().bool()},
        {"scale": 2.0},
        {"scale": 1, "causal": True, "gain": "none"},
        {"scale": torch.tensor(2.0).double()},
    ],
)
def test_arguments_that_are_no_tensors_decide_as_in_the_module(named):
    tokens = torch.arange(20).view(4, 5) % 7
    assert_equals_the_loop(Named().double(), {"tokens": tokens, **named}, 3, False)


def test_each_value_of_an_argument_decides_for_itself():
    network, networks = stack(Named().double()), clones(Named().double(), 2)
    params, _ = torch.func.stack_module_state(networks)
    tokens = torch.arange(20).view(4, 5) % 7
    for named in ({"causal": True}, {"causal": 1}, {"causal": False}, {"scale": 3.0}, {}):
        got = network(params, {"tokens": tokens, **named})
        torch.testing.assert_close(got, torch.stack([net(tokens, **named) for net in networks]))


@pytest.mark.parametrize("engine", ["auto", "stacked", "vmap", "loop"])
def test_an_argument_that_the_forward_does_not_have_is_refused(engine):
    params, _ = torch.func.stack_module_state([Named()] * 2)
    inputs = {"tokens": torch.zeros(2, 3).long(), "maks": torch.ones(3, 3)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'maks'"):
        stack(Named(), engine=engine)(params, inputs)


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
def test_buffers_that_are_left_out_are_the_modules_own(engine):
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double().eval()
    module[1].running_mean.copy_(torch.randn(4))
    module[1].running_var.copy_(torch.rand(4) + 0.5)
    networks = clones(module, 3)
    params, _ = torch.func.stack_module_state(networks)
    got = stack(module, engine=engine, batchnorm="recalibrate")(params, images())
    torch.testing.assert_close(got, torch.stack([network(images()) for network in networks]))
    before = copy.deepcopy(module.state_dict())
    got = stack(module.train(), engine=engine, batchnorm="recalibrate")(params, images())
    torch.testing.assert_close(
        got, torch.stack([network.train()(images()) for network in networks])
    )
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


FOLLOWED = [("auto", False), ("auto", True), ("vmap", False), ("loop", False), ("loop", True)]


class ChangesItsInput(nn.Module):
    """Doubles it; and where `reads`, asks for a number."""

    def __init__(self, reads=False):
        super().__init__()
        self.shift, self.reads = nn.Parameter(torch.ones(64)), reads

    def forward(self, x):
        x.mul_(2.0)
        if x.shape[0] > 100 or (self.reads and (x * self.shift).sum().item() > 1e9):
            return x
        return (x * self.shift).sin()


@pytest.mark.parametrize("engine, reads", FOLLOWED)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("per_point", [False, True])
def test_networks_do_not_see_what_another_did_to_their_input(engine, reads, inside, per_point):
    module = ChangesItsInput(reads)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            x = x * 1.0
            return self.inner(x) + x

    module = Around() if inside else module
    x, networks = images().flatten(1), clones(module.double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    given = torch.stack([x, x + 1, x + 2]) if per_point else x.clone()
    kept, network = given.clone(), stack(module, engine=engine)
    for _ in range(2):
        got = network(params, given, per_point=per_point)
        for i, one in enumerate(networks):
            torch.testing.assert_close(got[i], one((kept[i] if per_point else x).clone()))
        assert torch.equal(given, kept)


class Averaging(nn.Module):
    """Keeps an average in a buffer, which it assigns, and counts in place."""

    def __init__(self, reads=False):
        super().__init__()
        self.layer, self.reads = nn.Linear(64, 5), reads
        self.register_buffer("average", torch.zeros(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = self.layer(x.flatten(1))
        if self.training:
            self.count.add_(1)
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        if self.reads:
            assert h.sum().item() < 1e9
        return h - self.average * self.count


@pytest.mark.parametrize("engine, reads", FOLLOWED)
@pytest.mark.parametrize("around", [nn.Identity, lambda layer: nn.Sequential(layer, nn.Tanh())])
def test_buffers_that_a_forward_assigns_are_updated_once(engine, reads, around):
    module = Averaging(reads)
    module = module if around is nn.Identity else around(module)
    assert_trains_like_the_loop(module.double(), [images(4, seed=i) for i in range(4)], 3, False)


class AveragingData(Averaging):
    """Assigns the values of its buffer."""

    def forward(self, x):
        h = self.layer(x.flatten(1))
        if self.training:
            self.average.data = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return h - self.average


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize("around", [nn.Identity, lambda layer: nn.Sequential(layer, nn.Tanh())])
def test_values_that_a_forward_assigns_to_a_buffer_are_kept(engine, around):
    module = AveragingData()
    module = module if around is nn.Identity else around(module)
    draws = [images(4, seed=i) for i in range(4)]
    assert_trains_like_the_loop(module.double(), draws, 3, False, engine=engine)


def test_an_input_that_no_engine_takes_changes_no_engine():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    params, _ = torch.func.stack_module_state(clones(module, 3))
    network = stack(module)
    before = network.explain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            network(params, torch.zeros(4, 7).double())
    assert network.engine == "stacked" and network.explain() == before


@dataclass
class Outputs:
    logits: torch.Tensor


class Kept(dict):
    """As some libraries return."""

    def __init__(self, logits):
        super().__init__(logits=logits)


@pytest.mark.parametrize("kind", [Outputs, Kept])
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_tensors_that_cannot_be_joined_over_networks_are_refused(engine, kind):
    module = nn.Linear(6, 3)
    module.forward = lambda x: kind(F.linear(x, module.weight, module.bias))
    params, _ = torch.func.stack_module_state([module] * 2)
    with pytest.raises(TypeError, match=f"a {kind.__name__} with tensors cannot be joined"):
        stack(module, engine=engine)(params, torch.zeros(4, 6))
    got = stack(module, engine=engine, output="logits")(params, torch.zeros(4, 6))
    torch.testing.assert_close(got, params["bias"][:, None].expand(2, 4, 3))


def test_a_module_on_the_meta_device_is_an_architecture_or_is_refused_by_name():
    module = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2))
    params, _ = torch.func.stack_module_state([module] * 2)
    x, meta = torch.randn(4, 6), copy.deepcopy(module).to("meta")
    torch.testing.assert_close(stack(meta)(params, x), stack(module)(params, x))
    meta.register_buffer("scale", torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="params lack scale, which the module has on the meta dev"):
        stack(meta)(params, x)
    with pytest.raises(ValueError, match="Sequential is on the meta device, without numbers; load"):
        permutation_spec(meta, x)


class Permuted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 5)
        self.register_buffer("order", torch.tensor([3, 0, 4, 1, 2]))

    def forward(self, x):
        return self.layer(x.flatten(1))[:, self.order]


def test_integers_that_all_points_of_a_path_share_are_not_stacked():
    path = Path.linear(Permuted().double(), Permuted().double(), 5)
    network = stack(Permuted().double().eval())
    for params in (path.stacked(), path.stacked_interior()):
        got = network(params, images())
        assert "vmap" not in network.explain()
        networks = [Permuted().double() for _ in range(len(got))]
        for i, net in enumerate(networks):
            net.load_state_dict({name: tensor[i] for name, tensor in params.items()})
        torch.testing.assert_close(got, torch.stack([net(images()) for net in networks]))


@pytest.mark.parametrize("given", [True, False])
def test_a_table_is_read_at_the_places_of_each_network(given):
    class Table(Permuted):
        def forward(self, x):
            h = self.layer(x.flatten(1))
            return h + self.order[h.argmax(-1)][:, None]

    networks = clones(Table().double().eval(), 3)
    params, buffers = torch.func.stack_module_state(networks)
    got = stack(networks[0])(params | (buffers if given else {}), images())
    torch.testing.assert_close(got, torch.stack([net(images()) for net in networks]))


def test_explain_says_once_for_all_networks_only_of_what_they_share():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    params, _ = torch.func.stack_module_state([module] * 2)
    network = stack(module)
    for per_point in (False, True, False):
        network(params, torch.stack([images()] * 2) if per_point else images(), per_point=per_point)
        assert ("once for all networks" in network.explain()) != per_point


def test_what_runs_one_by_one_within_vmap_is_not_in_warnings():
    module = Between(lambda layer, x: torch.renorm(layer(x), 2, 0, 1.0))
    params, _ = torch.func.stack_module_state([module.double()] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack(module, engine="vmap")(params, images())


def test_a_forward_of_several_inputs_says_so_when_given_one():
    module = nn.Bilinear(3, 3, 2)
    params, _ = torch.func.stack_module_state([module] * 2)
    for engine in ("auto", "stacked"):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input2'"):
            stack(module, engine=engine)(params, torch.zeros(4, 3))
