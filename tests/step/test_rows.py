"""Logits of a large vocabulary come some rows at a time: the same numbers, never all at once."""

import pytest
import torch
import transformers
from conftest import plain
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgeo import Forward, Path, evaluate, optimize, stack
from fastgeo.step import logits
from fastgeo.step.energy import EndLogits, energy_and_gradient, losses_and_gradient
from fastgeo.step.engines import Engine

SIZE = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, bos_token_id=0)


class Bare(nn.Module):
    """A head with a bias behind an embedding, of which a part may be frozen."""

    def __init__(self, frozen="", classes=60):
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 16), nn.Linear(16, classes)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen or "?"))

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).tanh())


def gpt2():
    size = dict(vocab_size=60, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, **HEADS))


def gemma2():
    """Its logits are bounded, by functions behind the head."""
    config = transformers.Gemma2Config(**SIZE, **HEADS, final_logit_softcapping=3.0)
    return transformers.Gemma2ForCausalLM(config)


MODELS = {
    "tied": gpt2,
    "untied": llama,
    "bounded": gemma2,
    "bias": Bare,
    "frozen body": lambda: Bare("embed"),
    "frozen head": lambda: Bare("head"),
}


def line(make, points=5):
    """A module, and a path between two others of its kind."""
    networks = []
    for seed in range(3):
        torch.manual_seed(seed)
        networks.append(make().double().eval())
        for parameter in networks[-1].parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return networks[0], Path.linear(*networks[1:], points)


def tokens(batch=3, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(60, (batch, length), generator=generator)
    counted = torch.rand(batch, length, generator=generator) < 0.7
    return {"input_ids": ids}, ids.roll(-1, 1).masked_fill(~counted, -100), counted


def trained(module):
    first = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(p, name) for name, p in named if p.requires_grad}


def steps(make, engine, chunk, counted=True, rows=True):
    """Energies, losses and both gradients of a step."""
    (module, path), (inputs, labels, weight) = line(make), tokens()
    weight = weight if counted else None
    way = Engine(stack(module, engine=engine, output="logits"), chunk)
    counts = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    ends = EndLogits(path)(inputs, inputs, way)
    assert (len(ends.slices()) > 1) == rows
    given = path, way, inputs, trained(module)
    found = energy_and_gradient(*given, ends, weight, counts, 0.5)
    return *found, *losses_and_gradient(*given, labels, weight, scale=0.5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine, chunk", [("stacked", None), ("stacked", 1), ("loop", 2)])
def test_a_step_by_rows_is_the_step(monkeypatch, name, engine, chunk):
    whole = steps(MODELS[name], "stacked", None, rows=False)
    monkeypatch.setattr(logits, "LARGE", 5 * 60 * 4)
    got = steps(MODELS[name], engine, chunk)
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-14)
    assert min(max(g.abs().max() for g in found.values()) for found in got[1::2]) > 1e-4


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that an operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta)
        numbers = (t.untyped_storage().nbytes() // t.itemsize for t in tensors)
        self.numbers = max([self.numbers, *numbers])
        return out


LIMIT = 9 * 20 * 500  # twenty rows of all points


def largest(work, forward, length, monkeypatch):
    """Of a whole optimisation or evaluation on texts of a length, all that is before it included;
    of 500 classes."""
    monkeypatch.setattr(logits, "LARGE", LIMIT)
    module, a, b = (Bare(classes=500) for _ in range(3))
    path = Path.linear(a, b, 9)
    ids = torch.randint(60, (10, length))
    with Largest() as found:
        if work == "evaluate":
            evaluate(path, module, ({"input_ids": ids}, ids), forward=forward)
        else:
            descent = plain(objective=work)
            optimize(
                path, module, [({"input_ids": ids}, ids)], steps=2, descent=descent, forward=forward
            )
    return found.numbers


@pytest.mark.parametrize(
    "work, options",
    [
        ("jsd", {}),
        ("cross_entropy", {}),
        ("evaluate", {}),
        ("jsd", dict(engine="stacked", chunk=1)),
        ("jsd", dict(engine="loop")),
        ("jsd", dict(precision="bf16")),
    ],
)
def test_no_tensor_grows_with_the_number_of_rows(monkeypatch, work, options):
    found = [largest(work, Forward(**options), length, monkeypatch) for length in (8, 32)]
    assert max(found) <= LIMIT < 9 * 8 * 10 * 500


def test_captured_steps_by_rows_are_those_of_whole_logits(monkeypatch):
    """As a GPU replays them; without one their operations run one by one."""
    (module, path), (inputs, labels, _) = line(Bare), tokens()

    def optimised():
        batches = [(inputs, labels)] * 2
        found = optimize(path, module, batches, steps=2, descent=plain(), cuda_graph=True)
        return found.interior

    whole = optimised()
    monkeypatch.setattr(logits, "LARGE", 5 * 60 * 4)
    torch.testing.assert_close(optimised(), whole, rtol=1e-12, atol=1e-14)
