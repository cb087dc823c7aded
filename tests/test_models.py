"""The paper's networks."""

import pytest
import torch
import torch.nn.functional as F
from conftest import images

from fastgeo import match, models, permutation_spec


def test_resnet20_width_4_is_the_published_network():
    module = models.resnet(20, 4)
    assert sum(p.numel() for p in module.parameters()) == 4_327_754
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["block_groups.1.blocks.0.shortcut.0.weight"] == (128, 64, 1, 1)
    assert shapes["block_groups.2.blocks.2.norm2.bias"] == (256,)
    expected = {"conv1.weight", "norm1.weight", "norm1.bias", "linear.weight", "linear.bias"}
    for group in range(3):
        for block in range(3):
            prefix = f"block_groups.{group}.blocks.{block}"
            expected |= {f"{prefix}.conv{i}.weight" for i in (1, 2)}
            expected |= {f"{prefix}.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        if group:
            prefix = f"block_groups.{group}.blocks.0.shortcut"
            expected |= {f"{prefix}.0.weight", f"{prefix}.1.weight", f"{prefix}.1.bias"}
    assert set(shapes) == expected


def test_channel_norm_normalises_each_pixel():
    x = images(3, channels=6)
    out = models.ChannelNorm(6).double()(x)
    torch.testing.assert_close(out.mean(1), torch.zeros(3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(
        out, (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    )
    shortcut = models.resnet(8, 1, norm="channel").block_groups[1].blocks[0].shortcut
    assert shortcut[0].kernel_size == (3, 3)


@pytest.mark.parametrize(
    "options, words",
    [(dict(depth=9), "6 k"), (dict(width=0.01), "channel"), (dict(norm="batch"), "'batch'")],
)
def test_impossible_resnets_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        models.resnet(**options)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_gpt_is_the_decoder_of_its_definition(norm):
    """Attention by its formula, one head and one position at a time, in float64."""
    torch.manual_seed(0)
    module = models.gpt(11, 6, depth=1, width=0.25, norm=norm).double()
    tokens, block = torch.randint(11, (5,)), module.blocks[0]
    x = module.tokens.weight[tokens] + module.positions.weight[:5]
    normed = block.norm1(x)
    query, key, value = (f(normed) for f in (block.query, block.key, block.value))
    attended = torch.zeros_like(x)
    for start in range(0, 32, 8):
        head = slice(start, start + 8)
        for i in range(5):
            scores = key[: i + 1, head] @ query[i, head] / 8**0.5
            attended[i, head] = scores.softmax(0) @ value[: i + 1, head]
    x = x + block.mix(attended)
    x = x + block.down(F.gelu(block.up(block.norm2(x))))
    torch.testing.assert_close(module(tokens[None])[0], module.head(module.norm(x)))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_every_axis_of_a_gpt_but_tokens_and_positions_may_be_permuted(norm):
    torch.manual_seed(0)
    a, b = (models.gpt(11, 6, depth=2, width=0.25, norm=norm) for _ in range(2))
    spec = str(permutation_spec(a, a.example_input_array))
    assert spec.startswith("GPT: 9 permutations")  # residual; heads, query-key, value, MLP in each
    assert "tokens.weight[1]: 32 positions" in spec and "blocks.1.up.weight[0]: 128 posit" in spec
    found = match(a, b, a.example_input_array, module=a, restarts=1)
    assert found.objective_after > found.objective_before and found.relative_change < 1e-10


@pytest.mark.parametrize(
    "options, words",
    [(dict(depth=0), "depth"), (dict(width=0.01), "4 channels"), (dict(norm="group"), "'group'")],
)
def test_impossible_gpts_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        models.gpt(11, **options)
