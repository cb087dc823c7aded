"""Mixtures of permutations: worth what their permutations are worth, and better than one by one."""

import pytest
import torch
from conftest import tiny_resnet
from zoo import ZOO

from fastgeo import models, permutation_spec
from fastgeo.matching.pair import Objective
from fastgeo.matching.relaxation import Relaxation


@pytest.mark.parametrize("name", ["resnet-group", "gpt", "factors", "vgg"])
def test_the_value_of_permutations_is_the_inner_product_of_the_permuted_parameters(name):
    (member,) = [member for member in ZOO if member.name == name]
    a, b = member.make(1), member.make(2)
    spec = permutation_spec(a, member.inputs(2))
    objective = Objective(spec, a.state_dict(), b.state_dict())
    assignment, drawn = objective.assignment(), spec.random(torch.Generator().manual_seed(3))
    relaxation = Relaxation(assignment)
    matrices = {
        name: torch.eye(size)[assignment.positions(name, drawn).flatten()]
        for name, size in relaxation.sizes.items()
    }
    identity = {name: torch.eye(size) for name, size in relaxation.sizes.items()}
    gained = relaxation.value(matrices) - relaxation.value(identity)
    assert gained == pytest.approx(objective(drawn) - objective({}), rel=1e-4)


@pytest.mark.parametrize("name", ["mlp", "resnet-group", "gpt", "resnext-se"])
def test_a_planted_permutation_is_found_from_any_start(name):
    """From the permuted copy as it is, by the relaxation alone."""
    (member,) = [member for member in ZOO if member.name == name]
    module = member.make()
    spec, state = permutation_spec(module, member.inputs(2)), module.state_dict()
    hidden = spec.permute(state, spec.random(torch.Generator().manual_seed(1)))
    assignment = Objective(spec, state, hidden).assignment()
    Relaxation(assignment).ascend(100)
    found = spec.permute(hidden, assignment.permutations)
    torch.testing.assert_close(found, state, rtol=0, atol=0)


def test_the_relaxation_gains_on_what_it_starts_from():
    for a, b in (
        (tiny_resnet(seed=1), tiny_resnet(seed=2)),
        (models.mlp(12, (8, 6, 8), 5), models.mlp(12, (8, 6, 8), 5)),
    ):
        objective = Objective(permutation_spec(a), a.state_dict(), b.state_dict())
        assignment = objective.assignment()
        Relaxation(assignment).ascend(100)
        assert objective(assignment.permutations) > objective({})
