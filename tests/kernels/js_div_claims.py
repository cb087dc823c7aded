"""What every implementation of the divergence of pairs has to do, for every beta.

Run in process for `torch`, in a process with TRITON_INTERPRET=1 and on a GPU for `triton`.
"""

import math

import mpmath
import torch
import torch.nn.functional as F
from fastgeo_kernels import js_div, path_fisher_rao, path_js_div, path_js_div_value_and_grad

BETAS = [0.0, 1e-3, 0.1, 0.5, 0.9, 1.0]


def rows(count, classes, distance, seed=0):
    """fp32 logits of p and q, `distance` apart."""
    generator = torch.Generator().manual_seed(seed)
    p = 3 * torch.randn(count, classes, generator=generator)
    return p, p + distance * torch.randn(count, classes, generator=generator)


def saturated(count, classes, margin, turn):
    """Nearly all of each row on one class; `turn` = 0: the same one in p and q."""
    generator = torch.Generator().manual_seed(1)
    winner = margin * F.one_hot(torch.arange(count) % classes, classes).float()
    noise = torch.randn(2, count, classes, generator=generator)
    return winner + 0.3 * noise[0], winner.roll(turn, 1) + noise[1]


def cases(count, classes):
    found = {f"distance {d:g}": rows(count, classes, d) for d in (1e-4, 1e-2, 0.3, 1, 3, 10, 30)}
    for margin in (10, 20):
        found[f"margin {margin}, one winner"] = saturated(count, classes, margin, 0)
        found[f"margin {margin}, two winners"] = saturated(count, classes, margin, 1)
    return found


def by_definition(p_logits, q_logits, beta, temperature=1.0):
    """60 digits: the values, the two gradients and the two terms that each of these is the
    difference of, as lists of rows."""
    with mpmath.workdps(60):
        return [
            _row(a, b, mpmath.mpf(beta), mpmath.mpf(temperature))
            for a, b in zip(p_logits.tolist(), q_logits.tolist(), strict=True)
        ]


def _row(a, b, beta, temperature):
    p, q = ([mpmath.exp(x / temperature) for x in row] for row in (a, b))
    p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))
    m = [beta * s + (1 - beta) * t for s, t in zip(p, q, strict=True)]
    if beta in (0, 1):  # KL to the other row: the logarithms have no m, and one gradient no log
        first, second, there = (p, q, 1) if beta == 0 else (q, p, -1)
        logs = [mpmath.log(s / t) for s, t in zip(first, second, strict=True)]
        kl = mpmath.fsum(s * x for s, x in zip(first, logs, strict=True))
        one = [(s * (x - kl), s * (abs(x) + kl)) for s, x in zip(first, logs, strict=True)]
        other = [(t - s, abs(t - s)) for s, t in zip(first, second, strict=True)]
        value, sides = kl, ((one, other) if there == 1 else (other, one))
    else:
        value, sides = mpmath.mpf(0), []
        for share, side in ((beta, p), (1 - beta, q)):
            logs = [mpmath.log(s / x) for s, x in zip(side, m, strict=True)]
            kl = mpmath.fsum(s * x for s, x in zip(side, logs, strict=True))
            value += share * kl
            sides.append(
                [
                    (share * s * (x - kl), share * s * (abs(x) + kl))
                    for s, x in zip(side, logs, strict=True)
                ]
            )
    grads = [[(g / temperature, size / temperature) for g, size in side] for side in sides]
    return value, grads, (max(p), max(q))


def check_digits(impl, name, p, q, beta, temperature=1.0, device="cpu"):
    """Values within 2e-6, where they are above 1e-30. Gradients within 2e-6 of their row's largest
    entry; where a row is saturated within 1e-8 (1 - p_max); and where they are the difference of a
    logarithm and the divergence within two units in the last place of these. Triton's exponential
    has a relative error of about 1e-7 times its exponent, and so has the gradient of a saturated
    row, all of whose entries are of the size 1 - p_max."""
    leaves = [x.to(device).requires_grad_() for x in (p, q)]
    options = dict(beta=beta, temperature=temperature, reduction="none", impl=impl)
    values = js_div(*leaves, **options)
    grads = torch.autograd.grad(values.sum(), leaves)
    for i, (value, sides, tops) in enumerate(by_definition(p, q, beta, temperature)):
        got = values[i].item()
        assert abs(got - value) <= 2e-6 * value + 1e-30, f"{name}, row {i}: {got} for {value}"
        for grad, side, top in zip(grads, sides, tops, strict=True):
            largest = max(abs(g) for g, _ in side)
            exponent = -mpmath.log(1 - top) if impl == "triton" else 0
            for one, (g, size) in zip(grad[i].tolist(), side, strict=True):
                allowed = (
                    (2e-6 + 1.2e-7 * exponent) * largest + 1e-8 * (1 - top) + 2.5e-7 * size + 1e-37
                )
                assert abs(one - g) <= allowed, f"{name}, row {i}: {one} for {float(g)}"


