"""Matching finds planted permutations, never loses, and says what it did."""

import contextlib
import copy
import functools
import itertools
import tracemalloc
import warnings

import pytest
import torch
from conftest import images, tiny_resnet
from torch import nn
from torch.nn.utils import prune
from tqdm import tqdm
from zoo import BATCH_NORM, ZOO

from fastgeo import match, match_many, models, permutation_spec
from fastgeo.forward.standin import TABLE
from fastgeo.matching import assignment, pair
from fastgeo.matching.assignment import Assignment
from fastgeo.matching.pair import Objective, check_same_function
from fastgeo.profiling.measure import peak_bytes


def inner(x, y):
    """The oracle of the objective, on parameters without ties."""
    return sum((x[name] * y[name]).sum().item() for name in x)


def noisy(state, spec, noise, generator):
    """Every parameter with Gaussian noise; running statistics and counters as they are."""
    new = {}
    for name, tensor in state.items():
        moved = tensor.is_floating_point() and name not in spec.buffers
        drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) if moved else 0
        new[name] = tensor + noise * drawn if moved else tensor
    return new | {name: new[first] for name, first in spec.tied.items()}


@pytest.mark.parametrize("noise", [0, 0.01])
@pytest.mark.parametrize("member", ZOO + BATCH_NORM, ids=lambda member: member.name)
def test_a_planted_permutation_is_found_exactly(member, noise):
    """Of every network of the zoo; all weights are generic, so there is one best permutation."""
    module, inputs = member.make(), member.inputs(6)
    spec, state = permutation_spec(module, inputs), module.state_dict()
    generator = torch.Generator().manual_seed(1)
    planted = spec.random(generator)
    hidden = noisy(spec.permute(state, planted), spec, noise, generator)
    matching = match(state, hidden, inputs, module=module, restarts=2)
    found = spec.permute(spec.permute(state, planted), matching.permutations)
    torch.testing.assert_close(found, state, rtol=0, atol=0)
    assert matching.relative_change < 1e-12


@pytest.mark.parametrize("name", ["resnet-group", "gpt", "vit", "resnext-se", "unet"])
def test_a_planted_permutation_is_found_by_activations(name):
    (member,) = [member for member in ZOO if member.name == name]
    module, inputs = member.make(), member.inputs(32)
    spec, state = permutation_spec(module, inputs), module.state_dict()
    hidden = spec.permute(state, spec.random(torch.Generator().manual_seed(1)))
    matching = match(state, hidden, inputs, module=module, method="activations")
    torch.testing.assert_close(matching.state_dict, state, rtol=0, atol=0)
    assert matching.sweeps == 0 and len(matching.objectives) == 1


def test_activations_match_features_that_weights_do_not():
    """Units that compute the same by differently scaled weights."""
    a = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    b, order, x = copy.deepcopy(a), torch.randperm(8), torch.randn(64, 6, dtype=torch.float64)
    scale = torch.rand(8, 1, dtype=torch.float64) * 10 + 0.1
    b[0].weight.data = (scale * a[0].weight.data)[order]
    b[0].bias.data = (scale[:, 0] * a[0].bias.data)[order]
    b[2].weight.data = (a[2].weight.data / scale[:, 0])[:, order]
    matching = match(a, b, x, method="activations")
    assert torch.equal(order[matching.permutations["0.weight[0]"]], torch.arange(8))


def test_objective_is_the_inner_product_and_never_falls():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    matching = match(a, b)
    assert matching.objective_before == pytest.approx(inner(a.state_dict(), b.state_dict()))
    assert matching.objective_after == pytest.approx(inner(a.state_dict(), matching.state_dict))
    assert matching.objective_after == max(matching.objectives)
    reached = [match(a, b, restarts=1, max_sweeps=n).objective_after for n in range(1, 8)]
    assert matching.objective_before < reached[0]
    assert all(low <= high for low, high in itertools.pairwise(reached))


