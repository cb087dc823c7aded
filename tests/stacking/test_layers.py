"""Attention, recurrence, embeddings, dropout and BatchNorm, stacked, against the loop."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equals_the_loop, assert_trains_like_the_loop, clones, settings
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves
from zoo import ZOO

from fastgeo import Path, optimize, stack

B, T, D = 3, 5, 8


def sequences(batch=B, length=T, width=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


class Around(nn.Module):
    """Some use of a layer on sequences that differ between the networks."""

    def __init__(self, use, layer=None):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.layer = layer if layer is not None else nn.Identity()
        self.use = use

    def forward(self, x):
        return self.use(self.layer, self.first(x), x)


def assert_stacked(network):
    assert not {"vmap:", "loop:"} & set(network.explain().split()), network.explain()


BLIND = torch.ones(T, T).triu(1).bool()
BIAS = sequences(1, T, T, seed=1)[0]
PADDED = torch.arange(T) >= torch.tensor([5, 3, 4])[:, None]
FAINT = sequences(1, B, T, seed=2)[0]
PER_HEAD = sequences(B * 2, T, T, seed=3)


@pytest.mark.parametrize(
    "options, use",
    [
        ({}, lambda a, x, shared: a(x, x, x)[0]),
        ({}, lambda a, x, shared: a(x, x, x, need_weights=False)[0]),
        ({}, lambda a, x, shared: a(x, x, x)[0] * a(x, x, x)[1].square().sum()),
        ({}, lambda a, x, shared: a(x, x, x, average_attn_weights=False)[1].flatten(1)),
        ({}, lambda a, x, shared: a(x, shared, shared)[0]),
        ({}, lambda a, x, shared: a(shared, x, shared + 1, need_weights=False)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=BLIND)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=BIAS, need_weights=False)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=BLIND, is_causal=True)[0]),
        (
            {},
            lambda a, x, shared: a(x, x, x, attn_mask=BLIND, is_causal=True, need_weights=False)[0],
        ),
        ({}, lambda a, x, shared: a(x, x, x, key_padding_mask=PADDED)[0]),
        ({}, lambda a, x, shared: a(x, x, x, key_padding_mask=PADDED, need_weights=False)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=BLIND, key_padding_mask=PADDED)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=BIAS, key_padding_mask=FAINT)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=PER_HEAD, key_padding_mask=FAINT)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=PER_HEAD, need_weights=False)[0]),
        ({}, lambda a, x, shared: a(x, x, x, attn_mask=x[0, :1, :T].tanh() * BIAS)[0]),
        ({}, lambda a, x, shared: a(x, x, x, key_padding_mask=x.sum((0, 1))[:T].expand(B, T))[0]),
        (dict(bias=False), lambda a, x, shared: a(x, x, x)[0]),
        (dict(kdim=4, vdim=6), lambda a, x, shared: a(x, x[..., :4], shared[..., :6])[0]),
        (dict(add_bias_kv=True), lambda a, x, shared: a(x, x, x)[0]),
        (dict(add_zero_attn=True), lambda a, x, shared: a(x, x, x)[0]),
        (
            dict(add_bias_kv=True, add_zero_attn=True),
            lambda a, x, shared: a(x, x, x, attn_mask=BIAS, key_padding_mask=FAINT)[0],
        ),
        (dict(dropout=0.5), lambda a, x, shared: a(x, x, x)[0]),
    ],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_equals_the_loop(options, use, batch_first):
    layer = nn.MultiheadAttention(D, 2, batch_first=batch_first, **options)
    module = Around(use, layer).double().eval()
    x = sequences() if batch_first else sequences(T, B)
    assert_stacked(assert_equals_the_loop(module, x, 3, False))


def test_attention_of_one_sequence_equals_the_loop():
    module = Around(lambda a, x, shared: a(x, x, shared)[0], nn.MultiheadAttention(D, 2)).double()
    assert_stacked(assert_equals_the_loop(module, sequences()[0], 3, False))


@pytest.mark.parametrize(
    "use",
    [
        lambda e, x: e(x),
        lambda e, x: e(x, src_key_padding_mask=PADDED),
        lambda e, x: e(x, BLIND, is_causal=True),
        lambda e, x: e(x, mask=BLIND, src_key_padding_mask=PADDED),
        lambda e, x: e.layers[0](x, src_mask=BIAS),
    ],
)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_encoders_equal_the_loop_operation_by_operation(use, norm_first, batch_first):
    options = dict(norm_first=norm_first, batch_first=batch_first, activation=F.gelu)
    layer = nn.TransformerEncoderLayer(D, 2, 12, **options)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D), enable_nested_tensor=False)
    module = Around(lambda e, x, shared: use(e, x), encoder).double().eval()
    x = sequences() if batch_first else sequences(T, B)
    network = assert_equals_the_loop(module, x, 3, False)
    assert_stacked(network)
    params = {name: torch.stack([p] * 2) for name, p in module.named_parameters()}
    with torch.no_grad():
        got = network(params, x)
    torch.testing.assert_close(got[1], module(x).detach())


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
def test_padded_encoders_compute_the_same_without_a_gradient(engine):
    layer = nn.TransformerEncoderLayer(D, 2, 12, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    use = lambda e, x, shared: e(x, src_key_padding_mask=PADDED)  # noqa: E731
    networks = clones(Around(use, encoder).double().eval(), 2)
    params, _ = torch.func.stack_module_state(networks)
    with torch.no_grad():
        got = stack(networks[0], engine=engine)(params, sequences())
    expected = torch.stack([net(sequences()) for net in networks])
    torch.testing.assert_close(got, expected.detach())


def heads(x):
    return x.unflatten(-1, (2, 4)).transpose(-3, -2)


@pytest.mark.parametrize(
    "use",
    [
        lambda _, x, shared: F.scaled_dot_product_attention(x, x, x),
        lambda _, x, shared: F.scaled_dot_product_attention(x, shared, shared, is_causal=True),
        lambda _, x, shared: F.scaled_dot_product_attention(*[heads(x)] * 3, scale=0.3),
        lambda _, x, shared: F.scaled_dot_product_attention(heads(x), heads(shared), heads(x)),
        lambda _, x, shared: F.scaled_dot_product_attention(*[heads(x)] * 3, attn_mask=~BLIND),
        lambda _, x, shared: F.scaled_dot_product_attention(
            *[heads(x)] * 3, attn_mask=heads(x) @ heads(x).mT
        ),
        lambda _, x, shared: F.scaled_dot_product_attention(
            *[heads(x)] * 3, attn_mask=heads(x)[:, :1] @ heads(shared)[:, :1].mT
        ),
        lambda _, x, shared: F.scaled_dot_product_attention(
            *[heads(x)] * 3, attn_mask=~PADDED[:, None, None].expand(B, 1, T, T)
        ),
        lambda _, x, shared: F.scaled_dot_product_attention(
            heads(x), heads(x)[:, :1], heads(x)[:, 1:], enable_gqa=True
        ),
        lambda _, x, shared: F.scaled_dot_product_attention(
            *[heads(x)[:, None]] * 3, is_causal=True
        ),
    ],
)
def test_attention_equals_the_loop(use):
    network = assert_equals_the_loop(Around(use).double(), sequences(), 3, False)
    assert "scaled_dot_product_attention  stacked" in network.explain()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Embedding(7, 4),
        nn.Embedding(7, 4, padding_idx=2),
        nn.Embedding(7, 4, padding_idx=-1),
        nn.Embedding(7, 4, scale_grad_by_freq=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_point", [False, True])
def test_embeddings_equal_the_loop(layer, per_point):
    tokens = torch.tensor([[0, 2, 2, 6], [1, 2, 3, 6]])
    tokens = torch.stack([tokens, (tokens + 1) % 7, 6 - tokens]) if per_point else tokens
    assert_equals_the_loop(nn.Sequential(layer, nn.Linear(4, 3)).double(), tokens, 3, per_point)


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
@pytest.mark.parametrize(
    "options",
    [
        dict(sparse=True),
        dict(max_norm=0.5),
        dict(max_norm=0.5, norm_type=1.0, padding_idx=2),
        dict(max_norm=0.5, sparse=True),
    ],
    ids=str,
)
def test_sparse_and_bounded_embeddings_have_the_numbers_and_gradients_of_each(engine, options):
    """Rows that are looked up are shortened in place, in params as in a network by itself."""
    module = nn.Sequential(nn.Embedding(7, 4, **options), nn.Linear(4, 3)).double()
    networks, tokens = clones(module, 3), torch.tensor([[0, 2, 2, 6], [1, 2, 3, 6]])
    params, _ = torch.func.stack_module_state(networks)
    got = stack(module, engine=engine)(params, tokens)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, list(params.values()), upstream)
    for i, network in enumerate(networks):
        expected = network(tokens)
        torch.testing.assert_close(got[i], expected)
        own = torch.autograd.grad(expected, list(network.parameters()), upstream[i])
        for one, other in zip(gradients, own, strict=True):
            torch.testing.assert_close(one[i], other.to_dense())
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(params[name][i], parameter)
    assert module[0].sparse == options.get("sparse", False)


@pytest.mark.parametrize("options", [dict(sparse=True), dict(max_norm=0.5)], ids=str)
@pytest.mark.parametrize("engine", ["auto", "stacked", "vmap", "loop"])
def test_a_path_of_sparse_and_bounded_embeddings_is_optimized(engine, options):
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Embedding(7, 4, **options), nn.Linear(4, 3)) for _ in range(2))
    a[1].weight.data *= 5
    tokens = torch.tensor([0, 2, 1, 6, 3])
    found = optimize(Path.linear(a, b, 4), a, [tokens], steps=2, **settings(engine=engine))
    plain = nn.Sequential(nn.Embedding(7, 4, max_norm=options.get("max_norm")), nn.Linear(4, 3))
    loop = settings(engine="loop")
    expected = optimize(Path.linear(a, b, 4), plain, [tokens], steps=2, **loop)
    got, wanted = (stack(plain)(path.stacked(), torch.arange(7)) for path in (found, expected))
    torch.testing.assert_close(got, wanted)


# --- Recurrence -----------------------------------------------------------------------------------


def all_of(output):
    """The states and the last ones, in one row."""
    return torch.cat([value.flatten() for value in tree_leaves(output)])[None]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(bias=False),
        dict(num_layers=2, dropout=0.5),
        dict(num_layers=2, bidirectional=True),
        dict(batch_first=True, bidirectional=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "use",
    [
        lambda r, x, shared: all_of(r(x)),
        lambda r, x, shared: all_of(r(shared)),
        lambda r, x, shared: all_of(r(x[0])),  # one sequence
    ],
)
def test_recurrent_layers_equal_the_loop(kind, options, use):
    module = Around(use, kind(D, 4, **options)).double().eval()
    assert_stacked(assert_equals_the_loop(module, sequences(), 3, False))


@pytest.mark.parametrize(
    "layer, use",
    [
        (nn.LSTM(D, 4), lambda r, x, shared: r(x, (x[:1, :, :4], shared[:1, :, 4:]))),
        (nn.GRU(D, 4), lambda r, x, shared: r(shared, x[:1, :, :4])),
        (nn.RNN(D, 4, nonlinearity="relu"), lambda r, x, shared: r(x, shared[:1, :, :4])),
        (nn.LSTMCell(D, 4), lambda r, x, shared: r(x[0], (shared[0, :, :4], x[1, :, :4]))),
        (nn.LSTMCell(D, 4, bias=False), lambda r, x, shared: r(shared[0, 0])),
        (nn.GRUCell(D, 4), lambda r, x, shared: r(x[0], r(shared[0]))),
        (nn.RNNCell(D, 4), lambda r, x, shared: r(shared[0], x[0, :, :4])),
        (nn.RNNCell(D, 4, nonlinearity="relu"), lambda r, x, shared: r(x[0])),
    ],
)
def test_recurrence_from_given_states_equals_the_loop(layer, use):
    module = Around(lambda r, x, shared: all_of(use(r, x, shared)), layer).double()
    assert_stacked(assert_equals_the_loop(module, sequences(), 3, False))


def packed(layer, x, shared):
    sequences = pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True)
    return pad_packed_sequence(layer(sequences)[0], batch_first=True)[0]


@pytest.mark.parametrize(
    "layer, use, line",
    [
        (nn.LSTM(D, 4, bidirectional=True), packed, "loop: its sequences are packed"),
        (nn.GRU(D, 4), packed, "loop: its sequences are packed"),
        (nn.LSTM(D, 4, proj_size=2), lambda r, x, _: r(x)[0], "loop: its states are projected"),
    ],
)
def test_packed_and_projected_recurrence_is_a_loop_over_the_call(layer, use, line):
    network = assert_equals_the_loop(Around(use, layer).double(), sequences(), 3, False)
    assert line in network.explain()


# --- Dropout --------------------------------------------------------------------------------------

DROPOUT = [
    nn.Dropout(0.4),
    nn.Dropout1d(0.4),
    nn.AlphaDropout(0.4),
    nn.FeatureAlphaDropout(0.4),
    nn.MultiheadAttention(D, 2, dropout=0.4, batch_first=True),
    nn.GRU(D, D, num_layers=2, dropout=0.4),
]


@pytest.mark.parametrize("layer", DROPOUT, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shared", [False, True])
def test_dropout_draws_for_every_network_by_itself(layer, shared):
    def use(layer, x, own):
        x = own if shared else x
        if isinstance(layer, nn.MultiheadAttention):
            return layer(x, x, x)[0]
        return layer(x)[0] if isinstance(layer, nn.GRU) else layer(x)

    module = Around(use, copy.deepcopy(layer)).double().train()
    params = {name: torch.stack([p] * 200) for name, p in module.named_parameters()}
    got = stack(module)(params, sequences())
    assert not torch.equal(got[0], got[1])  # equal networks, other draws
    alone = torch.stack([module(sequences()) for _ in range(200)])
    # Both are means of 200 draws from one distribution.
    deviation = (got.std(0) ** 2 + alone.std(0) ** 2).sqrt() / 200**0.5
    z = (got.mean(0) - alone.mean(0)) / (deviation + 1e-9)
    assert z.abs().max() < 6

    module.eval()
    evaluated = stack(module)(params, sequences())
    torch.testing.assert_close(evaluated[0], module(sequences()))
    torch.testing.assert_close(evaluated[1], evaluated[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vgg", "gpt", "text-cnn"])
def test_a_network_is_run_in_the_mode_that_it_is_in(name):
    (member,) = [member for member in ZOO if member.name == name]
    module, x = member.make(), member.inputs(4)
    network = stack(module)
    params = {name: torch.stack([p] * 2) for name, p in module.named_parameters()}
    for mode in (False, True, False):
        module.train(mode)
        first, second = network(params, x)
        assert torch.equal(first, second) != mode


# --- BatchNorm ------------------------------------------------------------------------------------


def batch_norm_net(spatial, **options):
    if spatial == 0:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, **options), nn.Linear(4, 3))
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[spatial]
    layers = [kinds[0](2, 4, 3), kinds[1](4, **options), nn.ReLU(), kinds[0](4, 3, 2)]
    return nn.Sequential(*layers)


OPTIONS = [{}, dict(momentum=None), dict(momentum=0.0), dict(track_running_stats=False)]
OPTIONS += [dict(affine=False), dict(momentum=0.3, eps=1e-2)]


@pytest.mark.parametrize("spatial", [0, 1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("engine", ["stacked", "loop"])
@pytest.mark.parametrize("per_point", [False, True])
def test_batch_norm_trains_like_the_loop(spatial, options, engine, per_point):
    """Outputs, gradients and running statistics, in two training steps and one evaluation."""
    shape = (8, 2, *(6,) * spatial) if spatial else (8, 6)
    draws = [
        torch.randn((3, *shape) if per_point else shape, dtype=torch.float64) for _ in range(3)
    ]
    module = batch_norm_net(spatial, **options).double()
    assert_trains_like_the_loop(module, draws, 3, per_point, engine=engine)


def test_an_index_out_of_range_is_not_a_row_of_another_network():
    module = nn.Embedding(7, 2)
    params, _ = torch.func.stack_module_state(clones(module, 3))
    for index in (7, -1):
        tokens = torch.zeros(3, 4, dtype=torch.long)
        tokens[1, 2] = index
        with pytest.raises(IndexError):
            stack(module, engine="stacked")(params, tokens, per_point=True)
        with pytest.raises(IndexError):
            stack(module)(params, tokens, per_point=True)


def test_shared_attention_without_dropout_is_computed_once():
    module = Around(lambda layer, x, shared: F.scaled_dot_product_attention(shared, shared, x))
    shared = Around(
        lambda layer, x, shared: x * F.scaled_dot_product_attention(shared, shared, shared)
    )
    for one in (module, shared):
        assert_equals_the_loop(one.double(), sequences(), 3, False)


def _causal(length):
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)


@pytest.mark.parametrize(
    "layer, use",
    [
        (
            lambda: nn.Transformer(D, 2, 1, 2, 12, batch_first=True),
            lambda layer, x, shared: layer(shared, x, tgt_mask=_causal(T)),
        ),
        (
            lambda: nn.Transformer(D, 2, 1, 1, 12, norm_first=True),
            lambda layer, x, shared: layer(x, 2 * x[:2], src_key_padding_mask=PADDED_FIRST),
        ),
        (
            lambda: nn.TransformerDecoder(
                nn.TransformerDecoderLayer(D, 2, 12, batch_first=True), 2, nn.LayerNorm(D)
            ),
            lambda layer, x, shared: layer(
                x, shared, _causal(T), memory_key_padding_mask=PADDED, tgt_is_causal=True
            ),
        ),
    ],
)
def test_whole_transformers_are_stacked(layer, use):
    module = Around(use, layer()).double().eval()
    assert_stacked(assert_equals_the_loop(module, sequences(), 3, False))


PADDED_FIRST = torch.arange(B) >= torch.tensor([3, 2, 1, 3, 2])[:, None]  # [T, B]: batch is second
