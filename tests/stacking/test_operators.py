"""Single operations on stacked values against the loop over modules, in float64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals_the_loop, clones, images
from torch import nn
from torch.utils._pytree import tree_leaves

from fastgeo import stack
from fastgeo.forward.standin import TABLE, Operation


class Body(nn.Module):
    """A convolution and a linear head around some function of the features [B, 4, 6, 6]."""

    def __init__(self, function, layer=None):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.layer = layer or nn.Identity()
        self.head = nn.Linear(144, 5)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self.conv(x), self.layer).flatten(1))


BEHIND_N = [  # of [B, 4, 6, 6] features
    lambda x, layer: x + x.mean(0),  # [B, C, H, W] + [C, H, W]
    lambda x, layer: x + x.mean((2, 3), keepdim=True),
    lambda x, layer: x + x.mean((-1, -2), True),
    lambda x, layer: x + x.mean(),
    lambda x, layer: torch.mean(x, dim=1, keepdim=True) + x,
    lambda x, layer: x - x.sum(1, keepdim=True) / x.amax((2, 3), keepdim=True),
    lambda x, layer: 2 + (x + 1),
    lambda x, layer: torch.add(x, x, alpha=2),
    lambda x, layer: 1 / (2 - x.sigmoid()) ** 2 * torch.where(x > 0, x, -x),
    lambda x, layer: torch.flatten(input=x, start_dim=2),
    lambda x, layer: layer.weight * x.permute(0, 2, 3, 1),
    lambda x, layer: (layer.weight.exp() + layer.bias)[:, None, None] * x,
    lambda x, layer: x.permute(0, 3, 1, -2).reshape(12, -1),
    lambda x, layer: (x.permute((0, 2, 3, 1)) @ layer.weight[:, None]).repeat(1, 1, 1, 4),
    lambda x, layer: x.transpose(1, -1).matmul(x.mean(1)[:, None, :4, :4]),
    lambda x, layer: torch.bmm(x.flatten(2), x.flatten(2).transpose(1, 2)).repeat(1, 1, 9),
    lambda x, layer: x.view(x.size(0), -1),
    lambda x, layer: x.view((x.shape[0], 2, 2, 36)),
    lambda x, layer: x.reshape(-1, 6).unflatten(0, (12, -1)),
    lambda x, layer: x.unsqueeze(1).squeeze(1).unsqueeze(-1),
    lambda x, layer: torch.cat([x[:, 1:], x[:, :1]], dim=1),
    lambda x, layer: torch.cat([x, torch.zeros(12, 4, 6, 6, dtype=x.dtype)], 1)[:, 2:6],
    lambda x, layer: torch.stack([x[:, 0], x[:, 1]], 1).repeat(1, 2, 1, 1),
    lambda x, layer: torch.cat([x.chunk(2, 1)[1] * 2, x.chunk(2, 1)[0]], 1),
    lambda x, layer: x.split([1, 3], dim=1)[1].sum(1, keepdim=True) + x,
    lambda x, layer: x.chunk(2, -1)[0].contiguous().view(12, -1).repeat(1, 2),
    lambda x, layer: x[:, :, None, 0].expand(-1, -1, 6, -1),
    lambda x, layer: x[..., 0, :].unsqueeze(2).expand(12, 4, 6, 6),
    lambda x, layer: x[:, [3, 1, 0, 2]],
    lambda x, layer: x[:, torch.tensor([3, 1, 0, 2])],
    lambda x, layer: x[torch.arange(12), torch.arange(12) % 4].repeat(1, 4, 1),
    lambda x, layer: x[:, 0, torch.tensor([3, 1, 0, 2])].repeat(1, 6, 1),
    lambda x, layer: x[torch.arange(12), :, torch.arange(12) % 6].repeat(1, 1, 6),
    lambda x, layer: x[[0] * 12, :, [5]].repeat(1, 1, 6),
    lambda x, layer: x[:, layer.bias.argsort()],
    lambda x, layer: torch.eye(4).double()[x.argmax(1)].mT,
    lambda x, layer: x[..., torch.ones(6).bool()],
    lambda x, layer: x.softmax(1) + F.log_softmax(x, -1),
    lambda x, layer: torch.softmax(x, -1, torch.float32).double() + x.log_softmax(1, x.dtype),
    lambda x, layer: F.softmax(x, 1, 3, torch.float32) + x.double(),
    lambda x, layer: x.cumsum(1),
    lambda x, layer: x.max(1, keepdim=True)[0] + x,
    lambda x, layer: torch.einsum("bchw,c->bchw", x, layer.bias + 1),
    lambda x, layer: torch.einsum("b c h w, c -> b h w", [x, layer.weight]).repeat(1, 4, 1),
    lambda x, layer: torch.einsum("...w,zw->...z", x, torch.eye(6, dtype=x.dtype)[[1, 0, 2] * 2]),
    lambda x, layer: (x @ x.mean((0, 1, 2)) + x.mean((0, 1, 2)) @ x.mT)[..., None] * x,
    lambda x, layer: x + (x.sum((2, 3)) @ layer.weight)[:, None, None, None],
    lambda x, layer: x + x[0, 0, 0] @ x[1, 1, 1],
    lambda x, layer: torch.mm(x.flatten(1), x[:, 0].flatten(1).T.repeat(4, 12)),
    lambda x, layer: x[:, :, 0].max() + x * x.min(),
    lambda x, layer: torch.max(x, x.mean(1, True)) * torch.min(x, torch.zeros(6, dtype=x.dtype)),
    lambda x, layer: x.max(dim=-1, keepdim=True).values + x - torch.min(x, 1)[0][:, None],
    lambda x, layer: (x + torch.max(x, 1).indices[:, None]).view_as(x).flatten(2),
    lambda x, layer: layer.bias[None, :, None, None].expand_as(x) * x,
    lambda x, layer: torch.ones(4, 1, 1, dtype=x.dtype).expand_as(x) * x.reshape_as(x.mT),
    lambda x, layer: F.pad(x, (1, 1, 2, 0))[:, :, :6, :6],
    lambda x, layer: F.pad(x, (1, 1, 2, 0), mode="reflect")[:, :, :6, :6],
    lambda x, layer: F.max_pool2d(x, 2).repeat(1, 1, 2, 2),
    lambda x, layer: (F.max_pool2d(x, 2, return_indices=True)[1] + x[:, :, :3, :3]).repeat(
        1, 1, 2, 2
    ),
    lambda x, layer: F.avg_pool2d(x, 3, 1, 1),
    lambda x, layer: F.adaptive_avg_pool2d(x, 1) + x,
    lambda x, layer: F.interpolate(x[:, :, :3, :3], scale_factor=2, mode="bilinear"),
    lambda x, layer: F.normalize(x, dim=1),
    lambda x, layer: x.to(torch.float64).type_as(x).masked_fill(x > 0, 0.5),
    lambda x, layer: x * (torch.ones(12, 1, 1, 1) > 0).type_as(x),
    lambda x, layer: x + torch.arange(x.shape[-1], dtype=x.dtype, device=x.device),
    lambda x, layer: F.gelu(F.silu(F.leaky_relu(x, 0.2)), approximate="tanh"),
    lambda x, layer: x * ((x > 0) & (x < 1)) - x * ((x > 1) | ~(x > 0)),
    lambda x, layer: torch.relu_(x * 2),
    lambda x, layer: (x * 2).clamp_(-1, 1).mul_(3),
]


def assert_stacked(network):
    assert not {"vmap:", "loop:"} & set(network.explain().split()), network.explain()


@pytest.mark.parametrize("function", BEHIND_N)
@pytest.mark.parametrize("points", [3, 12])  # 12 is also the batch, so a wrong broadcast would fit
def test_shapes_and_arguments_behind_n(function, points):
    module = Body(function, nn.LayerNorm(4)).double()
    assert_stacked(assert_equals_the_loop(module, images(), points, False))


class Bare(Body):
    """All that a function of the features [B, 4, 6, 6] gives, of any shapes."""

    def forward(self, x):
        x = self.conv(x)
        given = tree_leaves((x, self.function(x, self.layer)))
        return torch.cat([value.double().flatten() for value in given])[None]


S = torch.randn(12, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
PLACES = torch.tensor([3, 0, 1])


def places(x, count=3):
    """A few different integers below 4, others in each network."""
    return x[0, 0, 0, :4].argsort()[:count]


def after(change, x, *given):
    x = x.clone()
    change(x, *given)
    return x


put = torch.Tensor.__setitem__
ANYWHERE = [  # shared tensors in any position, axes from either end, names of arguments
    lambda x, w: torch.addmm(w.bias, S[0, 0, :, :4], x[0, 0, :4, :4]),
    lambda x, w: torch.addmm(S[0, 0, 0, :4], x[0, 0, :, :4], S[0, 0, :4, :4]),
    lambda x, w: torch.addmm(input=x[0, 0], mat2=S[0, 0], mat1=x[1, 0], beta=0.5, alpha=2),
    lambda x, w: (x[0, 0].addmm(x[1, 0], S[0, 0], beta=0), x[0, 0, 0].addmv(S[0, 0], x[1, 1, 0])),
    lambda x, w: (x[0].baddbmm(S[0], x[1]), x[0, 0].addbmm(S[0], x[1], alpha=3)),
    lambda x, w: (torch.outer(w.weight, S[0, 0, 0]), S[0, 0, 0].outer(w.bias)),
    lambda x, w: (x.split([1, 3], dim=1), torch.split(x, 5), x.split(4, -1), x.chunk(chunks=3)),
    lambda x, w: (x.tensor_split(4, dim=-1), torch.tensor_split(x, (1, 5), 2), x.hsplit([3])),
    lambda x, w: (torch.hsplit(w.bias, 2), w.bias.split(3), x.unbind(), x.unbind(-3), list(x[0])),
    lambda x, w: torch.cat([torch.zeros(0).double(), x], 1) + torch.cat([x[0, 0, 0, :0], x], -1),
    lambda x, w: (torch.cat([w.bias, w.bias[:0]]), torch.cat((S, x), axis=-2)),
    lambda x, w: (torch.stack([x, S], -1), torch.stack([x.sum(), w.bias.sum()])),
    lambda x, w: (x.roll(1, 1), torch.roll(x, (1, 2), (0, -1)), x.roll(shifts=3, dims=2)),
    lambda x, w: (F.normalize(x), F.normalize(x, p=3, dim=-1), F.normalize(w.bias, dim=0)),
    lambda x, w: (x.norm(), x.norm(dim=1), x.norm(2, -1, True), torch.norm(x, p=1, dim=(0, 2))),
    lambda x, w: torch.linalg.vector_norm(x, ord=1, dim=(0, -1), keepdim=True, out=None) + x,
    lambda x, w: (torch.linalg.vector_norm(x, 3), torch.linalg.vector_norm(x, keepdim=True)),
    lambda x, w: (torch.linalg.norm(x), torch.linalg.norm(x, dim=1), torch.linalg.norm(x[0, 0], 2)),
    lambda x, w: (torch.linalg.norm(w.bias, 3), torch.linalg.matrix_norm(x, "fro", (0, 1), True)),
    lambda x, w: (x.var(), x.var(1), x.var(False), x.var(1, False, True), x.var(-1, correction=0)),
    lambda x, w: (x.std(unbiased=False), torch.std(x, (0, -2)), torch.var_mean(x, 1, keepdim=True)),
    lambda x, w: (torch.std_mean(x), torch.var_mean(x, dim=[0, 2], correction=0)),
    lambda x, w: (x.logsumexp(1), torch.logsumexp(x, dim=(0, -1), keepdim=True)),
    lambda x, w: (x.sum(axis=1), x.sum(1, keepdims=True), x.round().sum(0, dtype=torch.float32)),
    lambda x, w: ((x.sum() > 0).any(), (x > 0).all(), x.sum().sum(), x.mean().max()),
    lambda x, w: (x[0].prod(), x.prod(-1), x.prod(dim=0, keepdim=True), x.count_nonzero(1)),
    lambda x, w: (x.cumsum(-1), torch.cumsum(input=x, dim=0), x.cumprod(1), x.logcumsumexp(2)),
    lambda x, w: (x.clone().cumsum_(1), x.cummax(1), x.diff(), torch.diff(x, dim=0)),
    lambda x, w: (x.flip(1), x.flip(0, -1), torch.flip(x, dims=(0, 2)), w.bias.flip(0)),
    lambda x, w: (x.sort(), x.sort(1, True), x.sort(dim=0, descending=True), x.argsort(-2)),
    lambda x, w: (x.topk(2), x.topk(k=2, dim=1), x.topk(1, 0, False), x.kthvalue(2, 1, True)),
    lambda x, w: (x.argmax(), x.argmax(1), x.argmin(-1, True), x.argmax(keepdim=True)),
    lambda x, w: (x.max(1), torch.max(x, other=S), torch.min(S, x), w.bias.argmax(0)),
    lambda x, w: (x.gather(1, places(x).view(3, 1, 1, 1)), torch.gather(S, 0, x.argsort(0))),
    lambda x, w: torch.gather(x, dim=-1, index=PLACES.view(1, 1, 1, 3).expand(12, 4, 6, 3)),
    lambda x, w: (x.scatter(1, x.argsort(1), S), x.scatter(-1, x.argsort(-1)[..., :2], 3.0)),
    lambda x, w: S.scatter(dim=2, index=PLACES.view(1, 1, 3, 1), src=x[:1, :1, :3, :1]),
    lambda x, w: torch.zeros_like(x).scatter_add_(1, x.argsort(1) // 2, S),
    lambda x, w: torch.zeros(12, 4, 6, 6).double().scatter_(1, x.argmax(1, keepdim=True), 1.0),
    lambda x, w: x.scatter_reduce(1, x.argsort(1) // 2, S, "amax", include_self=False),
    lambda x, w: (S.take_along_dim(x.argsort(1), 1), x.take_along_dim(x.argsort(0), dim=0)),
    lambda x, w: (x.index_select(1, PLACES), torch.index_select(x, dim=-1, index=places(x))),
    lambda x, w: (S.index_select(2, places(x)), w.bias.index_select(0, places(x))),
    lambda x, w: (x.index_add(1, PLACES // 2, S[:, :3], alpha=2), x.index_fill(1, PLACES, 4.0)),
    lambda x, w: (x.index_add(-1, places(x) // 2, S[..., :3]), S.index_copy(0, places(x), x[:3])),
    lambda x, w: torch.zeros(9, 6).double().index_add_(0, places(x), x[0, 0, :3], alpha=0.5),
    lambda x, w: (x.index_copy(2, PLACES, x[:, :, :3]), x.clone().index_fill_(-1, places(x), -1)),
    lambda x, w: S.index_put((places(x) // 2, PLACES // 2), x[0, 0, 0, :1], accumulate=True),
    lambda x, w: x.clone().index_put_((PLACES, places(x)), torch.tensor(1.0).double(), True),
    lambda x, w: (x[places(x)], x[..., places(x)], S[:, places(x), 1:], x[places(x), -places(x)]),
    lambda x, w: (x[places(x), :, PLACES], x[:, None, places(x)], x[-1, ..., places(x)[0]]),
    lambda x, w: (x[:, x.argsort(1)[0, :, :3, 0], None], x[torch.arange(12) > 7, places(x, 4)]),
    lambda x, w: (x[0, :, PLACES], x[torch.tensor(1), :, PLACES], x[[0, 1], places(x, 2)]),
    lambda x, w: (w.bias[places(x)], w.bias[places(x)[0]], x[S > 0], S[0, 0, 0][x.argmax(-1)]),
    lambda x, w: (after(put, x, places(x), 1.0), after(put, x, (..., places(x)), x[..., :3] * 2)),
    lambda x, w: after(put, x, (slice(2), PLACES[:2], places(x, 2)), S[0, 0, 0]),
    lambda x, w: after(put, x, (PLACES, slice(None), places(x)), x[:3, :, 0]),
    lambda x, w: (after(put, x, x > 0, 0.5), after(put, x, x[:, :, 0, 0] > 0, w.bias[0])),
    lambda x, w: (after(put, x, S > 0, x[S > 0] * 2), after(put, x, (..., 0), w.bias[0])),
    lambda x, w: (after(put, x, (slice(None), [0, 2]), x[:, :2]), after(put, x, 3, S[0])),
    lambda x, w: (x.new_ones(6) * x, x.new_full((4, 1, 1), 2.0) * x, x.new_tensor([1, 2])),
    lambda x, w: (torch.zeros_like(x) + S, torch.full_like(x, 3, dtype=torch.float32) * 2),
    lambda x, w: (x.repeat_interleave(2), x.repeat_interleave(repeats=2, dim=-1)),
    lambda x, w: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), dim=1, output_size=4),
    lambda x, w: (x.select(1, 0), x.select(dim=-1, index=-2), torch.narrow(x, -1, 0, 3)),
    lambda x, w: (x.unfold(-1, 2, 1), x.unfold(dimension=1, size=2, step=2), F.unfold(x[0], 2)),
    lambda x, w: F.fold(F.unfold(x, (2, 3), padding=1), 6, (2, 3), padding=1),
    lambda x, w: (
        x.tril(),
        torch.triu(x, diagonal=1),
        x.diagonal(),
        x.diagonal(1, dim1=-1, dim2=2),
    ),
    lambda x, w: (F.one_hot(x.argmax(1), 6), F.glu(x), F.glu(x, 1), F.glu(x, dim=-2)),
    lambda x, w: (F.pixel_shuffle(x, 2), F.pixel_shuffle(x[0], 2), F.pixel_unshuffle(x, 3)),
    lambda x, w: (F.channel_shuffle(x, 2), torch.channel_shuffle(x, groups=4)),
    lambda x, w: (F.instance_norm(x), F.instance_norm(S, weight=w.weight, bias=w.bias)),
    lambda x, w: F.bilinear(x, S, w.bias.view(4, 1, 1).expand(4, 6, 6)),
    lambda x, w: (F.cosine_similarity(x, S), F.cosine_similarity(x, S, dim=-1)),
    lambda x, w: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * 1j),
    lambda x, w: (x.mT, w.bias.t(), x[0, 0].T, w.bias.tile(2), x.tile((2, 1))),
    lambda x, w: (x == S, x != 0, 1 - x, 2**x, abs(x), x.atan2(S), x.asinh(), x.fmax(S)),
    lambda x, w: (x.sum().softmax(0) * x, x.roll(1), torch.einsum("bchw,c", x, w.bias)),
    lambda x, w: (
        torch.stack(torch.meshgrid(*x[0, 0, :2], indexing="ij")),
        x.clone().fill_(x[0, 0, 0, 0]),
    ),
    lambda x, w: (torch.linalg.slogdet(x.mT @ x + 2).logabsdet, x.masked_fill(x > 1, w.bias[0])),
    lambda x, w: F.linear(x, w.weight.repeat(2)[:6]),
    lambda x, w: (x.float().cpu(), S.to(x.float()), x.to(memory_format=torch.channels_last)),
]


@pytest.mark.parametrize("function", ANYWHERE)
@pytest.mark.parametrize("points", [3, 12])
def test_arguments_that_are_shared_or_named_or_behind_n(function, points):
    module = Bare(function, nn.LayerNorm(4)).double()
    assert_stacked(assert_equals_the_loop(module, images(), points, False))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4),
        nn.GroupNorm(1, 4, affine=False),
        nn.LayerNorm(6),
        nn.LayerNorm((4, 6, 6)),
        nn.LayerNorm((6, 6), elementwise_affine=False),
        nn.RMSNorm(6),
        nn.RMSNorm((6, 6), eps=1e-3),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, track_running_stats=True).eval(),
        nn.LocalResponseNorm(2),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.ConvTranspose2d(4, 2, 3, padding=1, groups=2),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1)),
        nn.Linear(6, 6),
        nn.Linear(6, 3, bias=False),
        nn.Bilinear(6, 6, 6),
        nn.PReLU(4),
        nn.Softmax(1),
        nn.Softplus(),
        nn.ELU(),
        nn.Hardswish(),
        nn.GLU(1),
        nn.MaxPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.AdaptiveMaxPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.PixelShuffle(2),
        nn.ChannelShuffle(2),
        nn.LPPool2d(2, 2),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.Unflatten(1, (2, 2)),
        nn.Dropout(0.5).eval(),
        nn.Dropout2d(0.5).eval(),
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [True, False])
def test_every_layer_equals_the_loop(layer, shared):
    """A layer on features that differ between the networks, and on the input that they share."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            x = x if shared else self.scale * x
            x = x[:, :, None] if isinstance(self.layer, nn.Conv3d) else x
            x = self.layer(x, x) if isinstance(self.layer, nn.Bilinear) else self.layer(x)
            return x.flatten(1) * self.scale.sum()

    x = torch.randn(12, 4, 6, 6, dtype=torch.float64)
    assert_stacked(assert_equals_the_loop(Features().double(), x, 3, False))