def test_every_one_dimensional_parameter_counts():
    """Biases alone decide where the weights are all alike."""
    a = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    for layer in (a[0], a[2]):
        nn.init.constant_(layer.weight, 0.5)
    b, order = copy.deepcopy(a), torch.tensor([3, 1, 4, 0, 2])
    b[0].bias.data = a[0].bias.data[order]
    matching = match(a, b, torch.randn(4, 2))
    torch.testing.assert_close(matching.state_dict["0.bias"], a[0].bias.data)


def test_matching_stops_where_no_single_permutation_gains():
    """One hidden layer is matched optimally (brute force), and the result is a fixed point."""
    a, b = models.mlp(6, (5,), 3).double(), models.mlp(6, (5,), 3).double()
    spec, state = permutation_spec(b), b.state_dict()
    best = max(
        inner(a.state_dict(), spec.permute(state, {"layers.0.weight[0]": torch.tensor(order)}))
        for order in itertools.permutations(range(5))
    )
    for restarts in (1, 3):
        found = match(a, b, restarts=restarts).objective_after
        assert found == pytest.approx(best, rel=1e-12)

    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    matching = match(a, b, restarts=1)
    assert matching.sweeps < 30
    again = match(a, matching.module, restarts=1, seed=5)
    assert again.sweeps == 1 and again.objective_after == again.objective_before


def test_heads_and_their_channels_are_matched_optimally():
    """Brute force over two heads and the two channels of each."""
    torch.manual_seed(3)
    (a, b), x = ([nn.MultiheadAttention(4, 2).double() for _ in range(2)], torch.randn(3, 1, 4))

    class SelfAttention(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    a, b = SelfAttention(a), SelfAttention(b)
    spec = permutation_spec(b, x)
    heads, keys, values = spec.channels
    swaps, best = [torch.tensor([0, 1]), torch.tensor([1, 0])], -torch.inf
    for order, *inside in itertools.product(swaps, repeat=5):
        within = {keys: torch.stack(inside[:2]), values: torch.stack(inside[2:])}
        new = spec.permute(b.state_dict(), {heads: order} | within)
        best = max(best, inner(a.state_dict(), new))
    assert match(a, b, x, restarts=1).objective_after == pytest.approx(best, rel=1e-12)


def test_the_seed_decides_the_result_and_restarts_keep_the_best():
    a, b = models.resnet(14, 1), models.resnet(14, 1)
    first, second = (match(a, b, restarts=1, seed=3) for _ in range(2))
    torch.testing.assert_close(first.state_dict, second.state_dict, rtol=0, atol=0)
    matching = match(a, b, restarts=6)
    assert len(set(matching.objectives)) > 1 and len(matching.objectives) == 6
    assert matching.objective_after == max(matching.objectives)
    usual = match(a, b, restarts=1)
    assert matching.objectives[0] == usual.objective_after <= matching.objective_after


def test_the_average_is_the_mean_of_the_matched_networks():
    """By definition, in float64; integers are the first network's, statistics are averaged."""
    x = images(8).float()
    networks = [
        nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 6), nn.Flatten()
        ).bfloat16()
        for _ in range(3)
    ]
    for i, network in enumerate(networks):
        network[1].num_batches_tracked += i
        network[1].running_mean += i
    frame = match_many(networks, x.bfloat16())
    average = frame.average()
    assert average.keys() == networks[0].state_dict().keys()
    for name, tensor in average.items():
        own = [state[name] for state in frame.state_dicts]
        if name.endswith("num_batches_tracked"):
            assert tensor == 0
        else:
            exact = torch.stack([t.double() for t in own]).mean(0)
            assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact.bfloat16())
    networks[0].load_state_dict(average)
    average["0.weight"].zero_()  # a copy
    assert frame.state_dicts[0]["0.weight"].any()