def check_path_is_its_edges(impl, device="cpu", count=7, betas=BETAS):
    logits = torch.stack([x for d in (1e-2, 3) for x in rows(count, 9, d)]).to(device)
    for beta in betas:
        options = dict(beta=beta, reduction="none", temperature=2.0, impl=impl)
        leaf = logits.clone().requires_grad_()
        path = path_js_div(leaf, **options)
        edges = torch.stack([js_div(x, y, **options) for x, y in zip(leaf, leaf[1:], strict=False)])
        torch.testing.assert_close(path, edges, rtol=2e-6, atol=1e-12)
        back = path_js_div(logits.flip(0), **{**options, "beta": 1 - beta}).flip(0)
        torch.testing.assert_close(back, path.detach(), rtol=2e-6, atol=1e-12)
        upstream = torch.rand(path.shape, generator=torch.Generator().manual_seed(0)).to(device)
        (got,), (expected,) = (torch.autograd.grad(v, leaf, upstream) for v in (path, edges))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
        value, grad = path_js_div_value_and_grad(logits, beta=beta, temperature=2.0, impl=impl)
        torch.testing.assert_close(value, path.detach().mean(-1), rtol=2e-6, atol=1e-12)
        (expected,) = torch.autograd.grad(path_js_div(leaf, **options).mean(-1).sum(), leaf)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def check_ends_are_kl(impl, device="cpu"):
    """KL itself, by PyTorch in float64, and what the divergence over beta tends to."""
    p, q = (x.to(device) for x in rows(12, 10, 1.0))
    for first, second, beta, near in ((p, q, 0.0, 1e-6), (q, p, 1.0, 1 - 1e-6)):
        expected = F.kl_div(
            second.double().log_softmax(-1), first.double().log_softmax(-1), log_target=True,
            reduction="none",
        ).sum(-1)  # fmt: skip
        got = js_div(p, q, beta=beta, reduction="none", impl=impl)
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=0)
        limit = js_div(p, q, beta=near, reduction="none", impl=impl) / min(near, 1 - near)
        torch.testing.assert_close(limit.double(), expected, rtol=1e-4, atol=0)


def check_masked_classes(impl, device="cpu", betas=BETAS):
    """-inf in both rows: not there. In q only: KL(p || q) is inf, its gradient to q is q - p."""
    p, q = (x.to(device) for x in rows(5, 9, 1.0))
    kept = [0, 1, 3, 4, 5, 6, 8]
    for beta in betas:
        dropped = torch.tensor([2, 7], device=device)
        both = [x.index_fill(1, dropped, -math.inf) for x in (p, q)]
        got = js_div(*both, beta=beta, reduction="none", impl=impl)
        expected = js_div(p[:, kept], q[:, kept], beta=beta, reduction="none", impl=impl)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
        one = q.clone()
        one[:, 3] = -math.inf
        leaf, other = one.requires_grad_(), p.clone().requires_grad_()
        value = js_div(other, leaf, beta=beta, reduction="none", impl=impl)
        grad, other_grad = torch.autograd.grad(value.sum(), (leaf, other))
        assert grad.isfinite().all() and not other_grad.isnan().any()
        if beta == 0:
            assert torch.equal(value, torch.full_like(value, math.inf))
            expected = leaf.detach().softmax(-1) - p.softmax(-1)
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        else:
            limit = js_div(p, one.detach().clamp(min=-300), beta=beta, reduction="none", impl=impl)
            torch.testing.assert_close(value.detach(), limit, rtol=2e-6, atol=0)
        same = js_div(one.detach(), one.detach(), beta=beta, reduction="none", impl=impl)
        assert torch.equal(same, torch.zeros_like(same))


# --- Rows that count nothing ----------------------------------------------------------------------


