"""Symmetries read off one pass: they are those known, they hold, and what is fixed says why."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import BATCH_NORM, ZOO

from fastgeo import models, permutation_spec

# Free permutations of each member of the zoo: sizes, as SIZE in OUTER x SIZE where every position
# of an outer permutation has an inner one of its own; two of them where queries and keys have one
# and values another.
ENCODER = ["2", "4 in 2", "4 in 2"]
FREE = {
    "resnet-group": ["4", "4", "8", "8", "16", "16"],
    "resnet-channel": ["4", "4", "8", "8", "16", "16"],
    "mlp": ["8", "6", "8"],
    "lenet": ["4", "6", "12"],
    "vgg": ["4", "6", "6", "10"],
    "torchvision-resnet18": [
        *["2", "2 in 2"] * 3,
        *["2", "4 in 2"] * 3,
        *["2", "8 in 2"] * 3,
        *["2", "16 in 2"] * 3,
    ],
    "torchvision-mobilenet": [
        *("2", "4 in 2"),
        *("2", "24 in 2", "2", "4 in 2"),
        *("2", "24 in 2"),
        *("2", "24 in 2", "2", "4 in 2"),
        "1280",
    ],
    "densenet": ["4", "4", "4", "4", "8"],
    "convnext": ["6", "24", "24"],
    "vit": ["8", *ENCODER, "16", *ENCODER, "16"],
    "torchvision-vit": ["8", *ENCODER, "16", *ENCODER, "16"],
    "transformer": ["8", *ENCODER, "16", *ENCODER, "16"],
    "gpt": ["8", *ENCODER, "32", *ENCODER, "32"],
    "llama": ["8", "2", "4", "12"],  # rotary positions fix the channels of queries and keys
    "mixer": ["6", "8", "8"],
    "unet": ["4", "4", "6", "6", "8", "8", "6", "6", "6", "4", "4"],
    "plain-parameters": ["8"],
    "resnext-se": ["8", *["3", "4 in 3", "4 in 3", "2"] * 2],
    "text-cnn": ["6", "4", "4"],
    "wavenet": ["4"],
    "last-word": ["2", "4 in 2", "4 in 2"],
    "padded-encoder": ["8", *ENCODER, "12", *ENCODER, "12"],
    "factors": ["6", "6"],
    "shared-layers": ["8"],
    "recurrent": ["6", "7"],
}
FREE_WITH_BATCH_NORM = {
    "torchvision-resnet18": [*["4"] * 3, *["8"] * 3, *["16"] * 3, *["32"] * 3],
    "convolutions": ["4", "6"],
    "mlp": ["8", "6"],
}


def sizes(spec):
    def described(own):
        outer = (str(spec.channels[name].size) for name in own.within)
        return " in ".join([str(own.size), *outer])

    return [described(own) for own in spec.channels.values()]


def outputs(module, inputs):
    return module(**inputs) if isinstance(inputs, dict) else module(inputs)


@torch.no_grad()
def assert_holds(module, inputs, spec, other_inputs, draws=3):
    """Permuted at random the module computes the same, also on inputs that the spec never saw."""
    state, moved = module.state_dict(), 0
    for seed in range(draws):
        new = spec.permute(state, spec.random(torch.Generator().manual_seed(seed)))
        moved += any(not torch.equal(new[name], tensor) for name, tensor in state.items())
        permuted = copy.deepcopy(module)
        permuted.load_state_dict(new)
        for x in (inputs, other_inputs):
            torch.testing.assert_close(
                outputs(permuted, x), outputs(module, x), rtol=1e-12, atol=1e-12
            )
    assert moved or not spec.channels


@pytest.mark.parametrize("member", ZOO, ids=lambda member: member.name)
def test_permuted_at_random_every_network_of_the_zoo_computes_the_same(member):
    module, inputs = member.make(), member.inputs(4)
    spec = permutation_spec(module, inputs)
    assert sizes(spec) == FREE[member.name]
    assert_holds(module, inputs, spec, member.inputs(7))


@pytest.mark.parametrize("member", BATCH_NORM, ids=lambda member: member.name)
def test_running_statistics_are_permuted_with_their_channels(member):
    module, inputs = member.make(), member.inputs(4)
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer += torch.rand_like(buffer)
    spec = permutation_spec(module, inputs)
    assert sizes(spec) == FREE_WITH_BATCH_NORM[member.name]
    assert_holds(module, inputs, spec, member.inputs(7))


def resnet_by_hand(names):
    """Git Re-Basin's table for the paper's ResNets: one permutation for the residual stream of each
    group, one inside each block."""

    def norm(name, permutation):
        return {f"{name}.weight": (permutation,), f"{name}.bias": (permutation,)}

    stream = "conv1"
    axes = {"conv1.weight": (stream, None, None, None)} | norm("norm1", stream)
    blocks = {m[0] for name in names if (m := re.match(r"block_groups\.\d+\.blocks\.\d+", name))}
    for block in sorted(blocks):
        inner, before = f"{block}.conv1", stream
        if f"{block}.shortcut.0.weight" in names:
            stream = f"{block}.shortcut"
            axes[f"{block}.shortcut.0.weight"] = (stream, before, None, None)
            axes |= norm(f"{block}.shortcut.1", stream)
        axes[f"{block}.conv1.weight"] = (inner, before, None, None)
        axes |= norm(f"{block}.norm1", inner)
        axes[f"{block}.conv2.weight"] = (stream, inner, None, None)
        axes |= norm(f"{block}.norm2", stream)
    return axes | {"linear.weight": (None, stream), "linear.bias": (None,)}


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_the_spec_of_the_papers_resnet20_is_the_one_written_by_hand(norm):
    module = models.resnet(20, 1, norm=norm)
    expected = resnet_by_hand(list(module.state_dict()))
    spec = permutation_spec(module)
    derived = {name: tuple(own[0] if own else None for own in a) for name, a in spec.axes.items()}
    assert all(len(own) <= 1 for axes in spec.axes.values() for own in axes)
    assert derived.keys() == expected.keys()
    renamed = {}
    for name, axes in expected.items():
        for by_hand, own in zip(axes, derived[name], strict=True):
            assert renamed.setdefault(by_hand, own) == own, name
    assert renamed.pop(None) is None
    assert len(set(renamed.values())) == len(renamed) == len(spec.channels) == 12


# --- What networks do to axes ---------------------------------------------------------------------


class Layers(nn.Module):
    """Layers by name, and a forward."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.of = nn.ModuleDict(layers)
        self.run = forward

    def forward(self, x):
        return self.run(x, **self.of)


