"""Captured steps against those one by one; without a GPU they run operation by operation."""

import json
import os
import signal

import pytest
import torch
from commands import refused
from conftest import images, plain, settings, tiny_resnet
from torch import nn

from fastgeo import Checkpoints, Descent, Forward, Path, data, models, optimize
from fastgeo.app.cli import main
from fastgeo.data.inputs import Passes
from fastgeo.step.steps import Steps


@pytest.fixture(autouse=True)
def read_every_two(monkeypatch):
    monkeypatch.setattr("fastgeo.step.steps.AT_ONCE", 2)


def captured(path, module, batches, descent=plain(), forward=Forward(), **how) -> Steps:  # noqa: B008
    how |= dict(capture=True, device=path.device, most=len(path) - 2, on_choice=None)
    steps = Steps(module.eval(), Passes(batches, repeat=True), descent, forward, **how)
    steps.begin(path, {})
    return steps


def recorded(log):
    return lambda metrics, _: log.append(metrics)


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
        on_step=recorded(expected_log),
        **settings(
            engine="stacked",
            **{
                name: value
                for name, value in options.items()
                if name not in ("chunk", "channels_last")
            },
        ),
    )
    got = optimize(
        *(path, module, batches),
        steps=5,
        on_step=recorded(log),
        cuda_graph=True,
        **settings(**options),
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
        after = optimize(
            now,
            module,
            [x],
            steps=1,
            descent=plain(lr=1.0, precondition=False),
            forward=Forward(engine="stacked"),
        )
        for name, leaf in leaves.items():
            leaf.grad = (leaf - after.interior[name]).detach()
        optimizer.step()
    options = dict(steps=2, lr=lr, precondition=False, momentum=0.9)
    got = optimize(path, module, batches, cuda_graph=True, **settings(**options))
    torch.testing.assert_close(got.interior, leaves, rtol=1e-6, atol=1e-9)


def test_a_run_over_augmented_digits_is_that_of_optimize():
    digits = data.load("digits", augment="flip-crop", train_subset=100)
    module, a, b = (models.resnet(8, 0.25, in_channels=1) for _ in range(3))
    path = Path.linear(a, b, 4)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = optimize(
        path,
        module,
        digits.shuffled(32, generators[0]),
        steps=4,
        descent=plain(),
        forward=Forward(engine="stacked"),
    )
    got = optimize(
        path,
        module,
        digits.shuffled(32, generators[1]),
        steps=4,
        cuda_graph=True,
        descent=plain(),
    )
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-5, atol=1e-6)


def test_bf16_steps_are_those_of_optimize():
    """The copy that the update leaves is what a cast of the weights would be."""
    module, x = tiny_resnet().float(), images().float()
    path = Path.linear(tiny_resnet(1).float(), tiny_resnet(2).float(), 5)
    forward = Forward(engine="stacked", precision="bf16", channels_last=False)
    how = dict(steps=3, descent=plain(), forward=forward)
    expected, got = (
        optimize(path, module, [x], **how, cuda_graph=graph) for graph in (False, True)
    )
    for name, tensor in got.interior.items():
        assert tensor.dtype == torch.float32
        moved = (expected.interior[name] - path.interior[name]).norm()
        # Gradients of bf16 leaves come back rounded to bf16.
        assert (tensor - expected.interior[name]).norm() <= 0.02 * moved + 1e-7, name


def test_a_step_in_bf16_keeps_copies_of_what_the_body_alone_reads():
    module, path = tiny_resnet().float(), Path.linear(*(tiny_resnet(i).float() for i in (1, 2)), 5)
    steps = captured(path, module, [images().float()], forward=Forward(precision="bf16"))
    found = steps.take([0.1])
    head = {"linear.weight", "linear.bias"}
    for name, tensor in steps.step.evaluated.interior.items():
        assert tensor.dtype == (torch.float32 if name in head else torch.bfloat16)
    assert (found.energies > 0).all()


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
    steps = captured(path, module, [images()], plain(momentum=0.9))
    steps.take([0.1])
    before = [tensor.clone() for tensor in steps.step.memory()]
    steps._way.__self__.replay.warm_up()
    for tensor, own in zip(steps.step.memory(), before, strict=True):
        assert torch.equal(tensor, own)
    assert not steps.choice.chosen.network.not_stacked()


def test_tied_and_frozen_parameters_and_named_inputs():
    module, a, b = (Tied() for _ in range(3))
    path = Path.linear(a, b, 4)
    batches = [dict(x=torch.randn(5, 6), y=torch.randn(5, 6)) for _ in range(2)]
    expected = optimize(
        path, module, batches, steps=3, descent=plain(), forward=Forward(engine="stacked")
    )
    got = optimize(path, module, batches, steps=3, cuda_graph=True, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior)
    assert torch.equal(got.interior["first.weight"], got.interior["second.weight"])


def test_steps_work_on_the_same_memory_and_leave_the_path_alone(path, module):
    before = {name: t.clone() for name, t in path.interior.items()}
    steps = captured(path, module, [images()], plain(momentum=0.9))
    pointers = [t.data_ptr() for t in steps.step.memory()]
    found = steps.take([0.1, 0.1])
    assert [t.data_ptr() for t in steps.step.memory()] == pointers
    assert (found.energies > 0).all() and found.energies.shape == (2, 6)
    torch.testing.assert_close(path.interior, before, rtol=0, atol=0)


