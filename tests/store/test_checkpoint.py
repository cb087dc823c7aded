"""States of a loop: going on from one is not to be told from never having stopped."""

import os
import signal
from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch
from conftest import evaluating, images, plain, settings, tiny_resnet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastgeo import Checkpoints, Forward, Path, Training, models, optimize
from fastgeo.data.images import load
from fastgeo.data.loaders import loader_data
from fastgeo.store.checkpoint import Stopped
from fastgeo.train import train_ends

CONFIG = Training(epochs=2, train_batch_size=25, train_lr=0.05)


class Cut(BaseException):
    """What nothing handles, as little as a power cut."""


def cut_at(*steps):
    """An on_step that cuts the loop at each of these steps once."""
    left = list(steps)

    def on_step(metrics, state):
        if left and metrics["step"] == left[0]:
            left.pop(0)
            raise Cut

    return on_step


def until_done(folder, steps, loop, **options):
    """The loop's result after a cut at each of the steps."""
    on_step = cut_at(*steps)
    for _ in steps:
        with pytest.raises(Cut), Checkpoints(folder, seconds=0, **options) as checkpoints:
            checkpoints._pause = 0  # every step is saved
            loop(checkpoints=checkpoints, on_step=on_step)
    with Checkpoints(folder, seconds=0, **options) as checkpoints:
        return loop(checkpoints=checkpoints, on_step=on_step)


@pytest.fixture(autouse=True)
def every_step_is_saved(monkeypatch):
    monkeypatch.setattr("fastgeo.store.checkpoint.SHARE", 0)


def shuffling(x):
    return DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=4, shuffle=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batches", [lambda x: list(x.split(4)), shuffling])
def test_a_path_goes_on_to_the_last_bit(batches, momentum, path, module, tmp_path):
    def loop(**options):
        how = dict(steps=9, momentum=momentum, lr_schedule="cosine", engine="stacked")
        return optimize(path, module, batches(images()), **settings(**how, **options))

    torch.manual_seed(3)
    expected = loop()
    torch.manual_seed(3)
    got = until_done(tmp_path / "states", (1, 2, 3, 7), loop, log=tmp_path / "log.jsonl")
    for name, tensor in expected.interior.items():
        assert torch.equal(got.interior[name], tensor), name
    assert (tmp_path / "log.jsonl").read_bytes().count(b"\n") == 9


def test_an_iterator_goes_on_when_it_is_made_anew(path, module, tmp_path):
    def loop(**options):
        stream = iter(images(seed=i) for i in range(7))
        return optimize(path, module, stream, **settings(engine="stacked", **options))

    got = until_done(tmp_path / "states", (2, 5), loop)
    torch.testing.assert_close(got.interior, loop().interior, rtol=0, atol=0)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout())
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.body(x))


def digits_loader():
    digits = load("digits", train_subset=100)
    x, y = digits.normalize(digits.train.images), digits.train.labels
    train = DataLoader(TensorDataset(x, y), batch_size=25, shuffle=True)
    return loader_data((train, [(x, y)]))


