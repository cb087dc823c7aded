"""Small random networks of the architectures that people have, from the libraries they come from.

Images are not square and, in batches of 4, hardly any two dimensions that meet are equal: a wrong
broadcast shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm.layers
import torch
import torchvision.models
import transformers
from timm.models import (
    beit,
    byobnet,
    convnext,
    deit,
    efficientnet,
    eva,
    maxxvit,
    metaformer,
    mlp_mixer,
    mobilevit,
    nfnet,
    resnetv2,
    swin_transformer,
    vision_transformer,
)
from torch import Tensor, nn
from zoo import Member


@dataclass(frozen=True)
class Entry(Member):
    """A network of a library.

    Attributes:
        batch_norm: whether it has batch normalisation, whose statistics differ between the modes.
    """

    batch_norm: bool = False


def images(height: int, width: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def texts(pad: int, batch: int) -> dict[str, Tensor]:
    """Of 13 tokens out of 29, most padded on the right, by less than the sliding windows' width."""
    generator = torch.Generator().manual_seed(batch)
    tokens = torch.randint(3, 29, (batch, 13), generator=generator)
    mask = (torch.arange(13) < 13 - 3 * torch.arange(batch)[:, None] % 5).long()
    return {"input_ids": tokens.masked_fill(mask == 0, pad), "attention_mask": mask}


# transformers