def timm(x, embed, qkv, out, head):
    x = embed(x)
    B, T, C = x.shape
    q, k, v = qkv(x).reshape(B, T, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    y = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return head((x + out(y.transpose(1, 2).reshape(B, T, C))).mean(1))


def neox(x, embed, qkv, out, head):
    x = embed(x)
    B, T, C = x.shape
    q, k, v = qkv(x).view(B, T, 2, 12).transpose(1, 2).chunk(3, -1)
    y = F.scaled_dot_product_attention(q, k, v)
    return head((x + out(y.transpose(1, 2).flatten(2))).mean(1))


def repeated_keys(x, embed, q, kv, out, head):
    x = embed(x)
    B, T, C = x.shape
    q = q(x).view(B, T, 4, 4).transpose(1, 2)
    k, v = kv(x).split(8, dim=-1)
    k, v = (t.view(B, T, 2, 4).transpose(1, 2) for t in (k, v))
    k = k.repeat_interleave(2, dim=1)
    v = v[:, :, None].expand(B, 2, 2, T, 4).reshape(B, 4, T, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return head((x + out(y)).mean(1))


def option_a(x, first, down, last, head):
    """He et al.'s shortcut without parameters: a subsampled image, channels of zeros."""
    x = first(x).relu()
    shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3))
    return head((last(down(x).relu()) + shortcut).relu().mean((2, 3)))