@pytest.mark.parametrize(
    "make_module, data, optimizer",
    [
        (lambda: models.resnet(8, 0.5, in_channels=1), "flip-crop", "sgd"),
        (Dropping, "flip-crop", "sgd"),
        (Dropping, "loader", "sgd"),
        (Dropping, "loader", "adamw"),
    ],
)
def test_training_goes_on_to_the_last_bit(make_module, data, optimizer, tmp_path):
    """Moments, schedule, order, augmentation, dropout and running statistics."""

    def loop(**options):
        own = load("digits", train_subset=100, augment="flip-crop")
        return train_ends(
            make_module,
            digits_loader() if data == "loader" else own,
            (3, 4),
            replace(CONFIG, optimizer=optimizer),
            **evaluating(engine="stacked", batchnorm="recalibrate", **options),
        )

    logs = [tmp_path / name for name in ("uncut.jsonl", "cut.jsonl")]
    with Checkpoints(tmp_path / "uncut", log=logs[0]) as checkpoints:
        expected = loop(checkpoints=checkpoints)
    got = until_done(tmp_path / "states", (1, 2, 5), loop, log=logs[1])
    for one, other in zip(got, expected, strict=True):
        assert list(one) == list(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert logs[0].read_bytes() == logs[1].read_bytes()
    plain = loop()
    assert all(torch.equal(plain[i][name], got[i][name]) for i in (0, 1) for name in plain[i])


def stopped_at(folder, step, path, module, **options):
    with pytest.raises(Cut), Checkpoints(folder, seconds=0) as checkpoints:
        optimize(
            path,
            module,
            [images()],
            steps=20,
            on_step=cut_at(step),
            checkpoints=checkpoints,
            **settings(**options),
        )


def test_the_two_newest_states_are_kept_and_nothing_else_is_touched(path, module, tmp_path):
    (tmp_path / "thesis-2026.tex").touch()
    (tmp_path / "train-000000001").mkdir()
    stopped_at(tmp_path, 5, path, module)
    own = {"optimize-000000004", "optimize-000000005"}
    assert set(os.listdir(tmp_path)) == own | {"thesis-2026.tex", "train-000000001"}
    assert set(os.listdir(tmp_path / "optimize-000000005")) == {
        *("path.safetensors", "state.safetensors", "state.json")
    }
    assert len(Path.load(tmp_path / "optimize-000000005" / "path.safetensors")) == 7
    Checkpoints(tmp_path).clear()
    assert os.listdir(tmp_path) == ["thesis-2026.tex"]


def test_a_damaged_state_is_left_aside_for_the_one_before_it(path, module, tmp_path):
    options = dict(steps=20, engine="stacked")
    expected = optimize(path, module, [images()], **settings(**options))
    stopped_at(tmp_path, 5, path, module, engine="stacked")
    with open(tmp_path / "optimize-000000005" / "path.safetensors", "r+b") as stream:
        stream.seek(-3, os.SEEK_END)
        stream.write(b"\x11")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="optimize-000000005/path.safetensors: it was damaged.*4"):
        got = optimize(path, module, [images()], checkpoints=checkpoints, **settings(**options))
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)
    for state in tmp_path.iterdir():
        (state / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="state.json: .*no other state of optimize is there: rem"):
        optimize(
            path, module, [images()], steps=20, checkpoints=Checkpoints(tmp_path), descent=plain()
        )


def test_states_of_something_else_are_refused(path, module, tmp_path):
    with pytest.raises(Cut), Checkpoints(tmp_path, seconds=0, of={"batch": 12}) as checkpoints:
        optimize(
            path, module, [images()], on_step=cut_at(0), checkpoints=checkpoints, descent=plain()
        )
    with pytest.raises(ValueError, match="belongs to another run: batch is 12 there and 8 here"):
        optimize(
            path,
            module,
            [images()],
            checkpoints=Checkpoints(tmp_path, of={"batch": 8}),
            descent=plain(),
        )
    other = Path.linear(tiny_resnet(seed=1), tiny_resnet(seed=5), 7)
    with pytest.raises(ValueError, match="between other ends"):
        optimize(
            other,
            module,
            [images()],
            checkpoints=Checkpoints(tmp_path, of={"batch": 12}),
            descent=plain(),
        )
    os.rename(tmp_path / "optimize-000000000", tmp_path / "optimize-000000009")
    with pytest.raises(ValueError, match="of another stage or step: it was moved here"):
        optimize(
            path,
            module,
            [images()],
            checkpoints=Checkpoints(tmp_path, of={"batch": 12}),
            descent=plain(),
        )