def test_results_are_shown_in_a_few_lines():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    matching = match(a, b, restarts=2)
    shown = repr(matching)
    assert len(shown) < 600 and "tensor" not in shown
    assert f"{matching.objective_before:.2f} before, {matching.objective_after:.2f} after" in shown
    assert all(f"{objective:.2f}" in shown for objective in matching.objectives)
    count = sum(t.numel() for t in a.state_dict().values())
    assert f"ResNet, {count:,} numbers (float64)" in shown and "6 permutations of 4 to 16" in shown
    data = images(20), torch.arange(20) % 5
    frame = match_many([a, b, matching.module], images(), data=data)
    shown = repr(frame)
    assert len(shown) < 800 and "tensor" not in shown and "CommonFrame of 3 networks" in shown
    assert f"to {frame.barriers_before.max():.3f} before" in shown
    with pytest.warns(UserWarning, match="no channels to permute"):
        nothing = match_many([nn.Linear(2, 2), nn.Linear(2, 2)], torch.randn(3, 2))
    assert "0 permutations of each network" in repr(nothing) and "barrier" not in repr(nothing)


def test_only_what_has_a_moved_neighbour_is_computed_again():
    """Every other product is kept, and what is kept is what would be computed."""
    a, b = models.mlp(60, (20, 24, 28, 16), 500), models.mlp(60, (20, 24, 28, 16), 500)
    spec = permutation_spec(a)
    looked = Objective(spec, a.state_dict(), b.state_dict()).assignment()
    first, second, third, last = looked.families
    for family in looked.families:
        looked.gains(family)
    sizes = dict(zip(looked.families, (20, 24, 28, 16), strict=True))
    biases = {family: 2 * size**2 for family, size in sizes.items()}  # FLOP, not worth keeping
    moved = {second: torch.randperm(24)}
    for family, products in (
        (first, 2 * 20**2 * 24),
        (second, 0),
        (third, 2 * 28**2 * 24),
        (last, 0),
    ):
        looked.move(moved)
        before = looked.work
        gains = looked.gains(family)
        assert looked.work - before == products + biases[family]
        anew = Objective(spec, a.state_dict(), b.state_dict()).assignment()
        anew.move(moved)
        torch.testing.assert_close(gains, anew.gains(family), rtol=1e-12, atol=1e-12)


def test_matching_holds_little_beside_the_networks(monkeypatch):
    """The two that are given, and at most four times one: of tensors, and what NumPy has."""
    monkeypatch.setattr(assignment, "PART", 2**13)
    a, b = models.mlp(450, (300, 300, 300), 10), models.mlp(450, (300, 300, 300), 10)
    x, size = torch.randn(4, 450), sum(p.nbytes for p in a.parameters())
    spec = permutation_spec(a, x)
    for method in ("weights", "activations"):
        assert peak_bytes(lambda method=method: match(a, b, x, method=method)) < 4 * size
    looked = Objective(spec, a.state_dict(), b.state_dict()).assignment()
    tracemalloc.start()
    tensors = peak_bytes(lambda: pair.descend(looked, 5, 0, tqdm(disable=True)))
    arrays = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0 < arrays and tensors + arrays < 4 * size


def test_no_start_takes_more_work_than_the_first(monkeypatch):
    """What that leaves out is said; enough for small networks is always allowed."""
    a, b = models.mlp(30, (64, 64, 64), 10), models.mlp(30, (64, 64, 64), 10)
    whole = match(a, b)
    assert whole.left_out == [] and "left out" not in repr(whole)
    done = []

    class Counted(Assignment):
        def __init__(self, *args):
            super().__init__(*args)
            done.append(self)

    monkeypatch.setattr(pair, "Assignment", Counted)
    monkeypatch.setattr(pair, "LEAST_WORK", 0)
    matching = match(a, b, restarts=4)
    first, *others = [own.work for own in done]
    a_look = 2 * 64**2 * (64 + 64 + 1) + 4 * 64**3
    assert max(others) < first + a_look
    assert any("the relaxation from step" in what for what in matching.left_out)
    assert f"left out: {matching.left_out[0]}" in repr(matching)
    assert matching.objectives[0] == whole.objectives[0]
    again = match(a, b, restarts=4)  # work is not time: it repeats itself
    assert again.left_out == matching.left_out and again.objectives == matching.objectives


