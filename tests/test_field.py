"""What people bring: pruned and hand-written networks, loaders with a state, ragged batches."""

import contextlib
import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images, plain, settings
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from fastgeo import Checkpoints, Descent, Forward, Path, evaluate, match, optimize, recalibrate
from fastgeo.data import loaders
from fastgeo.data.loaders import loader_data
from fastgeo.train import Training, train_ends

X = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def calls(path, module, **forward):
    """Every function that takes a path and its module."""
    how = Forward(**forward)
    return [
        lambda: optimize(path, module, [X], steps=2, descent=plain(), forward=how),
        lambda: evaluate(path, module, {"x": (X, Y)}, forward=how),
    ]


# --- What is not trained --------------------------------------------------------------------------


def pruned(seed, mask=None):
    torch.manual_seed(seed)
    network = mlp()
    if mask is None:
        prune.l1_unstructured(network[0], "weight", 0.6)
    else:
        prune.custom_from_mask(network[0], "weight", mask)
    return network


def test_networks_with_other_masks_have_no_path():
    a, b = pruned(1), pruned(2)
    words = "0.weight_mask is a mask of zeros and ones that differs"
    for options in ({}, {"interpolate_buffers": ["0.weight_mask"]}):
        with pytest.raises(ValueError, match=words):
            Path.linear(a, b, 5, **options)
    line = Path.linear(a.state_dict(), b.state_dict(), 5)  # which do not say what is a buffer
    for call in calls(line, a):
        with pytest.raises(ValueError, match=words):
            call()


def test_networks_with_the_same_mask_stay_sparse():
    a = pruned(1)
    mask = a[0].weight_mask
    path = optimize(Path.linear(a, pruned(2, mask), 5), a, [X], steps=3, descent=plain())
    for point in path.points():
        assert torch.equal(point["0.weight_mask"], mask)
        assert (point["0.weight_orig"] * point["0.weight_mask"] == 0).float().mean() > 0.59


class Coded(nn.Module):
    """Adds a table that no step trains and no forward updates."""

    def __init__(self, seed, value=None):
        super().__init__()
        torch.manual_seed(seed)
        self.body = mlp()
        self.register_buffer("code", torch.randn(3) if value is None else value)

    def forward(self, x):
        return self.body(x) + self.code


def test_what_nothing_updates_is_interpolated_only_if_it_is_named(tmp_path):
    a, b = Coded(1), Coded(2)
    words = r"code is a buffer, .* interpolate_buffers=\['code'\]"
    with pytest.raises(ValueError, match=words):
        Path.linear(a, b, 5)
    for line in (
        Path.linear(a.state_dict(), b.state_dict(), 5),
        Path.linear(a, b, 5, batchnorm="recalibrate"),
    ):
        for call in calls(line, a):
            with pytest.raises(ValueError, match=words):
                call()
    with pytest.raises(ValueError, match="names codes, which the two ends do not have"):
        Path.linear(a, b, 5, interpolate_buffers=["codes"])

    line = Path.linear(a, b, 5, interpolate_buffers=["code"])
    path = optimize(line, a, [X], steps=2, descent=Descent(coarse_to_fine=True))
    path.save(tmp_path / "path")
    for kept in (path, Path.load(tmp_path / "path"), path.to("cpu"), path.resample(9)):
        torch.testing.assert_close(kept.at(0.25)["code"], torch.lerp(a.code, b.code, 0.25))
        assert kept.interpolated == {"code"}
        evaluate(kept, a, {"x": (X, Y)})


def test_infinities_that_are_the_same_in_both_ends_stay():
    """As those of a causal mask; the mean of two of them would be no number."""
    a, b = (Coded(seed, torch.tensor([0.0, -math.inf, 0.0])) for seed in (1, 2))
    line = Path.linear(a, b, 5)
    assert all(torch.equal(point["code"], a.code) for point in line.points())


