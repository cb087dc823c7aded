"""The step on static buffers against `optimize`, step by step; on a GPU it is captured, too."""

import pytest
import torch
from conftest import images, tiny_resnet
from torch import nn

from fastgeo import Augmented, Path, data, models, optimize, optimize_static
from fastgeo.static import Given, StaticStep


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
        for key in ("energy", "sqrt_jsd"):
            assert one[key] == pytest.approx(other[key], rel=1e-9)


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
    source = Augmented(digits, 32, torch.Generator().manual_seed(5))
    for kept in source.take(5):  # over the end of an epoch
        assert torch.equal(source.inputs(kept), next(expected)[0])


def test_a_run_over_augmented_digits_is_that_of_optimize():
    digits = data.load("digits", augment="flip-crop", train_subset=100)
    module, a, b = (models.resnet(8, 0.25, in_channels=1) for _ in range(3))
    path = Path.linear(a, b, 4)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    expected = optimize(path, module, digits.shuffled(32, generators[0]), steps=4, engine="stacked")
    got = optimize_static(path, module, Augmented(digits, 32, generators[1]), steps=4, read_every=3)
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


def test_what_cannot_be_is_named(path, module):
    with pytest.raises(ValueError, match="batches ended after 2 of 5 steps"):
        optimize_static(path, module, iter([images(), images()]), steps=5, read_every=2)
    with pytest.raises(ValueError, match="all batches must have one shape, got"):
        optimize_static(path, module, [images(8), images(12)], steps=2, read_every=1)
    with pytest.raises(ValueError, match="lower lr"):
        optimize_static(path, module, [images() * 1e300], steps=2)
    with pytest.raises(ValueError, match="there are no batches"):
        optimize_static(path, module, [], steps=2)
    with pytest.raises(ValueError, match="steps and read_every must be at least 1, got 0 and 50"):
        optimize_static(path, module, [images()], steps=0)