def shuffled(x, first, second, head):
    """A channel shuffle between grouped convolutions."""
    x = first(x).relu()
    B, C, H, W = x.shape
    x = x.view(B, 2, C // 2, H, W).transpose(1, 2).reshape(B, C, H, W)
    return head(second(x).relu().mean((2, 3)))


def states(x, embed, lstm, head, other):
    y, (h, c) = lstm(embed(x))
    return head(y.mean(1)) + other(h[-1]) + other(c[0])


def one_of_two_heads(x, embed, head):
    y = embed(x).view(-1, 2, 4)
    return head(torch.cat([y[:, 0], y.mean(1)], -1))


def gated(x, embed, head):
    return head(F.glu(embed(x), -1))


def biases_joined(x, q, k, v, head):
    """One matrix and one bias, without one for the keys, as in BEiT."""
    bias = torch.cat([q.bias, torch.zeros_like(k.bias), v.bias])
    weight = torch.cat([q.weight, k.weight, v.weight])
    q, k, v = F.linear(x, weight, bias).reshape(-1, 3, 2, 3).unbind(1)
    return head(((q * k).sum(-1, keepdim=True) * v).flatten(1))


def branches_weighed(x, branches, weights, head):
    """As in selective kernels: between branches the weights of each channel sum to one."""
    weights = weights(x).view(-1, 2, 4).softmax(1)
    return head((branches(x).view(-1, 2, 4) * weights).sum(1))


def gram(x, embed, head):
    y = embed(x).view(-1, 3, 4)
    return head((y @ y.mT).sum(2))


def gram_of_halves(x, embed, scale, head):
    y = embed(x)
    y = torch.cat([y[:, :12] * scale(x), y[:, 12:]], -1).view(-1, 2, 3, 4)
    return head((y @ y.mT).sum(-1).flatten(1))


def swapped(x, embed, head):
    """A position of the inner axis is looked at before the halves that lie end to end."""
    y = torch.cat(embed(x).chunk(2, -1)[::-1], -1).unflatten(-1, (2, 2, 3))
    return head(y[:, :, 1].flatten(1))


def looked_at_twice(x, a, b, head):
    """The halves of two values, each by itself, and both values together."""
    y, z = a(x).view(-1, 2, 6), b(x).view(-1, 2, 6)
    return head(y[:, 0]) + head(z[:, 1].cumsum(-1)) + (y + z).mean((1, 2))[:, None]


def in_order_of_heads(x, embed, head):
    y = embed(x).view(-1, 2, 3)
    return head((y + y.roll(1, 1)).flatten(1))


def complex_rotary(x, embed, qk, head):
    turn = torch.polar(torch.ones(2), torch.arange(2.0)).to(torch.complex128)
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (2, 2))) * turn).flatten(2)
        for t in qk(x).view(-1, 2, 2, 4).unbind(1)
    )
    return head(embed(x)) * (q * k).sum((1, 2))[:, None]


def states_of_zeros(x, embed, gru, head):
    y, _ = gru(embed(x), x.new_zeros(1, len(x), 6))
    return head(y.mean(1))


