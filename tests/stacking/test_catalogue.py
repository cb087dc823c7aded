"""Networks of transformers, timm and torchvision, and recurrent ones, stacked, against the loop."""

import pytest
import torch
from catalogue import CATALOGUE, TRANSFORMERS
from conftest import assert_trains_like_the_loop, clones
from torch.utils._pytree import tree_map

from fastgeo import stack

IN_FLOAT32 = ("llama", "mistral", "qwen3", "gemma", "mixtral", "vit-eager")  # norms or softmax
BY_VALUE = [entry for entry in TRANSFORMERS if entry.name in ("mixtral-eager", "mixtral-sdpa")]


def entries(chosen):
    """Those of all groups, with the group in the test's name."""
    return [
        pytest.param(entry, id=f"{group}-{entry.name}")
        for group, members in CATALOGUE.items()
        for entry in members
        if chosen(entry)
    ]


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_equals_the_loop(entry, x, per_point=False, points=3):
    """Outputs and gradients, to rounding of the largest number of a tensor; for gradients that are
    zero but for rounding also of the largest of all gradients."""
    module = entry.make()
    networks = clones(module, points)
    params, buffers = torch.func.stack_module_state(networks)
    network = stack(module, batchnorm="recalibrate")
    given = params | buffers if entry.batch_norm or not per_point else params  # or the module's own
    got = logits(network(given, x, per_point=per_point))
    assert network.engine == "stacked", network.reason
    each = []
    for i, net in enumerate(networks):
        own = tree_map(lambda t, i=i: t[i], x) if per_point else x
        each.append(logits(net(**own) if isinstance(own, dict) else net(own)))
    expected = torch.stack(each)
    rounding = 1e-6 if entry.name.startswith(IN_FLOAT32) else 1e-10
    torch.testing.assert_close(got, expected, rtol=0, atol=rounding * expected.abs().max().item())

    upstream = torch.randn_like(expected)
    own = [parameter for network in networks for parameter in network.parameters()]
    loop = torch.autograd.grad(expected, own, upstream)
    loop = [torch.stack(loop[i :: len(params)]) for i in range(len(params))]
    largest = max(gradient.abs().max().item() for gradient in loop)
    gradients = torch.autograd.grad(got, list(params.values()), upstream)
    for name, gradient, of_loop in zip(params, gradients, loop, strict=True):
        tolerance = rounding * (of_loop.abs().max().item() + 0.01 * largest)
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(gradient, of_loop, rtol=0, atol=tolerance, msg=message)
    return network


def not_stacked(network):
    """The lines of the calls that ran in another way."""
    lines = network.explain().splitlines()[1:]
    return [line for line in lines if {"vmap:", "loop:"} & set(line.split())]


@pytest.mark.parametrize("entry", entries(lambda entry: entry not in BY_VALUE))
def test_every_call_of_every_network_is_stacked_and_equals_the_loop(entry):
    assert not not_stacked(assert_equals_the_loop(entry, entry.inputs(2)))


@pytest.mark.parametrize("entry", entries(lambda entry: entry not in BY_VALUE))
def test_so_it_is_on_inputs_of_each_network_alone(entry):
    x = tree_map(lambda *t: torch.stack([own[:2] for own in t]), *map(entry.inputs, (2, 3, 4)))
    assert not not_stacked(assert_equals_the_loop(entry, x, per_point=True))


@pytest.mark.parametrize("entry", entries(lambda entry: entry.batch_norm))
def test_networks_with_batch_norm_train_like_the_loop(entry):
    draws = [entry.inputs(batch) for batch in (3, 4, 2)]
    network = assert_trains_like_the_loop(entry.make(), draws, 3, False)
    assert network.engine == "stacked" and not not_stacked(network)


@pytest.mark.parametrize("entry", BY_VALUE, ids=lambda entry: entry.name)
def test_experts_that_ask_for_their_tokens_run_in_loops_and_the_rest_is_stacked(entry):
    with pytest.warns(UserWarning, match="MixtralExperts runs in a loop over the networks"):
        network = assert_equals_the_loop(entry, entry.inputs(2))
    blocks = not_stacked(network)
    assert len(blocks) == 2  # one a layer; the line that asks is one of transformers'
    assert all(".mlp.experts " in line and "(modeling_mixtral.py:" in line for line in blocks)