def test_progress_has_an_end_and_says_which_start_it_is(capsys, monkeypatch):
    monkeypatch.setattr(pair, "tqdm", functools.partial(tqdm, mininterval=0))
    monkeypatch.setattr(pair, "DELAY", 0)
    match(tiny_resnet(seed=1), tiny_resnet(seed=2), progress=True)
    lines = capsys.readouterr().err.split("\r")
    assert any("match, start 2 of 3" in line and "<" in line for line in lines)
    done, total = lines[-1].split("| ")[1].split(" ")[0].split("/")
    assert done == total


def test_modules_and_states_are_left_alone_and_a_module_comes_back():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    before = {key: tensor.clone() for key, tensor in b.state_dict().items()}
    matching = match(a, b, images())
    torch.testing.assert_close(b.state_dict(), before, rtol=0, atol=0)
    assert "module" not in vars(matching)  # made when it is asked for
    assert type(matching.module) is models.ResNet and matching.module is not b
    torch.testing.assert_close(matching.module(images()), b(images()))
    torch.testing.assert_close(matching.module.state_dict(), matching.state_dict, rtol=0, atol=0)
    of_states = match(a.state_dict(), b.state_dict(), images(), module=a)
    assert of_states.module is None
    torch.testing.assert_close(of_states.state_dict, matching.state_dict, rtol=0, atol=0)


class Keeps(nn.Module):
    """Keeps what it computed, counts its calls and changes its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.features = self.a(x.mul_(2)).relu()
        return self.b(self.features)


def pruned():
    layers = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.random_unstructured(layers[0], "weight", 0.3)
    return layers


def normalised():
    layers = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layers[0])
    return layers


@pytest.mark.parametrize("build, free", [(Keeps, 1), (pruned, 0), (normalised, 1)])
@pytest.mark.parametrize("method", ["weights", "activations"])
def test_modules_that_cannot_be_copied_are_matched_and_left_as_they_were(build, free, method):
    (a, b), x = (build(), build()), torch.randn(5, 3)
    for module in (a, b):
        module(x.clone())
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(module)
    before, given = {key: t.clone() for key, t in b.state_dict().items()}, x.clone()
    kept = [dict(vars(layer)) for layer in b.modules()]
    with contextlib.nullcontext() if free else pytest.warns(UserWarning, match="is a buffer"):
        matching = match(a, b, x, method=method)
        frame = match_many([a, b], x)
    assert len(matching.spec.channels) == free and matching.relative_change < 1e-12
    assert frame.relative_change < 1e-12
    torch.testing.assert_close(b.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(x, given)
    for layer, own in zip(b.modules(), kept, strict=True):
        assert vars(layer).keys() == own.keys()
        assert all(vars(layer)[name] is value for name, value in own.items())


def test_compiled_modules_and_their_states_are_matched_as_what_they_are_made_of():
    (a, b), x = (models.mlp(6, (5,), 3).double() for _ in range(2)), torch.randn(4, 6)
    expected = match(a, b, x)
    compiled = torch.compile(a), torch.compile(b)
    for first, second in (compiled, (compiled[0].state_dict(), compiled[1]), (a, compiled[1])):
        matching = match(first, second, x)
        torch.testing.assert_close(matching.state_dict, expected.state_dict, rtol=0, atol=0)
        assert type(matching.module) is models.MLP
    states = [network.state_dict() for network in compiled]
    for frame in (match_many(compiled, x), match_many(states, x, module=compiled[0])):
        assert frame.state_dicts[0].keys() == a.state_dict().keys()
    within = [nn.Sequential(torch.compile(nn.Linear(3, 6)), nn.Linear(6, 2)) for _ in range(2)]
    assert len(match(*within, torch.randn(4, 3)).spec.channels) == 1
    with pytest.warns(FutureWarning):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(TypeError, match="is TorchScript, whose forward cannot be called on other"):
        match(scripted, scripted, x)


def test_inputs_and_outputs_may_be_as_in_transformers():
    class Output:
        def __init__(self, **fields):
            self.fields = fields

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, mask=None, labels=None, use_cache=True):
            assert labels is None and not use_cache and mask is None
            logits = self.b(self.a(x).relu())
            return Output(logits=logits, others=(logits.log(), {"best": logits.argmax(-1)}))

    inputs = {"x": torch.randn(4, 3), "mask": None, "labels": torch.zeros(4)}
    matching = match(Model(), Model(), inputs)  # logarithms of negative numbers are nan in both
    assert matching.relative_change < 1e-12 and len(matching.spec.channels) == 1
    nothing = nn.Sequential(nn.Linear(3, 2))
    nothing.register_forward_hook(lambda *_: [])
    with pytest.raises(ValueError, match="Sequential returns no tensor"):
        match(nothing, nothing, torch.randn(4, 3))


def test_a_network_without_symmetries_is_left_as_it_is():
    class Branches(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    a, b = Branches(3, 4), Branches(3, 4)
    for method in ("weights", "activations"):
        with pytest.warns(UserWarning, match="no channels to permute: .* asks for __bool__"):
            matching = match(a, b, torch.ones(2, 3), method=method)
        torch.testing.assert_close(matching.state_dict, b.state_dict())
        assert "asks for __bool__() of what it computes" in matching.spec.fixed["weight"][0]


def test_a_permuted_network_that_computes_something_else_is_refused():
    module = tiny_resnet()
    wrong = module.state_dict() | {"norm1.weight": module.norm1.weight.detach().flip(0)}
    assert check_same_function(module, module.state_dict(), module.state_dict(), images()) == 0
    module.norm1.weight.data[0] += 0.1
    with pytest.raises(ValueError, match="the permuted network does not compute what b does: its"):
        check_same_function(module, module.state_dict(), wrong, images())


class Float32Norm(nn.Module):
    """As Llama's: whatever it is given, it computes in float32."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(size))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y.type_as(x) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_within_is_as_coarse_as_the_module_computes(dtype):
    """A norm in float32 rounds more than float64 may; what is a little wrong is still refused."""
    torch.manual_seed(1)
    a, b = (
        nn.Sequential(nn.Linear(8, 64), Float32Norm(64), nn.ReLU(), nn.Linear(64, 5)).to(dtype)
        for _ in range(2)
    )
    x = torch.randn(16, 8)
    matching = match(a, b, x)
    assert 1e-10 < matching.relative_change < 1e-6
    assert matching.objective_after > matching.objective_before
    state = matching.state_dict
    wrong = state | {"1.weight": state["1.weight"].clone()}
    wrong["1.weight"][[0, 1]] = wrong["1.weight"][[0, 1]].mean()
    with pytest.raises(ValueError, match="does not compute what b does"):
        check_same_function(b, b.state_dict(), wrong, x.to(dtype))
    in_float64 = nn.Sequential(a[0], a[2], a[3])
    slightly = in_float64.state_dict()
    slightly["0.bias"] = slightly["0.bias"].double() * (1 + 1e-8)
    with pytest.raises(ValueError, match="does not compute what b does"):
        check_same_function(in_float64, in_float64.state_dict(), slightly, x.to(dtype))


