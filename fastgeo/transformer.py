"""Transformer layers as plain functions, which torch.fx can follow."""

from torch import nn


def _encoder(
    self: nn.TransformerEncoder, src, mask=None, src_key_padding_mask=None, is_causal=None
):
    for layer in self.layers:
        src = layer(src, mask, src_key_padding_mask, bool(is_causal))
    return src if self.norm is None else self.norm(src)


def _encoder_layer(
    self: nn.TransformerEncoderLayer, src, src_mask=None, src_key_padding_mask=None, is_causal=False
):
    masks = (src_mask, src_key_padding_mask)
    if self.norm_first:
        src = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
        return src + self._ff_block(self.norm2(src))
    src = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
    return self.norm2(src + self._ff_block(src))


def _decoder(
    self: nn.TransformerDecoder,
    tgt,
    memory,
    tgt_mask=None,
    memory_mask=None,
    tgt_key_padding_mask=None,
    memory_key_padding_mask=None,
    tgt_is_causal=None,
    memory_is_causal=False,
):
    masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
    for layer in self.layers:
        tgt = layer(tgt, memory, *masks, bool(tgt_is_causal), memory_is_causal)
    return tgt if self.norm is None else self.norm(tgt)


def _transformer(
    self: nn.Transformer,
    src,
    tgt,
    src_mask=None,
    tgt_mask=None,
    memory_mask=None,
    src_key_padding_mask=None,
    tgt_key_padding_mask=None,
    memory_key_padding_mask=None,
    src_is_causal=None,
    tgt_is_causal=None,
    memory_is_causal=False,
):
    memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
    masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
    return self.decoder(tgt, memory, *masks, tgt_is_causal, memory_is_causal)


# What their forwards compute, without the branches on masks and sizes, which choose kernels or
# find what does not fit.
PLAIN = {
    nn.Transformer.forward: _transformer,
    nn.TransformerDecoder.forward: _decoder,
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerEncoderLayer.forward: _encoder_layer,
}
