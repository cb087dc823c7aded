"""Permutations leave the function alone, and matching finds them."""

import itertools

import pytest
import torch
from conftest import images, tiny_resnet
from torch import nn

from fastgeo import match, models
from fastgeo.permutation import permutation_axes, permute, random_permutations


def networks():
    torch.manual_seed(0)
    return {
        "group": tiny_resnet(norm="group"),
        "channel": tiny_resnet(norm="channel"),
        "deep": models.resnet(14, 0.5, in_channels=1, num_classes=5).double(),
        "mlp": models.mlp(64, (16, 12, 16), 5).double(),
    }


def shaken(module, seed=0):
    """Norm weights and biases away from 1 and 0, so that a wrong permutation of them shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.2 * noise
    return module


@pytest.mark.parametrize("name", networks())
def test_permuted_network_computes_the_same_function(name):
    module = shaken(networks()[name])
    state, x = module.state_dict(), images()
    axes = permutation_axes(state)
    for seed in range(3):
        draw = random_permutations(axes, state, torch.Generator().manual_seed(seed))
        permuted = permute(axes, draw, state)
        assert any(not torch.equal(permuted[key], state[key]) for key in state)
        out = torch.func.functional_call(module, permuted, (x,))
        torch.testing.assert_close(out, module(x))


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("noise", [0, 0.01])
def test_matching_recovers_a_random_permutation_exactly(name, noise):
    state = shaken(networks()[name]).state_dict()
    axes = permutation_axes(state)
    draw = random_permutations(axes, state, torch.Generator().manual_seed(1))
    hidden = permute(axes, draw, state)
    hidden = {key: tensor + noise * torch.randn_like(tensor) for key, tensor in hidden.items()}
    matching = match(state, hidden)
    for key, permutation in matching.permutations.items():
        assert torch.equal(draw[key][permutation], torch.arange(len(permutation))), key
    if not noise:
        torch.testing.assert_close(matching.state_dict, state, rtol=0, atol=0)


def test_objective_is_the_inner_product_and_never_falls():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    matching = match(a, b)

    def inner(x, y):
        return sum((x[key] * y[key]).sum().item() for key in x)

    assert matching.objective_before == pytest.approx(inner(a.state_dict(), b.state_dict()))
    assert matching.objective_after == pytest.approx(inner(a.state_dict(), matching.state_dict))
    reached = [match(a, b, max_sweeps=sweeps).objective_after for sweeps in range(1, 8)]
    assert matching.objective_before < reached[0]
    assert all(low <= high for low, high in itertools.pairwise(reached))


def test_matching_stops_where_no_single_permutation_gains():
    """The result is a fixed point, and one hidden layer is matched optimally (brute force)."""
    a, b = models.mlp(6, (5,), 3).double(), models.mlp(6, (5,), 3).double()
    best = -torch.inf
    axes = permutation_axes(a.state_dict())
    for order in itertools.permutations(range(5)):
        permuted = permute(axes, {"layers.0": torch.tensor(order)}, b.state_dict())
        best = max(best, sum((p * permuted[k]).sum().item() for k, p in a.named_parameters()))
    assert match(a, b).objective_after == pytest.approx(best, rel=1e-12)

    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    matching = match(a, b)
    assert matching.sweeps < 30
    again = match(a, matching.state_dict, seed=5)
    assert again.sweeps == 1 and again.objective_after == again.objective_before


def test_the_seed_decides_the_result():
    a, b = models.resnet(14, 1), models.resnet(14, 1)
    first, second = match(a, b, seed=3), match(a, b, seed=3)
    assert all(torch.equal(first.state_dict[k], second.state_dict[k]) for k in first.state_dict)
    assert len({match(a, b, seed=seed).objective_after for seed in range(4)}) > 1


def test_modules_and_their_states_are_left_alone():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    before = {key: tensor.clone() for key, tensor in b.state_dict().items()}
    matched = match(a, b).state_dict
    torch.testing.assert_close(b.state_dict(), before, rtol=0, atol=0)
    b.load_state_dict(matched)


def test_unknown_networks_and_bad_arguments_are_named():
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="resnet and mlp only, got Sequential"):
        match(other, other)
    with pytest.raises(ValueError, match="resnet and mlp only, and 0.weight is not as it is"):
        match(other.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="conv1.weight has shape"):
        match(models.resnet(8, 1), models.resnet(8, 2))
    with pytest.raises(ValueError, match="sweeps must be at least 1, got 0"):
        match(tiny_resnet(), tiny_resnet(), max_sweeps=0)
    with pytest.raises(TypeError, match="got int"):
        match(1, 2)


def test_states_that_only_resemble_the_models_are_refused():
    mlp, resnet = models.mlp(6, (5,), 3).state_dict(), tiny_resnet().state_dict()
    for state, name in (
        (mlp | {"layers.2.bias": torch.ones(2)}, "layers.2.weight"),
        ({"layers.0.weight": torch.ones(4, 3), "layers.1.bias": torch.ones(2)}, "layers.0.bias"),
        (mlp | {"layers.1.weight": torch.ones(5)}, "layers.1.weight"),
        (mlp | {"layers.0.bias": torch.ones(4)}, "layers.0.bias"),
        (resnet | {"extra": torch.ones(3)}, "extra"),
    ):
        with pytest.raises(ValueError, match=f"{name} is not as it is in either"):
            match(state, state)
