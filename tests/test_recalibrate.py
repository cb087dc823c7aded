"""BatchNorm on a path: batch statistics while it is optimised, computed anew before it is used."""

import copy
import functools

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
    with pytest.raises(ValueError, match="nothing to recalibrate"):
        recalibrate(line, plain, [torch.randn(5, 4)])
    with pytest.raises(ValueError, match="batchnorm must be 'refuse' or 'recalibrate', got 'yes'"):
        Path.linear(network(1), network(2), 5, batchnorm="yes")


def test_an_instance_norm_that_tracks_is_computed_anew_like_batch_norm():
    def net(seed):
        torch.manual_seed(seed)
        norm = nn.InstanceNorm2d(4, track_running_stats=True)
        network = nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Flatten(), nn.Linear(144, 5)).double()
        network(images(seed=seed))
        return network

    with pytest.raises(ValueError, match="1.running_mean .*InstanceNorm.*track_running_stats=Fal"):
        Path.linear(net(1), net(2), 3)
    line = Path.linear(net(1), net(2), 3, batchnorm="recalibrate")
    batches = [images(6, seed=4), images(6, seed=5)]
    got = recalibrate(line, net(1), batches)
    for old, new in zip(line.points(), got.points(), strict=True):
        maps = [F.conv2d(x, old["0.weight"], old["0.bias"]) for x in batches]
        mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        variance = torch.stack([m.var((2, 3)).mean(0) for m in maps]).mean(0)
        torch.testing.assert_close(new["1.running_mean"], mean)
        torch.testing.assert_close(new["1.running_var"], variance)


class Normalised(nn.Module):
    """BatchNorm written by hand, with buffers of other names, in place or by assignment."""

    def __init__(self, width, momentum, assigns):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("moving_average", torch.zeros(width))
        self.register_buffer("moving_square", torch.ones(width))
        self.momentum, self.assigns = momentum, assigns

    def forward(self, x):
        mean, square = self.moving_average, self.moving_square
        if self.training:
            mean, square = x.mean(0), x.square().mean(0)
            for name, new in (("moving_average", mean), ("moving_square", square)):
                old = getattr(self, name)
                if self.assigns:
                    setattr(self, name, old + self.momentum * (new.detach() - old))
                else:
                    old.lerp_(new.detach(), self.momentum)
        return (x - mean) / (square - mean.square() + 1e-5).sqrt() * self.scale + self.shift


def by_hand(seed, momentum=0.1, assigns=False):
    """Spectral norm, then BatchNorm by hand; trained a little, so that its statistics are its."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(8, 16)),
        Normalised(16, momentum, assigns),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.utils.spectral_norm(nn.Linear(16, 3)),
    ).double()
    for _ in range(200):
        network(2 * rows(9, seed) + 1)
    return network


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=generator, dtype=torch.float64)


def linear(point, layer, x):
    """Divided by the largest singular value, by definition."""
    weight = point[f"{layer}.weight_orig"]
    return F.linear(x, weight / torch.linalg.matrix_norm(weight, 2), point[f"{layer}.bias"])


def logits_by_hand(point, x):
    """[B, 3], with the statistics of the batch."""
    h = linear(point, 0, x)
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
    return linear(point, 4, (h * point["1.scale"] + point["1.shift"]).relu())


@pytest.mark.parametrize("momentum, assigns", [(0.1, False), (0.01, True)])
def test_what_a_network_updates_is_found_by_watching_it(momentum, assigns):
    """Averages of any momentum over the batches, and singular vectors of every weight."""
    make = functools.partial(by_hand, momentum=momentum, assigns=assigns)
    line = Path.linear(make(1), make(2), 5, batchnorm="recalibrate")
    batches = [rows(16, 3), rows(16, 4), rows(11, 5)]
    got = recalibrate(line, make(0), batches, forward=Forward(chunk=2))
    for old, new in zip(line.points(), got.points(), strict=True):
        features = [linear(old, 0, x) for x in batches]
        mean = torch.stack([h.mean(0) for h in features]).mean(0)
        square = torch.stack([h.square().mean(0) for h in features]).mean(0)
        torch.testing.assert_close(new["1.moving_average"], mean)
        torch.testing.assert_close(new["1.moving_square"], square)
        for layer in (0, 4):
            u, weight, v = (new[f"{layer}.weight_{part}"] for part in ("u", "orig", "v"))
            torch.testing.assert_close(u @ weight @ v, torch.linalg.matrix_norm(weight, 2))


@pytest.mark.parametrize("engine", ["auto", "stacked", "loop"])
def test_steps_of_what_is_written_by_hand_use_the_statistics_of_the_batch(engine):
    line = Path.linear(by_hand(1), by_hand(2), 5, batchnorm="recalibrate")
    before, x, energies = copy.deepcopy(line._parts()), rows(32, 3), []
    optimize(
        line,
        by_hand(0),
        [x],
        steps=1,
        on_step=lambda metrics, path: energies.append(metrics["energy"]),
        **settings(batchnorm="recalibrate", engine=engine),
    )
    p = torch.stack([logits_by_hand(point, x) for point in line.points()]).softmax(-1)
    middle = (p[:-1] + p[1:]) / 2
    divergences = [(q * (q / middle).log()).sum(-1).mean(-1) for q in (p[:-1], p[1:])]
    assert energies[0] == pytest.approx(sum(d.sum().item() for d in divergences) / 2)
    torch.testing.assert_close(line._parts(), before, rtol=0, atol=0)


def test_a_last_batch_of_one_is_left_out(path):
    """It has no variance; torch raises for it."""
    batches = [images(12, seed=1), images(12, seed=2)]
    whole = recalibrate(path, network(), batches)
    got = recalibrate(path, network(), [*batches, images(1, seed=3)])
    torch.testing.assert_close(got._parts(), whole._parts(), rtol=0, atol=0)
    how = settings(batchnorm="recalibrate", engine="stacked")
    steps = [
        optimize(path, network(), given, steps=5, **how)
        for given in (batches, [*batches, images(1, seed=3)])
    ]
    torch.testing.assert_close(steps[0].interior, steps[1].interior, rtol=0, atol=0)
    split = {"x": (images(13), torch.arange(13) % 5)}
    evaluate(path, network(), split, batch_size=12, forward=Forward(batchnorm="recalibrate"))
