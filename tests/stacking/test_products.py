"""A last linear layer that waits gives what it would have given, whatever the forward does."""

import pytest
import torch
from conftest import clones
from torch import nn

from fastgeo import stack
from fastgeo.stacking.products import Products


class Net(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.body, self.head, self.end = nn.Linear(4, 6), nn.Linear(6, 9), end

    def forward(self, x):
        return self.end(self.body(x), self.head)


def bounded(h, head):
    return (3 * torch.tanh(head(h) / 3)).double().contiguous()


def by_hand(h, head):
    """An activation that looks at what waits several times."""
    y = head(h)
    return 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.04 * torch.pow(y, 3.0))))


def in_place(h, head):
    y = head(h)
    doubled = 2 * y
    y.add_(1)
    return doubled + y.tanh_()


def behind_a_change(h, head):
    y = head(h)
    doubled = 2 * y
    y.add_(1)
    return doubled


def only_one(h, head):
    y = head(h)
    y[:, 0] = 0
    return y


def cut(h, head):
    return head(h)[..., :7]


def transposed(h, head):
    return h @ head.weight.t()


ENDS = [bounded, by_hand, in_place, behind_a_change, only_one, cut, transposed]
WAIT = {"stacked": {bounded, transposed}, "loop": {bounded, behind_a_change}}


@pytest.mark.parametrize("engine", ["stacked", "loop", "vmap"])
@pytest.mark.parametrize("end", ENDS)
def test_outputs_by_rows_are_the_outputs(engine, end):
    module = Net(end).double()
    networks, x = clones(module, 3), torch.randn(5, 2, 4).double()
    params, _ = torch.func.stack_module_state(networks)
    expected = torch.stack([network(x) for network in networks])
    network = stack(module, engine=engine)
    found = network.by_rows(params, x, 1)
    assert isinstance(found, Products) == (end in WAIT.get(engine, ()))
    got = found
    if isinstance(found, Products):
        got = torch.cat([one.value()[0] for one in found])
        assert got.dtype == found[0].dtype and got.shape[1:] == found[0].shape[1:]
        rows = torch.cat([one.rows(slice(1, 9, 3)) for one in found])
        torch.testing.assert_close(rows, expected.flatten(1, 2)[:, 1:9:3])
    torch.testing.assert_close(got, expected)
    to, upstream = list(params.values()), torch.randn_like(expected)
    gradients = torch.autograd.grad(got, to, upstream, materialize_grads=True)
    again = torch.autograd.grad(network(params, x), to, upstream, materialize_grads=True)
    torch.testing.assert_close(gradients, again)
    assert torch.equal(network.by_rows(params, x, 10 * 9), network(params, x))


def test_what_a_product_is_made_of_may_change_only_before_it_is_computed():
    """A stacked pass sees the change and computes it first; a loop does not, and says so."""

    def end(h, head):
        y = head(h)
        h.zero_()
        return y

    module, x = Net(end), torch.randn(5, 2, 4)
    params, _ = torch.func.stack_module_state(clones(module, 2))
    with torch.no_grad():
        expected = stack(module, engine="loop")(params, x)
        torch.testing.assert_close(stack(module).by_rows(params, x, 1), expected)
        (first, _) = stack(module, engine="loop").by_rows(params, x, 1)
        with pytest.raises(RuntimeError, match="changes in place what its last layer was given"):
            first.rows(slice(0, 2))
