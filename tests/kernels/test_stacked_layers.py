"""Layers of N stacked networks against the loop over networks, in float64."""

import pytest
import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    stacked_channel_norm,
    stacked_conv,
    stacked_conv_transpose,
    stacked_group_norm,
    stacked_layer_norm,
    stacked_linear,
    stacked_rms_norm,
)
from fastgeo_kernels.stacked import plain


def random(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_is_the_loop(stacked, one, x, *parameters, shared=False):
    """Equal outputs, and equal gradients to every input, under a random upstream gradient."""
    points = len(parameters[0])
    inputs = (x, *parameters)
    got = stacked(x.expand(points, *x.shape) if shared else x, *parameters)
    each = [x] * points if shared else x
    expected = torch.stack([one(*own) for own in zip(each, *parameters, strict=True)])
    upstream = random(*expected.shape, seed=2).detach()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


CONVOLUTIONS = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}
SIZE = (9, 8, 7)


@pytest.mark.parametrize("points", [1, 2, 3, 25])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "spatial, options",
    [
        (2, {}),
        (2, dict(stride=2, padding=1)),
        (2, dict(dilation=2)),
        (2, dict(groups=2)),
        (1, dict(padding="same")),
        (3, dict(padding=(1, 0, 1))),
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_stacked_conv_is_the_loop(monkeypatch, points, shared, spatial, options, alone):
    monkeypatch.setattr(plain, "_alone", lambda *_: alone and spatial == 2)
    x = random(*(() if shared else (points,)), 4, 6, *SIZE[:spatial])
    weight = random(points, 8, 6 // options.get("groups", 1), *(3,) * spatial)
    assert_is_the_loop(
        lambda x, w, b: stacked_conv(x, w, b, **options),
        lambda x, w, b: CONVOLUTIONS[spatial][0](x, w, b, **options),
        *(x, weight, random(points, 8)),
        shared=shared,
    )


@pytest.mark.parametrize("padding", [0, 1, (1, 2), "valid"])
@pytest.mark.parametrize("channels", [3, 24])
def test_a_strided_1x1_convolution_of_few_channels_is_the_loop(channels, padding):
    """In fp32 and channels-last, where oneDNN's own weight gradient overruns a buffer."""
    x, weight = random(3, 4, channels, 9, 8), random(3, 5, channels, 1, 1)
    lies = x.detach().permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2).float()
    leaves = [lies.requires_grad_(), weight.detach().float().requires_grad_()]
    got = stacked_conv(*leaves, stride=2, padding=padding)
    expected = torch.stack(
        [F.conv2d(*own, None, 2, padding) for own in zip(x, weight, strict=True)]
    )
    upstream = random(*expected.shape, seed=2).detach()
    found = [got, *torch.autograd.grad(got, leaves, upstream.float())]
    wanted = [expected, *torch.autograd.grad(expected, (x, weight), upstream)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_strided_1x1_convolution_that_is_safe_is_one_call_bit_for_bit():
    """Copies of what it reads would be rounded in another order, and a run would be another one."""
    x, weight = random(8, 75, 16, 16).float(), random(25, 4, 3, 1, 1).float()
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    expected = F.conv2d(leaves[0], leaves[1].flatten(0, 1), stride=2, groups=25)
    upstream = random(*expected.shape, seed=2).float().detach()
    wanted = [expected, *torch.autograd.grad(expected, leaves, upstream)]
    networks = leaves[0].unflatten(1, (25, 3)).transpose(0, 1)
    got = stacked_conv(networks, leaves[1], stride=2).transpose(0, 1).flatten(1, 2)
    found = [got, *torch.autograd.grad(got, leaves, upstream)]
    assert all(map(torch.equal, found, wanted))


def test_inputs_that_all_networks_share_are_taken_as_they_are():
    """Under as many networks as images, too, and no element of them is copied for a network."""
    x, weight, bias = random(3, 6, 9, 8), random(3, 8, 6, 3, 3), random(3, 8)
    got = stacked_conv(x, weight, bias)
    assert torch.equal(got, stacked_conv(x.expand(3, *x.shape), weight, bias))
    assert_is_the_loop(
        lambda x, w, b: stacked_conv(x[0], w, b), F.conv2d, x, weight, bias, shared=True
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stacked_conv(x, weight)
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), weight.numel()])


