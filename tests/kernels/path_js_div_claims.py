"""What every implementation of the path divergence has to do; the tests name the implementation.

Run in process for `torch`, in a process with TRITON_INTERPRET=1 and on a GPU for `triton`.
"""

import math

import torch
from fastgeo_kernels import path_fisher_rao, path_js_div, path_js_div_value_and_grad

LN2 = math.log(2.0)
CANCELS = 2.5e-7  # two units in the last place of fp32


def by_definition(logits, temperature=1.0):
    """float64: per-row JSD [E, B]; its gradient to both rows of an edge, each [E, B, C]; p."""
    rows, (grad_p, _), (grad_q, _), p = terms(logits, temperature)
    return rows, grad_p, grad_q, p


def terms(logits, temperature):
    """`by_definition`, and with each gradient the size of the two terms that it is the difference
    of."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    log_m = torch.logaddexp(log_p[:-1], log_p[1:]) - LN2

    def side(rows):
        ratio = torch.where(p[rows] > 0, log_p[rows] - log_m, 0.0)
        kl = (p[rows] * ratio).sum(-1, keepdim=True)
        scale = p[rows] / (2 * temperature)
        return kl[..., 0], (scale * (ratio - kl), scale * (ratio.abs() + kl))

    (kl_p, grad_p), (kl_q, grad_q) = side(slice(None, -1)), side(slice(1, None))
    return (kl_p + kl_q) / 2, grad_p, grad_q, p


def path(points, batch, classes, distance, seed=0, spread=3.0, shift=0.0):
    """fp32 logits whose neighbours are `distance` apart, each row shifted by a constant."""
    generator = torch.Generator().manual_seed(seed)
    start = spread * torch.randn(1, batch, classes, generator=generator)
    steps = distance * torch.randn(points - 1, batch, classes, generator=generator)
    shifts = shift * torch.randn(points, batch, 1, generator=generator)
    return torch.cat([start, start + steps.cumsum(0)]) + shifts


def check_against_the_definition(logits, impl, temperature=1.0, edge_weight=None):
    """Value within 1e-5 where JSD >= 1e-9. Gradient: within 2e-6 of the largest entry that any of
    the row's edges gives it; where rows are saturated within 1e-8 (1 - p_max) of the weight; and
    where it is the small difference of log(p / m) and KL, within what rounds these two.
    """
    points, batch, _ = logits.shape
    rows, *gradients, p = terms(logits, temperature)
    got_rows = path_js_div(logits, reduction="none", temperature=temperature, impl=impl)
    assert got_rows.shape == rows.shape and got_rows.isfinite().all()
    assert (got_rows >= 0).all() and (got_rows <= LN2 + 1e-7).all()
    got_rows = got_rows.double()
    large = rows >= 1e-9
    assert ((got_rows - rows).abs() <= 1e-5 * rows)[large].all()
    assert (got_rows[~large] <= 1.1e-9).all()

    value, grad = path_js_div_value_and_grad(
        logits, edge_weight, temperature=temperature, impl=impl
    )
    torch.testing.assert_close(value.double(), rows.mean(-1), rtol=1e-5, atol=1e-9)
    assert grad.dtype == logits.dtype and grad.shape == logits.shape and grad.isfinite().all()
    weight = torch.ones(points - 1).to(rows) if edge_weight is None else edge_weight.double()
    weight = weight[:, None, None] / batch
    expected, largest = torch.zeros_like(p), torch.zeros_like(p[..., :1])
    saturated, rounded = torch.zeros_like(largest), torch.zeros_like(p)
    tail = 1 - p.amax(-1, keepdim=True)
    slots = slice(None, -1), slice(1, None)
    for slot, (contribution, size) in zip(slots, gradients, strict=True):
        rounded[slot] += weight.abs() * size
        expected[slot] += weight * contribution
        largest[slot] += (weight * contribution).abs().amax(-1, keepdim=True)
        saturated[slot] += weight.abs() * tail[slot] / temperature
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[logits.dtype]
    # float64 itself leaves 1e-16 of the weight in the leading entry of a saturated row, and
    # numbers below 1e-38 are 0 in fp32 (6e-8 in fp16).
    floor = 6e-8 if logits.dtype == torch.float16 else 1e-14 * weight.abs().amax()
    error = (grad.double() - expected).abs()
    allowed = 2e-6 * largest + 1e-8 * saturated + CANCELS * rounded
    allowed = allowed + rounding * expected.abs() + floor
    assert (error <= allowed).all(), (error / allowed).max()


def check_survives_extremes(impl, device="cpu", dtypes=(torch.float32,)):
    for dtype in dtypes:
        hot = torch.full((4, 3, 5), -1e4, dtype=dtype, device=device)
        for point, hot_class in enumerate((0, 0, 1, 2)):
            hot[point, :, hot_class] = 1e4
        value, grad = path_js_div_value_and_grad(hot, impl=impl)
        expected = torch.tensor([0, LN2, LN2], device=device)
        torch.testing.assert_close(value, expected, rtol=2e-7, atol=0)
        assert value[0] == 0 and torch.equal(grad, torch.zeros_like(grad))
        distance = path_fisher_rao(hot, impl=impl)
        torch.testing.assert_close(distance, expected / LN2 * math.pi, rtol=1e-6, atol=0)
    for classes in (1, 7):
        equal = torch.randn(1, 3, classes, device=device).expand(3, 3, classes)
        value, grad = path_js_div_value_and_grad(equal, impl=impl)
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(path_fisher_rao(equal, impl=impl), torch.zeros_like(value))
        assert grad.abs().max() < 1e-9


def check_masked_classes(impl, device="cpu"):
    """Masked in both rows: the divergence over the rest. In one: the limit of p -> 0."""
    logits = path(3, 4, 9, 1.0, seed=5).to(device)
    masked = logits.clone()
    masked[..., 2] = masked[..., 7] = -math.inf
    kept = [0, 1, 3, 4, 5, 6, 8]
    value, grad = path_js_div_value_and_grad(masked, impl=impl)
    expected, expected_grad = path_js_div_value_and_grad(logits[..., kept], impl="torch")
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad[..., kept], expected_grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(grad[..., [2, 7]], torch.zeros_like(grad[..., [2, 7]]))

    one, limit = logits.clone(), logits.clone()
    one[1, :, 2], limit[1, :, 2] = -math.inf, -2e3
    for got, expected in zip(
        path_js_div_value_and_grad(one, impl=impl),
        path_js_div_value_and_grad(limit, impl=impl),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)

    padding = logits.clone()
    padding[:, 1] = -math.inf  # a row of nothing
    rows = path_js_div(padding, reduction="none", impl=impl)
    assert torch.equal(rows[:, 1], torch.zeros_like(rows[:, 1]))
    bad = logits.clone()
    bad[1, 2, 3] = math.nan
    rows = path_js_div(bad, reduction="none", impl=impl)
    assert rows[:, 2].isnan().all() and rows[:, [0, 1, 3]].isfinite().all()


def check_nan_stays_in_its_rows(classes, impl, device="cpu"):
    """In the gradients to a row with a NaN and to its neighbours, of that sample only. (Outputs
    must not hold NaN beforehand.)"""
    for bad in (math.nan, math.inf):
        logits = path(4, 3, classes, 1.0).to(device)
        logits[0, 1, classes // 2] = bad
        _, grad = path_js_div_value_and_grad(logits, impl=impl)
        assert grad[:2, 1].isnan().all() and grad[2:].isfinite().all()
        assert grad[:, [0, 2]].isfinite().all()


def check_symmetry_and_repetition(logits, impl):
    forward = path_js_div(logits, reduction="none", impl=impl)
    backward = path_js_div(logits.flip(0), reduction="none", impl=impl).flip(0)
    # Bit for bit in Triton; torch's exp2 on a CPU rounds the end of a tensor in another way.
    torch.testing.assert_close(forward, backward, rtol=0 if impl == "triton" else 1e-6, atol=0)
    value, grad = path_js_div_value_and_grad(logits, impl=impl)
    again, grad_again = path_js_div_value_and_grad(logits, impl=impl)
    assert torch.equal(value, again) and torch.equal(grad, grad_again)
    left = grad.double().sum(-1).abs()
    assert (left <= 3e-7 * grad.double().abs().sum(-1) + 1e-7 / logits.shape[1]).all()


def check_any_upstream_gradient(logits, impl):
    """The length, sum of sqrt(JSD), over a masked batch: autograd against the definition."""
    points, batch, _ = logits.shape
    mask = torch.arange(batch, device=logits.device) % 3 != 1
    edge_weight = torch.linspace(0.5, 2, points - 1, device=logits.device)
    x = logits.clone().requires_grad_()
    options = dict(sample_weight=mask, edge_weight=edge_weight, temperature=2.0, impl=impl)
    path_js_div(x, **options).sqrt().sum().backward()
    rows, grad_p, grad_q, _ = by_definition(logits, 2.0)
    share = mask.double() / mask.sum()
    length = ((rows * share).sum(-1) * edge_weight.double()).sqrt()
    upstream = (edge_weight.double() / (2 * length))[:, None, None] * share[:, None]
    expected = torch.zeros_like(x, dtype=torch.float64)
    expected[:-1] += upstream * grad_p
    expected[1:] += upstream * grad_q
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(x.grad[:, ~mask], torch.zeros_like(x.grad[:, ~mask]))
    every_row = path_js_div(x, reduction="none", sample_weight=mask, impl=impl)
    assert torch.equal(every_row[:, ~mask], torch.zeros_like(every_row[:, ~mask]))
    value, grad = path_js_div_value_and_grad(
        logits, edge_weight, sample_weight=mask, temperature=2.0, impl=impl
    )
    torch.testing.assert_close(value.double(), (rows * share).sum(-1), rtol=1e-5, atol=1e-10)
    weighted = (edge_weight.double()[:, None, None] * share[:, None]) * grad_p
    torch.testing.assert_close(grad[0].double(), weighted[0], rtol=1e-5, atol=1e-7)


def check_strides(impl, device="cpu"):
    torch.manual_seed(0)
    base = torch.randn(3, 4, 2, 14, device=device)
    views = {
        "transposed": torch.randn(5, 3, 7, device=device).transpose(0, 1),
        "classes first": torch.randn(7, 3, 5, device=device).permute(1, 2, 0),
        "sliced": base[:, :, 1, ::2],
        "shared start": torch.randn(1, 4, 7, device=device).expand(3, 4, 7),
        "shared batch": torch.randn(3, 1, 7, device=device).expand(3, 4, 7),
        "misaligned": torch.randn(3 * 4 * 8 + 1, device=device)[1:].view(3, 4, 8),
    }
    for name, view in views.items():
        assert not view.is_contiguous() or name == "misaligned"
        for got, expected in zip(
            path_js_div_value_and_grad(view, impl=impl),
            path_js_div_value_and_grad(view.contiguous().clone(), impl=impl),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8, msg=name)


def check_fisher_rao(logits, impl):
    p = logits.double().softmax(-1)
    half = (p[:-1].sqrt() - p[1:].sqrt()).norm(dim=-1) / 2
    expected = 4 * half.asin()
    got = path_fisher_rao(logits, reduction="none", impl=impl).double()
    torch.testing.assert_close(got, expected, rtol=5e-6, atol=1e-7)
    torch.testing.assert_close(
        path_fisher_rao(logits, impl=impl).double(),
        expected.square().mean(-1).sqrt(),
        rtol=5e-6,
        atol=0,
    )


def check_functional_transforms(impl):
    """torch.func.grad and vmap, in both orders, give what autograd gives row by row."""
    stack = torch.stack([path(3, 4, 5, 1.0, seed) for seed in range(3)])

    def energy(logits):
        return path_js_div(logits, temperature=0.5, impl=impl).sum()

    expected = torch.stack([energy(x) for x in stack])
    torch.testing.assert_close(torch.vmap(energy)(stack), expected)
    x = stack.clone().requires_grad_()
    (grad,) = torch.autograd.grad(torch.stack([energy(row) for row in x]).sum(), x)
    torch.testing.assert_close(torch.func.grad(energy)(stack[0]), grad[0])
    torch.testing.assert_close(torch.vmap(torch.func.grad(energy))(stack), grad)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.vmap(energy)(x).sum())(stack), grad)
    torch.testing.assert_close(
        torch.vmap(energy, in_dims=2)(stack.movedim(0, 2)), expected, msg="another dimension"
    )
    value, grad = torch.vmap(lambda x: path_js_div_value_and_grad(x, impl=impl))(stack)
    for i, row in enumerate(stack):
        one_value, one_grad = path_js_div_value_and_grad(row, impl=impl)
        torch.testing.assert_close(value[i], one_value)
        torch.testing.assert_close(grad[i], one_grad)


def check_other_derivatives_raise(impl):
    import pytest

    x = path(3, 2, 4, 1.0).requires_grad_()
    (grad,) = torch.autograd.grad(path_js_div(x, impl=impl).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: path_js_div(x, impl=impl), (x.detach(),), (x.detach(),))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.hessian(lambda x: path_js_div(x, impl=impl).sum())(x.detach())


def check_compiles_as_one_graph(impl):
    x = path(4, 3, 6, 1.0)
    edge_weight = torch.tensor([1.0, 2.0, 0.5])

    def loss(x):
        return path_js_div(x, impl=impl).sqrt().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss(a).backward()
    compiled(b).backward()
    torch.testing.assert_close(b.grad, a.grad)
    step = torch.compile(
        lambda x, w: path_js_div_value_and_grad(x, w, impl=impl),
        backend="aot_eager",
        fullgraph=True,
    )
    for got, expected in zip(
        step(x, edge_weight), path_js_div_value_and_grad(x, edge_weight, impl=impl), strict=True
    ):
        torch.testing.assert_close(got, expected)


def check_energy_falls(impl):
    """A path with one free point moves down its gradient to less than half the energy."""
    ends = path(2, 8, 10, 3.0, seed=3)
    middle = torch.randn(8, 10, generator=torch.Generator().manual_seed(4))
    energies = []
    for _ in range(12):
        value, grad = path_js_div_value_and_grad(torch.stack([ends[0], middle, ends[1]]), impl=impl)
        energies.append(value.sum().item())
        middle = middle - 20 * grad[1]
    assert all(after < before for before, after in zip(energies, energies[1:], strict=False))
    assert energies[-1] < energies[0] / 2