def check_rows_of_weight_0_are_not_there(impl, device="cpu", classes=9, betas=(0.0, 0.1, 0.5)):
    """NaN, inf and the largest numbers in rows of weight 0 change neither values nor gradients."""
    logits = torch.stack([x for d in (0.5, 2) for x in rows(6, classes, d)]).to(device)
    kept = torch.tensor([1, 0, 1, 0, 0, 1], device=device, dtype=torch.bool)
    weight = torch.tensor([0.5, 0, 2, 0, 0, 1], device=device)
    dirty = logits.clone()
    dirty[:, 1], dirty[1, 3], dirty[2:, 4] = math.nan, math.inf, 3e38
    for beta in betas:
        for mask in (weight, kept):
            options = dict(beta=beta, temperature=2.0, impl=impl)
            own = mask[kept] if mask is weight else None
            leaves = [x.clone().requires_grad_() for x in (dirty, logits[:, kept])]
            results = [
                path_js_div(leaves[0], sample_weight=mask, **options),
                path_js_div(leaves[1], sample_weight=own, **options),
            ]
            _same_in_kept_rows(results, leaves, kept)
            pairs = [
                js_div(leaves[0][0], leaves[0][1], sample_weight=mask, **options),
                js_div(leaves[1][0], leaves[1][1], sample_weight=own, **options),
            ]
            _same_in_kept_rows(pairs, leaves, kept)
            got, expected = (
                path_js_div_value_and_grad(leaf.detach(), sample_weight=m, **options)
                for leaf, m in zip(leaves, (mask, own), strict=True)
            )
            torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(got[1][:, kept], expected[1], rtol=1e-5, atol=1e-8)
            assert torch.equal(got[1][:, ~kept], torch.zeros_like(got[1][:, ~kept]))
    for reduction in ("none", "batchmean"):
        options = dict(reduction=reduction, impl=impl)
        got = path_fisher_rao(dirty, sample_weight=kept, **options)
        expected = path_fisher_rao(logits[:, kept], **options)
        got = got[:, kept] if reduction == "none" else got
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    # The upstream gradient of such a row does not come through either: of a square root at 0.
    leaf = dirty.clone().requires_grad_()
    path_js_div(leaf, sample_weight=kept, reduction="none", impl=impl).sqrt().sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad[:, kept].abs().sum() > 0


def _same_in_kept_rows(results, leaves, kept):
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    got, expected = (
        torch.autograd.grad(result.sum(), leaf)[0]
        for result, leaf in zip(results, leaves, strict=True)
    )
    torch.testing.assert_close(got[:, kept], expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(got[:, ~kept], torch.zeros_like(got[:, ~kept]))


def check_labels_and_normalizer(impl, device="cpu"):
    p, q = (x.to(device) for x in rows(12, 9, 1.0))
    labels = torch.arange(12, device=device) % 4
    labels[[1, 2, 7]] = -100
    kept = labels != -100
    q[1] = math.nan
    shaped = dict(beta=0.1, impl=impl)
    p3, q3 = (x.view(3, 4, 9).requires_grad_() for x in (p, q))
    each = js_div(p3[labels.view(3, 4) != -100], q3[labels.view(3, 4) != -100], **shaped)
    mean = js_div(p3, q3, labels=labels.view(3, 4), **shaped)
    torch.testing.assert_close(mean, each)
    other = labels.masked_fill(labels == -100, 7)
    got = js_div(p3, q3, labels=other.view(3, 4), ignore_index=7, **shaped)
    assert torch.equal(got, mean)
    for count in (5, 5.0, torch.tensor(5, device=device), torch.tensor(5.0, device=device)):
        got = js_div(p3, q3, labels=labels.view(3, 4), normalizer=count, **shaped)
        torch.testing.assert_close(got, mean * kept.sum() / 5)
        path = torch.stack([p, q]).detach()
        weight = kept.float()
        options = dict(sample_weight=weight, normalizer=count, **shaped)
        torch.testing.assert_close(path_js_div(path, **options)[0], got)
        value, grad = path_js_div_value_and_grad(path, **options)
        torch.testing.assert_close(value[0], got)
        (expected,) = torch.autograd.grad(got, p3)
        torch.testing.assert_close(grad[0], expected.view(12, 9), rtol=1e-5, atol=1e-9)
    every = js_div(p3[0], p3[1], normalizer=8, **shaped)
    torch.testing.assert_close(every, js_div(p3[0], p3[1], **shaped) / 2)
    nothing = torch.full_like(labels, -100).view(3, 4)
    for normalizer in (None, 0.5, torch.zeros((), device=device)):
        value = js_div(p3, q3, labels=nothing, normalizer=normalizer, **shaped)
        assert value == 0
        for grad in torch.autograd.grad(value, (p3, q3)):
            assert torch.equal(grad, torch.zeros_like(grad))


# --- What differentiates, traces and maps ---------------------------------------------------------


def check_functional_transforms(impl, device="cpu"):
    p, q = (torch.stack(list(x.to(device).split(4))) for x in rows(12, 5, 1.0))
    kept = torch.tensor([True, False, True, True], device=device)

    def loss(p, q):
        return js_div(p, q, beta=0.1, sample_weight=kept, temperature=0.5, impl=impl)

    torch.testing.assert_close(torch.vmap(loss)(p, q), torch.stack(list(map(loss, p, q))))
    torch.testing.assert_close(
        torch.vmap(loss, (0, None))(p, q[0]), torch.stack([loss(x, q[0]) for x in p])
    )
    leaves = [x.clone().requires_grad_() for x in (p, q)]
    total = torch.stack(list(map(loss, *leaves))).sum()
    expected = torch.autograd.grad(total, leaves)
    for got in (
        torch.vmap(torch.func.grad(loss, (0, 1)))(p, q),
        torch.func.grad(lambda p, q: torch.vmap(loss)(p, q).sum(), (0, 1))(p, q),
    ):
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)
    (only,) = torch.func.grad(loss, (1,))(p[0], q[0])
    torch.testing.assert_close(only, expected[1][0])


