"""The symmetries of networks that people have, and of random programs: as many as counted by hand
and no more than are true."""

import random

import pytest
import torch
import torch.nn.functional as F
from catalogue import CATALOGUE
from torch import nn
from torch.func import functional_call

from fastgeo import match, permutation_spec
from fastgeo.data.inputs import tensors_within

# Each attention has the heads, queries and keys within each, values within each; with rotary
# positions, which fix queries and keys within, and fewer keys than queries, it has the heads of
# keys, those of queries at each, values within each. With rotary positions and no fewer keys it has
# two. Every MLP has its hidden channels, every width of the residual stream has its own.
CLASSES = {
    "transformers/gpt2": 1 + 2 * (3 + 1),
    "transformers/llama": 1 + 2 * (3 + 1),
    "transformers/mistral": 1 + 2 * (3 + 1),
    "transformers/qwen3": 1 + 2 * (3 + 1),
    "transformers/gemma": 1 + 2 * (3 + 1),
    "transformers/gemma2": 1 + 2 * (3 + 1),
    "transformers/gemma3": 1 + 2 * (3 + 1),
    "transformers/mixtral": 0,  # reads which experts are needed
    "transformers/mixtral-batched": 1 + 2 * (3 + 1),  # experts of one tensor, permuted alike
    "transformers/bert": 1 + 2 * (3 + 1) + 1,  # the pooler
    "transformers/distilbert": 1 + 2 * (3 + 1) + 1,
    "transformers/roberta": 1 + 2 * (3 + 1) + 1,
    "transformers/vit": 1 + 2 * (3 + 1),
    "transformers/convnext": 4 + 5,  # four widths, five blocks
    "timm/vit": 1 + 2 * (3 + 1),
    "timm/deit": 1 + 2 * (3 + 1),
    "timm/beit": 1 + 2 * (3 + 1),
    "timm/eva02": 1 + 2 * (2 + 1),
    "timm/swin": 2 + 4 * (3 + 1),
    "timm/convnext": 4 + 5,
    "timm/convnextv2": 4 + 5,
    "timm/mixer": 1 + 2 * 2,
    "timm/resmlp": 1 + 2,  # between tokens it has one matrix, and these are fixed
    "timm/resnetv2": 2 * (1 + 2 + 3 * 2),  # the groups of norms, and the channels within each
    # deep stem; four widths; blocks of groups, channels after three convolutions, squeeze (the
    # first has one group); last convolution
    "timm/nfnet": 3 + 4 + (3 + 1) + 4 * (1 + 3 + 1) + 1,
    # stem; inverted residuals: hidden channels and, with a width of their own, output; around the
    # transformers the convolutions before, inside, after and of both joined; last convolution
    "timm/mobilevit": 1 + 2 + 3 + (2 + 4 + 2 * 4) + (2 + 4 + 4) + 1,
    # stem; width, hidden channels, squeeze; width, attention, MLP
    "timm/coatnet": 2 + 2 * 3 + 2 * (1 + 3 + 1),
    "timm/repvgg": 4,
    # stem and widths in groups (the first has one), hidden channels in groups, squeezes
    "timm/efficientnet": 2 + (1 + 2 + 2 + 2) + 3 * 2 + 4,
    "timm/poolformer": 4 + 5,
    "torchvision/convnext": 2 + 3,
    "torchvision/swin": 2 + 4 * (3 + 1),
    # stem; two widths with hidden channels, squeeze, attention and MLP in windows and in a grid;
    # classifier
    "torchvision/maxvit": 2 + 2 * (1 + 2 + 2 * (3 + 1)) + 1,
    "torchvision/efficientnet": 1 + 3 + 3 + 4 + 1,  # stem, widths, hidden, squeezes, last
    "torchvision/vit": 1 + 2 * (3 + 1),
    "recurrent/lstm": 1 + 2 * 2,  # embedding; each layer in each direction
    "recurrent/gru": 2,
    "recurrent/rnn": 2,
}
IN_FLOAT32 = ("llama", "mistral", "qwen3", "gemma", "mixtral")  # of their norms at least
NAMED = {f"{library}/{e.name}": e for library, own in CATALOGUE.items() for e in own}


def classes_of(name):
    return CLASSES.get(name, CLASSES.get(name.rsplit("-", 1)[0]))


@torch.no_grad()
def outputs(module, state, inputs):
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    return list(tensors_within(functional_call(module, state, args, kwargs, tie_weights=False)))


def assert_holds(module, spec, batches, draws=2, bound=1e-12):
    """Permuted at random the module computes the same, also on inputs that the spec never saw."""
    state = module.state_dict()
    for seed in range(draws):
        new = spec.permute(state, spec.random(torch.Generator().manual_seed(seed)))
        for inputs in batches:
            pairs = zip(outputs(module, new, inputs), outputs(module, state, inputs), strict=True)
            for got, expected in pairs:
                assert (got - expected).abs().max() <= bound * expected.abs().max(), str(spec)


@pytest.mark.parametrize("name", NAMED)
def test_each_network_has_the_classes_counted_by_hand_and_they_hold(name):
    module, batches = NAMED[name].make(), [NAMED[name].inputs(n) for n in (4, 7)]
    spec = permutation_spec(module, batches[0])
    assert len(spec.channels) == classes_of(name), str(spec)
    assert min((own.size for own in spec.channels.values()), default=2) > 1
    in_float32 = any(word in name for word in IN_FLOAT32)
    assert_holds(module, spec, batches, bound=2e-6 if in_float32 else 1e-12)


