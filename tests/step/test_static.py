"""The step on static buffers against `optimize`, step by step; on a GPU it is captured, too."""

import json
import os
import signal

import pytest
import torch
from commands import refused
from conftest import images, tiny_resnet
from torch import nn

from fastgeo import Checkpoints, Path, data, models, optimize, optimize_static
from fastgeo.app.cli import main
from fastgeo.step.sources import Drawn, Given
from fastgeo.step.static import StaticStep


def recorded(log):
    return lambda metrics, *_: log.extend(metrics if isinstance(metrics, list) else [metrics])


@pytest.mark.parametrize("norm", ["group", "channel"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(precondition=False),
        dict(channels_last=True),
        dict(chunk=2),
        dict(momentum=0.9, lr_schedule="linear"),
        dict(lr_schedule="cosine", precondition=False),
        dict(coarse_to_fine=True, momentum=0.9, lr_schedule="linear", channels_last=True),
    ],
    ids=str,
)
def test_every_step_is_that_of_optimize(norm, options):
    module, batches = tiny_resnet(norm=norm), [images(seed=seed) for seed in range(3)]
    path = Path.linear(tiny_resnet(1, norm), tiny_resnet(2, norm), 7)
    expected_log, log = [], []
    expected = optimize(
        *(path, module, batches),
        steps=5,
        engine="stacked",
        **{
            name: value for name, value in options.items() if name not in ("chunk", "channels_last")
        },
        on_step=recorded(expected_log),
    )
    got = optimize_static(
        *(path, module, batches), steps=5, read_every=2, on_read=recorded(log), **options
    )
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-9, atol=1e-12)
    assert all(tensor.is_contiguous() for tensor in got.interior.values())
    assert [metrics["step"] for metrics in log] == list(range(5))
    for one, other in zip(log, expected_log, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def test_momentum_is_that_of_torch(path, module):
    """torch.optim.SGD on the interior, with the gradients that plain steps have; Nesterov's."""
    batches, lr = [images(), images(seed=4)], 0.05
    leaves = {name: t.clone() for name, t in path.interior.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr, momentum=0.9, nesterov=True)
    for x in batches:
        now = Path(path.start, leaves, path.end)
        after = optimize(now, module, [x], steps=1, lr=1.0, precondition=False, engine="stacked")
        for name, leaf in leaves.items():
            leaf.grad = (leaf - after.interior[name]).detach()
        optimizer.step()
    options = dict(steps=2, lr=lr, precondition=False, momentum=0.9)
    got = optimize_static(path, module, batches, **options)
    torch.testing.assert_close(got.interior, leaves, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("augment", ["none", "flip-crop"])
def test_batches_made_on_the_device_are_those_of_shuffled(augment):
    digits = data.load("digits", augment=augment, train_subset=70)
    expected = digits.shuffled(32, torch.Generator().manual_seed(5))
    source = Drawn(digits.shuffled(32, torch.Generator().manual_seed(5)))
    for kept in source.take(5):  # over the end of an epoch
        assert torch.equal(source.inputs(kept), next(expected)[0])


def test_a_run_over_augmented_digits_is_that_of_optimize():
    digits = data.load("digits", augment="flip-crop", train_subset=100)
    module, a, b = (models.resnet(8, 0.25, in_channels=1) for _ in range(3))
    path = Path.linear(a, b, 4)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = optimize(path, module, digits.shuffled(32, generators[0]), steps=4, engine="stacked")
    got = optimize_static(path, module, digits.shuffled(32, generators[1]), steps=4, read_every=3)
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-5, atol=1e-6)


def test_bf16_steps_are_those_of_optimize():
    """The copy that the update leaves is what a cast of the weights would be."""
    module, x = tiny_resnet().float(), images().float()
    path = Path.linear(tiny_resnet(1).float(), tiny_resnet(2).float(), 5)
    expected, got = (
        function(path, module, [x], steps=3, precision="bf16", channels_last=False, **options)
        for function, options in ((optimize, dict(engine="stacked")), (optimize_static, {}))
    )
    for name, tensor in got.interior.items():
        assert tensor.dtype == torch.float32
        moved = (expected.interior[name] - path.interior[name]).norm()
        # Gradients of bf16 leaves come back rounded to bf16.
        assert (tensor - expected.interior[name]).norm() <= 0.02 * moved + 1e-7, name


def test_a_step_in_bf16_keeps_copies_of_what_the_body_alone_reads():
    module, path = tiny_resnet().float(), Path.linear(*(tiny_resnet(i).float() for i in (1, 2)), 5)
    static = StaticStep(path, module, Given([images().float()]), precision="bf16")
    head = {"linear.weight", "linear.bias"}
    for name, tensor in static.network_path.interior.items():
        assert tensor.dtype == (torch.float32 if name in head else torch.bfloat16)
    static.step()
    assert (static.energies[0] > 0).all()


class Tied(nn.Module):
    """A tied weight, a frozen one, an integer buffer, two inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("order", torch.arange(6))

    def forward(self, x, y):
        return self.second(self.first(x).tanh()[:, self.order] * self.frozen + y)


def test_warming_up_leaves_everything_as_it_was(path, module):
    static = StaticStep(path, module, Given([images()]), momentum=0.9, read_every=2)
    static.run()
    state = [t.clone() for t in (static.weight, static.velocity, static.rates)]
    static.warm_up()
    for tensor, before in zip((static.weight, static.velocity, static.rates), state, strict=True):
        assert torch.equal(tensor, before)
    assert static.turn == 0 and not static.engine.network.not_stacked()


def test_tied_and_frozen_parameters_and_named_inputs():
    module, a, b = (Tied() for _ in range(3))
    path = Path.linear(a, b, 4)
    batches = [dict(x=torch.randn(5, 6), y=torch.randn(5, 6)) for _ in range(2)]
    expected = optimize(path, module, batches, steps=3, engine="stacked")
    got = optimize_static(path, module, batches, steps=3)
    torch.testing.assert_close(got.interior, expected.interior)
    assert torch.equal(got.interior["first.weight"], got.interior["second.weight"])


def test_the_step_works_on_the_same_memory_and_leaves_the_path_alone(path, module):
    before = {name: t.clone() for name, t in path.interior.items()}
    static = StaticStep(path, module, Given([images()]), read_every=3)
    buffers = [static.weight, static.gradient, static.energies, *static.kept]
    pointers = [t.data_ptr() for t in buffers]
    for _ in range(3):
        static.step()
    assert [t.data_ptr() for t in buffers] == pointers
    assert (static.energies > 0).all() and static.energies.shape == (3, 6)
    torch.testing.assert_close(path.interior, before, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_it_goes_on_at_every_level_to_the_last_bit(path, module, tmp_path, stop):
    """Cut behind two steps, at the next level of points, and behind some steps of it."""
    batches = [images(seed=seed) for seed in range(3)]
    options = dict(coarse_to_fine=True, momentum=0.9, lr_schedule="linear", channels_last=True)
    options |= dict(steps=7, read_every=2)
    expected_log, log, rest = [], [], []
    expected = optimize_static(path, module, batches, on_read=recorded(expected_log), **options)

    def interrupt(metrics, now):
        log.extend(metrics)
        if metrics[-1]["step"] >= stop - 1:
            raise RuntimeError

    with pytest.raises(RuntimeError), Checkpoints(tmp_path) as states:
        optimize_static(path, module, batches, checkpoints=states, on_read=interrupt, **options)
    (saved,) = tmp_path.iterdir()
    with Checkpoints(tmp_path) as states:
        options |= dict(checkpoints=states, on_read=recorded(rest))
        got = optimize_static(path, module, batches, **options)
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)
    first = rest[0]["step"]
    assert saved.name == f"optimize-{first:09d}" and log[:first] + rest == expected_log


def test_a_state_that_gives_no_finite_energy_is_not_kept(path, module, tmp_path):
    options = dict(steps=6, read_every=1, lr=1e200)
    with pytest.raises(ValueError, match="at step 1: the divergence"):
        with Checkpoints(tmp_path, seconds=0) as states:
            optimize_static(path, module, [images()], checkpoints=states, **options)
    assert [state.name for state in tmp_path.iterdir()] == ["optimize-000000000"]


def test_a_run_replays_the_steps_that_it_would_take_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--steps", "8", "--points", "7", "--train-subset", "150"]
    options += ["--augment", "flip-crop", "--width", "0.25", "--precision", "bf16"]
    for how in ("--no-cuda-graph", "--cuda-graph"):
        main(["run", "--out", how[2:], *options, how])
    logs = [
        [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
        for folder in ("no-cuda-graph", "cuda-graph")
    ]
    assert [line["step"] for line in logs[1]] == list(range(8))
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_replayed_run_that_is_stopped_goes_on_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--steps", "60", "--points", "7", "--train-subset", "150"]
    options += ["--augment", "flip-crop", "--width", "0.25", "--cuda-graph"]
    main(["run", "--out", "uncut", *options])
    record = Checkpoints.record

    def stop_at(step):
        def stopping(self, line):
            record(self, line)
            if line["step"] == step and "energy" in line:
                os.kill(os.getpid(), signal.SIGTERM)

        return stopping

    for step in (3, 45):  # of the first and of the second number of points
        monkeypatch.setattr(Checkpoints, "record", stop_at(step))
        with pytest.raises(SystemExit) as stopped:
            main(["run", "--out", "cut", *options, "--resume"])
        assert stopped.value.code == 143
    main(["run", "--out", "cut", "--resume"])
    for name in ("path.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "uncut" / name).read_bytes()


def test_metrics_of_the_steps_before_an_error_are_given(path, module):
    log, batches = [], [images(), images(seed=4), images() * 1e300]
    with pytest.raises(ValueError, match="optimisation stopped at step 2: the divergence of edge"):
        optimize_static(path, module, batches, steps=3, on_read=recorded(log))
    assert [line["step"] for line in log] == [0, 1]


class Reading(nn.Linear):
    def __init__(self, of):
        super().__init__(64, 10)
        self.of = of

    def forward(self, x):
        y = super().forward(x.flatten(1))
        return y if self.of(x, y).item() > 0 else -y


@pytest.mark.parametrize("of", [lambda x, y: x.sum(), lambda x, y: y.sum()])
def test_what_a_cuda_graph_cannot_do_is_refused_before_a_run(capsys, tmp_path, monkeypatch, of):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgeo.app.user.new_module", lambda name: Reading(of))
    words = refused(capsys, "run", "--cuda-graph", "--engine", "auto", "--model", "own:make")
    assert "Reading reads numbers back from the device, item: read by (test_static.py:" in words
    assert words.endswith("leave out --cuda-graph")


def test_what_a_cuda_graph_cannot_do_is_named(capsys):
    for options, words in (
        (["--engine", "loop"], "--cuda-graph runs networks stacked, not as a loop"),
        (["--batchnorm", "recalibrate"], "--cuda-graph has no --batchnorm recalibrate"),
    ):
        assert words in refused(capsys, "run", "--cuda-graph", *options)
    assert "profile measures steps that are not" in refused(capsys, "profile", "--cuda-graph")


def test_what_cannot_be_is_named(path, module):
    with pytest.raises(ValueError, match="batches ended after 2 of 5 steps"):
        optimize_static(path, module, iter([images(), images()]), steps=5, read_every=2)
    for read_every in (1, 50):
        with pytest.raises(ValueError, match=r"True\), got \[12, 1, .* \[8, 1, 8"):
            options = dict(steps=2, read_every=read_every)
            optimize_static(path, module, [images(8), images(12)], **options)
    for count in (3, 4):  # to the next level, and behind it
        with pytest.raises(ValueError, match=f"batches ended after {count} of 6 steps"):
            batches = iter([images()] * count)
            optimize_static(path, module, batches, steps=6, coarse_to_fine=True, read_every=1)
    with pytest.raises(ValueError, match="lower lr"):
        optimize_static(path, module, [images() * 1e300], steps=2)
    with pytest.raises(ValueError, match="there are no batches"):
        optimize_static(path, module, [], steps=2)
    with pytest.raises(ValueError, match="steps and read_every must be at least 1, got 0 and 50"):
        optimize_static(path, module, [images()], steps=0)