class Mixed(nn.Module):
    """A bf16 layer among others in fp32, whose forward says so."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.a.bfloat16()

    def forward(self, x):
        return self.b(self.norm(self.a(x.bfloat16()).float()).relu())


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_a_network_of_mixed_types_is_matched_in_its_own(method):
    module, x = Mixed(), torch.randn(64, 8)
    spec, state = permutation_spec(module, x), module.state_dict()
    hidden = spec.permute(state, spec.random(torch.Generator().manual_seed(1)))
    matching = match(state, hidden, x, module=module, method=method)
    torch.testing.assert_close(matching.state_dict, state, rtol=0, atol=0)  # their types, too
    assert matching.relative_change < 1e-5
    wrong = state | {"a.bias": state["a.bias"].flip(0)}
    with pytest.raises(ValueError, match="does not compute what b does"):
        check_same_function(module, state, wrong, x)


def test_a_symmetry_that_is_none_is_caught(monkeypatch):
    """A wrong rule (the order of channels does not count for cumsum) cannot slip through."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x).cumsum(-1))

    cumsum = torch.ops.aten.cumsum
    wrong = TABLE[cumsum]._replace(rule=lambda out, x, dim: list(x.axes))
    monkeypatch.setitem(TABLE, cumsum, wrong)
    with pytest.raises(ValueError, match="does not compute what b does"):
        match(Running(), Running(), torch.randn(4, 3))


