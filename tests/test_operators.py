"""Single operations on stacked values against the loop over modules, in float64."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals_the_loop, clones, images
from torch import nn

from fastgeo import stack


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
    lambda x, layer: x[:, layer.bias.argsort()],
    lambda x, layer: x[..., torch.ones(6).bool()],
    lambda x, layer: x.softmax(1) + F.log_softmax(x, -1),
    lambda x, layer: torch.softmax(x, -1, torch.float32).double() + x.log_softmax(1, x.dtype),
    lambda x, layer: F.softmax(x, 1, 3, torch.float32) + x.double(),
    lambda x, layer: x.cumsum(1),
    lambda x, layer: x.max(1, keepdim=True)[0] + x,
    lambda x, layer: torch.einsum("bchw,c->bchw", x, layer.bias + 1),
    lambda x, layer: torch.einsum("b c h w, c -> b h w", [x, layer.weight]).repeat(1, 4, 1),
    lambda x, layer: torch.einsum("...w,zw->...z", x, torch.eye(6, dtype=x.dtype)[[1, 0, 2] * 2]),
    lambda x, layer: torch.einsum("bchw,bchw", x, x) + x,
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
    lambda x, layer: x + torch.arange(x.shape[-1], dtype=x.dtype, device=x.device),
    lambda x, layer: F.gelu(F.silu(F.leaky_relu(x, 0.2)), approximate="tanh"),
    lambda x, layer: x * ((x > 0) & (x < 1)) - x * ((x > 1) | ~(x > 0)),
    lambda x, layer: torch.relu_(x * 2),
    lambda x, layer: (x * 2).clamp_(-1, 1).mul_(3),
]


@pytest.mark.parametrize("function", BEHIND_N)
@pytest.mark.parametrize("points", [3, 12])  # 12 is also the batch, so a wrong broadcast would fit
def test_shapes_and_arguments_behind_n(function, points):
    module = Body(function, nn.LayerNorm(4)).double()
    assert_equals_the_loop(module, images(), points, False)


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
    network = assert_equals_the_loop(Features().double(), x, 3, False)
    without_a_form = isinstance(layer, nn.Bilinear | nn.InstanceNorm2d | nn.Dropout2d)
    if not shared:
        without_a_form |= isinstance(layer, nn.GLU | nn.LocalResponseNorm | nn.PixelShuffle)
    assert ("vmap" in network.explain()) == without_a_form


@pytest.mark.parametrize(
    "function, line",
    [
        (lambda x, layer: x[:, layer.bias.argsort()], "vmap: its index differs"),
        (lambda x, layer: x[[0] * 12, :, [5]].repeat(1, 1, 6), "vmap: its indices are not side"),
        (
            lambda x, layer: x * (torch.ones(12, 1, 1, 1) > 0).type_as(x),
            "vmap: its input is one for",
        ),
        (lambda x, layer: torch.eye(4).double()[x.argmax(1)].mT, "vmap: it has no"),
        (
            lambda x, layer: x * torch.linalg.slogdet(x.mT @ x + 2).logabsdet.mean(),
            "vmap: it has no",
        ),
        (lambda x, layer: x.masked_fill(x > 1, layer.bias[0]), "vmap: its stacked form failed"),
        (lambda x, layer: F.linear(x, layer.weight.repeat(2)[:6])[..., None] * x, "form failed"),
        (lambda x, layer: torch.einsum("bchw,c", x, layer.bias).repeat(1, 4, 1), "not given by"),
    ],
)
def test_explain_says_where_values_had_no_stacked_form(function, line):
    network = assert_equals_the_loop(Body(function, nn.LayerNorm(4)).double(), images(), 3, False)
    assert line in network.explain()


def test_a_stacked_form_that_fails_is_warned_of_once():
    module = Body(lambda x, layer: x.masked_fill(x > 1, layer.bias[0]), nn.LayerNorm(4))
    network, params = stack(module), {n: t[None] for n, t in module.state_dict().items()}
    with pytest.warns(UserWarning, match="masked_fill.* runs through vmap: its stacked form fail"):
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
    assert_equals_the_loop(Body(function, layer).double(), images(), 3, False)


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
            lambda x: x.ravel(),
            lambda x: x.broadcast_to(x.shape),
            lambda x: x.swapdims(0, 1),
            lambda x: torch.moveaxis(x, 0, 1),
            lambda x: torch.atleast_2d(x),
            lambda x: x.positive(),
            lambda x: torch.hsplit(x, [2])[0],
            lambda x: F.dropout2d(x, 0.5, False),
            lambda x: F.alpha_dropout(x, 0.5, False),
            lambda x: F.dropout(x, 0.5, False),
            lambda x: x.detach(),
            lambda x: x.double(),
        )
    ]
    + [lambda x, layer: x[:, :2].mul_(2).repeat(1, 2, 1, 1) + x],
)
def test_a_value_changed_through_a_view_and_used_again_runs_in_a_loop(function):
    module = Body(function).double()
    assert "in place" in stack(module).reason
    assert_equals_the_loop(module, images(), 3, False, runs_as="loop")


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
    assert stack(module).engine != "stacked"
    x, networks = images(), clones(module, 3)
    params, _ = torch.func.stack_module_state(networks)
    expected = torch.stack([network(x) for network in networks])
    torch.testing.assert_close(stack(module)(params, x), expected)


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
