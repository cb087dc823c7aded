"""Coarse to fine: points are inserted where they belong, in the middle of an optimisation."""

import pytest
import torch
from conftest import images, plain, settings, tiny_resnet

from fastgeo import Checkpoints, Descent, Forward, Path, optimize
from fastgeo.basis import Basis
from fastgeo.step.step import resampled


@pytest.mark.parametrize(
    "points, steps, expected",
    [
        (25, 100, {0: 5, 40: 9, 70: 17, 90: 25}),
        (25, 4, {0: 5, 1: 9, 2: 17, 3: 25}),
        (25, 1, {0: 25}),
        (9, 3, {0: 5, 2: 9}),
        (6, 10, {0: 5, 7: 6}),
        (5, 10, {0: 5}),
        (3, 10, {0: 3}),
    ],
)
def test_levels(points, steps, expected):
    basis = Basis("polychain", points)
    assert Descent().levels(basis, steps) == expected
    assert plain().levels(basis, steps) == {0: points}


@pytest.mark.parametrize("points", [3, 4, 7, 13, 25, 30])
def test_a_resampled_path_is_the_same_curve(path, points):
    bent = Path(path.start, {k: v.sin() for k, v in path.interior.items()}, path.end)
    new = bent.resample(points)
    assert len(new) == points
    for i, point in enumerate(new.points()):
        torch.testing.assert_close(dict(point), bent.at(i / (points - 1)))
    if (points - 1) % (len(bent) - 1) == 0:
        back = new.resample(len(bent))
        torch.testing.assert_close(back.interior, bent.interior)
    with pytest.raises(ValueError, match="points must be at least 3"):
        bent.resample(2)


def test_coarse_to_fine_is_optimisation_at_each_number_of_points(module):
    """Against one call for each of them, over the same batches in turn."""
    path, batches = (
        Path.linear(tiny_resnet(1), tiny_resnet(2), 9),
        [images(seed=i) for i in range(6)],
    )
    seen, choices = [], []
    options = dict(engine="stacked", on_choice=choices.append)
    got = optimize(
        *(path, module, batches),
        steps=6,
        on_step=lambda metrics, now: seen.append((metrics["points"], len(now))),
        **settings(coarse_to_fine=True, **options),
    )
    assert seen == [(5, 5)] * 4 + [(9, 9)] * 2 and len(got) == 9
    assert [choice["points"] for choice in choices] == [3, 7]
    first = optimize(
        path.resample(5), module, batches[:4], descent=plain(), forward=Forward(engine="stacked")
    )
    expected = optimize(
        first.resample(9), module, batches[4:], descent=plain(), forward=Forward(engine="stacked")
    )
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)


def test_the_velocity_is_a_curve_that_rests_at_the_ends():
    path = Path.linear({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 9)
    assert resampled({}, path) == {}
    got = resampled({"w": torch.tensor([[1.0, 10], [3, 20], [2, 40]])}, path)
    expected = [[0.5, 5], [1, 10], [2, 15], [3, 20], [2.5, 30], [2, 40], [1, 20]]
    torch.testing.assert_close(got["w"], torch.tensor(expected))


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_it_goes_on_at_every_level_to_the_last_bit(module, tmp_path, stop):
    path, batches = (
        Path.linear(tiny_resnet(1), tiny_resnet(2), 9),
        [images(seed=i) for i in range(6)],
    )
    options = dict(
        steps=6, coarse_to_fine=True, engine="stacked", momentum=0.9, lr_schedule="linear"
    )
    uncut = optimize(path, module, batches, **settings(**options))

    def interrupt(metrics, now):
        if metrics["step"] == stop:
            raise RuntimeError

    with pytest.raises(RuntimeError), Checkpoints(tmp_path) as states:
        optimize(
            path, module, batches, checkpoints=states, on_step=interrupt, **settings(**options)
        )
    with Checkpoints(tmp_path) as states:
        got = optimize(path, module, batches, checkpoints=states, **settings(**options))
    torch.testing.assert_close(got.interior, uncut.interior, rtol=0, atol=0)


def test_it_needs_the_number_of_steps(module, path):
    how = dict(descent=plain(coarse_to_fine=True), forward=Forward(engine="stacked"))
    with pytest.raises(ValueError, match="give steps, how many: batches have no length"):
        optimize(path, module, iter([images()] * 4), **how)
    expected = optimize(path, module, [images()] * 4, steps=4, **how)
    got = optimize(path, module, [images()] * 4, **how)  # one pass by default
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)
