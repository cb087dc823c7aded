"""BatchNorm on a path: batch statistics while it is optimised, computed anew before it is used."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import images, plain, settings
from torch import nn
from torch.func import functional_call

from fastgeo import Forward, Path, evaluate, optimize, recalibrate


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Linear(8, 5),
    ).double()


@pytest.fixture
def path():
    """Its ends saw different numbers of batches."""
    ends = [network(1), network(2)]
    for i, end in enumerate(ends):
        for _ in range(i + 1):
            end(images(seed=i))
    return Path.linear(*ends, 5, batchnorm="recalibrate")


def recalibrated_by_torch(point, batches):
    """torch.optim.swa_utils.update_bn on a module of the point's weights, without dropout."""
    module = network()
    module.load_state_dict(point)
    module.train()
    module[6].p = 0.0
    torch.optim.swa_utils.update_bn(batches, module)
    return module.state_dict()


@pytest.mark.parametrize("chunk", [None, 2])
def test_every_network_has_the_statistics_that_torch_computes(path, chunk):
    batches = [images(12, seed=1), images(12, seed=2), images(7, seed=3)]
    before = copy.deepcopy(path._parts())
    got = recalibrate(path, network(), batches, forward=Forward(chunk=chunk))
    for point, old in zip(got.points(), path.points(), strict=True):
        torch.testing.assert_close(point, recalibrated_by_torch(old, batches))
    torch.testing.assert_close(path._parts(), before, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["stacked", "vmap", "loop"])
def test_steps_equal_the_loop_on_batch_statistics(path, engine):
    x, module = images(), network().train()
    statistics = {name for name in path.start if "running" in name or "tracked" in name}
    points = [{k: v.clone() for k, v in point.items()} for point in path.points()]
    leaves = [
        {k: v.requires_grad_() for k, v in point.items() if k not in statistics}
        for point in points[1:-1]
    ]
    training = copy.deepcopy(module)
    training[6].p = 0.0
    p = [functional_call(training, point, (x,)).softmax(-1) for point in points]
    energy = 0
    for left, right in zip(p[:-1], p[1:], strict=True):
        middle = ((left + right) / 2).log()
        kl = [F.kl_div(middle, q, reduction="batchmean") for q in (left, right)]
        energy = energy + (kl[0] + kl[1]) / 2

    options = dict(lr=0.1, precondition=False, batchnorm="recalibrate", engine=engine)
    got = optimize(path, module, [x], steps=1, **settings(**options))
    for name in leaves[0]:
        gradient = torch.autograd.grad(energy, [leaf[name] for leaf in leaves], retain_graph=True)
        expected = path.interior[name] - 0.1 * torch.stack(gradient)
        torch.testing.assert_close(got.interior[name], expected)
    for name in statistics & set(path.interior):  # left as they were
        torch.testing.assert_close(got.interior[name], path.interior[name], rtol=0, atol=0)
    assert all(layer.training for layer in module)
    assert module[1].track_running_stats and module[1].momentum == 0.1
    torch.testing.assert_close(module.state_dict(), network().state_dict(), rtol=0, atol=0)


def test_evaluation_recalibrates_on_the_first_split(path):
    train, test = images(24, seed=1), images(10, seed=2)
    labels = torch.arange(24) % 5
    splits = {"train": (train, labels), "test": (test, labels[:10])}
    result = evaluate(
        path, network(), splits, batch_size=8, forward=Forward(batchnorm="recalibrate")
    )
    for i, point in enumerate(path.points()):
        module = network()
        module.load_state_dict(recalibrated_by_torch(point, list(train.split(8))))
        loss = F.cross_entropy(module.eval()(test), labels[:10])
        assert result.splits["test"].loss[i] == pytest.approx(loss.item())


def test_batch_norm_is_refused_with_the_way_out(path):
    with pytest.raises(ValueError, match="running_mean belongs to .* batchnorm='recalibrate'"):
        Path.linear(network(1), network(2), 5)
    for use in (
        lambda: optimize(path, network(), [images()], descent=plain()),
        lambda: evaluate(path, network(), {"x": (images(), torch.zeros(12).long())}),
    ):
        with pytest.raises(ValueError, match="layer 1 is BatchNorm, .* batchnorm='recalibrate'"):
            use()


def test_what_cannot_be_recalibrated_is_named(path):
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(path, network(), [])
    plain = nn.Sequential(nn.Linear(4, 3))
    line = Path.linear(plain, nn.Sequential(nn.Linear(4, 3)), 4)
    with pytest.raises(ValueError, match="no BatchNorm with running statistics"):
        recalibrate(line, plain, [torch.randn(5, 4)])
    with pytest.raises(ValueError, match="batchnorm must be 'refuse' or 'recalibrate', got 'yes'"):
        Path.linear(network(1), network(2), 5, batchnorm="yes")


def test_an_instance_norm_that_tracks_is_named_with_what_to_do():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    with pytest.raises(ValueError, match="1.running_mean .*InstanceNorm.*track_running_stats=Fal"):
        Path.linear(module, module, 3)
    path = Path.linear(module, module, 3, batchnorm="recalibrate")
    with pytest.raises(ValueError, match="layer 1 is InstanceNorm .*track_running_stats=False"):
        recalibrate(path, module, [torch.randn(4, 1, 6, 6)])
