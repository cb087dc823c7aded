"""Small networks of many kinds, written as users write them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fastgeo import models


@dataclass(frozen=True)
class Member:
    """A network and inputs for it.

    Attributes:
        name: what it is called in a test's name.
        build: returns the module, freshly initialised.
        inputs: batch size -> inputs, a tensor or keyword arguments.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor | dict[str, Tensor]]

    def make(self, seed: int = 0) -> nn.Module:
        """In float64, norms and biases away from their initial 1 and 0, in eval mode."""
        torch.manual_seed(seed)
        module = self.build().double().eval()
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
        return module


def pictures(channels: int, size: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, channels, size, size, generator=generator, dtype=torch.float64)


def words(vocabulary: int, length: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(vocabulary, (batch, length), generator=generator)


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.fc1 = nn.Linear(6 * 2 * 2, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.fc2(F.relu(self.fc1(x)))


def vgg() -> nn.Module:
    """Flattened over space, with dropout."""
    layers, before = [], 3
    for channels in (4, "pool", 6, 6, "pool"):
        if channels == "pool":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
        before = channels
    head = [nn.Flatten(), nn.Linear(6 * 4 * 4, 10), nn.ReLU(True), nn.Dropout(), nn.Linear(10, 5)]
    return nn.Sequential(*layers, *head)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(2, channels)


def resnet18() -> nn.Module:
    net = torchvision.models.resnet18(num_classes=5, norm_layer=group_norm)
    return _narrow(net, 16)


def mobilenet() -> nn.Module:
    net = torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.1, norm_layer=group_norm)
    net.features = nn.Sequential(*list(net.features)[:5], nn.Conv2d(8, 1280, 1))
    return net


def _narrow(net: nn.Module, factor: int) -> nn.Module:
    """The same network with that many times fewer channels."""
    for name, layer in net.named_modules():
        parent = net.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, nn.Conv2d):
            inputs = 3 if layer.in_channels == 3 else layer.in_channels // factor
            new = nn.Conv2d(
                *(inputs, layer.out_channels // factor, layer.kernel_size),
                *(layer.stride, layer.padding),
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.GroupNorm):
            new = nn.GroupNorm(2, layer.num_channels // factor)
        elif isinstance(layer, nn.BatchNorm2d):
            new = nn.BatchNorm2d(layer.num_features // factor)
        elif isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features // factor, layer.out_features)
        else:
            continue
        setattr(parent, name.rpartition(".")[2], new)
    return net


class DenseNet(nn.Module):
    """Every layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1))
            for c in (4, 8, 12)
        )
        self.transition = nn.Sequential(nn.Conv2d(16, 8, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.head(self.transition(x).mean([2, 3]))


class ConvNeXt(nn.Module):
    """LayerNorm over channels behind a permutation, depthwise convolution, layer scale."""

    class Block(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.pwconv1 = nn.Linear(dim, 4 * dim)
            self.pwconv2 = nn.Linear(4 * dim, dim)
            self.gamma = nn.Parameter(0.5 * torch.ones(dim))

        def forward(self, x):
            shortcut = x
            x = self.dwconv(x).permute(0, 2, 3, 1)
            x = self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
            return shortcut + (self.gamma * x).permute(0, 3, 1, 2)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, kernel_size=2, stride=2)
        self.blocks = nn.Sequential(self.Block(6), self.Block(6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class ViT(nn.Module):
    """Class token, positions, nn.MultiheadAttention."""

    class Block(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

        def forward(self, x):
            y = self.norm1(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.norm2(x))

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8) / 5)
        self.blocks = nn.ModuleList([self.Block(8, 2) for _ in range(2)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class GPT(nn.Module):
    """Causal attention with one projection for query, key and value; tied embedding and head."""

    class Block(nn.Module):
        def __init__(self, dim, heads):
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            self.drop = nn.Dropout(0.1)

        def forward(self, x):
            B, T, C = x.size()
            q, k, v = self.qkv(self.norm1(x)).split(C, dim=2)
            q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.drop(self.out(y.transpose(1, 2).contiguous().view(B, T, C)))
            return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([self.Block(8, 2) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Llama(nn.Module):
    """RMSNorm, gated linear units, grouped queries, rotary positions; a mask as second input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1, self.norm2 = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(8, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))
        self.o = nn.Linear(8, 8, bias=False)
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        angles = torch.arange(6)[:, None] / 10.0 ** torch.arange(2)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def rotate(self, x):
        half = torch.cat((-x[..., 2:], x[..., :2]), dim=-1)
        return x * self.cos + half * self.sin

    def forward(self, tokens, mask):
        batch, length = tokens.shape
        x = self.embed(tokens)
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(batch, length, -1, 4).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(
            self.rotate(q), self.rotate(k), v, attn_mask=mask[:, None], enable_gqa=True
        )
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, 8))
        y = self.norm2(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(x)


class Mixer(nn.Module):
    """Linear layers over patches and over channels in turn."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.tokens = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)  # [B, patches, channels]
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))


class UNet(nn.Module):
    """Classes of pixels: down, up by transposed convolution and interpolation, skip connections."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = self.twice(3, 4), self.twice(4, 6)
        self.bottom = self.twice(6, 8)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.join2, self.join1 = self.twice(12, 6), self.twice(10, 4)
        self.head = nn.Conv2d(4, 5, 1)

    @staticmethod
    def twice(inputs, outputs):
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
            *(nn.GroupNorm(1, outputs), nn.Conv2d(outputs, outputs, 3, padding=1), nn.SiLU()),
        )

    def forward(self, x):
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.avg_pool2d(second, 2))
        x = self.join2(torch.cat([self.up2(x), second], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.join1(torch.cat((x, first), dim=1))
        return self.head(x).permute(0, 2, 3, 1)


class Plain(nn.Module):
    """Parameters and operators, no layers."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(12, 8) / 3)
        self.b1 = nn.Parameter(torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(()))
        self.w2 = nn.Parameter(torch.randn(5, 8) / 3)

    def forward(self, x):
        h = torch.tanh(x @ self.w1 + self.b1)
        h = h / (h.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
        return self.scale.exp() * F.linear(h, self.w2) - 0.5


class ResNeXt(nn.Module):
    """Grouped convolutions and squeeze-and-excitation."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv1 = nn.Conv2d(channels, 12, 1, bias=False)
            self.norm1 = nn.GroupNorm(3, 12)
            self.conv2 = nn.Conv2d(12, 12, 3, padding=1, groups=3)
            self.conv3 = nn.Conv2d(12, channels, 1)
            self.squeeze, self.excite = nn.Linear(channels, 2), nn.Linear(2, channels)

        def forward(self, x):
            y = self.conv3(F.leaky_relu(self.conv2(F.relu(self.norm1(self.conv1(x)))), 0.1))
            gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1).flatten(1))))
            x = x + y * torch.sigmoid(gate)[:, :, None, None]
            return F.relu_(x)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(self.Block(8), self.Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(x.view(x.size(0), x.size(1), -1).mean(-1))


class TextCNN(nn.Module):
    """Convolutions of several widths over words, the maximum over time."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.convs = nn.ModuleList([nn.Conv1d(6, 4, width) for width in (2, 3)])
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.embed(tokens).transpose(1, 2)
        x = [F.relu(conv(x)).amax(-1) for conv in self.convs]
        return self.head(self.drop(torch.cat(x, -1)))


class WaveNet(nn.Module):
    """Gated causal convolutions with growing dilation, the largest value over time."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(1, 4, 1)
        self.filters = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(3))
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x, skips = self.stem(x[:, None]), 0
        for i, layer in enumerate(self.filters):
            padded = F.pad(x, (2**i, 0))
            y = torch.tanh(layer(padded)) * torch.sigmoid(self.gates[i](padded))
            skips = skips + y
            x = x + y
        return self.head(F.relu(skips).max(dim=-1).values)


