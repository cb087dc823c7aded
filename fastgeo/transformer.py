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


# What their forwards compute, without the branches on masks that choose kernels for inference.
PLAIN = {
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerEncoderLayer.forward: _encoder_layer,
}