class Updates(Coded):
    """A codebook of moving averages, statistics of a kind of their own, and counts."""

    def __init__(self, seed):
        super().__init__(seed, torch.zeros(3))
        self.register_buffer("largest", torch.full((16,), -100.0))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("rows", torch.tensor(0))

    def forward(self, x):
        h = self.body[0](x)
        if self.training:
            self.code.mul_(0.8).add_(0.2 * self.body[2](h.relu()).detach().mean(0))
            self.largest.copy_(torch.maximum(self.largest, h.detach().amax(0)))
            self.calls += 1
            self.rows += len(x)
        return self.body[2]((h - self.largest).relu()) - self.code


def test_whatever_a_network_updates_is_recalibrated_as_it_updates_it():
    ends = [Updates(1), Updates(2)]
    for i, end in enumerate(ends):
        for _ in range(i + 3):
            end(X[:16])
    line = Path.linear(*ends, 5, batchnorm="recalibrate")
    got = recalibrate(line, ends[0], [X[:10], X[10:]])
    for old, new in zip(line.points(), got.points(), strict=True):
        h = F.linear(X, old["body.0.weight"], old["body.0.bias"])
        out = F.linear(h.relu(), old["body.2.weight"], old["body.2.bias"])
        torch.testing.assert_close(new["code"], (out[:10].mean(0) + out[10:].mean(0)) / 2)
        torch.testing.assert_close(new["largest"], torch.maximum(old["largest"], h.amax(0)))
        assert new["calls"] == 2 and new["rows"] == 24


