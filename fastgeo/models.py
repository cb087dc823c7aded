"""The networks of the presets: the ResNets of Git Re-Basin and of Tan et al., an MLP, and a GPT.

No BatchNorm anywhere: its running statistics do not interpolate along a path. The parameter names
of `resnet` are those of the published checkpoints, which load unchanged at depth 20, width 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each pixel of [B, C, H, W] (Git Re-Basin's normalisation)."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "group":
        return nn.GroupNorm(1, channels)  # statistics over C, H and W
    if kind == "channel":
        return ChannelNorm(channels)
    raise ValueError(f"norm must be 'group' or 'channel', got {kind!r}")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, C, H, W] -> [B, C', H/stride, W/stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            size = 1 if norm == "group" else 3
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False),
                _norm(norm, channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class BlockGroup(nn.Module):
    """Blocks of one width; the first of them takes the stride."""

    def __init__(self, in_channels: int, channels: int, blocks: int, stride: int, norm: str):
        super().__init__()
        self.blocks = nn.Sequential(
            Block(in_channels, channels, stride, norm),
            *(Block(channels, channels, 1, norm) for _ in range(blocks - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ResNet(nn.Module):
    """[B, in_channels, H, W] images to [B, num_classes] logits."""

    def __init__(self, blocks: int, channels: list[int], in_channels: int, classes: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.norm1 = _norm(norm, channels[0])
        self.block_groups = nn.Sequential(
            BlockGroup(channels[0], channels[0], blocks, 1, norm),
            BlockGroup(channels[0], channels[1], blocks, 2, norm),
            BlockGroup(channels[1], channels[2], blocks, 2, norm),
        )
        self.linear = nn.Linear(channels[2], classes)

    @property
    def example_input_array(self) -> Tensor:
        """Two inputs [2, in_channels, 32, 32] for `fastgeo.match`."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, self.conv1.in_channels, 32, 32, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.block_groups(x)
        return self.linear(x.mean((2, 3)))


def resnet(
    depth: int = 20,
    width: float = 4,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    norm: str = "group",
) -> ResNet:
    """A CIFAR ResNet (He et al., 2016, section 4.2) of 16, 32 and 64 times `width` channels.

    Args:
        depth: 6 k + 2 for k blocks in each of the three groups: 8, 14, 20, 32, ...
        width: factor on the channels; 4 in the paper, fractions allowed (0.5: 8, 16, 32).
        in_channels, num_classes: of the data.
        norm: "group" is GroupNorm(1, C), with a 1x1 shortcut (Tan et al.); "channel" is LayerNorm
            over channels at each pixel, with a 3x3 shortcut (Git Re-Basin).

    Raises:
        ValueError: a depth that is not 6 k + 2, a width below one channel, an unknown norm.

    Example:
        >>> sum(p.numel() for p in resnet(20, 4).parameters())
        4327754
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 k + 2 (8, 14, 20, ...), got {depth}")
    channels = [round(width * base) for base in (16, 32, 64)]
    if channels[0] < 1:
        raise ValueError(f"width must leave at least one channel of 16, got {width}")
    return ResNet((depth - 2) // 6, channels, in_channels, num_classes, norm)


class MLP(nn.Module):
    """[B, ...] inputs, flattened, to [B, num_classes] logits through ReLU layers."""

    def __init__(self, features: list[int]):
        super().__init__()
        self.in_features = features[0]
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in zip(features[:-1], features[1:], strict=True)
        )

    @property
    def example_input_array(self) -> Tensor:
        """Two inputs [2, in_features] for `fastgeo.match`."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, self.in_features, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def mlp(in_features: int, hidden: tuple[int, ...] = (512, 512, 512), num_classes: int = 10) -> MLP:
    """A multi-layer perceptron with ReLU between its layers.

    Args:
        in_features: size of one flattened input.
        hidden: width of each hidden layer.
        num_classes: size of the output.

    Example:
        >>> mlp(64, (32,))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    return MLP([in_features, *hidden, num_classes])


class GPTBlock(nn.Module):
    """Causal self-attention, then an MLP, each added to what it reads: [B, T, C] -> [B, T, C]."""

    def __init__(self, channels: int, heads: int, norm: type[nn.Module]):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.query, self.key, self.value, self.mix = (
            nn.Linear(channels, channels) for _ in range(4)
        )
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, T, C / H]
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """[B, T] tokens to [B, T, vocabulary] logits of the tokens that follow."""

    def __init__(
        self, vocabulary: int, block_size: int, depth: int, channels: int, heads: int, norm: str
    ):
        super().__init__()
        kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[norm]
        self.tokens = nn.Embedding(vocabulary, channels)
        self.positions = nn.Embedding(block_size, channels)
        self.blocks = nn.Sequential(*(GPTBlock(channels, heads, kind) for _ in range(depth)))
        self.norm = kind(channels)
        self.head = nn.Linear(channels, vocabulary)

    @property
    def example_input_array(self) -> Tensor:
        """Two inputs [2, block_size] for `fastgeo.match`."""
        generator = torch.Generator().manual_seed(0)
        size = (2, self.positions.num_embeddings)
        return torch.randint(self.tokens.num_embeddings, size, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def gpt(
    vocabulary: int,
    block_size: int = 64,
    depth: int = 2,
    width: float = 0.5,
    *,
    norm: str = "layer",
) -> GPT:
    """A decoder of 128 times `width` channels in four heads (Radford et al., 2019, in small).

    Norms come before what they feed, positions are learned, and no two layers share weights: query,
    key and value are layers of their own, and so is the head. So every axis of every weight is one
    of the residual stream, of a head, or of one MLP.

    Args:
        vocabulary: how many tokens there are.
        block_size: T, at most so many tokens in one input.
        depth: how many blocks.
        width: factor on the channels, rounded to a multiple of four.
        norm: "layer" is LayerNorm, "rms" RMSNorm.

    Raises:
        ValueError: a width below four channels, a depth below 1, an unknown norm.

    Example:
        >>> gpt(100)(torch.zeros(3, 64, dtype=torch.long)).shape
        torch.Size([3, 64, 100])
    """
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    channels = 4 * round(32 * width)
    if channels < 4:
        raise ValueError(f"width must leave at least 4 channels of 128, got {width}")
    return GPT(vocabulary, block_size, depth, channels, 4, norm)
