"""Chunks of a path give the same step, in as many forward passes, with two of them alive."""

import pytest
import torch
from conftest import images, plain, settings, tiny_resnet
from torch import nn

from fastgeo import Forward, Path, optimize, stack
from fastgeo.forward.options import bytes_of
from fastgeo.stacking.module import StackedModule
from fastgeo.step import energy
from fastgeo.step.energy import EndLogits, energy_and_gradient
from fastgeo.step.engines import Engine
from fastgeo.step.memory import activation_bytes


def step(path, module, x, engine, chunk):
    """Energies and gradients of one step."""
    way = Engine(stack(module, engine=engine), chunk)
    trained = {name: name for name, _ in module.named_parameters()}
    return energy_and_gradient(path, way, x, trained, EndLogits(path)(x, x, way))


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 9])
def test_chunks_give_the_same_energies_and_gradient(module, engine, chunk):
    path = Path.linear(tiny_resnet(seed=1), tiny_resnet(seed=2), 9)
    expected = step(path, module, images(), "loop", None)
    got = step(path, module, images(), engine, chunk)
    torch.testing.assert_close(got, expected)


@pytest.fixture
def passes(monkeypatch):
    """How many networks each forward pass evaluated."""
    counts = []
    call = StackedModule.__call__

    def counted(self, params, *args, **kwargs):
        counts.append(len(next(iter(params.values()))))
        return call(self, params, *args, **kwargs)

    monkeypatch.setattr(StackedModule, "__call__", counted)
    return counts


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 5, 7])
def test_every_network_is_evaluated_once_a_step(path, module, passes, chunk):
    step(path, module, images(), "stacked", chunk)
    assert sum(passes) == len(path)
    assert max(passes) <= max(chunk or 5, 1)


@pytest.mark.parametrize("chunk, most", [(None, 1), (5, 1), (3, 2), (2, 2), (1, 2)])
def test_at_most_two_chunks_are_alive(path, module, monkeypatch, chunk, most):
    alive, counts = set(), []

    class Chunk(energy._Chunk):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            counts.append(len(alive))

        def backward(self):
            alive.remove(self)
            return super().backward()

    monkeypatch.setattr(energy, "_Chunk", Chunk)
    step(path, module, images(), "stacked", chunk)
    assert max(counts) == most


def test_logits_of_the_ends_are_kept_while_the_inputs_stay_as_they_are(path, module, passes):
    array = images().numpy().copy()
    first, second, aliased = images(), images(seed=4), torch.from_numpy(array)
    ends, engine = EndLogits(path), Engine(stack(module))

    def evaluated(x):
        passes.clear()
        got = ends(x, x, engine)
        kept = not passes
        fresh = EndLogits(path)(x, x, engine)
        torch.testing.assert_close(got.of(), fresh.of(), rtol=0, atol=0)
        return not kept

    assert evaluated(first) and evaluated(second) and evaluated(aliased)
    assert not evaluated(first) and not evaluated(second) and not evaluated(aliased)
    first += 1
    array += 1  # which leaves no trace in the tensor's version
    assert evaluated(first) and not evaluated(second) and evaluated(aliased)
    kept = len(ends.known)
    del second
    assert len(ends.known) == kept - 1
    with torch.inference_mode():
        unversioned = images(seed=5)
    assert evaluated(unversioned) and evaluated(unversioned)


def test_more_than_the_cache_holds_is_computed_anew(path, module, passes, monkeypatch):
    monkeypatch.setattr(energy, "MOST_CACHED", images().nbytes + 1000)
    ends, engine, batches = EndLogits(path), Engine(stack(module)), [images(), images(seed=4)]
    for x in batches * 2:
        ends(x, x, engine)
    assert passes == [2, 2, 2]


@pytest.mark.parametrize("engine", ["stacked", "loop"])
def test_activation_bytes_are_those_that_autograd_keeps(engine):
    module = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))
    params = {name: tensor[None] for name, tensor in module.named_parameters()}
    network = stack(module, engine=engine)
    # The rectified layer, for itself and for the layer that reads it, and the logits.
    assert activation_bytes(network, params, torch.randn(10, 64)) == 4 * 10 * (16 + 5)


@pytest.mark.parametrize(
    "given, size", [("8GiB", 2**33), ("500 MB", 5 * 10**8), ("2kib", 2048), (1000, 1000), ("7B", 7)]
)
def test_sizes_are_read(given, size):
    assert bytes_of(given) == size


@pytest.mark.parametrize("given", ["", "GiB", "8 apples", "-1GiB", "1.2.3GB", 0, "0.1"])
def test_what_is_no_size_is_refused(given):
    with pytest.raises(ValueError, match="a memory budget is a size as in 8GiB"):
        bytes_of(given)


def test_a_memory_budget_chooses_the_chunk(module):
    path, x, choices = Path.linear(tiny_resnet(1), tiny_resnet(2), 9), images(), []
    params = {name: tensor[None] for name, tensor in path.start.items()}
    each = activation_bytes(stack(module), params, x)

    def chunk_for(budget):
        optimize(
            *(path, module, [x]),
            on_choice=choices.append,
            descent=plain(),
            forward=Forward(engine="stacked", channels_last=False, memory_budget=budget),
        )
        return choices[-1]["chunk"]

    assert [chunk_for(2 * k * each) for k in (1, 2, 3)] == [1, 2, 3]
    assert chunk_for(6 * each + 1) == 3 and chunk_for(6 * each - 1) == 2
    assert chunk_for(7 * each) is None  # all seven interior points fit
    with pytest.raises(ValueError, match="memory_budget .* too small: the activations of one"):
        chunk_for(2 * each - 1)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(chunk=2, memory_budget="1GiB"), "give one of them"),
    ],
)
def test_contradictory_bounds_are_refused(path, module, options, words):
    with pytest.raises(ValueError, match=words):
        optimize(path, module, [images()], **settings(**options))