class Quantised(nn.Module):
    """A codebook as it is trained by moving averages: sums over counts."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(8, 4), nn.Linear(4, 3)
        self.register_buffer("codes", torch.randn(5, 4))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("counts", torch.ones(5))

    def forward(self, x):
        h = self.body(x)
        nearest = torch.cdist(h, self.codes).argmin(-1)
        if self.training:
            chosen = F.one_hot(nearest, 5).to(h)
            self.counts.lerp_(chosen.sum(0), 0.1)
            self.sums.lerp_(chosen.T @ h.detach(), 0.1)
            self.codes.copy_(self.sums / self.counts[:, None])
        return self.head(self.codes[nearest])


def test_a_codebook_is_updated_as_its_network_does_by_itself():
    line = Path.linear(Quantised(1), Quantised(2), 4, batchnorm="recalibrate")
    got = recalibrate(line, Quantised(0), [X[:10], X[10:]], forward=Forward(chunk=3))
    for old, new in zip(line.points(), got.points(), strict=True):
        module = Quantised(0)
        module.load_state_dict(old)
        for x in (X[:10], X[10:]):
            module.train()(x)
        torch.testing.assert_close(new, module.state_dict())


def test_a_moving_average_that_no_state_dict_has_is_refused():
    def network(seed):
        module = Updates(seed)
        module._non_persistent_buffers_set.add("code")
        return module

    line = Path.linear(network(1), network(2), 4, batchnorm="recalibrate")
    with pytest.raises(ValueError, match="code is a moving average that is in no state dict"):
        recalibrate(line, network(1), [X])


class Cut(BaseException):
    """What nothing handles."""


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_optimisation_on_statistics_of_batches_goes_on_to_the_last_bit(shuffle, tmp_path):
    """Weights under spectral norm, batches that are shuffled, and a last one of one input."""

    def network(seed):
        torch.manual_seed(seed)
        head = nn.utils.spectral_norm(nn.Linear(16, 3))
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), head)

    line = Path.linear(network(1), network(2), 5, batchnorm="recalibrate")
    how = settings(batchnorm="recalibrate", engine="stacked", momentum=0.9)

    def loop(**options):
        batches = DataLoader(TensorDataset(X[:17], Y[:17]), batch_size=8, shuffle=shuffle)
        return optimize(line, network(0), batches, steps=7, **how, **options)

    torch.manual_seed(3)
    expected = loop()
    torch.manual_seed(3)
    for cut in (0, 1, 2, 5):

        def on_step(metrics, path, cut=cut):
            if metrics["step"] == cut:
                raise Cut

        with pytest.raises(Cut), Checkpoints(tmp_path, seconds=0) as states:
            loop(checkpoints=states, on_step=on_step)
    with Checkpoints(tmp_path, seconds=0) as states:
        got = loop(checkpoints=states)
    torch.testing.assert_close(got._parts(), expected._parts(), rtol=0, atol=0)


def test_tied_names_with_different_values_are_refused():
    def network():
        layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
        layers[1].weight = layers[0].weight
        return layers

    a, b = network(), network()
    state = {name: tensor.clone() for name, tensor in b.state_dict().items()}
    state["1.weight"] += 1
    words = "0.weight and 1.weight are one tensor in the module and differ in "
    for call in calls(Path.linear(a.state_dict(), state, 4), a):
        with pytest.raises(ValueError, match=words + "the interior of the path"):
            call()
    with pytest.raises(ValueError, match=words + "network 2"):
        match(a, state, X)


# --- What is random, or no logits -----------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.tail = mlp(), nn.Linear(3, 3)

    def forward(self, x):
        return self.tail(F.dropout(self.body(x)))


def test_a_network_that_is_random_in_evaluation_mode_is_named():
    for module, words in (
        (Noisy(), "^Noisy draws random numbers in evaluation mode"),
        (nn.Sequential(mlp(), Noisy().tail, Noisy().body[1]), None),
        (nn.Sequential(nn.Linear(8, 8), Noisy(), nn.Linear(3, 3)), "^layer 1, Noisy, draws"),
    ):
        line = Path.linear(module, module, 4)
        for engine in ("auto", "stacked", "vmap", "loop"):
            for call in calls(line, module, engine=engine):
                with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
                    call()
        with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
            match(module, module, X)


@pytest.mark.parametrize("tail, refused", [(nn.Softmax(-1), True), (nn.LogSoftmax(-1), False)])
def test_probabilities_are_no_logits(tail, refused):
    a, b = (nn.Sequential(mlp(), tail) for _ in range(2))
    for call in calls(Path.linear(a, b, 4), a):
        words = "gives probabilities, .* and logits are wanted"
        with pytest.raises(ValueError, match=words) if refused else contextlib.nullcontext():
            call()


# --- Modules that cannot be copied ----------------------------------------------------------------


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        self.features = self.layers[:2](x)
        return self.layers[2](self.features)


def old_norm(kind):
    def build():
        layers = mlp()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            kind(layers[0])
        for _ in range(50):  # until the vectors of spectral norm are those of the weights
            layers(X)
        return layers.eval()

    return build


MASK = (torch.arange(8 * 16).view(16, 8) % 3 > 0).float()


@pytest.mark.parametrize(
    "build",
    [
        lambda: pruned(0, MASK),
        old_norm(nn.utils.weight_norm),
        old_norm(nn.utils.spectral_norm),
        Keeps,
    ],
)
def test_nothing_copies_a_module(build, monkeypatch):
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(build())
        ends[-1](X)
        if "0.weight_orig" not in ends[-1].state_dict() or isinstance(ends[-1], Keeps):
            with pytest.raises(RuntimeError, match="deepcopy"):
                copy.deepcopy(ends[-1])
    a, b = ends

    def refuse(*args):
        raise AssertionError("a module is copied")

    monkeypatch.setattr(nn.Module, "__deepcopy__", refuse, raising=False)
    before = {name: tensor.clone() for name, tensor in a.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no channels to permute")
        matching = match(a, b, X)
    assert matching.relative_change < 1e-10
    statistics = "0.weight_u" in before
    how = {"batchnorm": "recalibrate"} if statistics else {}
    line = Path.linear(a.state_dict(), matching.state_dict, 5, **how)
    path = optimize(line, a, [X], steps=3, descent=plain(), forward=Forward(**how))
    if statistics:
        path = recalibrate(path, a, [X])
    result = evaluate(path, a, {"x": (X, Y)}, forward=Forward(**how))
    for point, loss in zip(path.points(), result.splits["x"].loss, strict=True):
        with torch.no_grad():
            a.load_state_dict(point)
            assert loss == pytest.approx(F.cross_entropy(a(X), Y).item(), rel=1e-4)


# --- Loaders --------------------------------------------------------------------------------------

ROWS = TensorDataset(torch.arange(12.0)[:, None], torch.zeros(12).long())


class Remembers(Sampler):
    """Reads on where it stopped."""

    def __init__(self):
        self.left = []

    def __iter__(self):
        if not self.left:
            self.left = torch.randperm(12).tolist()
        while self.left:
            yield self.left.pop()

    def __len__(self):
        return 12


class DrawsByItself(Sampler):
    def __init__(self):
        self.numpy = np.random.default_rng(5)

    def __iter__(self):
        return iter(self.numpy.permutation(12).tolist())

    def __len__(self):
        return 12


class DrawsFromAll(Sampler):
    """As many data sets augment: with the global generators of Python and NumPy."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        order = list(range(12))
        self.draw(order)
        return iter(order)

    def __len__(self):
        return 12