class LastWord(nn.Module):
    """Attention by hand with its causal mask in a buffer; the state at each text's last word."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("causal", torch.tril(torch.ones(7, 7))[None, None])
        self.head = nn.Linear(8, 5)

    def forward(self, tokens, lengths):
        x = self.embed(tokens)
        B, T, C = x.size()
        q, k, v = (
            layer(x).view(B, T, 2, C // 2).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.causal[:, :, :T, :T] == 0, float("-inf"))
        y = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view_as(x)
        return self.head((x + y)[torch.arange(B), lengths - 1])


class PaddedEncoder(nn.Module):
    """PyTorch's encoder on texts of several lengths, and the mean of their words."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens, lengths):
        padded = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]
        x = self.encoder(self.embed(tokens), src_key_padding_mask=padded)
        keep = (~padded).unsqueeze(-1).to(x.dtype)
        return self.head((x * keep).sum(dim=1) / keep.sum(1).clamp(min=1))


class Factors(nn.Module):
    """A mixture of bilinear forms, by einsum; the gate is a plain product."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(12, 6) / 3) for _ in range(2))
        self.core = nn.Parameter(torch.randn(6, 6, 5) / 3)
        self.gate = nn.Parameter(torch.randn(12))

    def forward(self, x):
        y = torch.einsum("bi,bj,ijc->bc", torch.mm(x, self.left), x @ self.right, self.core)
        return y * torch.sigmoid(x @ self.gate).unsqueeze(-1).expand_as(y)


class Shared(nn.Module):
    """The same layer three times, and an in-place residual addition."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.again = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            y = self.again(self.norm(x).relu())
            y += x
            x = y
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.gru = nn.GRU(6, 7, batch_first=True)
        self.head = nn.Linear(7, 5)

    def forward(self, tokens):
        return self.head(self.gru(self.embed(tokens))[0][:, -1])


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(3, 8), encoder, nn.Flatten(), nn.Linear(40, 5))


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=5)


