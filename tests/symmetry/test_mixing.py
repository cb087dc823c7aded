"""Linear maps of channels that leave the function of a network as it is, and where none do."""

import pytest
import torch
from catalogue import TIMM, TRANSFORMERS
from torch import nn
from zoo import ZOO

from fastgeo import models, permutation_spec
from fastgeo.matching.folding import folded
from fastgeo.matching.pair import check_same_function
from fastgeo.symmetry.derive import Symmetries
from fastgeo.symmetry.mixing import with_mixing

MEMBERS = {member.name: member for member in (*ZOO, *TRANSFORMERS, *TIMM)}


def mixing(module, inputs, equal=()):
    return with_mixing(Symmetries(module, inputs), equal)


def generic(module):
    """No weight of a norm is 1, and no bias 0."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module.eval()


def gpt(norm):
    return generic(models.gpt(20, 8, 2, 0.25, norm=norm).double())


def kinds(spec):
    """Name -> what acts on it."""
    return {
        name: "invertible" if own.sides else "mean" if own.keeps_mean else "orthogonal"
        for name, own in spec.mixed.items()
    }


@pytest.mark.parametrize(("norm", "stream"), [("layer", "mean"), ("rms", "orthogonal")])
def test_a_decoder_rotates_its_stream_and_mixes_within_heads(norm, stream):
    module = gpt(norm)
    spec = mixing(module, module.example_input_array)
    heads = [f"blocks.{i}.{layer}.weight[0].1" for i in range(2) for layer in ("query", "value")]
    assert kinds(spec) == {"tokens.weight[1]": stream} | dict.fromkeys(heads, "invertible")
    assert {fold.weight for fold in spec.folds} == {
        name for name, _ in module.named_parameters() if "norm" in name and "weight" in name
    }
    sides = spec.mixed["blocks.0.query.weight[0].1"].sides
    assert {spec.blocks[i].tensor: side for i, side in sides.items()} == {
        "blocks.0.query.weight": True,
        "blocks.0.query.bias": True,
        "blocks.0.key.weight": False,
        "blocks.0.key.bias": False,
    }
    assert spec.channels == permutation_spec(module, module.example_input_array).channels


@pytest.mark.parametrize(
    "name", ["transformer", "gpt", "llama", "gpt2-sdpa", "qwen3-eager", "vit", "eva02", "mobilevit"]
)
def test_mixed_at_random_a_network_computes_the_same(name):
    member = MEMBERS[name]
    module, inputs = generic(member.make()), member.inputs(2)
    spec, state = mixing(module, inputs), module.state_dict()
    assert spec.mixed
    drawn = spec.random(torch.Generator().manual_seed(1))
    moved = spec.permute(folded(spec, state), drawn)
    check_same_function(module, state, moved, inputs)
    assert any((moved[name] - state[name]).abs().max() > 0.01 for name in state)


def test_the_draw_is_orthogonal_and_keeps_the_mean_where_it_must():
    module = gpt("layer")
    drawn = mixing(module, module.example_input_array).random()
    matrix = drawn["tokens.weight[1]"]
    eye, ones = torch.eye(len(matrix)).double(), torch.ones(len(matrix)).double()
    torch.testing.assert_close(matrix @ matrix.T, eye)
    torch.testing.assert_close(matrix @ ones, ones)


class Stream(nn.Module):
    """A stream, written by an embedding and read by a norm."""

    def __init__(self, read, tied=False):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.head, self.read = nn.Linear(6, 7, bias=False), read
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        return self.head(self.read(self.norm, self.tokens(tokens)))


READS = {
    "twice": lambda norm, x: norm(x),
    "by a nonlinearity": lambda norm, x: norm(x).relu(),
    "before a nonlinearity": lambda norm, x: norm(x.tanh()),
    "with a number added": lambda norm, x: norm(x + 1),
    "by a sum of channels": lambda norm, x: norm(x) * x.sum(-1, keepdim=True),
    "added to the stream": lambda norm, x: x + norm(x),
    "in parts": lambda norm, x: norm(x)[..., [1, 0, 2, 3, 4, 5]],
    "by squares that are not summed": lambda norm, x: norm(x * x),
    "with a cumulated sum": lambda norm, x: norm(x.cumsum(-1)),
}


@pytest.mark.parametrize("read", READS)
def test_where_no_rotation_commutes_there_is_none(read):
    module = generic(Stream(READS[read], tied=read == "twice"))
    spec = mixing(module, torch.tensor([[0, 1, 2]]))
    assert not spec.mixed and not spec.folds
    if spec.channels:
        assert "permutations only" in str(spec)


class Pair(nn.Module):
    """Two factors of a product, which meet in a nonlinearity of a stack of them, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(3, 6)
        self.left, self.right = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        x, y = self.first(x), self.second(x)
        return self.left(x) + self.right(y) + torch.stack([x, y]).tanh().sum((0, -1))[:, None]


def test_what_is_stacked_takes_the_maps_that_the_stack_does():
    spec = mixing(Pair(), torch.randn(4, 3))
    assert len(spec.channels) == 2 and not spec.mixed


def test_a_norm_of_equal_weights_needs_no_folding():
    """So a tied head does not stand in the way."""
    module = Stream(READS["twice"], tied=True).double()
    inputs, equal = torch.tensor([[0, 1, 2]]), {"norm.weight", "norm.bias"}
    spec = mixing(module, inputs, equal)
    assert kinds(spec) == {"tokens.weight[1]": "mean"} and not spec.folds
    state = module.state_dict()
    check_same_function(module, state, spec.permute(state, spec.random()), inputs)
    assert not mixing(module, inputs).mixed


def test_a_bias_without_a_reader_of_its_own_is_divided_by_the_weight():
    module = generic(Stream(READS["twice"]).double())
    inputs, state = torch.tensor([[0, 1, 2]]), module.state_dict()
    spec = mixing(module, inputs)
    new = folded(spec, state)
    torch.testing.assert_close(new["norm.bias"], state["norm.bias"] / state["norm.weight"])
    check_same_function(module, state, new, inputs)
    state["norm.weight"][0] = 0
    with pytest.raises(ValueError, match="norm.bias cannot be folded"):
        folded(spec, state)


def test_balanced_factors_are_the_smallest_of_the_same_product():
    module = gpt("rms")
    spec, state = mixing(module, module.example_input_array), module.state_dict()
    new = folded(spec, state)
    query, key, before = (
        torch.cat([of[f"blocks.0.{name}.weight"], of[f"blocks.0.{name}.bias"][:, None]], 1)
        for name, of in (("query", new), ("key", new), ("query", state))
    )
    for head in torch.arange(32).view(4, 8):
        torch.testing.assert_close(query[head] @ query[head].T, key[head] @ key[head].T)
        singular = torch.linalg.svdvals(query[head].T @ key[head])[:8]
        assert query[head].square().sum() == pytest.approx(singular.sum().item())
        condition = torch.linalg.cond(query[head]).item()
        assert condition == pytest.approx((singular[0] / singular[-1]).sqrt().item())
    assert not torch.allclose(before, query)


def test_what_is_no_rotation_is_refused():
    module = gpt("rms")
    spec = mixing(module, module.example_input_array)
    drawn = spec.random()
    drawn["tokens.weight[1]"][0] *= 2
    with pytest.raises(ValueError, match=r"tokens.weight\[1\] must hold orthogonal matrices"):
        spec.permute(module.state_dict(), drawn)
