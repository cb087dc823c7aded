"""The layers' kernels under Triton's interpreter; `test_layer_kernels.py` runs this file in a
process with TRITON_INTERPRET=1. Grids are small: a program takes the interpreter 40 ms and more."""

import layer_claims as claims
import pytest
import torch
from fastgeo_kernels import launching, stacked_conv
from fastgeo_kernels.stacked import channel_norm, conv_kernels, group_norm, norm
from fastgeo_kernels.stacked.conv import OWN
from torch.utils._python_dispatch import TorchDispatchMode

from fastgeo import models, stack

assert launching.INTERPRETED, "set TRITON_INTERPRET=1"
pytestmark = pytest.mark.usefixtures("poisoned_outputs")

KINDS = ["group", "channel"]
NORM_SHAPES = [(1, 1, 1, 1, 1), (2, 2, 6, 3, 3), (3, 1, 17, 2, 5)]


@pytest.fixture
def tiles(monkeypatch):
    """Cuts every group into tiles of four pixels."""

    def cut(pixels, channels, backward, bytes_each):
        return group_norm.Tile(4, launching.power_of_two(channels), 1, False)

    monkeypatch.setattr(group_norm, "group_tile", cut)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("behind", claims.BEHIND, ids=str)
def test_norm_is_the_float64_definition(kind, shape, behind):
    claims.check_norm(kind, shape, *behind)


@pytest.mark.parametrize("behind", claims.BEHIND, ids=str)
def test_norm_of_a_group_in_tiles_is_the_float64_definition(tiles, behind):
    claims.check_norm("group", (2, 1, 6, 3, 3), *behind)
    claims.check_variance_is_no_difference_of_squares("group")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lay_out", [claims.networks_around, torch.clone])
def test_norm_in_other_layouts(kind, lay_out):
    claims.check_norm(kind, (2, 2, 6, 3, 3), True, True, lay_out=lay_out)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_beyond_the_last_block_change_nothing(kind, monkeypatch):
    """As there are where more than 65,535 blocks take a further axis of the grid."""
    for module in (group_norm, channel_norm):
        monkeypatch.setattr(module, "grid", lambda points, blocks: (points, blocks, 2))
    claims.check_norm(kind, (2, 2, 6, 3, 3), True, True)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_in_half_precision(kind):
    """The interpreter truncates where a GPU rounds, so that two units are allowed."""
    claims.check_norm(kind, (2, 2, 6, 3, 3), True, True, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("behind", claims.BEHIND, ids=str)
def test_gradients_of_two_uses_are_added_in_the_kernel(kind, behind):
    claims.check_norm_of_two_uses(kind, *behind)


@pytest.mark.parametrize("behind", claims.BEHIND, ids=str)
def test_gradients_of_two_uses_of_a_group_in_tiles(tiles, behind):
    how = dict(dtype=torch.bfloat16, lay_out=claims.networks_around)
    claims.check_norm_of_two_uses("group", *behind, **how)


class Sums(TorchDispatchMode):
    """How many sums of two large tensors there were."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += out.numel() >= 2 * 16 * 2 * 2
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_resnet_leaves_sums_of_gradients_to_its_norms(kind, monkeypatch):
    """All but those of two convolutions, where the number of channels changes; and what follows a
    norm is stacked, though inside of a level of vmap no kernel would run."""
    module = models.resnet(20, 0.25, in_channels=1, norm=kind)
    networks = [models.resnet(20, 0.25, in_channels=1, norm=kind) for _ in range(2)]
    params, _ = torch.func.stack_module_state(networks)
    x = claims.random(1, 1, 8, 8)

    def gradients():
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        network = stack(module)
        y = network(leaves, x)
        assert not network.not_stacked()
        with Sums() as sums:
            found = torch.autograd.grad(y.square().sum(), list(leaves.values()))
        return found, sums.count

    expected, usual = gradients()
    monkeypatch.setattr(norm, "use_triton", lambda *args: True)
    got, left = gradients()
    assert (left, usual) == (2, 9)
    for one, other in zip(got, expected, strict=True):
        claims.assert_close(one, other, 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_norm_has_its_digits_saves_little_and_keeps_a_nan(kind):
    claims.check_variance_is_no_difference_of_squares(kind)
    claims.check_norm_saves_its_input_and_statistics(kind)
    claims.check_norm_keeps_a_nan(kind)


def test_norm_of_many_pixels_has_several_programs(monkeypatch):
    """Rows of LayerNorm's parameter gradients are summed over programs, the last one not full."""
    monkeypatch.setattr(channel_norm, "PROGRAMS", 2)
    monkeypatch.setattr(channel_norm, "channel_tile", lambda c: group_norm.Tile(4, 8, 1, True))
    claims.check_norm("channel", (2, 3, 6, 2, 3), True, True)


# --- The update of a path -------------------------------------------------------------------------


@pytest.mark.parametrize("points, size", [(1, 3), (2, 300), (23, 9)])
@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("momentum, nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_path_update_is_the_float64_definition(points, size, precondition, momentum, nesterov):
    how = dict(precondition=precondition, momentum=momentum, nesterov=nesterov)
    claims.check_update(points, size, **how)


def test_path_update_of_126_points_keeps_its_digits():
    claims.check_update(126, 4)


def test_path_update_takes_half_precision_and_leaves_a_copy_in_it():
    claims.check_update(5, 9, dtype=torch.bfloat16, copy=torch.bfloat16, momentum=0.5)


# --- Convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, out, size, stride, lay_out",
    [
        ((2, 2, 5, 4, 4), 7, 3, 1, claims.channels_last),
        ((2, 1, 3, 6, 5), 4, 3, 2, claims.networks_around),
        ((1, 1, 18, 5, 4), 3, 1, 2, claims.networks_around),
        ((2, 1, 2, 1, 1), 2, 3, 1, claims.channels_last),
    ],
)
def test_conv_is_the_float64_definition(shape, out, size, stride, lay_out):
    claims.check_conv(OWN, shape, out, size, stride, lay_out=lay_out)


def test_conv_of_what_all_networks_share():
    claims.check_conv(OWN, (2, 2, 3, 4, 4), 5, 3, 1, shared=True)


def test_conv_in_several_tiles_and_slices(monkeypatch):
    """Channels beyond a tile, and slices of the batch that are added up."""
    blocks = conv_kernels.Blocks(16, 16, 16, 1)
    monkeypatch.setattr(conv_kernels, "conv_blocks", lambda *_: blocks)
    monkeypatch.setattr(conv_kernels, "weight_blocks", lambda *_: blocks)
    monkeypatch.setattr(conv_kernels, "PROGRAMS", 16)
    claims.check_conv(OWN, (1, 2, 18, 4, 4), 17, 1, 1)
    claims.check_conv(OWN, (1, 1, 5, 3, 3), 17, 3, 1)


def test_conv_in_half_precision():
    """The interpreter truncates where a GPU rounds, so that two units are allowed."""
    claims.check_conv(OWN, (2, 1, 5, 4, 4), 6, 3, 1, dtype=torch.bfloat16)


def test_conv_with_a_bias_is_the_plain_one():
    x, weight, bias = claims.random(2, 1, 3, 4, 4), claims.random(2, 5, 3, 3, 3), torch.ones(2, 5)
    got = stacked_conv(x, weight, bias, padding=1, impl="triton")
    torch.testing.assert_close(got, stacked_conv(x, weight, bias, padding=1, impl="torch"))