@pytest.mark.parametrize("name", [name for name in NAMED if classes_of(name)])
def test_a_planted_permutation_of_each_is_found_exactly(name):
    module, inputs = NAMED[name].make(), NAMED[name].inputs(4)
    spec, state = permutation_spec(module, inputs), module.state_dict()
    hidden = spec.permute(state, spec.random(torch.Generator().manual_seed(1)))
    matching = match(state, hidden, inputs, module=module)
    torch.testing.assert_close(matching.state_dict, state, rtol=0, atol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_experts_that_are_chosen_by_reading_numbers_leave_all_fixed(attention):
    entry = NAMED[f"transformers/mixtral-{attention}"]
    spec = permutation_spec(entry.make(), entry.inputs(4))
    assert "asks for __bool__() of what it computes" in spec.fixed["lm_head.weight"][1]
    assert ": if expert_idx == self.num_experts:)" in spec.fixed["lm_head.weight"][1]


# --- Random programs ------------------------------------------------------------------------------

PARTS = {6: (2, 3), 12: (3, 2, 2), 24: (2, 3, 4), 36: (3, 2, 6), 18: (3, 6), 9: (3, 3)}


class Program(nn.Module):
    """What networks do to axes, in a random order; parameters as they are needed."""

    def __init__(self, seed):
        super().__init__()
        self.seed, draw = seed, random.Random(seed)
        self.layers = nn.ModuleList(nn.Linear(3, draw.choice([6, 12, 24])) for _ in range(3))
        self.own = nn.ParameterList()

    def parameter(self, *shape):
        if self.used == len(self.own):
            self.own.append(nn.Parameter(torch.randn(shape)))
        self.used += 1
        return self.own[self.used - 1]

    def forward(self, x):
        draw, self.used = random.Random(self.seed), 0
        values = [layer(x) for layer in self.layers]
        for _ in range(draw.randint(3, 9)):
            i = draw.randrange(len(values))
            made = self.step(draw, values[i], values)
            if made.numel() < 20_000:
                values[i] = made
        flat = (value.flatten(1).tanh() for value in values)
        return sum(value @ self.parameter(value.shape[1], 2) for value in flat)

    def step(self, draw, x, values):
        axis, last = draw.randrange(1, x.ndim), x.shape[-1]
        half = max(1, x.shape[axis] // 2)
        steps = [
            lambda: x.flatten(1),
            lambda: x.transpose(axis, -1),
            lambda: x.narrow(axis, draw.randrange(half), half),
            lambda: torch.cat([x, draw.choice([v for v in values if v.shape == x.shape])], axis),
            lambda: torch.cat([x, x.cos() * self.parameter(last), x.tanh()], axis),
            lambda: x + draw.choice([v for v in values if v.shape == x.shape]),
            lambda: x * self.parameter(*x.shape[axis:]),
            lambda: x.tanh() @ self.parameter(last, draw.choice([4, 6, 12])),
            lambda: x.softmax(axis),
            lambda: x + x.roll(1, axis),
            lambda: F.layer_norm(x, x.shape[axis:]),
            lambda: F.normalize(x, dim=axis),
            lambda: F.batch_norm(x, None, None, training=True) if x.shape[1] > 1 else x,
            lambda: torch.stack([x, x.sin()], axis) if x.ndim < 4 else x,
            lambda: self.halves_swapped(x, axis, half),
            lambda: self.changed_in_place(x, half),
            lambda: x.repeat_interleave(2, axis),
        ]
        if x.shape[axis] in PARTS and x.ndim < 5:
            steps += [lambda: x.unflatten(axis, PARTS[x.shape[axis]])] * 4
        if x.ndim > 2:
            steps += [lambda: x.select(axis, 0), lambda: x.sum(axis), lambda: x @ x.mT]
            steps += [lambda: self.one_of(x.unbind(axis), values)] * 2
        if x.shape[axis] % 3 == 0:
            steps += [lambda: self.one_of(x.chunk(3, axis), values)] * 2
        return draw.choice(steps)()

    def one_of(self, parts, values):
        values += parts[1:]
        return parts[0]

    def halves_swapped(self, x, axis, half):
        out, rest = torch.zeros_like(x), x.shape[axis] - half
        out.narrow(axis, 0, half).copy_(x.narrow(axis, rest, half))
        out.narrow(axis, half, rest).add_(x.narrow(axis, 0, rest))
        return out

    def changed_in_place(self, x, half):
        x = x.clone()
        x[..., :half] *= self.parameter(x[..., :half].shape[-1])
        return x


@pytest.mark.parametrize("first", range(0, 320, 80))
def test_no_random_program_has_more_freedom_than_is_true(first):
    found = 0
    for seed in range(first, first + 80):
        torch.manual_seed(seed)
        module, (x, other) = Program(seed), torch.randn(2, 3, 3, dtype=torch.float64)
        module(x.float())
        module = module.double().eval()
        spec = permutation_spec(module, x)
        assert_holds(module, spec, [x, other], draws=1, bound=1e-10)
        found += len(spec.channels)
    assert found > 200
