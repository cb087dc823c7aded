"""Every network of the zoo, stacked, against the loop over modules, in float64."""

import pytest
import torch
from conftest import assert_equals_the_loop, assert_trains_like_the_loop
from zoo import BATCH_NORM, ZOO

from fastgeo import stack


@pytest.mark.parametrize("member", ZOO, ids=lambda member: member.name)
@pytest.mark.parametrize("points, per_point", [(1, False), (3, False), (3, True)])
def test_the_zoo_equals_the_loop(member, points, per_point):
    inputs = member.inputs(4)
    if per_point:
        draws = [member.inputs(4), member.inputs(5), member.inputs(6)]
        inputs = torch.utils._pytree.tree_map(lambda *t: torch.stack([x[:4] for x in t]), *draws)
    assert_equals_the_loop(member.make(), inputs, points, per_point)


@pytest.mark.parametrize("member", ZOO, ids=lambda member: member.name)
def test_every_operation_of_the_zoo_has_a_stacked_form(member):
    network, inputs = stack(member.make()), member.inputs(2)
    params, _ = torch.func.stack_module_state([member.make()] * 2)
    network(params, inputs)
    ways = network.explain().splitlines()[1:]
    assert not [line for line in ways if "vmap" in line or "loop" in line]


@pytest.mark.parametrize("member", BATCH_NORM, ids=lambda member: member.name)
@pytest.mark.parametrize("points, per_point", [(1, False), (3, False), (3, True)])
def test_networks_with_batch_norm_train_like_the_loop(member, points, per_point):
    draws = [member.inputs(batch) for batch in (6, 7, 8)]
    if per_point:
        draws = [torch.stack([x[i : i + 4] for i in range(points)]) for x in draws]
    network = assert_trains_like_the_loop(member.make(), draws, points, per_point)
    assert network.engine == "stacked"
    assert not {"vmap:", "loop:"} & set(network.explain().split())


@pytest.mark.parametrize("name", ["transformer", "padded-encoder"])
def test_equal_networks_train_on_dropout_of_their_own(name):
    (member,) = [member for member in ZOO if member.name == name]
    module, x = member.make().train(), member.inputs(4)
    params = {name: torch.stack([p] * 2) for name, p in module.named_parameters()}
    first, second = stack(module)(params, x)
    assert not torch.equal(first, second)


def test_a_tied_weight_has_the_sum_of_the_gradients_of_its_uses():
    (gpt,) = [member for member in ZOO if member.name == "gpt"]
    network, tokens = gpt.make(), gpt.inputs(4)
    stacked, _ = torch.func.stack_module_state([network] * 2)
    assert "head.weight" not in stacked  # one weight, under the first of its names
    got = stack(network)(stacked, tokens)[1]
    untied = gpt.make()
    untied.head.weight = torch.nn.Parameter(untied.embed.weight.detach().clone())
    of_head, of_embedding = torch.autograd.grad(
        untied(tokens).square().sum(), (untied.head.weight, untied.embed.weight)
    )
    (gradient,) = torch.autograd.grad(got.square().sum(), [stacked["embed.weight"]])
    torch.testing.assert_close(gradient[1], of_head + of_embedding)


def test_the_row_of_padding_has_no_gradient():
    (member,) = [member for member in ZOO if member.name == "text-cnn"]
    network, tokens = member.make(), member.inputs(4)
    assert (tokens == 0).any()
    params, _ = torch.func.stack_module_state([network] * 3)
    (gradient,) = torch.autograd.grad(
        stack(network)(params, tokens).sum(), [params["embed.weight"]]
    )
    assert (gradient[:, 0] == 0).all() and (gradient[:, 1:] != 0).any()