linear, conv = nn.Linear, nn.Conv2d
ATTENTION = dict(embed=linear(3, 8), qkv=linear(8, 24), out=linear(8, 8), head=linear(8, 5))
FORMS = {
    "timm": (timm, ATTENTION, (4, 6, 3), ["8", "2", "4 in 2", "4 in 2"]),
    "neox": (neox, ATTENTION, (4, 6, 3), ["8", "2", "4 in 2", "4 in 2"]),
    "repeated keys": (
        repeated_keys,
        dict(
            embed=linear(3, 8),
            q=linear(8, 16),
            kv=linear(8, 16),
            out=linear(16, 8),
            head=linear(8, 5),
        ),
        (4, 6, 3),
        ["8", "2", "2 in 2", "4 in 2", "4 in 2"],
    ),
    "padded shortcut": (
        option_a,
        dict(
            first=conv(3, 4, 3, 1, 1),
            down=conv(4, 8, 3, 2, 1),
            last=conv(8, 8, 1),
            head=linear(8, 5),
        ),
        (4, 3, 8, 8),
        ["4", "8", "3"],
    ),
    "channel shuffle": (
        shuffled,
        dict(first=conv(3, 8, 3), second=conv(8, 8, 3, groups=4), head=linear(8, 5)),
        (4, 3, 8, 8),
        ["2", "4", "2 in 4"],
    ),
    "depthwise": (
        lambda x, a, b, c, head: head(c(b(a(x)).relu()).mean((2, 3))),
        dict(
            a=conv(3, 6, 1),
            b=conv(6, 12, 3, groups=6),
            c=nn.ConvTranspose2d(12, 6, 2, groups=6),
            head=linear(6, 5),
        ),
        (4, 3, 8, 8),
        ["6", "2 in 6"],
    ),
    "groups of groups": (
        lambda x, a, norm, b, head: head(b(norm(a(x))).mean((2, 3))),
        dict(
            a=conv(3, 12, 1),
            norm=nn.GroupNorm(2, 12),
            b=conv(12, 8, 3, groups=4),
            head=linear(8, 5),
        ),
        (4, 3, 8, 8),
        ["2", "2 in 2", "3 in 2 in 2", "2 in 2 in 2"],
    ),
    "lstm": (
        states,
        dict(
            embed=linear(3, 4),
            lstm=nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True),
            head=linear(12, 5),
            other=linear(6, 5),
        ),
        (4, 7, 3),
        ["4", "6", "6", "6"],  # the layer above backwards, and the one below forwards
    ),
    "biases joined": (
        biases_joined,
        dict(q=linear(3, 6), k=linear(3, 6), v=linear(3, 6), head=linear(6, 5)),
        (4, 3),
        ["2", "3 in 2", "3 in 2"],
    ),
    "branches weighed": (
        branches_weighed,
        dict(branches=linear(3, 8), weights=linear(3, 8), head=linear(4, 5)),
        (4, 3),
        ["2", "4"],
    ),
    "gram": (gram, dict(embed=linear(3, 12), head=linear(3, 5)), (4, 3), ["3", "4"]),
    "gram of halves": (
        gram_of_halves,
        dict(embed=linear(3, 24), scale=linear(3, 12), head=linear(6, 5)),
        (4, 3),
        ["3", "4", "3", "4"],
    ),
    "swapped": (swapped, dict(embed=linear(3, 12), head=linear(6, 5)), (4, 3), ["3"] * 4),
    "looked at twice": (
        looked_at_twice,
        dict(a=linear(3, 12), b=linear(3, 12), head=linear(6, 5)),
        (4, 3),
        [],
    ),
    "in order of heads": (
        in_order_of_heads,
        dict(embed=linear(3, 6), head=linear(6, 5)),
        (4, 3),
        ["3"],
    ),
    "complex rotary": (
        complex_rotary,
        dict(embed=linear(3, 8), qk=linear(3, 16), head=linear(8, 5)),
        (4, 3),
        ["8", "2"],
    ),
    "weights normalised": (
        lambda x, a, norm, b: b(norm(a(x))),
        dict(
            a=nn.utils.parametrizations.weight_norm(linear(3, 6), dim=1),
            norm=nn.RMSNorm(6, eps=1e-5),
            b=nn.utils.parametrizations.weight_norm(linear(6, 5)),
        ),
        (4, 3),
        ["6"],
    ),
    "states of zeros": (
        states_of_zeros,
        dict(embed=linear(3, 4), gru=nn.GRU(4, 6, batch_first=True), head=linear(6, 5)),
        (4, 7, 3),
        ["4", "6"],
    ),
    "one head": (one_of_two_heads, dict(embed=linear(3, 8), head=linear(8, 5)), (4, 3), ["4"]),
    "gated": (gated, dict(embed=linear(3, 8), head=linear(4, 5)), (4, 3), ["4"]),
}


@pytest.mark.parametrize("name", FORMS)
def test_axes_are_followed_through(name):
    forward, layers, shape, expected = FORMS[name]
    module = Layers(forward, **copy.deepcopy(layers)).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, other = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    spec = permutation_spec(module, x)
    assert sizes(spec) == expected, str(spec)
    assert_holds(module, x, spec, other)


def layers(forward):
    parts = dict(a=linear(3, 6), b=linear(6, 6), c=linear(6, 5))
    return Layers(forward, **parts).double().eval()


