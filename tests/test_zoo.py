"""Every network of the zoo, stacked, against the loop over modules, in float64."""

import pytest
import torch
from conftest import assert_equals_the_loop
from zoo import ZOO

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
    others = [line for line in ways if "vmap" in line or "loop" in line]
    assert not others if member.native else others
