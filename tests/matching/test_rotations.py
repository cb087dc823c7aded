"""Matching by all symmetries finds planted maps, never loses, and leaves both ends' functions."""

import itertools

import pytest
import torch
from catalogue import DECODER, configured
from torch import Tensor
from torch.func import functional_call
from zoo import ViT

from fastgeo import Path, match, models
from fastgeo.matching.folding import folded
from fastgeo.symmetry.derive import Symmetries
from fastgeo.symmetry.mixing import with_mixing


def llama():
    options = DECODER | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    return configured("LlamaForCausalLM", "LlamaConfig", options)


NETWORKS = {
    "gpt-layer": (lambda: models.gpt(50, 8, 2, 0.25), lambda: torch.randint(50, (2, 8))),
    "gpt-rms": (lambda: models.gpt(50, 8, 2, 0.25, norm="rms"), lambda: torch.randint(50, (2, 8))),
    "llama": (llama, lambda: {"input_ids": torch.randint(20, (2, 7))}),
    "vit": (ViT, lambda: torch.rand(2, 3, 8, 8).double()),
}


def network(name, seed=0):
    """With norms whose weights are not 1."""
    torch.manual_seed(seed)
    make, inputs = NETWORKS[name]
    module = make().eval().double()
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module, inputs()


def distance(x, y):
    return sum((x[name] - y[name]).square().sum() for name in x).sqrt().item()


def logits(module, state, inputs):
    args, kwargs = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), inputs)
    with torch.no_grad():
        out = functional_call(module, dict(state), args, kwargs)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", NETWORKS)
def test_planted_maps_are_found(name):
    """Rotations and permutations, and any invertible maps within heads."""
    module, inputs = network(name)
    spec, state = with_mixing(Symmetries(module, inputs), ()), module.state_dict()
    generator = torch.Generator().manual_seed(1)
    hidden = spec.permute(folded(spec, state), spec.random(generator))
    for channels, mixing in spec.mixed.items():
        if mixing.sides is not None:  # balancing undoes what is not orthogonal
            size = spec.channels[channels].size
            matrix = torch.randn(size, size, generator=generator).double()
            inverse = torch.linalg.inv(matrix).T
            for i, side in mixing.sides.items():
                block = spec.blocks[i]
                part = block.of(hidden[block.tensor])
                axis = block.axes.index(channels)
                mixed = torch.tensordot(matrix if side else inverse, part, dims=([1], [axis]))
                part.copy_(mixed.movedim(0, axis))
    was, now = logits(module, state, inputs), logits(module, hidden, inputs)
    torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-5)
    matching = match(state, hidden, inputs, module=module, symmetries="all", restarts=1)
    assert distance(matching.a, matching.state_dict) < 1e-9
    permuted = match(state, hidden, inputs, module=module, restarts=1)
    assert distance(state, permuted.state_dict) > 1


@pytest.mark.parametrize("name", ["gpt-layer", "llama"])
def test_both_ends_compute_what_they_did(name):
    a, inputs = network(name)
    b, _ = network(name, seed=1)
    matching = match(a, b, inputs, symmetries="all", restarts=1, max_sweeps=2)
    for module, state in ((a, matching.a), (b, matching.module.state_dict())):
        was = logits(module, module.state_dict(), inputs)
        torch.testing.assert_close(logits(module, state, inputs), was, rtol=1e-5, atol=1e-5)
        assert distance(module.state_dict(), state) > 1
    middle = Path.linear(matching.a, matching.module, 3)
    assert middle.at(0.5).keys() == a.state_dict().keys()


def test_the_objective_never_falls_and_is_above_that_of_permutations():
    a, inputs = network("gpt-rms")
    b, _ = network("gpt-rms", seed=1)
    reached = [match(a, b, inputs, symmetries="all", restarts=1, max_sweeps=n) for n in range(1, 6)]
    after = [matching.objective_after for matching in reached]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(after))
    for matching in reached:
        permutations, *rotations = matching.objectives
        assert min(rotations[0], matching.objective_after) > permutations
    inner = sum((matching.a[k] * matching.state_dict[k]).sum().item() for k in matching.a)
    assert matching.objective_after == pytest.approx(inner)


def test_permutations_are_the_default_and_leave_a_alone():
    a, inputs = network("gpt-rms")
    b, _ = network("gpt-rms", seed=1)
    matching = match(a, b, inputs, restarts=1, max_sweeps=1)
    assert all(torch.equal(matching.a[name], own) for name, own in a.state_dict().items())
    assert not matching.spec.mixed and not matching.spec.folds


def test_states_keep_their_types():
    a, inputs = network("gpt-layer")
    a = a.float()
    matching = match(a, a, inputs, symmetries="all", restarts=1, max_sweeps=1)
    states = (matching.a, matching.state_dict)
    assert {t.dtype for state in states for t in state.values()} == {torch.float32}
    assert distance(*states) < 1e-4


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"symmetries": "some"}, "symmetries must be one of permutation, all, got 'some'"),
        ({"symmetries": "all", "method": "activations"}, "matched by weights only"),
    ],
)
def test_what_is_not_offered_is_refused(wrong, says):
    a, inputs = network("gpt-rms")
    with pytest.raises(ValueError, match=says):
        match(a, a, inputs, **wrong)