def test_batches_of_another_shape_are_done_between_the_others(path, module):
    """And so is one of which some rows do not count."""
    x = images()
    batches = [images(8), images(8, seed=4), images(12), (x, torch.arange(12) % 5), images(8)]
    batches.append((x, torch.tensor([-100] * 4 + [1] * 8)))
    how = dict(steps=6, descent=plain(momentum=0.9), forward=Forward(engine="stacked"))
    expected, got = (
        optimize(path, module, batches, **how, cuda_graph=graph) for graph in (False, True)
    )
    torch.testing.assert_close(got.interior, expected.interior, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_it_goes_on_at_every_level_to_the_last_bit(path, module, tmp_path, stop):
    """Cut behind two steps, at the next level of points, and behind some steps of it."""
    batches = [images(seed=seed) for seed in range(3)]
    options = dict(coarse_to_fine=True, momentum=0.9, lr_schedule="linear", channels_last=True)
    options |= dict(steps=7)
    expected_log, log, rest = [], [], []
    expected = optimize(
        path,
        module,
        batches,
        on_step=recorded(expected_log),
        cuda_graph=True,
        **settings(**options),
    )

    def interrupt(metrics, now):
        log.append(metrics)
        if metrics["step"] >= stop - 1:
            raise RuntimeError

    with pytest.raises(RuntimeError), Checkpoints(tmp_path) as states:
        optimize(
            path,
            module,
            batches,
            checkpoints=states,
            on_step=interrupt,
            cuda_graph=True,
            **settings(**options),
        )
    (saved,) = tmp_path.iterdir()
    with Checkpoints(tmp_path) as states:
        options |= dict(checkpoints=states, on_step=recorded(rest))
        got = optimize(path, module, batches, cuda_graph=True, **settings(**options))
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)
    first = rest[0]["step"]
    assert saved.name == f"optimize-{first:09d}" and log[:first] + rest == expected_log


def test_a_state_that_gives_no_finite_energy_is_not_kept(path, module, tmp_path):
    options = dict(steps=6, lr=1e200)
    with pytest.raises(ValueError, match="at step 1: the divergence"):
        with Checkpoints(tmp_path, seconds=0) as states:
            optimize(
                path, module, [images()], checkpoints=states, cuda_graph=True, **settings(**options)
            )
    assert [state.name for state in tmp_path.iterdir()] == ["optimize-000000000"]


def test_a_run_replays_the_steps_that_it_would_take_one_by_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--steps", "8", "--points", "7", "--train-subset", "150"]
    options += ["--augment", "flip-crop", "--width", "0.25", "--precision", "bf16"]
    for captured in ("False", "True"):
        main(["run", "--out", captured, *options, "--cuda-graph", captured])
    logs = [
        [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
        for folder in ("False", "True")
    ]
    assert [line["step"] for line in logs[1]] == list(range(8))
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_replayed_run_that_is_stopped_goes_on_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--epochs", "1", "--steps", "60", "--points", "7", "--train-subset", "150"]
    options += ["--augment", "flip-crop", "--width", "0.25", "--cuda-graph", "True"]
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
        optimize(
            path, module, batches, steps=3, on_step=recorded(log), cuda_graph=True, descent=plain()
        )
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
    monkeypatch.setattr("fastgeo.app.given._function", lambda name: lambda: Reading(of))
    words = refused(
        capsys, "run", "--cuda-graph", "True", "--engine", "auto", "--model", "own:make"
    )
    assert "Reading reads numbers back from the device, item: read by (test_captured.py:" in words
    assert words.endswith("leave out --cuda-graph")


def test_what_a_cuda_graph_cannot_do_is_named(capsys):
    for options, words in (
        (["--engine", "loop"], "--cuda-graph runs networks stacked, not as a loop"),
        (
            ["--batchnorm", "recalibrate"],
            "--cuda-graph and --batchnorm recalibrate exclude each other",
        ),
    ):
        assert words in refused(capsys, "run", "--cuda-graph", "True", *options)
    words = refused(capsys, "profile", "--cuda-graph", "True")
    assert "profile measures steps outside of a CUDA graph only" in words


def test_what_cannot_be_captured_is_named_or_done_one_by_one(path, module):
    x, log = torch.randn(4, 64), []
    line = Path.linear(Reading(None), Reading(None), 5)
    reading = Reading(lambda x, y: x.sum())
    with pytest.raises(ValueError, match="Reading reads numbers back from the device, item: read"):
        optimize(line, reading, [x], steps=2, cuda_graph=True, descent=plain())
    steps = captured(line, reading, [x])
    steps._must = False
    found = steps.take([0.1, 0.1])
    assert len(found.energies) == 1 and steps.at_once == 1
    expected = optimize(line, reading, [x], steps=1, descent=plain(), on_step=recorded(log))
    torch.testing.assert_close(steps.step.path.interior, expected.interior)
    assert found.energies.sum().item() == pytest.approx(log[0]["energy"])


def test_what_cannot_be_is_named(path, module):
    with pytest.raises(ValueError, match="batches ended after 3 of 5 steps"):
        batches = iter([images(), images(), images()])
        optimize(path, module, batches, steps=5, cuda_graph=True, descent=plain())
    for count in (0, 1, 3):
        batches, how = iter([images()] * count), Descent(lr_schedule="constant")
        with pytest.raises(ValueError, match=f"batches ended after {count} of 6 steps"):
            optimize(path, module, batches, steps=6, cuda_graph=True, descent=how)
    with pytest.raises(ValueError, match="step 0: the divergence of edge 0 is nan; look at the"):
        optimize(path, module, [images() * 1e300], steps=2, cuda_graph=True, descent=plain())