def halves_joined(x, a, b, c):
    out = torch.empty(len(x), 12, dtype=x.dtype)
    out[:, :6], out[:, 6:] = a(x), b(a(x))
    return c(out[:, :6] * out[:, 6:])


def changed_by_a_view(x, a, b, c):
    y = a(x)
    y[:, :2] *= b(y)[:, :2].detach()
    y[:, 2:].add_(1).relu_()
    return c(y)


def rows_added(x, a, b, c):
    y = torch.zeros_like(a(x))
    for i in range(2):  # as experts are, for each the rows that are given to it
        rows = torch.where((x[:, 0] > 0) == bool(i))[0]
        y.index_add_(0, rows, (i + 1) * a(x)[rows])
    y.scatter_add_(0, torch.arange(len(x))[:, None].expand_as(y).flip(0), b(y))
    return c(y + y.gather(0, torch.zeros(1, 6, dtype=torch.int64)))


def columns_added(x, a, b, c):
    return c(b(torch.zeros_like(a(x)).index_add_(1, torch.tensor([1, 0, 2, 3, 5, 4]), a(x))))


def masked(x, a, b, c):
    y = b(a(x))
    y[x[:, 0] > 0] = 0
    y[torch.arange(len(x)) % 2 == 0] += 1
    return c(y.masked_fill_(torch.ones(6, dtype=torch.bool), 2).copy_(a(x)) + y)


@pytest.mark.parametrize(
    "forward, expected",
    [
        (lambda x, a, b, c: c(a(x).add_(b.bias).mul_(2)), ["6"]),
        (halves_joined, ["6"]),
        (changed_by_a_view, ["2", "4", "4"]),
        (rows_added, ["6"]),
        (columns_added, ["6"]),
        (masked, ["6"]),
    ],
)
def test_what_is_changed_in_place_is_followed(forward, expected):
    module, (x, other) = layers(forward), torch.randn(2, 4, 3, dtype=torch.float64)
    spec = permutation_spec(module, x)
    assert sizes(spec) == expected, str(spec)
    assert_holds(module, x, spec, other)


def test_heads_are_permuted_whole_with_a_permutation_in_each():
    """Queries and keys share theirs, values have another, within the same heads."""
    (member,) = [member for member in ZOO if member.name == "gpt"]
    module = member.make()
    spec = permutation_spec(module, member.inputs(2))
    heads, keys, values = [f"blocks.0.qkv.weight[0].{i}" for i in range(3)]
    assert spec.channels[keys].within == spec.channels[values].within == (heads,)
    state, out = module.state_dict(), "blocks.0.out.weight"
    swapped = spec.permute(state, {heads: torch.tensor([1, 0])})
    torch.testing.assert_close(swapped[out], state[out][:, [4, 5, 6, 7, 0, 1, 2, 3]])
    within = torch.tensor([[1, 0, 2, 3], [0, 1, 3, 2]])
    moved = spec.permute(state, {values: within})
    torch.testing.assert_close(moved[out], state[out][:, [1, 0, 2, 3, 4, 5, 7, 6]])
    name = "blocks.0.qkv.bias"
    torch.testing.assert_close(moved[name][:16], state[name][:16])
    torch.testing.assert_close(moved[name][16:], state[name][16:][[1, 0, 2, 3, 4, 5, 7, 6]])