@pytest.mark.parametrize("shared", [False, True])
def test_images_that_are_convolved_by_network_stay_so_behind_a_norm(monkeypatch, shared):
    monkeypatch.setattr(plain, "_alone", lambda *_: True)
    x = random(*(() if shared else (3,)), 6, 4, 8, 7).requires_grad_()
    weight, factor = random(3, 5, 4, 3, 3), random(3, 5)
    y = stacked_conv(x, weight, padding=1)
    z = stacked_group_norm(y, 1, factor, factor, residual=y, relu=True)
    grad = torch.autograd.grad(z, y, z.detach(), retain_graph=True)[0]
    assert all(plain.lies_around(value) for value in (y, z, grad))
    each = [x] * 3 if shared else x.unbind(0)
    expected = torch.stack([F.conv2d(a, w, padding=1) for a, w in zip(each, weight, strict=True)])
    normed = [F.group_norm(a, 1, w, w) for a, w in zip(expected, factor, strict=True)]
    torch.testing.assert_close(z, F.relu(torch.stack(normed) + expected))


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize(
    "spatial, options",
    [(2, {}), (2, dict(stride=2, output_padding=1, groups=2)), (1, dict(dilation=2)), (3, {})],
)
def test_stacked_conv_transpose_is_the_loop(points, spatial, options):
    weight = random(points, 6, 8 // options.get("groups", 1), *(3,) * spatial)
    assert_is_the_loop(
        lambda x, w, b: stacked_conv_transpose(x, w, b, **options),
        lambda x, w, b: CONVOLUTIONS[spatial][1](x, w, b, **options),
        *(random(points, 4, 6, *SIZE[:spatial]), weight, random(points, 8)),
    )


@pytest.mark.parametrize("points", [1, 3, 25])
@pytest.mark.parametrize("inner", [(4,), (4, 5)])
def test_stacked_linear_is_the_loop(points, inner):
    x, weight, bias = random(points, *inner, 6), random(points, 7, 6), random(points, 7)
    assert_is_the_loop(stacked_linear, F.linear, x, weight, bias)


@pytest.mark.parametrize("points, groups", [(1, 1), (3, 1), (25, 2)])
def test_stacked_group_norm_is_the_loop(points, groups):
    assert_is_the_loop(
        lambda x, w, b: stacked_group_norm(x, groups, w, b),
        lambda x, w, b: F.group_norm(x, groups, w, b),
        *(random(points, 4, 6, 3, 3), random(points, 6), random(points, 6)),
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", ["group", "channel"])
def test_norms_with_a_sum_and_a_relu_behind_are_the_loop(kind, relu):
    def stacked(x, w, b, residual):
        if kind == "group":
            return stacked_group_norm(x, 1, w, b, residual=residual, relu=relu)
        return stacked_channel_norm(x, w, b, residual=residual, relu=relu)

    def one(x, w, b, residual):
        if kind == "group":
            y = F.group_norm(x, 1, w, b)
        else:
            y = F.layer_norm(x.movedim(1, -1), w.shape, w, b).movedim(-1, 1)
        return F.relu(y + residual) if relu else y + residual

    x, residual = random(3, 4, 6, 5, 5), random(3, 4, 6, 5, 5, seed=2)
    assert_is_the_loop(stacked, one, x, random(3, 6), random(3, 6, seed=3), residual)


@pytest.mark.parametrize("points", [1, 3, 25])
@pytest.mark.parametrize("shape", [(6,), (5, 6)])
def test_stacked_layer_and_rms_norm_are_the_loop(points, shape):
    x, weight, bias = random(points, 4, 5, 6), random(points, *shape), random(points, *shape)
    assert_is_the_loop(
        lambda x, w, b: stacked_layer_norm(x, shape, w, b),
        lambda x, w, b: F.layer_norm(x, shape, w, b),
        *(x, weight, bias),
    )
    assert_is_the_loop(
        lambda x, w: stacked_rms_norm(x, shape, w, 1e-3),
        lambda x, w: F.rms_norm(x, shape, w, 1e-3),
        *(x, weight),
    )


def test_stacked_layers_name_what_does_not_fit():
    with pytest.raises(
        ValueError, match=r"stacked_conv: x must have 5 dimensions, got \[4, 3, 8\]"
    ):
        stacked_conv(torch.zeros(4, 3, 8), torch.zeros(2, 5, 3, 3, 3))
    shared = r"what all N networks share is given as x.expand\(N, \*x.shape\)"
    with pytest.raises(ValueError, match=shared):
        stacked_conv_transpose(torch.zeros(4, 3, 8, 8), torch.zeros(2, 3, 5, 3, 3))
    with pytest.raises(ValueError, match=shared):
        stacked_linear(torch.zeros(4, 3), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=shared):
        stacked_group_norm(torch.zeros(4, 3, 8, 8), 1, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"stacked_conv: weight .* one to three .* \[2, 5, 3\]"):
        stacked_conv(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match=r"stacked_linear: weight .* N as in x \[2, 4, 3\]"):
        stacked_linear(torch.zeros(2, 4, 3), torch.zeros(3, 5, 3))


@pytest.mark.parametrize("size", [1, 3])
def test_weights_for_a_gpu_are_copied_once(size):
    """Of rows of many parameters: to channels-last, and not at all if they are that already."""
    rows = torch.randn(3, 1000)
    for flat in (rows[:, : 4 * 5 * size**2], rows.clone()[:, : 4 * 5 * size**2].contiguous()):
        weight = flat.unflatten(1, (4, size, size, 5)).movedim(-1, 2)
        got = plain._innermost(weight).flatten(0, 1)
        assert torch.equal(got, weight.flatten(0, 1))
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.data_ptr() == flat.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["conv", "conv_transpose", "linear"])
def test_products_in_half_precision_are_rounded_once(monkeypatch, dtype, layer):
    """Against float64 of the same halves: half a unit in the last place, and fp32's own errors."""
    monkeypatch.setattr(plain, "WIDENS", True)  # as on a CPU without AVX-512
    x, weight, bias = (
        random(*shape).detach().to(dtype).requires_grad_()
        for shape in {
            "conv": [(3, 4, 16, 8, 8), (3, 8, 16, 3, 3), (3, 8)],
            "conv_transpose": [(3, 4, 16, 8, 8), (3, 16, 8, 3, 3), (3, 8)],
            "linear": [(3, 4, 144), (3, 8, 144), (3, 8)],
        }[layer]
    )
    function = {
        "conv": stacked_conv,
        "conv_transpose": stacked_conv_transpose,
        "linear": stacked_linear,
    }[layer]
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    got, expected = function(x, weight, bias), function(*exact)
    upstream = random(*expected.shape, seed=2).detach().to(dtype)
    found = (got, *torch.autograd.grad(got, (x, weight, bias), upstream))
    wanted = (expected, *torch.autograd.grad(expected, exact, upstream.double()))
    close = dict(rtol=torch.finfo(dtype).eps / 2 + 1e-5, atol=2e-5)
    for tensor, reference in zip(found, wanted, strict=True):
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.double(), reference, **close)


def test_halves_and_singles_are_not_mixed():
    x, weight = torch.randn(3, 4, 6).bfloat16(), torch.randn(3, 5, 6)
    with pytest.raises(RuntimeError, match="BFloat16 but found Float"):
        stacked_linear(x, weight)