def check_compiles_as_one_graph(impl, backend="aot_eager", device="cpu"):
    p, q = (x.to(device) for x in rows(6, 5, 1.0))
    labels = torch.tensor([0, -100, 1, 2, -100, 3], device=device)
    weight = torch.linspace(0, 1, 6, device=device)
    for beta in (0.0, 0.1, 0.5):

        def loss(p, q, count, beta=beta):
            options = dict(labels=labels, sample_weight=weight, normalizer=count, temperature=2.0)
            return js_div(p, q, beta=beta, impl=impl, **options)

        compiled = torch.compile(loss, backend=backend, fullgraph=True)
        count = torch.tensor(3.0, device=device)
        results = []
        for function in (loss, compiled):
            student = q.clone().requires_grad_()
            value = function(p, student, count)
            value.backward()
            results.append((value.detach(), student.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def check_other_derivatives_raise(impl):
    import pytest

    p, q = rows(3, 4, 1.0)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(js_div(p, q, impl=impl), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda q: js_div(p, q, impl=impl), (q.detach(),), (q.detach(),))


def check_under_autocast(impl, device="cpu"):
    """The arithmetic is fp32 whatever autocast says, and gradients have their logits' dtype."""
    p, q = (x.to(device).bfloat16() for x in rows(6, 11, 1.0))
    q.requires_grad_()
    expected = js_div(p, q, impl=impl)
    with torch.autocast(device, torch.bfloat16):
        got = js_div(p, q, impl=impl)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    (grad,) = torch.autograd.grad(got, q)
    assert grad.dtype == torch.bfloat16


def check_inplace(impl, device="cpu"):
    """The gradient lies where the student's logits were, and is the same; they are gone."""
    p, base = (x.to(device) for x in rows(6, 11, 1.0))
    labels = torch.tensor([0, -100, 1, 2, -100, 3], device=device)
    for dtype in (torch.float32, torch.bfloat16):
        for both in (False, True):
            results = []
            for inplace in (False, True):
                leaves = p.clone().requires_grad_(both), base.to(dtype).requires_grad_()
                student = (leaves[1] * 1).view(2, 3, 11)
                teacher = leaves[0].view(2, 3, 11)
                options = dict(beta=0.1, labels=labels.view(2, 3), temperature=2.0)
                value = js_div(teacher, student, inplace=inplace, impl=impl, **options)
                wanted = student, *(leaf for leaf in leaves if leaf.requires_grad)
                grads = torch.autograd.grad(value * 3, wanted, retain_graph=True)
                assert (grads[0].data_ptr() == student.data_ptr()) == inplace
                results.append(grads)
            for got, expected in zip(*results, strict=True):
                assert got.dtype == expected.dtype and torch.equal(got, expected)
    import pytest

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    with pytest.raises(ValueError, match="inplace needs contiguous q_logits"):
        js_div(p.T, base.T, inplace=True, impl=impl)