class Wrapped:
    """A loader around a loader."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader

    def __len__(self):
        return len(self.loader)


def with_generator():
    return DataLoader(ROWS, 3, shuffle=True, generator=torch.Generator().manual_seed(7))


LOADERS = {
    "plain": lambda: DataLoader(ROWS, 3, shuffle=True),
    "generator": with_generator,
    "remembers": lambda: DataLoader(ROWS, 3, sampler=Remembers()),
    "draws by itself": lambda: DataLoader(ROWS, 3, sampler=DrawsByItself()),
    "random": lambda: DataLoader(ROWS, 3, sampler=DrawsFromAll(random.shuffle)),
    "numpy": lambda: DataLoader(ROWS, 3, sampler=DrawsFromAll(np.random.shuffle)),
    "wrapped": lambda: Wrapped(with_generator()),
    "workers": lambda: DataLoader(
        ROWS,
        3,
        shuffle=True,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    ),
}


def drawn(stream, count):
    return [next(stream)[0].flatten().int().tolist() for _ in range(count)]


def streams(data, *seeds):
    return [data.shuffled(3, torch.Generator().manual_seed(seed)) for seed in seeds]


@pytest.mark.parametrize("name", LOADERS)
def test_networks_beside_each_other_draw_what_each_draws_alone(name):
    data = loader_data((LOADERS[name](), [(X, Y)]))
    (alone,), (other,) = streams(data, 1), streams(data, 2)
    expected, different = drawn(alone, 12), drawn(other, 12)
    side_by_side = streams(data, 1, 2)
    got: list[list] = [[], []]
    for _ in range(12):
        for batches, stream in zip(got, side_by_side, strict=True):
            batches += drawn(stream, 1)
    assert got == [expected, different] and expected != different
    passes = [expected[i : i + 4] for i in (0, 4, 8)]
    assert all(sorted(sum(one, [])) == list(range(12)) for one in passes)
    assert passes[0] != passes[1] != passes[2]

    (stopped,), (resumed,) = streams(data, 1), streams(data, 9)
    drawn(stopped, 6)
    state = stopped.state_dict()
    resumed.load_state_dict(state)
    assert drawn(resumed, 6) == expected[6:]

    in_order = [[x.tolist() for x, _ in data.in_order("train", 3)] for _ in range(2)]
    assert in_order[0] == in_order[1]


class Augments(Dataset):
    """Its own generator, and data that are not to be copied."""

    def __init__(self):
        self.rows, self.generator = torch.arange(12.0), np.random.default_rng(0)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return self.rows[i : i + 1] + self.generator.uniform(0, 0.5), 0


def test_a_data_set_that_draws_by_itself_is_drawn_from_apart_and_shares_its_data():
    whole = Augments()
    data = loader_data((DataLoader(whole, 3), [(X, Y)]))

    def values(stream, count):
        return [next(stream)[0].flatten().tolist() for _ in range(count)]

    (alone,) = streams(data, 1)
    expected = values(alone, 4)
    one, other = streams(data, 1, 2)
    got = []
    for _ in range(4):
        got += values(one, 1)
        values(other, 1)
    assert got == expected
    copied = loaders.own_loader("train", data.train, 3).dataset
    assert copied is not whole and copied.rows is whole.rows
    for loader in (DataLoader(ROWS, 3), DataLoader([(0.0, 1)] * 1000, 3)):
        assert loaders.own_loader("train", loader, 3).dataset is loader.dataset


def test_global_random_numbers_are_left_alone():
    data = loader_data((LOADERS["numpy"](), [(X, Y)]))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    (stream,) = streams(data, 1)
    drawn(stream, 5)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after


def test_a_loader_that_cannot_be_copied_is_refused():
    class Locked(Wrapped):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle '_thread.lock' object")

    with pytest.raises(ValueError, match="the train loader cannot be copied .*_thread.lock"):
        loader_data((Locked(DataLoader(ROWS, 3)), [(X, Y)]))


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield X[0], Y[0]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_loader_without_end_is_refused_after_a_while(split, monkeypatch):
    monkeypatch.setattr(loaders, "COUNTING", 0.05)
    given = {"train": [(X, Y)], "test": [(X, Y)], split: DataLoader(Endless(), batch_size=8)}
    with pytest.raises(ValueError, match=f"{split} loader has no length and did not end .*__len__"):
        loader_data((given["train"], given["test"]))


def test_a_pass_over_a_loader_ends_where_its_length_says():
    class Declared(Wrapped):
        def __len__(self):
            return 3

    data = loader_data((Declared(DataLoader(Endless(), batch_size=8)), [(X, Y)]))
    assert data.batches == len(list(data.in_order("train", 8))) == 3


# --- Training on batches of different shapes ------------------------------------------------------


class Bag(nn.Module):
    """The mean of the embeddings of a row's tokens, of which 0 is none."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, tokens):
        there = (tokens != 0).unsqueeze(-1)
        return self.head((self.embed(tokens) * there).sum(1) / there.sum(1))


