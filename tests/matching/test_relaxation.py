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
    gained = relaxation.value(drawn) - relaxation.value(spec.identity())
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


def test_mixtures_on_a_line_are_worth_what_dense_matrices_make_of_them():
    """The value between two permutations is the quadratic of its ends and the gradient."""
    a, b = models.mlp(5, (4, 6), 3).double(), models.mlp(5, (4, 6), 3).double()
    spec = permutation_spec(a)
    relaxation = Relaxation(Objective(spec, a.state_dict(), b.state_dict()).assignment())
    start, end = (spec.random(torch.Generator().manual_seed(seed)) for seed in range(2))
    first, second = spec.channels

    def dense(t):
        """By definition, with the mixtures written out."""
        p, q = (
            sum(
                weight * torch.eye(len(own[name]), dtype=torch.float64)[own[name]]
                for weight, own in ((1 - t, start), (t, end))
            )
            for name in (first, second)
        )
        ones = [torch.eye(n, dtype=torch.float64) for n in (5, 3)]
        total = 0
        for i, (left, right) in enumerate([(p, ones[0]), (q, p), (ones[1], q)]):
            mixed = left @ b.layers[i].weight @ right.T
            total += (a.layers[i].weight * mixed).sum()
            total += (a.layers[i].bias * (left @ b.layers[i].bias)).sum() if i < 2 else 0
        return total.item()

    gradient = relaxation.gradient(start)
    slope = sum(
        (gradient[name][torch.arange(size), own[name]]).sum().item() * sign
        for sign, own in ((1, end), (-1, start))
        for name, size in relaxation.sizes.items()
    )
    square = relaxation.value(end) - relaxation.value(start) - slope
    for t in (0, 0.3, 1):
        found = relaxation.value(start) + slope * t + square * t**2
        assert found - relaxation.value(start) == pytest.approx(dense(t) - dense(0), abs=1e-5)
