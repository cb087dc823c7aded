"""The optimisation step against a plain loop, and what the energy and lengths must satisfy."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import images, plain, settings, tiny_resnet
from fastgeo_kernels import inverse_path_laplacian
from torch import nn
from torch.func import functional_call, jvp

from fastgeo import Forward, Path, evaluate, models, optimize


def loop_energy(module, points, x):
    """Sum of the Jensen-Shannon divergences of neighbours, by definition, as a loop."""
    p = [functional_call(module, q, (x,), tie_weights=False).softmax(-1) for q in points]
    energy = 0
    for left, right in zip(p[:-1], p[1:], strict=True):
        middle = ((left + right) / 2).log()
        kl = [F.kl_div(middle, each, reduction="batchmean") for each in (left, right)]
        energy = energy + (kl[0] + kl[1]) / 2
    return energy


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("norm", ["group", "channel"])
def test_steps_equal_the_plain_loop(precondition, norm):
    """Three steps: 7 modules one after the other, autograd, an explicitly inverted Laplacian."""
    module, x = tiny_resnet(norm=norm), images(6)
    path = Path.linear(tiny_resnet(1, norm), tiny_resnet(2, norm), 7)
    laplacian = torch.diag(torch.full((5,), 2.0)) - torch.diag(torch.ones(4), 1)
    laplacian = (laplacian - torch.diag(torch.ones(4), -1)).double()

    points = [{k: v.clone() for k, v in point.items()} for point in path.points()]
    for _ in range(3):
        leaves = [{k: v.detach().requires_grad_() for k, v in p.items()} for p in points[1:-1]]
        energy = loop_energy(module, [points[0], *leaves, points[-1]], x)
        for name in points[0]:
            grad = torch.stack(
                torch.autograd.grad(energy, [leaf[name] for leaf in leaves], retain_graph=True)
            )
            if precondition:
                grad = torch.linalg.solve(laplacian, grad.flatten(1)).view_as(grad)
            for i, leaf in enumerate(leaves):
                points[i + 1][name] = (leaf[name] - 0.1 * grad[i]).detach()

    got = optimize(path, module, [x], steps=3, descent=plain(lr=0.1, precondition=precondition))
    for stacked, loop in zip(got.points(), points, strict=True):
        torch.testing.assert_close(stacked, loop, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "momentum, lr_schedule, factors",
    [
        (0.9, "constant", [1, 1, 1, 1]),
        (0.9, "linear", [1, 0.75, 0.5, 0.25]),
        (0.0, "cosine", [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
    ],
)
@pytest.mark.parametrize("precondition", [False, True])
def test_momentum_and_falling_rates_equal_torchs_optimizer(
    precondition, momentum, lr_schedule, factors
):
    module, x = tiny_resnet(), images(6)
    path = Path.linear(tiny_resnet(1), tiny_resnet(2), 5)
    laplacian = torch.tensor([[2.0, -1, 0], [-1, 2, -1], [0, -1, 2]]).double()
    points = [{k: v.clone() for k, v in point.items()} for point in path.points()]
    leaves = [{k: v.requires_grad_() for k, v in point.items()} for point in points[1:-1]]
    flat = [tensor for leaf in leaves for tensor in leaf.values()]
    optimizer = torch.optim.SGD(flat, 0.2, momentum=momentum, nesterov=momentum > 0)
    for factor in factors:
        optimizer.zero_grad()
        loop_energy(module, [points[0], *leaves, points[-1]], x).backward()
        if precondition:
            for name in points[0]:
                grad = torch.stack([leaf[name].grad for leaf in leaves])
                solved = torch.linalg.solve(laplacian, grad.flatten(1)).view_as(grad)
                for leaf, own in zip(leaves, solved, strict=True):
                    leaf[name].grad = own
        optimizer.param_groups[0]["lr"] = 0.2 * factor
        optimizer.step()

    how = dict(lr=0.2, momentum=momentum, lr_schedule=lr_schedule, precondition=precondition)
    got = optimize(path, module, [x], steps=4, **settings(**how))
    for stacked, loop in zip(got.points(), points, strict=True):
        torch.testing.assert_close(stacked, {k: v.detach() for k, v in loop.items()})


def test_inverse_path_laplacian_inverts():
    for size in (1, 2, 23):
        laplacian = 2 * torch.eye(size)
        laplacian -= torch.diag(torch.ones(size - 1), 1) + torch.diag(torch.ones(size - 1), -1)
        product = laplacian @ inverse_path_laplacian(size)
        torch.testing.assert_close(product, torch.eye(size), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precondition", [False, True])
def test_the_energy_falls_and_the_ends_stay(path, module, precondition):
    x, log = images(), []
    got = optimize(
        path,
        module,
        [x],
        steps=20,
        on_step=lambda metrics, path: log.append((metrics, path)),
        descent=plain(lr=0.02, precondition=precondition),
    )
    energies = [metrics["energy"] for metrics, _ in log]
    assert all(high > low for high, low in zip(energies[:-1], energies[1:], strict=True))
    assert [metrics["step"] for metrics, _ in log] == list(range(20))
    for name in path.start:
        assert torch.equal(got.start[name], path.start[name])
        assert torch.equal(got.end[name], path.end[name])

    metrics, at_step = log[7]  # the metrics are those of the path handed over with them
    assert loop_energy(module, list(at_step.points()), x).item() == pytest.approx(metrics["energy"])
    assert at_step.euclidean().sum().item() == pytest.approx(metrics["euclidean"])


def test_the_path_tells_the_history_of_its_optimisation(path, module):
    batches, log = [images(), images(seed=4)], []
    got = optimize(path, module, batches, steps=5, on_step=lambda m, _: log.append(m))
    *steps, last = got.history
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in steps] == log
    seconds = [line["seconds"] for line in got.history]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    now = loop_energy(module, list(got.points()), batches[0]).item()  # the fifth batch
    assert last["energy"] == pytest.approx(now) and last["step"] == 5
    assert last["euclidean"] == pytest.approx(got.euclidean().sum().item())
    captured = optimize(path, module, batches, steps=5, cuda_graph=True)
    assert captured.history[-1]["energy"] == pytest.approx(last["energy"])
    assert len(got.plot().axes) == 2 and not path.history


def test_a_path_that_nobody_watches_is_measured_at_its_first_and_last_step(path, module):
    got = optimize(path, module, [images()], steps=4, descent=plain())
    assert ["euclidean" in line for line in got.history] == [True, False, False, False, True]
    assert got.history[0]["euclidean"] == pytest.approx(path.euclidean().sum().item())


def test_an_energy_that_does_not_fall_is_warned_of(path, module):
    with pytest.warns(UserWarning, match=r"the energy did not fall: .* lower lr \(now 1e-09\)"):
        optimize(path, module, [images()], steps=12, descent=plain(lr=1e-9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward = Forward(engine="stacked")
        optimize(path, module, [images()], steps=12, descent=plain(lr=0.02), forward=forward)


def test_the_path_given_is_not_changed(path, module):
    before = {name: tensor.clone() for name, tensor in path.interior.items()}
    optimize(path, module, [images()], steps=2, descent=plain())
    torch.testing.assert_close(path.interior, before, rtol=0, atol=0)


def test_the_geodesic_of_a_softmax_is_the_great_circle():
    """With free logits the geodesic is known: square roots of probabilities on a great circle, at
    equal angles (Fisher-Rao geometry of the simplex)."""
    module = nn.Linear(1, 3, bias=False).double()
    a = {"weight": torch.tensor([[2.0], [0.0], [0.0]]).double()}
    b = {"weight": torch.tensor([[0.0], [2.0], [0.0]]).double()}
    start = Path.linear(a, b, 17)
    start.interior["weight"] += torch.randn(15, 3, 1).double() / 10
    x = torch.ones(1, 1).double()
    path = optimize(start, module, [x], steps=300, descent=plain(lr=2.0))

    ends = [state["weight"].flatten().softmax(0).sqrt() for state in (a, b)]
    angle = (ends[0] @ ends[1]).acos()
    for i, point in enumerate(path.points()):
        t = i / 16
        circle = torch.sin((1 - t) * angle) * ends[0] + torch.sin(t * angle) * ends[1]
        expected = (circle / torch.sin(angle)).square()
        torch.testing.assert_close(
            point["weight"].flatten().softmax(0), expected, rtol=0, atol=2e-4
        )
    result = evaluate(path, module, {"x": (x, torch.zeros(1, dtype=torch.long))})
    assert result.fisher_rao == pytest.approx(2 * angle.item(), rel=1e-4)
    assert result.fisher_rao_lower_bound == pytest.approx(2 * angle.item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list"])
def test_targets_are_ignored(path, module, kind):
    x, y = images(), torch.zeros(12)
    batch = {"tensor": x, "tuple": (x, y), "list": [x, y]}[kind]
    expected = optimize(path, module, [x], steps=1, descent=plain())
    got = optimize(path, module, [batch], steps=1, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)


def test_batches_are_gone_through_once_or_until_the_steps_are_done(path, module):
    def steps_taken(batches, **options):
        log = []
        optimize(
            path, module, batches, on_step=lambda m, p: log.append(m["step"]), **settings(**options)
        )
        return len(log)

    loader = torch.utils.data.DataLoader(images(), batch_size=4)
    assert steps_taken(loader) == 3
    assert steps_taken(loader, steps=7) == 7
    assert steps_taken(iter(list(loader)), steps=2) == 2
    with pytest.raises(ValueError, match="batches ended after 3 of 5 steps"):
        steps_taken(iter(list(loader)), steps=5)
    with pytest.raises(ValueError, match="batches ended after 0 of"):
        steps_taken([])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tied_and_frozen_parameters(momentum):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(4, 3).requires_grad_(False)

        def forward(self, x):
            return self.frozen(F.relu(self.second(F.relu(self.first(x)))))

    a, b, x = Tied().double(), Tied().double(), torch.randn(8, 4).double()
    path = Path.linear(a, b, 5)
    got = optimize(path, a, [x], steps=1, descent=plain(precondition=False, momentum=momentum))
    assert torch.equal(got.interior["first.weight"], got.interior["second.weight"])
    assert torch.equal(got.interior["frozen.weight"], path.interior["frozen.weight"])

    points = [{k: v.clone() for k, v in point.items()} for point in path.points()]
    shared = [point["first.weight"].requires_grad_() for point in points[1:-1]]
    for point, weight in zip(points[1:-1], shared, strict=True):
        point["second.weight"] = weight
    gradient = torch.autograd.grad(loop_energy(a, points, x), shared)
    expected = path.interior["first.weight"] - 0.1 * (1 + momentum) * torch.stack(gradient)
    torch.testing.assert_close(got.interior["first.weight"], expected, rtol=1e-6, atol=1e-9)


def test_unused_parameters_stay_and_nothing_to_train_is_refused(path):
    module = nn.Sequential(nn.Linear(4, 3))
    module.unused = nn.Linear(2, 2)
    module.forward = lambda x: module[0](x)
    other = nn.Sequential(nn.Linear(4, 3))
    other.unused = nn.Linear(2, 2)
    line = Path.linear(module, other, 4)
    got = optimize(line, module, [torch.randn(5, 4)], steps=2, descent=plain())
    assert torch.equal(got.interior["unused.weight"], line.interior["unused.weight"])
    assert not torch.equal(got.interior["0.weight"], line.interior["0.weight"])
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        optimize(line, module.requires_grad_(False), [torch.randn(5, 4)], descent=plain())


def test_optimisation_works_where_gradients_are_off(path, module):
    expected = optimize(path, module, [images()], steps=1, descent=plain())
    with torch.no_grad():
        got = optimize(path, module, [images()], steps=1, descent=plain())
    torch.testing.assert_close(got.interior, expected.interior, rtol=0, atol=0)


def test_half_precision_paths_take_the_step_of_fp32(path, module):
    x = images().float()
    expected = optimize(
        _cast(path, torch.float32), module.float(), [x], steps=1, descent=plain(lr=1.0)
    )
    got = optimize(
        _cast(path, torch.bfloat16),
        module.bfloat16(),
        [x.bfloat16()],
        steps=1,
        descent=plain(lr=1.0),
    )
    for name, tensor in got.interior.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected.interior[name], rtol=0.02, atol=0.02)


def _cast(path, dtype):
    return Path(*({k: v.to(dtype) for k, v in part.items()} for part in path._parts().values()))


def test_dropout_is_off_on_a_path_and_the_module_keeps_its_mode():
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 5))

    module, x, y = network().double(), images(), torch.zeros(12, dtype=torch.long)
    path = Path.linear(network().double(), network().double(), 5)
    results = [evaluate(path, module.train(mode), {"x": (x, y)}) for mode in (True, True, False)]
    assert results[0] == results[1] == results[2]
    steps = [
        optimize(path, module.train(mode), [x], steps=2, descent=plain()).interior
        for mode in (True, False)
    ]
    torch.testing.assert_close(*steps, rtol=0, atol=0)
    module.train()
    module[2].eval()
    evaluate(path, module, {"x": (x, y)})
    assert [layer.training for layer in module] == [True, True, False, True]


def test_an_energy_that_is_not_finite_stops_and_leaves_the_last_good_path(path, module):
    log = []
    with pytest.raises(ValueError, match=r"step 1: .* edge 0 is nan, since .*; lower lr"):
        optimize(
            path,
            module,
            [images()],
            steps=5,
            on_step=lambda m, p: log.append((m, p)),
            descent=plain(lr=1e300),
        )
    assert len(log) == 1 and all(t.isfinite().all() for t in log[0][1].interior.values())
    with pytest.raises(ValueError, match="step 0: .* the inputs are not finite; look at the"):
        optimize(path, module, [images() * math.nan], steps=1, descent=plain())
    with pytest.raises(ValueError, match="not finite at point 1 after step 0; lower lr"):
        optimize(path, module, [images()], steps=1, descent=plain(lr=float("inf")))


def test_one_set_of_data_needs_no_name(path, module):
    x, y = images(), torch.arange(12) % 5
    named = evaluate(path, module, {"data": (x, y)})
    for data in ((x, y), [(x[:5], y[:5]), (x[5:], y[5:])]):
        found = evaluate(path, module, data).splits["data"]
        assert found.loss == pytest.approx(named.splits["data"].loss)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(lr=0), "lr must be positive, got 0"),
        (dict(lr=-0.1), "lr must be positive, got -0.1"),
        (dict(lr=math.nan), "lr must be positive, got nan"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(momentum=1.0), "momentum must be within 0..1, and less than 1, got 1.0"),
        (dict(momentum=-0.1), "momentum must be within 0..1, and less than 1, got -0.1"),
        (dict(lr_schedule="step"), "must be one of constant, linear, cosine: 'step'"),
    ],
)
def test_bad_settings_are_refused(path, module, options, words):
    with pytest.raises(ValueError, match=words):
        optimize(path, module, [images()], **settings(**options))


def test_arguments_of_another_type_are_named(path, module):
    for batches in (images(), [{"image": 3}], [{}], [None]):
        with pytest.raises(TypeError, match="inputs"):
            optimize(path, module, batches, steps=1, descent=plain())
    with pytest.raises(TypeError, match="unexpected keyword argument 'image'"):
        optimize(path, module, [{"image": images()}], steps=1, descent=plain())
    with pytest.raises(TypeError, match="path must be a fastgeo.Path, got dict"):
        optimize(path.at(0), module, [images()], descent=plain())
    with pytest.raises(TypeError, match="module must be an nn.Module, got function"):
        evaluate(path, lambda x: x, {"x": (images(), torch.zeros(12))})


def test_a_path_of_another_module_is_refused_by_name(path):
    with pytest.raises(ValueError, match="conv1.weight has shape .* in the path and .* the module"):
        optimize(
            path, models.resnet(8, 0.5, in_channels=1, num_classes=5), [images()], descent=plain()
        )
    with pytest.raises(ValueError, match="layers.0.weight is in the module and not in the path"):
        optimize(path, models.mlp(64), [images()], descent=plain())


# --- Evaluation -----------------------------------------------------------------------------------


def test_evaluation_equals_the_loop(path, module):
    x, y = images(40), torch.arange(40) % 5
    path = optimize(path, module, [x], steps=2, descent=plain())
    result = evaluate(path, module, {"train": (x, y), "test": [(x[:7], y[:7])]}, batch_size=16)

    loss, accuracy, p = [], [], []
    for point in path.points():
        logits = functional_call(module, point, (x,))
        loss.append(F.cross_entropy(logits, y).item())
        accuracy.append((logits.argmax(1) == y).double().mean().item())
        p.append(logits.softmax(1).detach())
    train = result.splits["train"]
    assert train.loss == pytest.approx(loss) and train.accuracy == pytest.approx(accuracy)
    assert train.barrier == pytest.approx(max(loss) - (loss[0] + loss[-1]) / 2)
    line = [loss[0] + i / 6 * (loss[-1] - loss[0]) for i in range(7)]
    excess = [point - straight for point, straight in zip(loss, line, strict=True)]
    assert train.barrier_above_line == pytest.approx(max(excess))
    points = [torch.cat([t.flatten() for t in point.values()]) for point in path.points()]
    steps = torch.stack([torch.dist(points[i], points[i + 1]) for i in range(6)])
    integral = torch.trapezoid(
        torch.tensor(loss).double(), torch.cat([steps[:1] * 0, steps.cumsum(0)])
    )
    assert train.integral == pytest.approx(integral.item())
    assert train.mean == pytest.approx((integral / steps.sum()).item())

    def divergence(q, r):
        m = (q + r) / 2
        return ((q * (q / m).log() + r * (r / m).log()).sum(1) / 2).mean().item()

    def distance(q, r):
        return (2 * (q * r).sqrt().sum(1).clamp(max=1).acos()).square().mean().sqrt().item()

    edges = list(zip(p[:-1], p[1:], strict=True))
    divergences = [divergence(q, r) for q, r in edges]
    assert result.energy == pytest.approx(sum(divergences))
    assert result.sqrt_jsd == pytest.approx(sum(map(math.sqrt, divergences)))
    assert result.fisher_rao == pytest.approx(sum(distance(q, r) for q, r in edges))
    assert result.fisher_rao_lower_bound == pytest.approx(distance(p[0], p[-1]))
    assert result.euclidean == pytest.approx(path.euclidean().sum().item())
    few = functional_call(module, path.start, (x[:7],))
    assert result.splits["test"].loss[0] == pytest.approx(F.cross_entropy(few, y[:7]).item())


def test_the_mean_loss_belongs_to_the_curve_and_not_to_where_its_points_are(module):
    """On one line, points that crowd where the loss is low do not lower it, as they would the mean
    over points."""
    data, line = (images(), torch.arange(12) % 5), Path.linear(tiny_resnet(1), tiny_resnet(2), 65)
    fine = evaluate(line, module, data).splits["data"]
    places = torch.linspace(0, 1, 65, dtype=torch.float64) ** 2
    start, end = line.start, line.end
    between = {
        name: torch.stack([torch.lerp(start[name], end[name], t) for t in places[1:-1]])
        for name in start
    }
    crowded = evaluate(Path(start, between, end), module, data).splits["data"]
    assert crowded.mean == pytest.approx(fine.mean, rel=1e-3)
    assert crowded.integral == pytest.approx(fine.integral, rel=1e-3)
    average = sum(crowded.loss) / 65
    assert abs(average - fine.mean) > 10 * abs(crowded.mean - fine.mean)


def test_the_mean_loss_of_a_path_without_length_is_that_of_its_network(module):
    found = evaluate(Path.linear(module, module, 3), module, (images(), torch.arange(12) % 5))
    split = found.splits["data"]
    assert split.mean == split.loss[0] > 0 == split.integral


def test_no_path_is_shorter_than_its_chord(module):
    x, y = images(), torch.zeros(12, dtype=torch.long)
    for seed in range(10):
        path = Path.linear(tiny_resnet(2 * seed), tiny_resnet(2 * seed + 1), 3 + seed)
        for steps in (0, 5):
            if steps:
                path = optimize(path, module, [x], steps=steps, descent=plain())
            result = evaluate(path, module, {"x": (x, y)})
            assert result.fisher_rao >= result.fisher_rao_lower_bound > 0


def test_lengths_of_a_fine_line_agree_with_the_fisher_metric(module):
    """sqrt 8 sum sqrt JSD (Eq. 1) and the Fisher-Rao length are, within 1 %, the length under the
    metric of Eq. 3, E_p[(d log p / dt)^2], from Jacobian-vector products."""
    a, b = tiny_resnet(1).state_dict(), tiny_resnet(2).state_dict()
    x, points = images(), 257
    direction = {name: b[name] - a[name] for name in a}

    def speed(t):
        state = {name: torch.lerp(a[name], b[name], t) for name in a}
        log_p, change = jvp(
            lambda state: functional_call(module, state, (x,)).log_softmax(-1),
            (state,),
            (direction,),
        )
        return (log_p.exp() * change.square()).sum(-1).mean().sqrt().item()

    middles = (torch.arange(512) + 0.5).double() / 512
    length = sum(speed(t) for t in middles) / 512
    y = torch.zeros(12, dtype=torch.long)
    result = evaluate(Path.linear(a, b, points), module, {"x": (x, y)})
    assert math.sqrt(8) * result.sqrt_jsd == pytest.approx(length, rel=0.01)
    assert result.fisher_rao == pytest.approx(length, rel=0.01)


def test_bad_splits_are_named(path, module):
    with pytest.raises(ValueError, match="'test' has 12 inputs and 11 labels"):
        evaluate(path, module, {"test": (images(), torch.zeros(11, dtype=torch.long))})
    with pytest.raises(ValueError, match="'test' holds no data"):
        evaluate(path, module, {"test": []})
    with pytest.raises(ValueError, match="at least one set"):
        evaluate(path, module, {})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(path, module, {"test": (images(), torch.zeros(12))}, batch_size=0)
    for data in ([images(), torch.zeros(12)], (images(),), [{"x": images()}], [({}, images())]):
        with pytest.raises(TypeError, match=r"a tuple \(inputs, labels\)"):
            evaluate(path, module, {"test": data})


@pytest.mark.parametrize(
    "labels, words",
    [
        (torch.full((12,), 5), r"within 0..4, or -100 where a row does not count, got 5..5"),
        (torch.arange(12) - 100, r"within 0..4, or -100 .*, got -99..-89"),
        (torch.zeros(12), r"integers \[12\], got torch.float32"),
        (torch.zeros(12, 1, dtype=torch.long), r"integers \[12\], got torch.int64 \[12, 1\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(path, module, labels, words):
    with pytest.raises(ValueError, match=words):
        evaluate(path, module, {"test": (images(), labels)})


def test_labels_of_any_integer_type_count(path, module):
    labels = torch.arange(12) % 5
    results = [
        evaluate(path, module, {"test": (images(), labels.to(dtype))})
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert results[0] == results[1] == results[2]