def padded():
    rows = [(torch.arange(1, 3 + i % 6), i % 3) for i in range(24)]

    def collate(batch):
        tokens, labels = zip(*batch, strict=True)
        return nn.utils.rnn.pad_sequence(tokens, batch_first=True), torch.tensor(labels)

    loader = DataLoader(rows, batch_size=3, shuffle=True, collate_fn=collate)
    return loader_data((loader, loader))


@pytest.mark.parametrize("engine, chunk", [("auto", None), ("stacked", None), ("loop", 2)])
def test_networks_are_trained_at_once_on_batches_of_other_shapes(engine, chunk):
    training = Training(epochs=3, train_lr=0.05)
    seeds = (1, 2, 3)
    how = dict(forward=Forward(engine=engine, chunk=chunk))
    ends = train_ends(Bag, padded(), seeds, training, **how)
    for seed, end in zip(seeds, ends, strict=True):
        (alone,) = train_ends(Bag, padded(), (seed,), training, **how)
        torch.testing.assert_close(end, alone)
    widths = {batch[0].shape for stream in (padded().train,) for batch in stream}
    assert len(widths) > 1


def test_a_last_batch_of_one_is_left_out_where_networks_have_batch_norm(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def ends(batches, epochs, **options):
        how = dict(forward=Forward(engine="stacked", batchnorm="recalibrate"))
        training = Training(epochs=epochs, train_lr=0.05)
        return train_ends(
            network, loader_data((batches, batches)), (1, 2), training, **how, **options
        )

    whole = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    expected = ends(whole, 3)
    exactly = dict(rtol=0, atol=0)
    with_tail = [*whole, (X[16:17], Y[16:17])]
    torch.testing.assert_close(ends(with_tail, 2), expected, **exactly)

    def on_step(metrics, states):
        if metrics["step"] == 2:  # whose batch is the first after the one that is left out
            raise Cut

    with pytest.raises(Cut), Checkpoints(tmp_path, seconds=0) as states:
        ends(with_tail, 2, checkpoints=states, on_step=on_step)
    with Checkpoints(tmp_path, seconds=0) as states:
        torch.testing.assert_close(ends(with_tail, 2, checkpoints=states), expected, **exactly)


# --- Modules and modes ----------------------------------------------------------------------------


class Empty(nn.Module):
    """A prompt of no tokens."""

    def __init__(self):
        super().__init__()
        self.layers, self.prompt = mlp(), nn.Parameter(torch.empty(0, 3))

    def forward(self, x):
        return self.layers(x) + self.prompt.sum(0)


def test_parameters_without_numbers_are_in_every_path(tmp_path):
    a, b = Empty(), Empty()
    matching = match(a, b, X)
    assert matching.relative_change < 1e-10 and matching.spec.channels
    assert matching.state_dict["prompt"].shape == (0, 3)
    line = Path.linear(a, matching.state_dict, 5)
    without = Path.linear(
        a.layers, {k[7:]: t for k, t in matching.state_dict.items() if k != "prompt"}, 5
    )
    for engine in ("auto", "stacked", "loop"):
        how = settings(engine=engine, precondition=True, momentum=0.9)
        path = optimize(line, a, [X], steps=4, **how)
        expected = optimize(without, a.layers, [X], steps=4, **how)
        for name, tensor in expected.interior.items():
            torch.testing.assert_close(path.interior[f"layers.{name}"], tensor)
    path.save(tmp_path / "path")
    loaded = Path.load(tmp_path / "path").resample(9)
    assert loaded.interior["prompt"].shape == (7, 0, 3)
    evaluate(loaded, a, {"x": (X, Y)})


def test_an_optimisation_in_inference_mode_is_one_all_the_same():
    ends = [mlp(), mlp()]
    expected = optimize(Path.linear(*ends, 5), mlp(), [X], steps=3, descent=plain())
    with torch.inference_mode():
        module = mlp()
        line, x = Path.linear(*ends, 5), X.clone()
        got = optimize(line, module, [x], steps=3, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        torch.compile,
        lambda m: torch.compile(nn.DataParallel(m)),
    ],
)
def test_what_only_calls_a_module_is_taken_off(wrap):
    a, b = mlp(), mlp()
    line = Path.linear(wrap(a), wrap(b), 5)
    assert list(line.start) == list(a.state_dict())
    got = optimize(line, wrap(a), [X], steps=2, descent=plain())
    expected = optimize(Path.linear(a, b, 5), a, [X], steps=2, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior)
    losses = [evaluate(got, m, {"x": (X, Y)}).splits["x"].loss for m in (wrap(a), a)]
    assert losses[0] == pytest.approx(losses[1])
    assert match(wrap(a), wrap(b), X).objective_after == match(a, b, X).objective_after


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:")
def test_torchscript_is_refused():
    a = mlp()
    scripted = torch.jit.script(a)
    line = Path.linear(a, mlp(), 4)
    for call in (
        *calls(line, scripted),
        lambda: match(scripted, a, X),
        lambda: Path.linear(scripted, scripted, 4),
        lambda: recalibrate(line, scripted, [X]),
    ):
        with pytest.raises(TypeError, match="is TorchScript, .*give the nn.Module"):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_in_an_end_is_named(value):
    a, b = mlp(), mlp()
    with torch.no_grad():
        b[0].bias[2] = value
    for call in (
        lambda: Path.linear(a, b, 4),
        lambda: match(a, b, X),
        lambda: match(a.state_dict(), b.state_dict(), X, module=a),
    ):
        with pytest.raises(ValueError, match=r"0\.bias is not finite in b"):
            call()


def test_batch_norm_without_running_statistics_needs_no_recalibration():
    """It has none: the batch's serve in either mode."""

    def network(seed):
        torch.manual_seed(seed)
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        layers = [nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
        return nn.Sequential(*layers).double()

    a, b = network(1), network(2)
    x, y = images(), torch.arange(12) % 5
    path = optimize(Path.linear(a, b, 5), a, [x], steps=2, descent=plain())
    losses = evaluate(path, a, {"x": (x, y)}).splits["x"].loss
    for point, loss in zip(path.points(), losses, strict=True):
        a.load_state_dict(point)
        assert loss == pytest.approx(F.cross_entropy(a(x), y).item())
    with pytest.raises(ValueError, match="nothing to recalibrate: .* leave out batchnorm"):
        optimize(path, a, [x], descent=plain(), forward=Forward(batchnorm="recalibrate"))