# --- What breaks a symmetry -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "forward, free, parameter, axis, words",
    [
        (lambda x, a, b, c: c(b(a(x).cumsum(-1))), ["6"], "of.a.weight", 0, "cumsum"),
        (
            lambda x, a, b, c: c(b(a(x).roll(1, -1))),
            ["6"],
            "of.b.weight",
            1,
            "roll: their order counts",
        ),
        (lambda x, a, b, c: c(b(a(x)[:, [0, 2, 1, 3, 4, 5]])), ["6"], "of.a.bias", 0, "getitem"),
        (lambda x, a, b, c: c(b(a(x)) * a(x).argmax(-1, True)), ["6"], "of.a.weight", 0, "argmax"),
        (lambda x, a, b, c: c(b(a(x).sort(-1)[0])), ["6"], "of.a.weight", 0, "their order counts"),
        (lambda x, a, b, c: c(b(a(x).view(-1, 2, 3).mT.flatten(1))), ["2", "3", "6"], None, 0, ""),
        (lambda x, a, b, c: c(b(a(x)) + torch.arange(6)), ["6"], "of.b.bias", 0, "always the same"),
        (lambda x, a, b, c: c(a(x)[:, :4] @ b.weight[:4]), None, "of.b.bias", 0, "does not use it"),
        (
            lambda x, a, b, c: c(b(a(x)) if x.sum() > 0 else a(x)),
            [],
            "of.b.weight",
            1,
            "asks for __bool__() of what it computes (test_permutation.py:",
        ),
    ],
)
def test_what_breaks_a_symmetry_is_fixed_and_said(forward, free, parameter, axis, words):
    module, x = layers(forward), torch.randn(4, 3, dtype=torch.float64)
    spec = permutation_spec(module, x)
    if free is not None:
        assert sorted(own.split(" in ")[0] for own in sizes(spec)) == free, str(spec)
    if parameter is not None:
        assert words in spec.fixed[parameter][axis]
        assert words in str(spec)
    assert_holds(module, x, spec, torch.randn(4, 3, dtype=torch.float64))


def view_before(x, a, b, c):
    out = torch.zeros(4, 6, dtype=x.dtype)
    view = out[:, :3]
    out.copy_(a(x))
    return c(out) + view.sum()


def decided_by_a_view(x, a, b, c):
    seen = x.new_zeros(4, 6)
    seen[:, :3].copy_(a(x)[:, :3])
    return c(b(a(x)) if seen.any() else a(x))


def decided_by_what_is_set(x, a, b, c):
    seen = torch.zeros(4, dtype=torch.bool)
    seen[0] = (a(x) > 0).any()
    return c(b(a(x)) if seen.any() else a(x))


@pytest.mark.parametrize(
    "forward, words",
    [
        (view_before, "writes into a tensor of which it has another view"),
        (decided_by_a_view, "asks for __bool__() of what it computes"),
        (decided_by_what_is_set, "asks for __bool__() of what it computes"),
        (lambda x, a, b, c: c(b(a(x)).t_().mean(1)), "calls t_, which changes a shape in place"),
    ],
)
def test_what_cannot_be_followed_is_said_with_its_line(forward, words):
    module, x = layers(forward), torch.randn(4, 3, dtype=torch.float64)
    why = permutation_spec(module, x).fixed["of.a.weight"][0]
    assert why.startswith("the network cannot be followed") and words in why
    assert "(test_permutation.py:" in why


def test_integers_are_asked_as_on_the_example_and_outputs_may_be_objects():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, tokens, mask):
            x = self.a(tokens)[:, : int(mask.sum(1).max())]
            return Output(self.c(self.b(x) if mask.all() else x))

    module, tokens = Words(), torch.randint(9, (2, 7))
    inputs = {"tokens": tokens, "mask": torch.ones_like(tokens), "labels": None}
    spec = permutation_spec(module, inputs)
    assert sizes(spec) == ["6", "6"]
    assert spec.fixed["c.weight"] == {0: "it is the network's output"}


def test_inputs_outputs_and_buffers_stay():
    spec = permutation_spec(models.mlp(12, (8,), 5))
    assert spec.fixed["layers.0.weight"] == {1: "it is the network's input"}
    assert spec.fixed["layers.1.weight"] == {0: "it is the network's output"}
    (member,) = [member for member in ZOO if member.name == "llama"]
    spec = permutation_spec(member.make(), member.inputs(2))
    assert "cos is a buffer" in spec.fixed["q.weight"][0]


def test_an_index_that_depends_on_the_inputs_leaves_axes_fixed():
    """A slice as long as the data say: its axis is looked at by position."""
    module = layers(lambda x, a, b, c: c(b(a(x)).cumsum(0)[: x.argmax() % 2 + 1]))
    x = torch.randn(4, 3, dtype=torch.float64)
    spec = permutation_spec(module, x)
    assert "getitem" in spec.fixed["of.b.weight"][0] and sizes(spec) == ["6"]
    assert_holds(module, x, spec, torch.randn(4, 3, dtype=torch.float64))


