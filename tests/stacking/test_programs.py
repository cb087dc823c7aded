"""Random forwards of views and changes in place, stacked, against the loop over modules.

What shares memory in one network must share it among N, whatever layout the engine keeps them in,
also where it has to leave an operation or a layer to a loop.
"""

import random

import pytest
import torch
import torch.nn.functional as F
from conftest import clones
from torch import nn

from fastgeo import stack

NEW = [
    torch.sin,
    F.relu,
    torch.sigmoid,
    torch.clone,
    lambda v: v * 1.5,
    lambda v: v + v.mean(),
    lambda v: v.cumsum(0),
    lambda v: torch.cat([v, v])[: len(v)],
    lambda v: F.max_pool2d(v, 1) if v.ndim == 4 else v * 0.5,
]
IN_PLACE = [
    lambda v, o: v.mul_(2),
    lambda v, o: v.add_(o.mean()),
    lambda v, o: v.sub_(o.detach().mean()),
    lambda v, o: v.clamp_(-1, 1),
    lambda v, o: v.cumsum_(0),
    lambda v, o: v.zero_(),
    lambda v, o: v.fill_(0.1),
    lambda v, o: v.copy_(v.flip(0).detach()),
    lambda v, o: torch.relu_(v),
    lambda v, o: F.relu(v, inplace=True),
    lambda v, o: v.__setitem__(0, 0.5),
    lambda v, o: v.__setitem__(..., v.mean().detach()),
    lambda v, o: v.__setitem__(v > 0.5, 0.0),
]


def view(draw, v):
    """A view of a value, or a copy where one network has to make one."""
    axes, axis = list(range(v.ndim)), draw.randrange(v.ndim)
    size, order = v.shape[axis], draw.sample(axes, v.ndim)
    choices = [
        lambda: v.reshape(len(v), -1),
        lambda: v.ravel(),
        lambda: v.flatten(-2) if v.ndim > 1 else v,
        lambda: v.flatten(0, 1) if v.ndim > 1 else v,
        lambda: v.permute(order),
        lambda: v.transpose(order[0], order[-1]),
        lambda: v.movedim(0, -1),
        lambda: v.unsqueeze(axis),
        lambda: v.squeeze(),
        lambda: v.narrow(axis, 0, draw.randint(1, size)),
        lambda: v.chunk(2, axis)[0],
        lambda: v.split([1, size - 1], axis)[1] if size > 1 else v,
        lambda: v.unbind(axis)[-1] if v.ndim > 1 else v,
        lambda: v[(slice(None),) * axis + (slice(0, None, 2),)],
        lambda: v.contiguous(),
        lambda: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v,
        lambda: v.detach(),
        lambda: v.double(),
        lambda: F.dropout(v, 0.5, False),
        lambda: v.view_as(v),
    ]
    return draw.choice(choices)()


class Decides(nn.Module):
    """By numbers on which the networks differ, so that it runs in a loop; gives what it is given,
    a view of it, both, or changes it in place."""

    def forward(self, v, kind):
        if v.double().sum().item() > 1e9:
            return -v
        if kind == 3:
            v.mul_(0.5)
        return [v, v.flatten(), (v.T if v.ndim == 2 else v, v[0]), v][kind]


class Program(nn.Module):
    """Some values of the networks and some that they share, and ten random operations on them."""

    def __init__(self, seed):
        super().__init__()
        self.seed = seed
        self.first, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.decides = Decides()
        self.norm, self.scale = nn.GroupNorm(1, 4), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        draw = random.Random(self.seed)
        shared, own = (x * 1.0, torch.zeros(len(x), 4, 5, 6).to(x)), (self.first(x), x * self.scale)
        values = [draw.choice(shared), draw.choice(own), self.norm(self.first(x))]
        for _ in range(10):
            v, other, kind = draw.choice(values), draw.choice(values), draw.random()
            image = v.ndim == 4 and v.shape[1] == 4
            if kind < 0.4:
                values.append(view(draw, v))
            elif kind < 0.55:
                values.append(draw.choice(NEW)(v))
            elif kind < 0.65:
                values.append(draw.choice([self.conv, self.norm])(v) if image else v + 1)
            elif kind < 0.73:
                given = self.decides(v, draw.randrange(4))
                values += given if isinstance(given, tuple) else [given]
            elif kind < 0.76:
                values.append(v + other if v.shape == other.shape else v - 1)
            else:
                draw.choice(IN_PLACE)(v, other)
        return sum((i + 1) * v.double().sin().sum() for i, v in enumerate(values)) * torch.ones(2)


def gradients_of(outputs, parameters):
    if not outputs.requires_grad:
        return []
    return torch.autograd.grad(outputs.sum(), parameters, materialize_grads=True)


def equals_the_loop(seed):
    """Whether the loop ran at all, which autograd refuses now and then; fails if N networks in one
    pass give something else."""
    torch.manual_seed(seed)
    networks = clones(Program(seed).double(), 3)
    params, _ = torch.func.stack_module_state(networks)
    x = torch.randn(3, 1, 5, 6, dtype=torch.float64)
    own = [parameter for network in networks for parameter in network.parameters()]
    try:
        expected = torch.stack([network(x.clone()) for network in networks])
        loop = gradients_of(expected, own)
    except RuntimeError:
        return False
    got = stack(networks[0])(params, x)
    torch.testing.assert_close(got, expected, equal_nan=True)
    for i, gradient in enumerate(gradients_of(got, list(params.values()))):
        one = torch.stack(loop[i :: len(params)])
        torch.testing.assert_close(gradient, one, rtol=1e-6, atol=1e-8, equal_nan=True)
    return True


@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("block", range(8))
@pytest.mark.filterwarnings("ignore::UserWarning")  # of what runs through vmap or in a loop
def test_what_shares_memory_in_one_network_shares_it_among_many(block, enabled):
    with torch.set_grad_enabled(enabled):
        ran = [equals_the_loop(seed) for seed in range(25 * block, 25 * (block + 1))]
    assert sum(ran) >= 10
