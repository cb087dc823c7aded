"""Stacked forms of recurrent layers: the steps of all networks at once; see `arithmetic`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_linear
from torch import Tensor

from fastgeo.stacking.forms.layers import linear
from fastgeo.stacking.stacked import NoForm, Stacked, each


def _lstm(x: Tensor, h: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    taken, kept, new, shown = (x + h).chunk(4, -1)
    cell = kept.sigmoid() * state[1] + taken.sigmoid() * new.tanh()
    return shown.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: Sequence[Tensor]) -> tuple[Tensor]:
    (r, z, new), (r_of_h, z_of_h, new_of_h) = x.chunk(3, -1), h.chunk(3, -1)
    new = (new + (r + r_of_h).sigmoid() * new_of_h).tanh()
    return (new + (z + z_of_h).sigmoid() * (state[0] - new),)


CELLS = {  # of what the input and the state give, and the state: the state afterwards
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda x, h, state: ((x + h).tanh(),),
    "rnn_relu": lambda x, h, state: ((x + h).relu(),),
}


def cell(function: Callable, n, input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    name = function.__name__.removesuffix("_cell")
    state = [each(t, n) for t in (hx if name == "lstm" else [hx])]
    x, h = linear(n, input, w_ih, b_ih), linear(n, Stacked(state[0]), w_hh, b_hh)
    after = tuple(map(Stacked, CELLS[name](x.tensor, h.tensor, state)))
    return after if name == "lstm" else after[0]


def layer(
    function: Callable,
    n,
    input,
    hx,
    params,
    has_biases,
    layers,
    dropout,
    train,
    bidirectional,
    batch_first=None,
):
    """What nn.LSTM, nn.GRU and nn.RNN call."""
    cell, is_lstm = CELLS[function.__name__], function.__name__ == "lstm"
    if batch_first is None or not isinstance(has_biases, bool):
        raise NoForm("its sequences are packed")
    states = [each(t, n) for t in (hx if is_lstm else [hx])]  # [N, layers, B, H]
    if states[0].shape[-1] != states[-1].shape[-1]:
        raise NoForm("its states are projected")
    weights = iter(each(t, n) for t in params)
    x = each(input, n).transpose(1, 2) if batch_first else each(input, n)  # [N, T, B, I]
    ends: list[Sequence[Tensor]] = []
    for layer in range(layers):
        if layer and train and dropout:
            x = F.dropout(x, dropout)
        outputs = []
        for backwards in (False, True)[: 1 + bidirectional]:
            w_ih, w_hh = next(weights), next(weights)
            b_ih, b_hh = (next(weights), next(weights)) if has_biases else (None, None)
            inputs = stacked_linear(x, w_ih, b_ih).unbind(1)
            state: Sequence[Tensor] = [t[:, len(ends)] for t in states]
            hidden = []
            for x_t in inputs[::-1] if backwards else inputs:
                state = cell(x_t, stacked_linear(state[0], w_hh, b_hh), state)
                hidden.append(state[0])
            outputs.append(torch.stack(hidden[::-1] if backwards else hidden, 1))
            ends.append(state)
        x = torch.cat(outputs, -1)
    out = x.transpose(1, 2) if batch_first else x
    return (Stacked(out), *(Stacked(torch.stack(end, 1)) for end in zip(*ends, strict=True)))