def test_bad_arguments_are_named():
    other, x = nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2)
    state = other.state_dict()
    with pytest.raises(ValueError, match="what Sequential takes is not known; give example_input"):
        match(other, other)
    with pytest.raises(ValueError, match="do not say what network they are of; give it as module"):
        match(state, state, x)
    with pytest.raises(ValueError, match="0.weight is a parameter of the module and not in the st"):
        match({"1.weight": x}, {"1.weight": x}, x, module=other)
    with pytest.raises(ValueError, match="extra is in the state dicts and not in the module"):
        match(state | {"extra": x}, state | {"extra": x}, x, module=other)
    with pytest.raises(ValueError, match=r"0.weight has shape \[2, 2\] in the state dicts and"):
        match(state, state, x, module=nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(ValueError, match="conv1.weight has shape"):
        match(models.resnet(8, 1), models.resnet(8, 2))
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        match(tiny_resnet(), tiny_resnet(), max_sweeps=0)
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        match(tiny_resnet(), tiny_resnet(), restarts=0)
    with pytest.raises(ValueError, match="method must be one of weights, activations, got 'all'"):
        match(tiny_resnet(), tiny_resnet(), method="all")
    with pytest.raises(TypeError, match="got int"):
        match(1, 2)


# --- Several networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet-group", "gpt", "resnext-se"])
def test_several_planted_copies_are_brought_to_one_frame(name):
    (member,) = [member for member in ZOO if member.name == name]
    module, inputs = member.make(), member.inputs(4)
    spec, state = permutation_spec(module, inputs), module.state_dict()
    generator = torch.Generator().manual_seed(2)
    copies = [spec.permute(state, spec.random(generator)) for _ in range(4)]
    frame = match_many(copies, inputs, module=module)
    for other in frame.state_dicts[1:]:
        torch.testing.assert_close(other, frame.state_dicts[0], rtol=0, atol=0)
    assert frame.relative_change < 1e-12 and frame.modules == [None] * 4


def test_a_common_frame_gains_for_the_sum_of_pairs():
    networks = [tiny_resnet(seed=seed) for seed in range(3)]
    frame = match_many(networks, images())
    states, before = frame.state_dicts, [network.state_dict() for network in networks]
    for found, own in ((frame.objectives_after, states), (frame.objectives_before, before)):
        expected = [[inner(x, y) for y in own] for x in own]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert frame.objectives_after.triu(1).sum() == pytest.approx(max(frame.objectives))
    assert frame.objectives_after.triu(1).sum() > frame.objectives_before.triu(1).sum()
    assert frame.barriers_before is None and frame.barriers_after is None
    for network, module in zip(networks, frame.modules, strict=True):
        torch.testing.assert_close(module(images()), network(images()))


def test_barriers_between_nearly_equal_networks_vanish_in_a_common_frame():
    module = tiny_resnet()
    spec, generator = permutation_spec(module), torch.Generator().manual_seed(4)
    labels = module(images()).argmax(-1)
    copies = [
        noisy(spec.permute(module.state_dict(), spec.random(generator)), spec, 1e-6, generator)
        for _ in range(3)
    ]
    frame = match_many(copies, images(), module=module, data=(images(), labels))
    for barriers in (frame.barriers_before, frame.barriers_after):
        assert barriers.shape == (3, 3) and torch.equal(barriers, barriers.T)
    assert frame.barriers_before.max() > 0.1 and frame.barriers_after.max() < 1e-4


def test_two_networks_in_a_common_frame_are_as_near_as_if_matched():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    frame, matching = match_many([a, b], restarts=8), match(a, b, restarts=8)
    assert frame.objectives_after[0, 1] == pytest.approx(matching.objective_after, rel=0.02)


def test_fewer_than_two_networks_have_no_common_frame():
    with pytest.raises(ValueError, match="networks must be at least two, got 1"):
        match_many([tiny_resnet()])