TOKENS = {"vocab_size": 29, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "use_cache": False,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
GEMMA = {
    "attn_implementation": "eager",
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}
ENCODER = {
    "hidden_size": 30,
    "intermediate_size": 38,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_labels": 5,
}
DISTILBERT = {"dim": 30, "hidden_dim": 38, "n_layers": 2, "n_heads": 6, "num_labels": 5}


def configured(model: str, configuration: str, options: dict) -> nn.Module:
    """With random weights."""
    return getattr(transformers, model)(getattr(transformers, configuration)(**options))


def attentions(name, model, configuration, options, inputs) -> list[Entry]:
    """The network in both implementations of attention."""
    return [
        Entry(
            f"{name}-{attention}",
            partial(configured, model, configuration, options | {"attn_implementation": attention}),
            inputs,
        )
        for attention in ("eager", "sdpa")
    ]


GPT2 = TOKENS | {"n_positions": 32, "n_embd": 30, "n_layer": 2, "n_head": 6, "use_cache": False}
VIT = ENCODER | {"image_size": (36, 20), "patch_size": 4}
CONVNEXT = {"hidden_sizes": (14, 16, 18, 20), "depths": (2, 1, 1, 1), "num_labels": 5}
# grouped_mm, the default for the experts, knows no float64
MIXTRAL = DECODER | {"num_local_experts": 5, "experts_implementation": "eager"}
BATCHED_EXPERTS = {"experts_implementation": "batched_mm", "attn_implementation": "sdpa"}
TEXTS = partial(texts, 0)
TRANSFORMERS = [
    *attentions("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, TEXTS),
    *attentions("llama", "LlamaForCausalLM", "LlamaConfig", DECODER, TEXTS),
    *attentions(
        *("mistral", "MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 5}),
        TEXTS,
    ),
    *attentions("qwen3", "Qwen3ForCausalLM", "Qwen3Config", DECODER, TEXTS),
    *attentions("gemma", "GemmaForCausalLM", "GemmaConfig", DECODER, TEXTS),
    Entry(
        "gemma2-eager",  # its soft caps on the scores are in no other
        partial(configured, "Gemma2ForCausalLM", "Gemma2Config", DECODER | GEMMA),
        TEXTS,
    ),
    *attentions("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | GEMMA, TEXTS),
    *attentions("mixtral", "MixtralForCausalLM", "MixtralConfig", MIXTRAL, TEXTS),
    Entry(
        "mixtral-batched",
        partial(configured, "MixtralForCausalLM", "MixtralConfig", MIXTRAL | BATCHED_EXPERTS),
        TEXTS,
    ),
    *attentions(
        *("bert", "BertForSequenceClassification", "BertConfig"),
        *(TOKENS | ENCODER | {"max_position_embeddings": 32}, TEXTS),
    ),
    *attentions(
        *("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig"),
        *(TOKENS | DISTILBERT | {"max_position_embeddings": 32}, TEXTS),
    ),
    *attentions(
        *("roberta", "RobertaForSequenceClassification", "RobertaConfig"),
        TOKENS | ENCODER | {"max_position_embeddings": 32, "pad_token_id": 1, "bos_token_id": 0},
        partial(texts, 1),
    ),
    *attentions("vit", "ViTForImageClassification", "ViTConfig", VIT, partial(images, 36, 20)),
    Entry(
        "convnext",
        partial(configured, "ConvNextForImageClassification", "ConvNextConfig", CONVNEXT),
        partial(images, 96, 40),
    ),
]


# timm

VISION = {"img_size": (36, 20), "patch_size": 4, "embed_dim": 30, "num_classes": 5}


def timm_vit() -> nn.Module:
    return vision_transformer.VisionTransformer(**VISION, depth=2, num_heads=6, mlp_ratio=1.5)


def timm_deit() -> nn.Module:
    """Distilled: two tokens and two heads, whose mean is the output."""
    return deit.VisionTransformerDistilled(**VISION, depth=2, num_heads=6, mlp_ratio=1.5)


def timm_beit() -> nn.Module:
    return beit.Beit(
        **VISION,
        **{"depth": 2, "num_heads": 6, "mlp_ratio": 1.5, "init_values": 0.1},
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    )


def timm_eva02() -> nn.Module:
    return eva.Eva(
        **VISION | {"embed_dim": 24},
        **{"depth": 2, "num_heads": 3, "mlp_ratio": 8 / 3, "swiglu_mlp": True},
        use_rot_pos_emb=True,
        ref_feat_shape=(9, 5),
    )


def timm_swin() -> nn.Module:
    """Two blocks in each of two stages, every second one with its windows shifted."""
    return swin_transformer.SwinTransformer(
        **{"img_size": (24, 36), "patch_size": 2, "window_size": 3, "mlp_ratio": 1.5},
        **{"embed_dim": 20, "depths": (2, 2), "num_heads": (2, 5), "num_classes": 5},
    )


def timm_convnext(**options) -> nn.Module:
    dims, depths = (14, 16, 18, 20), (2, 1, 1, 1)
    return convnext.ConvNeXt(num_classes=5, dims=dims, depths=depths, **options)


def timm_mixer(**options) -> nn.Module:
    return mlp_mixer.MlpMixer(**VISION, num_blocks=2, **options)


def timm_resmlp() -> nn.Module:
    return timm_mixer(block_layer=mlp_mixer.ResBlock, norm_layer=mlp_mixer.Affine, mlp_ratio=1.5)


def timm_resnetv2() -> nn.Module:
    """Big Transfer: weights standardised before every convolution, group normalisation."""
    return resnetv2.ResNetV2(
        **{"layers": [2, 1], "channels": (20, 24), "stem_chs": 12, "num_classes": 5},
        stem_type="fixed",
        norm_layer=partial(timm.layers.GroupNormAct, num_groups=2),
        conv_layer=partial(timm.layers.StdConv2d, eps=1e-8),
    )


def timm_nfnet() -> nn.Module:
    configuration = nfnet.NfCfg(
        **{"depths": (1, 2, 1, 1), "channels": (16, 24, 32, 32), "stem_chs": 16, "group_size": 8},
        **{"stem_type": "deep_quad", "extra_conv": True, "gamma_in_act": True, "skipinit": True},
        **{"same_padding": True, "num_features": 40, "act_layer": "gelu"},
        **{"attn_layer": "se", "attn_kwargs": {"rd_ratio": 0.5}},
    )
    return nfnet.NormFreeNet(configuration, num_classes=5)


def timm_mobilevit() -> nn.Module:
    block = mobilevit._inverted_residual_block
    transformer = partial(mobilevit._mobilevit_block, d=1, patch_size=2, br=1.5)
    configuration = byobnet.ByoModelCfg(
        blocks=(
            block(d=1, c=10, s=1, br=1.5),
            block(d=2, c=14, s=2, br=1.5),
            transformer(c=16, s=2, transformer_dim=24, transformer_depth=2),
            transformer(c=20, s=1, transformer_dim=28, transformer_depth=1),
        ),
        **{"stem_chs": 8, "stem_type": "3x3", "stem_pool": "", "downsample": ""},
        **{"act_layer": "silu", "num_features": 36},
    )
    return byobnet.ByobNet(configuration, num_classes=5)


def timm_coatnet() -> nn.Module:
    """Convolutions with squeeze-and-excitation, then attention with relative positions."""
    configuration = maxxvit.MaxxVitCfg(
        **{"embed_dim": (12, 16, 24, 40), "depths": (1, 1, 1, 1), "stem_width": (6, 10)},
        **maxxvit._rw_coat_cfg(conv_attn_early=True, transformer_shortcut_bias=False),
    )
    configuration.transformer_cfg.dim_head = 8
    return maxxvit.MaxxVit(configuration, img_size=(160, 96), num_classes=5)


def timm_repvgg() -> nn.Module:
    """As it is trained: three branches in each block, each with its batch normalisation."""
    blocks = ((1, 12, 2), (2, 16, 2), (1, 20, 2))
    configuration = byobnet.ByoModelCfg(
        blocks=tuple(byobnet.ByoBlockCfg(type="rep", d=d, c=c, s=s) for d, c, s in blocks),
        stem_type="rep",
        stem_chs=10,
    )
    return byobnet.ByobNet(configuration, num_classes=5)


def timm_efficientnet() -> nn.Module:
    blocks = ("ds_r1_k3_s1_e1_c8_se0.25", "ir_r2_k3_s2_e3_c16_se0.25", "ir_r1_k5_s2_e3_c24_se0.25")
    return efficientnet.EfficientNet(
        efficientnet.decode_arch_def([[block] for block in blocks]),
        **{"num_classes": 5, "num_features": 40, "stem_size": 16, "act_layer": nn.SiLU},
        norm_layer=partial(timm.layers.GroupNormAct, group_size=8),
    )


def timm_poolformer() -> nn.Module:
    return metaformer.MetaFormer(
        **{"depths": (2, 1, 1, 1), "dims": (14, 16, 18, 20), "num_classes": 5},
        **{"downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True, "use_mlp_head": False},
        **{"norm_layers": timm.layers.GroupNorm1, "layer_scale_init_values": 1e-5},
        res_scale_init_values=None,
    )


PATCHES, WINDOWS, PYRAMID = (partial(images, *size) for size in ((36, 20), (24, 36), (96, 40)))
TIMM = [
    Entry("vit", timm_vit, PATCHES),
    Entry("deit", timm_deit, PATCHES),
    Entry("beit", timm_beit, PATCHES),
    Entry("eva02", timm_eva02, PATCHES),
    Entry("swin", timm_swin, WINDOWS),
    Entry("convnext", timm_convnext, PYRAMID),
    Entry(
        "convnextv2",
        partial(timm_convnext, use_grn=True, ls_init_value=None, conv_mlp=True),
        PYRAMID,
    ),
    Entry("mixer", timm_mixer, PATCHES),
    Entry("resmlp", timm_resmlp, PATCHES),
    Entry("resnetv2", timm_resnetv2, PATCHES),
    Entry("nfnet", timm_nfnet, PYRAMID),
    Entry("mobilevit", timm_mobilevit, partial(images, 96, 48), batch_norm=True),
    Entry("coatnet", timm_coatnet, partial(images, 160, 96), batch_norm=True),
    Entry("repvgg", timm_repvgg, PYRAMID, batch_norm=True),
    Entry("efficientnet", timm_efficientnet, PATCHES),
    Entry("poolformer", timm_poolformer, PYRAMID),
]
BATCH_NORM_TIMM = [entry for entry in TIMM if entry.batch_norm]


# torchvision


def torchvision_convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(10, 14, 2), block(14, None, 1)], num_classes=5)


def torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        **{"patch_size": [2, 2], "window_size": [3, 3], "mlp_ratio": 1.5, "num_classes": 5},
        **{"embed_dim": 20, "depths": [2, 2], "num_heads": [2, 5], "stochastic_depth_prob": 0.0},
    )


def torchvision_maxvit() -> nn.Module:
    """Blocks of convolution, attention in windows and attention in grids."""
    return torchvision.models.MaxVit(
        **{"input_size": (48, 48), "partition_size": 3, "head_dim": 8, "mlp_ratio": 2},
        **{"stem_channels": 12, "block_channels": [24, 40], "block_layers": [1, 1]},
        **{"stochastic_depth_prob": 0.0, "num_classes": 5},
    )


def torchvision_efficientnet() -> nn.Module:
    block = torchvision.models.efficientnet.MBConvConfig
    return torchvision.models.EfficientNet(
        [block(1, 3, 1, 16, 8, 1), block(3, 3, 2, 8, 16, 2), block(3, 5, 2, 16, 24, 1)],
        **{"dropout": 0.0, "stochastic_depth_prob": 0.0, "last_channel": 40, "num_classes": 5},
    )


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(28, 4, 2, 6, 30, 38, num_classes=5)


TORCHVISION = [
    Entry("convnext", torchvision_convnext, PYRAMID),
    Entry("swin", torchvision_swin, WINDOWS),
    Entry("maxvit", torchvision_maxvit, partial(images, 48, 48), batch_norm=True),
    Entry("efficientnet", torchvision_efficientnet, PATCHES, batch_norm=True),
    Entry("vit", torchvision_vit, partial(images, 28, 28)),
]


# recurrent


class Tagger(nn.Module):
    """A tag for each word, after two layers in both directions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(29, 6)
        self.lstm = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, 5)

    def forward(self, tokens):
        states, _ = self.lstm(self.embed(tokens))
        return self.head(states)


class LastState(nn.Module):
    """A class for each series, from the last state of the last layer; time comes first."""

    def __init__(self, kind: Callable[..., nn.Module]):
        super().__init__()
        self.layers = kind(6, 9, num_layers=2, dropout=0.1)
        self.head = nn.Linear(9, 5)

    def forward(self, series):
        _, last = self.layers(series.transpose(0, 1))
        return self.head(last[-1])


def series(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 8, 6, generator=generator, dtype=torch.float64)


RECURRENT = [
    Entry("lstm", Tagger, lambda batch: texts(0, batch)["input_ids"]),
    Entry("gru", partial(LastState, nn.GRU), series),
    Entry("rnn", partial(LastState, nn.RNN), series),
]
CATALOGUE = {
    "transformers": TRANSFORMERS,
    "timm": TIMM,
    "torchvision": TORCHVISION,
    "recurrent": RECURRENT,
}