def batch_norm_convolutions() -> nn.Module:
    """The mean of all batches as statistics, and none."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.Hardswish(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def batch_norm_mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, affine=False, momentum=0.3), nn.ReLU()),
        nn.Linear(6, 5),
    )


def masked_words(batch: int) -> dict[str, Tensor]:
    causal = torch.ones(6, 6).tril().bool().expand(batch, 6, 6)
    return {"mask": causal, "tokens": words(11, 6, batch)}


def words_and_lengths(batch: int) -> dict[str, Tensor]:
    lengths = torch.arange(batch) % 3 + 2
    return {"lengths": lengths, "tokens": words(11, 7, batch)}


def rows(batch: int) -> Tensor:
    return pictures(1, 12, batch)[:, 0, 0]


SMALL, LARGE = partial(pictures, 3, 8), partial(pictures, 3, 16)
ZOO = [
    Member("resnet-group", lambda: models.resnet(8, 0.25, num_classes=5), SMALL),
    Member("resnet-channel", lambda: models.resnet(8, 0.25, num_classes=5, norm="channel"), SMALL),
    Member("mlp", lambda: models.mlp(12, (8, 6, 8), 5), rows),
    Member("lenet", LeNet, partial(pictures, 1, 16)),
    Member("vgg", vgg, LARGE),
    Member("torchvision-resnet18", resnet18, LARGE),
    Member("torchvision-mobilenet", mobilenet, LARGE),
    Member("densenet", DenseNet, SMALL),
    Member("convnext", ConvNeXt, SMALL),
    Member("vit", ViT, SMALL),
    Member("torchvision-vit", torchvision_vit, SMALL),
    Member("transformer", transformer, lambda b: pictures(1, 5, b)[:, 0, :, :3]),
    Member("gpt", GPT, partial(words, 11, 6)),
    Member("llama", Llama, masked_words),
    Member("mixer", Mixer, SMALL),
    Member("unet", UNet, SMALL),
    Member("plain-parameters", Plain, rows),
    Member("resnext-se", ResNeXt, SMALL),
    Member("text-cnn", TextCNN, partial(words, 11, 7)),
    Member("wavenet", WaveNet, rows),
    Member("last-word", LastWord, words_and_lengths),
    Member("padded-encoder", PaddedEncoder, words_and_lengths),
    Member("factors", Factors, rows),
    Member("shared-layers", Shared, rows),
    Member("recurrent", Recurrent, partial(words, 11, 4)),
]
BATCH_NORM = [
    Member(
        "torchvision-resnet18",
        lambda: _narrow(torchvision.models.resnet18(num_classes=5), 16),
        partial(pictures, 3, 32),
    ),
    Member("convolutions", batch_norm_convolutions, SMALL),
    Member("mlp", batch_norm_mlp, rows),
]