def test_a_log_that_was_changed_is_refused(path, module, tmp_path):
    options = dict(log=tmp_path / "log.jsonl", seconds=0)
    with pytest.raises(Cut), Checkpoints(tmp_path / "states", **options) as checkpoints:
        optimize(
            path,
            module,
            [images()],
            steps=9,
            on_step=cut_at(5),
            checkpoints=checkpoints,
            descent=plain(),
        )
    content = bytearray((tmp_path / "log.jsonl").read_bytes())
    content[20] ^= 1
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="log.jsonl was damaged: its first .* bytes"):
        Checkpoints(tmp_path / "states", **options).load("optimize")
    os.remove(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="cannot read .*log.jsonl"):
        Checkpoints(tmp_path / "states", **options).load("optimize")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_a_loop_behind_its_step(path, module, tmp_path, number, code):
    def ask(metrics, path):
        if metrics["step"] == 3:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stopped, Checkpoints(tmp_path) as checkpoints:
        optimize(
            path, module, [images()], steps=9, on_step=ask, checkpoints=checkpoints, descent=plain()
        )
    assert stopped.value.exit_code == code and isinstance(stopped.value, KeyboardInterrupt)
    assert os.listdir(tmp_path) == ["optimize-000000004"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_minutes_that_are_over_stop_a_loop(path, module, tmp_path):
    with pytest.raises(Stopped, match="the 1e-09 minutes are over") as stopped:
        checkpoints = Checkpoints(tmp_path, max_minutes=1e-9)
        optimize(path, module, [images()], steps=9, checkpoints=checkpoints, descent=plain())
    assert stopped.value.exit_code == 75 and len(os.listdir(tmp_path)) == 1


def test_an_error_in_the_users_code_leaves_the_state_before_its_step(path, module, tmp_path):
    def batches():
        yield from [images()] * 3
        raise RuntimeError("the network drive is gone")

    with pytest.raises(RuntimeError, match="drive") as error, Checkpoints(tmp_path) as checkpoints:
        optimize(path, module, batches(), checkpoints=checkpoints, descent=plain())
    assert os.listdir(tmp_path) == ["optimize-000000003"]
    assert "the last good state is in" in error.value.__notes__[0]


# --- Numbers that are not finite ------------------------------------------------------------------


class Explodes(torch.autograd.Function):
    """Finite forward, infinite backward from the third time on."""

    times = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Explodes.times += 1
        return gradient * (float("inf") if Explodes.times > 2 else 1)


class Fragile(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(Explodes.apply(self.first(x)))


def test_a_gradient_that_is_not_finite_is_traced_to_its_parameter(tmp_path):
    Explodes.times = 0
    path = Path.linear(Fragile(), Fragile(), 3)
    words = (
        "stopped at step 2: the gradient of first.weight is not finite at point 1, between edges "
        "0 and 1; lower lr"
    )
    with pytest.raises(ValueError, match=words), Checkpoints(tmp_path) as checkpoints:
        options = dict(steps=5, engine="loop", checkpoints=checkpoints)
        optimize(path, Fragile(), [torch.randn(5, 4)], **settings(**options))
    assert os.listdir(tmp_path) == ["optimize-000000002"]  # whose energy is finite

    Explodes.times = 0
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    data = loader_data(([(x, y)], [(x, y)]))
    words = "stopped at step 1 of 3: the gradient of first.weight of network a is not finite; lower"
    with pytest.raises(ValueError, match=words):
        train_ends(Fragile, data, (0, 1), replace(CONFIG, epochs=3), forward=Forward(engine="loop"))


class Halts(nn.Module):
    """Its second layer overflows on inputs beyond a bound."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(self.first(x)).exp()


def test_the_layer_that_overflows_first_is_named_and_the_good_state_kept(tmp_path):
    path = Path.linear(Halts(), Halts(), 4)
    good = torch.randn(5, 4)
    batches = [good, good, good * 1e38]
    words = (
        "stopped at step 2: the divergence of edge 0 is nan, since at point . what layer "
        "(first|second|Halts) gives is not finite; lower lr"
    )
    with pytest.raises(ValueError, match=words), Checkpoints(tmp_path, seconds=0) as checkpoints:
        optimize(
            path,
            Halts(),
            batches,
            steps=5,
            checkpoints=checkpoints,
            descent=plain(),
            forward=Forward(engine="loop"),
        )
    # The state of step 2 was saved before its energy was known, and is not kept.
    assert os.listdir(tmp_path) == ["optimize-000000001"]


def test_training_keeps_the_last_state_with_a_finite_loss(tmp_path):
    kept = []
    digits = load("digits", train_subset=100)
    config = replace(CONFIG, train_lr=1e30)
    with (
        pytest.raises(ValueError, match="stopped at step 1 of 8: the loss of network a is nan"),
        Checkpoints(tmp_path, seconds=0) as checkpoints,
    ):
        train_ends(
            lambda: models.mlp(64, (16,)),
            digits,
            (0, 1),
            config,
            checkpoints=checkpoints,
            on_step=lambda metrics, states: kept.append(states),
        )
    saved = Checkpoints(FilePath(tmp_path)).load("train")
    assert saved.step == 0 and len(kept) == 1
    for state, expected in zip(saved.tensors["ends"].values(), kept[0], strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)