@pytest.mark.parametrize(
    "function, line",
    [
        (
            lambda x, layer: x * x[places(x)[0], :, places(x)].mean(),
            "loop: an integer beside other indices differs",
        ),
        (lambda x, layer: x * F.one_hot(places(x) * 0).sum(), "loop: When vmap-ing"),
        (lambda x, layer: x * x.take(PLACES).mean(), "loop: it has no stacked form"),
        (lambda x, layer: x * torch.addr(x[0, 0], x[0, 0, 0], x[0, 0, 1]), "loop: it has no"),
    ],
)
def test_explain_says_where_values_had_no_stacked_form(function, line):
    network = assert_equals_the_loop(Body(function, nn.LayerNorm(4)).double(), images(), 3, False)
    assert line in network.explain()


def test_a_stacked_form_that_fails_is_warned_of_once(monkeypatch):
    def broken(n, *args):
        raise RuntimeError("what it is given is strange")

    monkeypatch.setitem(TABLE, torch.Tensor.take, Operation(broken))
    module = Body(lambda x, layer: x * x.take(PLACES).mean(), nn.LayerNorm(4))
    network, params = stack(module), {n: t[None] for n, t in module.state_dict().items()}
    with pytest.warns(UserWarning, match="take runs in a loop: its stacked form failed: what it"):
        network(params, images().float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(params, images().float())


def _added_to(x):
    x += 1.0
    return x


def _add_again(x):
    y = x * 2
    y += x
    z = y
    y -= 0.5
    y *= y.sigmoid()
    y /= 3
    y **= 2
    return y + z


def _counted(x):
    n = x.shape[1]
    n += 1
    n *= 2
    return x * n


def _pre_norm(x, layer):
    x = x * 1
    x += layer(x.mT).mT
    x += layer(x.mT).mT
    return x


def _flat(x):
    y = x.flatten(2).sin()
    y.mul_(2.0)
    y = y.view(x.shape)
    y.clamp_(-1, 1)
    return y + y.mean()


@pytest.mark.parametrize(
    "function, layer",
    [
        (lambda x, layer: layer(x) + x, nn.ReLU(inplace=True)),
        (lambda x, layer: F.relu(x, inplace=True) + x, None),
        (lambda x, layer: layer(x.flatten(1)) * 2, nn.Dropout(0.5, inplace=True).eval()),
        (lambda x, layer: layer(x.flatten(1)).view(x.shape) + x, nn.Dropout(inplace=True).eval()),
        (lambda x, layer: _added_to(layer(x)), nn.Softplus()),
        (lambda x, layer: _add_again(x), None),
        (lambda x, layer: _pre_norm(x, layer), nn.Linear(6, 6)),
        (lambda x, layer: _flat(x), None),
        (lambda x, layer: _counted(x), None),
    ],
)
def test_what_is_changed_in_place_is_stacked_and_later_uses_see_the_change(function, layer):
    assert_stacked(assert_equals_the_loop(Body(function, layer).double(), images(), 3, False))


def _through(view):
    """Change a view in place and use what it is a view of."""

    def function(x, layer):
        x = x.sin()
        v = view(x)
        v *= 2.0
        return x * 3

    return function


@pytest.mark.parametrize(
    "function",
    [
        _through(view)
        for view in (
            lambda x: x[:, :3],
            lambda x: x.mT,
            lambda x: x.broadcast_to(x.shape),
            lambda x: x.swapdims(0, 1),
            lambda x: torch.moveaxis(x, 0, 1),
            lambda x: torch.atleast_2d(x),
            lambda x: x.positive(),
            lambda x: torch.hsplit(x, [2])[0],
            lambda x: x.diagonal(0, 2, 3),
            lambda x: x.unfold(-1, 2, 2),
            lambda x: x.select(1, 2),
            lambda x: F.dropout2d(x, 0.5, False),
            lambda x: F.alpha_dropout(x, 0.5, False),
            lambda x: F.dropout(x, 0.5, False),
            lambda x: x.detach(),
            lambda x: x.double(),
        )
    ]
    + [lambda x, layer: x[:, :2].mul_(2).repeat(1, 2, 1, 1) + x],
)
def test_a_value_changed_through_a_view_is_stacked_and_used_with_the_change(function):
    assert_equals_the_loop(Body(function).double(), images(), 3, False)


def test_a_view_that_is_a_copy_in_the_layout_of_the_stack_is_changed_in_a_loop():
    module = Body(_through(lambda x: x.ravel())).double()
    networks, network = clones(module, 3), stack(module)
    params, _ = torch.func.stack_module_state(networks)
    expected = torch.stack([net(images()) for net in networks])
    torch.testing.assert_close(network(params, images()), expected)
    assert "its forward changes in place a view that is a copy here" in network.reason


def _to_data(x):
    x.data = x.data.clamp(-0.1, 0.1)
    return x


def _out_is_given(x):
    x = x.detach() * 1
    torch.add(x, 1.0, out=x)
    return x


@pytest.mark.parametrize("function", [_to_data, _out_is_given])
def test_what_is_assigned_to_the_data_of_a_value_is_not_lost(function):
    module = Body(lambda x, layer: function(x)).double()
    assert_stacked(assert_equals_the_loop(module, images(), 3, False))


def _to_rows(x, layer):
    out = torch.zeros(12, 144).double()
    out[:, :36] = x[:, 0].flatten(1)
    out[:, 36:].view(12, 3, 36)[:, 1] += x[:, 1].flatten(1)
    return out


class Reading(nn.Module):
    def forward(self, x):
        return x * x.norm().item()


@pytest.mark.parametrize("reader", [nn.Linear(144, 5), nn.Identity(), Reading()])
def test_a_shared_tensor_that_is_written_into_is_a_network_s_own_from_then_on(reader):
    module = Body(_to_rows).double()
    module.head = reader.double()
    assert_equals_the_loop(module, images(), 3, False)


class Accumulating(nn.Module):
    """torchvision's residual addition: out += identity."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return self.head(out.flatten(1))


def test_a_residual_added_in_place_is_stacked():
    assert_equals_the_loop(Accumulating().double(), images(), 3, False)


def test_an_input_changed_in_place_is_left_as_it_was():
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 5)).double()
    params, _ = torch.func.stack_module_state(clones(module, 3))
    x = images()
    stack(module, engine="stacked")(params, x)
    assert torch.equal(x, images())


class Scaled(nn.Module):
    """A scalar of a wider type does not decide the type."""

    def __init__(self, operation):
        super().__init__()
        self.layer, self.operation = nn.Linear(64, 5), operation
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.operation(self.layer(x.flatten(1)), self.scale)


@pytest.mark.parametrize(
    "operation",
    [lambda x, a: x * a, lambda x, a: a - x, lambda x, a: torch.where(x > 0, x, a)],
)
def test_a_scalar_parameter_of_another_type_promotes_as_in_one_network(operation):
    module, x = Scaled(operation), images().float()
    networks = clones(module, 3)
    params, _ = torch.func.stack_module_state(networks)
    expected = torch.stack([network(x) for network in networks])
    torch.testing.assert_close(stack(module)(params, x), expected)  # its type, too


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x[torch.randperm(x.size(0))],
        lambda x: F.gumbel_softmax(x),
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    ],
)
def test_what_is_drawn_for_a_shared_input_differs_between_the_networks(draw):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(draw(x))

    module = Drawing()
    params = {name: torch.stack([p] * 2) for name, p in module.named_parameters()}
    first, second = stack(module)(params, torch.randn(16, 8, 8))
    assert not torch.equal(first, second)
