"""bf16 bodies with fp32 heads, and what they do to a path."""

import pytest
import torch
from conftest import images, plain, tiny_resnet
from fastgeo_kernels.stacked import plain as stacked_layers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgeo import Forward, Path, data, evaluate, optimize, stack
from fastgeo.stacking.precision import matmul_precision


def networks(make, count=3):
    return torch.func.stack_module_state([make(seed) for seed in range(count)])[0]


def resnet(seed=0, norm="group"):
    return tiny_resnet(seed, norm).float()


class Recorded(TorchDispatchMode):
    """(operation, dtypes of its tensors) of every layer that runs meanwhile."""

    LAYERS = ("convolution", "native_group_norm", "native_layer_norm", "bmm", "baddbmm")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.LAYERS:
            self.calls.append((name, {a.dtype for a in args if isinstance(a, torch.Tensor)}))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("norm", ["group", "channel"])
def test_the_body_is_in_bf16_and_the_head_in_fp32(norm, monkeypatch):
    monkeypatch.setattr(stacked_layers, "WIDENS", False)  # which some CPUs do underneath
    network = stack(resnet(norm=norm), precision="bf16")
    params, x = networks(lambda seed: resnet(seed, norm)), images().float()
    with torch.no_grad():
        network(params, x)  # finds out which layers are the head
        with Recorded() as seen:
            logits = network(params, x)
    assert logits.dtype == torch.float32
    *body, head = seen.calls
    assert head == ("baddbmm", {torch.float32})
    assert len(body) == 18 and all(dtypes == {torch.bfloat16} for _, dtypes in body)


def test_bf16_errs_no_more_than_autocast_and_gradients_keep_the_dtype_of_the_weights():
    params, x = networks(resnet), images().float()
    params = {name: p.detach().requires_grad_() for name, p in params.items()}

    def result(network):
        logits = network(params, x)
        return [logits, *torch.autograd.grad(logits.square().sum(), params.values())]

    def autocast(params, x):
        with torch.autocast("cpu", torch.bfloat16):
            return stack(resnet(), engine="loop")(params, x).float()

    exact, ours, usual = map(result, (stack(resnet()), stack(resnet(), precision="bf16"), autocast))
    errors = [
        sum(((a - e).norm() / e.norm()).item() for a, e in zip(got, exact, strict=True))
        for got in (ours, usual)
    ]
    assert all(tensor.dtype == torch.float32 for tensor in ours)
    assert 0 < errors[0] <= 1.2 * errors[1]


def test_parameters_that_a_body_alone_reads():
    network = stack(resnet(), precision="bf16")
    assert network.parameters_in_half() == set()  # it is not known before it has run
    network(networks(resnet), images().float())
    names = {name for name, _ in resnet().named_parameters()}
    assert network.parameters_in_half() == names - {"linear.weight", "linear.bias"}
    assert stack(resnet()).parameters_in_half() == set()


class Standardised(nn.Module):
    """Weights that are computed from parameters, a tied head, an activation behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.hidden.weight

    def forward(self, x):
        weight = self.conv.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        x = nn.functional.conv2d(x, weight, self.conv.bias).amax((2, 3))
        return self.head(self.hidden(x).relu()).tanh()


def test_functions_of_parameters_and_tied_heads_stay_in_fp32():
    params, x = networks(lambda seed: Standardised()), images().float()
    network = stack(Standardised(), precision="bf16")
    got, expected = network(params, x), stack(Standardised())(params, x)
    assert network.parameters_in_half() == {"conv.bias", "hidden.bias"}
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)


def test_the_mean_in_front_of_the_head_is_taken_in_fp32():
    """Of features in bf16; the layers behind it get all of its digits."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3)))

    params, x = networks(lambda seed: Pooled()), images().float()
    with torch.no_grad():
        got = stack(Pooled(), precision="bf16")(params, x)
        for i, logits in enumerate(got):
            weight, bias = params["conv.weight"][i].bfloat16(), params["conv.bias"][i].bfloat16()
            features = nn.functional.conv2d(x.bfloat16(), weight, bias).relu().float()
            head = params["head.weight"][i], params["head.bias"][i]
            expected = nn.functional.linear(features.mean((2, 3)), *head)
            rounded = nn.functional.linear(features.mean((2, 3)).bfloat16().float(), *head)
            errors = [(other - expected).abs().max() for other in (logits, rounded)]
            assert errors[0] < 0.3 * errors[1]


def test_bf16_needs_the_stacked_engine():
    for engine in ("loop", "vmap"):
        with pytest.raises(ValueError, match="head in fp32, which engine 'stacked' alone can tell"):
            stack(resnet(), engine=engine, precision="bf16")
    with pytest.raises(ValueError, match="precision must be fp32, tf32, bf16, got 'fp8'"):
        stack(resnet(), precision="fp8")


def test_tf32_is_for_a_while():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", False)):
        with matmul_precision(precision):
            assert [backend.allow_tf32 for backend in backends] == [allowed] * 2
    assert [backend.allow_tf32 for backend in backends] == before


@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_pytorchs_newer_settings_are_left_as_they_were(value):
    """Set to one value, they make the older ones raise when these are read."""
    newer = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    with matmul_precision("fp32"):  # puts the settings of this process back
        for backend in newer:
            backend.fp32_precision = value
        for precision in ("fp32", "tf32", "bf16"):
            with matmul_precision(precision):
                inside = "tf32" if precision == "tf32" else "ieee"
                assert {backend.fp32_precision for backend in newer} == {inside}
                assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert {backend.fp32_precision for backend in newer} == {value}


def test_evaluation_in_bf16_is_near_that_in_fp32():
    path, x, y = Path.linear(resnet(1), resnet(2), 5), images(40).float(), torch.arange(40) % 5
    exact, half = (
        evaluate(path, resnet(), {"test": (x, y)}, forward=Forward(precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert half.splits["test"].loss == pytest.approx(exact.splits["test"].loss, rel=0.02)
    assert half.energy == pytest.approx(exact.energy, rel=0.1)


def test_a_path_in_bf16_falls_like_those_in_fp32():
    """Energies on digits: no further from fp32 than other orders of the same images are."""
    digits = data.load("digits", train_subset=512)
    start = Path.linear(*(trained(digits, seed) for seed in (1, 2)), 5)

    def curve(precision, seed):
        energies = []
        batches = digits.shuffled(64, torch.Generator().manual_seed(seed))
        path = optimize(
            *(start, ten_classes(), batches),
            steps=16,
            on_step=lambda metrics, path: energies.append(metrics["energy"]),
            descent=plain(),
            forward=Forward(engine="stacked", precision=precision),
        )
        assert all(t.dtype == torch.float32 for t in path.interior.values())
        x = digits.in_order("train", 512)
        return torch.tensor([*energies, evaluate(path, ten_classes(), {"train": x}).energy])

    fp32 = torch.stack([curve("fp32", seed) for seed in range(3)])
    bf16 = curve("bf16", 0)
    assert bf16[-1] < 0.5 * bf16[0]
    away = (bf16 - fp32[0]).abs()
    spread = fp32.amax(0) - fp32.amin(0)
    assert away.mean() < 0.2 * spread.mean() and away[-1] < 0.5 * spread[-1]


def ten_classes(seed=0):
    torch.manual_seed(seed)
    from fastgeo import models

    return models.resnet(8, 0.25, in_channels=1)


def trained(digits, seed):
    network = ten_classes(seed)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for x, y in digits.shuffled(64, torch.Generator().manual_seed(seed), epochs=3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network
