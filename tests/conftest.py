"""Small networks, data and paths that many tests share."""

import copy
import dataclasses
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # or every worker starts as many threads as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch.utils._pytree import tree_map

from fastgeo import Descent, Forward, Path, models, stack


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def module():
    """A small ResNet of the digits preset's family, in float64."""
    return tiny_resnet()


@pytest.fixture
def path():
    """Seven points between two of them."""
    return Path.linear(tiny_resnet(seed=1), tiny_resnet(seed=2), 7)


def tiny_resnet(seed: int = 0, norm: str = "group") -> models.ResNet:
    torch.manual_seed(seed)
    return models.resnet(8, 0.25, in_channels=1, num_classes=5, norm=norm).double()


def plain(**changes) -> Descent:
    """Descent as in the paper but for the preconditioner: no momentum, one rate, all points."""
    return Descent(**dict(momentum=0.0, lr_schedule="constant", coarse_to_fine=False) | changes)


def settings(**flat) -> dict:
    """Arguments of `optimize`: those of a plain descent and of a forward pass put together."""
    names = {field.name for field in dataclasses.fields(Descent)}
    own = {name: value for name, value in flat.items() if name in names}
    return {"descent": plain(**own)} | evaluating(
        **{name: value for name, value in flat.items() if name not in names}
    )


def evaluating(**flat) -> dict:
    """Arguments of `evaluate`: those of a forward pass put together."""
    names = {field.name for field in dataclasses.fields(Forward)}
    own = {name: value for name, value in flat.items() if name in names}
    others = {name: value for name, value in flat.items() if name not in names}
    return {"forward": Forward(**own)} | others


def images(count: int = 12, channels: int = 1, size: int = 8, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator, dtype=torch.float64)


def clones(module, count):
    """`count` copies of a module with weights of their own."""
    networks = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        network = copy.deepcopy(module)
        for parameter in network.parameters():
            parameter.data += 0.3 * torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
        networks.append(network)
    return networks


def assert_equals_the_loop(module, x, points, per_point, runs_as="stacked", **options):
    """Equal outputs, and equal gradients to every parameter, under a random upstream gradient."""
    networks = clones(module, points)
    network = stack(module, **options)
    assert network.engine == runs_as, network.reason
    stacked, _ = torch.func.stack_module_state(networks)
    if per_point and isinstance(x, torch.Tensor) and len(x) != points:
        x = torch.stack([x + i for i in range(points)])
    got = network(stacked, x, per_point=per_point)
    assert network.engine == runs_as, network.reason
    each = []
    for i, net in enumerate(networks):
        own = tree_map(lambda t, i=i: t[i], x) if per_point else x
        each.append(net(**own) if isinstance(own, dict) else net(own))
    expected = torch.stack(each)
    torch.testing.assert_close(got, expected)

    upstream = torch.randn_like(expected)
    own = [parameter for network in networks for parameter in network.parameters()]
    gradients, loop = (
        torch.autograd.grad(outputs, parameters, upstream, materialize_grads=True)
        for outputs, parameters in ((got, list(stacked.values())), (expected, own))
    )
    for i, name in enumerate(stacked):
        of_loop = torch.stack(loop[i :: len(stacked)])
        torch.testing.assert_close(gradients[i], of_loop, msg=lambda text, n=name: f"{n}: {text}")
    return network


def assert_trains_like_the_loop(module, draws, points, per_point, **options):
    """Outputs, gradients and running statistics over several inputs, in eval mode for the last."""
    networks = clones(module, points)
    params, buffers = torch.func.stack_module_state(networks)
    network = stack(module, batchnorm="recalibrate", **options)
    own = [parameter for network in networks for parameter in network.parameters()]
    for step, x in enumerate(draws):
        mode = step < len(draws) - 1
        module.train(mode)
        got = network(params | buffers, x, per_point=per_point)
        each = [net.train(mode)(x[i] if per_point else x) for i, net in enumerate(networks)]
        expected = torch.stack(each)
        torch.testing.assert_close(got, expected)
        upstream = torch.randn_like(expected)
        gradients, loop = (
            torch.autograd.grad(outputs, parameters, upstream)
            for outputs, parameters in ((got, list(params.values())), (expected, own))
        )
        expected = [torch.stack(loop[i :: len(params)]) for i in range(len(params))]
        torch.testing.assert_close(list(gradients), expected)
        for name in buffers:
            expected = torch.stack([net.get_buffer(name) for net in networks])
            torch.testing.assert_close(buffers[name], expected, msg=f"{name}, step {step}")
    return network


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Every output tensor holds NaN before the launch, or the number that this is called with."""
    new_empty, poison = torch.Tensor.new_empty, [torch.nan]

    def poisoned(self, *args, **kwargs):
        result = new_empty(self, *args, **kwargs)
        return result.fill_(poison[0]) if result.is_floating_point() else result

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    return lambda number: poison.__setitem__(0, number)


def pytest_ignore_collect(collection_path, config):
    """`-m gpu` reads no files but those of such tests: where they run, what others import may be
    missing."""
    others = collection_path.suffix == ".py" and not collection_path.stem.endswith("gpu")
    return True if others and config.option.markexpr == "gpu" else None


DESELECTED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    """Leave tests marked `gpu` out where there is no GPU, or Triton only interprets; they count as
    deselected, not passed."""
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.stash[DESELECTED] = len(on_gpu)


def pytest_terminal_summary(terminalreporter, config):
    count = config.stash.get(DESELECTED, 0)
    if count:
        terminalreporter.write_line(f"{count} tests marked gpu deselected: no GPU here")