def test_tied_parameters_satisfy_both_of_their_uses():
    module = layers(lambda x, a, b, c: c(F.linear(a(x), b.weight)) + a(x)[:, :5])
    module.of["b"].weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    assert permutation_spec(module, torch.zeros(2, 3)).tied == {}
    (member,) = [member for member in ZOO if member.name == "gpt"]
    gpt = member.make()
    spec = permutation_spec(gpt, member.inputs(2))
    assert spec.tied == {"head.weight": "embed.weight"}
    permuted = spec.permute(gpt.state_dict(), spec.random())
    assert torch.equal(permuted["head.weight"], permuted["embed.weight"])


def test_a_permutation_that_is_none_is_named():
    module = models.mlp(12, (8,), 5)
    spec, state = permutation_spec(module), module.state_dict()
    with pytest.raises(ValueError, match="layers.7 is not one of the permutations of MLP"):
        spec.permute(state, {"layers.7": torch.arange(8)})
    for wrong in (torch.arange(7), torch.zeros(8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"layers.0.weight\[0\] must hold permutations of 8"):
            spec.permute(state, {"layers.0.weight[0]": wrong})


def test_an_input_is_asked_for_where_it_is_not_known():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="what Sequential takes is not known; give example_input"):
        permutation_spec(module)
    with pytest.raises(ValueError, match="Sequential cannot be evaluated on example_input"):
        permutation_spec(module, torch.zeros(2, 5))
    with pytest.raises(TypeError, match="example_input must be a tensor"):
        permutation_spec(module, [torch.zeros(2, 3)])
    with pytest.raises(TypeError, match="module must be an nn.Module, got dict"):
        permutation_spec({}, torch.zeros(2, 3))
    module.example_input_array = torch.zeros(2, 3)
    assert sizes(permutation_spec(module)) == ["4"]


def test_a_spec_is_shown_in_a_few_lines_and_printed_in_full():
    network = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    spec = permutation_spec(network, torch.randn(3, 2))
    assert repr(spec).splitlines() == [
        "PermutationSpec of Sequential:",
        "  2 permutations, of 12 channels in all",
        "  what stays: 0.weight[1]",
    ]
    wide = permutation_spec(nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 3)), torch.randn(3, 2))
    assert repr(wide).endswith("what stays: 0.weight[1], 1.weight[0], 1.bias[0]")
    assert str(wide).startswith("Sequential: 1 permutations\n  0.weight[0]: 5 positions\nfixed:")


@pytest.mark.parametrize(
    "between, count",
    [
        (lambda x: torch.cartesian_prod(x[0, :2], x[0, :2]).sum() * x, 2),
        (lambda x: x @ torch.cov(x.T), 1),
        (lambda x: torch.block_diag(x, x)[:4, :5], 1),
        (lambda x: x - x.quantile(0.5, 1, keepdim=True), 0),  # changes a shape in place, inside
        (lambda x: x + F.one_hot(x.argmax(1), 5), 0),
        (lambda x: x * x.nonzero().sum(), 0),
    ],
)
def test_what_functions_are_made_of_is_followed_and_what_cannot_be_fixes_its_own_axes(
    between, count
):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.relu(self.last(between(self.first(x)))))

    module, x = Network().double(), torch.randn(4, 3, dtype=torch.float64)
    spec, expected = permutation_spec(module, x), module(x)
    assert "cannot be followed" not in str(spec)
    assert len(spec.channels) == count + 1  # and those in front of the head
    module.load_state_dict(spec.permute(module.state_dict(), spec.random()))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_layers_have_the_same_permutations_in_every_precision(kind, dtype):
    """In fp32 a CPU may have an operation of its own for a layer."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            options = dict(num_layers=2, bidirectional=True, batch_first=True)
            self.layers, self.head = kind(3, 4, **options), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.layers(x)[0][:, -1])

    module, x = Network().to(dtype), torch.randn(2, 5, 3, dtype=dtype)
    spec, expected = permutation_spec(module, x), module(x)
    assert [own.size for own in spec.channels.values()] == [4] * 4
    module.load_state_dict(spec.permute(module.state_dict(), spec.random()))
    torch.testing.assert_close(module(x), expected)
