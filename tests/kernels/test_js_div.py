"""The divergence of pairs in plain PyTorch: every beta, masks, normalisers; Triton's tests run the
same claims in `triton_interpreted.py` and on a GPU."""

import math

import js_div_claims as claims
import pytest
import torch
from fastgeo_kernels import js_div, path_fisher_rao, path_js_div, path_js_div_value_and_grad
from layer_claims import with_saved


@pytest.mark.parametrize("beta", claims.BETAS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_torch_has_its_digits(beta, temperature):
    for name, (p, q) in claims.cases(20, 10).items():
        claims.check_digits("torch", name, p, q, beta, temperature)


@pytest.mark.parametrize("beta", claims.BETAS)
def test_torch_has_its_digits_in_wide_rows(beta):
    for distance in (1e-3, 1.0, 10.0):
        claims.check_digits("torch", f"distance {distance}", *claims.rows(2, 700, distance), beta)


def test_a_path_is_its_edges():
    claims.check_path_is_its_edges("torch")


def test_the_ends_are_kl_divergences():
    claims.check_ends_are_kl("torch")


def test_masked_classes():
    claims.check_masked_classes("torch")


def test_rows_of_weight_0_are_not_there():
    claims.check_rows_of_weight_0_are_not_there("torch")
    claims.check_rows_of_weight_0_are_not_there("torch", classes=30)


def test_inplace():
    claims.check_inplace("torch")


def test_labels_and_normalizer():
    claims.check_labels_and_normalizer("torch")


def test_grad_vmap_and_one_graph():
    claims.check_functional_transforms("torch")
    claims.check_compiles_as_one_graph("torch")
    claims.check_other_derivatives_raise("torch")
    claims.check_under_autocast("torch")


@pytest.mark.parametrize("beta", claims.BETAS)
def test_gradcheck(beta):
    p, q = (x.double().requires_grad_() for x in claims.rows(4, 5, 1.0))
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5])
    options = dict(beta=beta, sample_weight=weight, normalizer=3.0, temperature=1.5)
    assert torch.autograd.gradcheck(lambda p, q: js_div(p, q, **options), (p, q))
    path = torch.stack([p, q, p.flip(1)]).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: path_js_div(x, **options), path)


@pytest.mark.parametrize("beta", claims.BETAS)
def test_equal_rows_have_exactly_no_divergence(beta):
    for classes in (1, 7, 33, 1000):
        p = claims.rows(9, classes, 1.0)[0].requires_grad_()
        rows = js_div(p, p.detach().clone(), beta=beta, reduction="none")
        assert torch.equal(rows, torch.zeros(9))
        assert torch.autograd.grad(rows.sum(), p)[0].abs().max() < 1e-9


def test_both_forms_meet_where_they_are_exchanged():
    """Doubles and the formula of `reference` on either side of the value where a row goes from one
    to the other, and far rows, in one slice and across slices."""
    for beta in claims.BETAS:
        given = [claims.rows(3, 10, d) for d in (3e-5, 1e-4, 3e-4, 1e-3, 40.0)]
        p, q = (torch.cat(x) for x in zip(*given, strict=True))
        claims.check_digits("torch", "mixed", p, q, beta)


def test_a_mean_is_the_mean_of_the_rows():
    """Under an upstream gradient of 1 as under any other, twice from one graph, and with weights
    that want a gradient themselves."""
    p, q = (x.requires_grad_() for x in claims.rows(6, 11, 1.0))
    weight = torch.linspace(0.5, 2, 6).requires_grad_()
    for options in ({}, dict(sample_weight=weight.detach()), dict(sample_weight=weight)):
        rows = js_div(p, q, reduction="none", beta=0.3)
        own = options.get("sample_weight", torch.ones(6))
        expected = (rows * own).sum() / own.sum()
        value = js_div(p, q, beta=0.3, **options)
        torch.testing.assert_close(value, expected)
        leaves = [p, q, *(x for x in options.values() if x.requires_grad)]
        for scale in (1.0, 1.0, -3.0):
            got, wanted = (
                torch.autograd.grad(scale * x, leaves, retain_graph=True) for x in (value, expected)
            )
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_a_traced_graph_of_fake_tensors_has_the_same_shapes():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        p, q = torch.empty(6, 11), torch.empty(6, 11, requires_grad=True)
        value = js_div(p, q, sample_weight=torch.empty(6))
        assert value.shape == () and torch.autograd.grad(value, q)[0].shape == q.shape
        assert js_div(p, q, reduction="none").shape == (6,)


def test_dtypes_may_differ():
    p, q = claims.rows(6, 11, 1.0)
    student = q.bfloat16().requires_grad_()
    got = js_div(p, student)
    torch.testing.assert_close(got, js_div(p, student.detach().float()))
    assert torch.autograd.grad(got, student)[0].dtype == torch.bfloat16
    assert js_div(p.double(), student).dtype == torch.float64


def test_what_needs_no_gradient_costs_none():
    """What is kept for the backward pass is the gradient that will be wanted, and no copy."""
    p, q = claims.rows(6, 50, 1.0)
    for wanted in ((True, False), (False, True), (True, True), (False, False)):
        leaves = [x.clone().requires_grad_(want) for x, want in zip((p, q), wanted, strict=True)]
        _, saved = with_saved(js_div, *leaves)
        assert [t.shape for t in saved if t.ndim == 2] == [p.shape] * sum(wanted)


def test_slices_of_the_batch_change_nothing(monkeypatch):
    from fastgeo_kernels.path_js_div import reference

    p, q = claims.rows(13, 10, 1.0)
    q.requires_grad_()
    weight = torch.linspace(0, 1, 13)
    results = []
    for chunk in (1 << 16, 50):
        monkeypatch.setattr(reference, "CHUNK", chunk)
        value = js_div(p, q, sample_weight=weight)
        results.append((value.detach(), *torch.autograd.grad(value, q)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


# --- Weights that are refused ---------------------------------------------------------------------

BAD_WEIGHTS = [-100.0, -1e-9, math.nan, math.inf]


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
@pytest.mark.parametrize("op", [path_js_div, path_js_div_value_and_grad, path_fisher_rao])
def test_weights_that_are_negative_or_not_finite_are_refused(op, bad):
    weight = torch.tensor([1.0, bad, 1.0])
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        op(torch.zeros(3, 3, 4), sample_weight=weight)
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        js_div(torch.zeros(3, 4), torch.zeros(3, 4), sample_weight=weight)


@pytest.mark.parametrize("bad", BAD_WEIGHTS)
def test_where_looking_is_not_possible_a_bad_weight_makes_nan(bad):
    """In a compiled graph, under vmap, and as on a GPU."""
    p, q = claims.rows(3, 4, 1.0)
    weight = torch.tensor([1.0, bad, 1.0])

    def loss(weight):
        return js_div(p, q, sample_weight=weight)

    assert torch.compile(loss, backend="aot_eager", fullgraph=True)(weight).isnan()
    with pytest.raises(ValueError, match="sample_weight must be finite and not negative"):
        loss(weight)  # by itself again
    mapped = torch.vmap(loss)(torch.stack([weight, torch.ones(3)]))
    assert mapped[0].isnan() and mapped[1].isfinite()


def test_bad_arguments_are_named():
    p = torch.zeros(3, 4)
    for options, error, words in (
        (dict(beta=1.5), ValueError, "beta must be 0, 1, or between 1e-6 and 1 - 1e-6, got 1.5"),
        (dict(beta=1e-9), ValueError, "beta must be .* got 1e-09"),
        (dict(beta=torch.ones(())), TypeError, "beta must be a Python number, got Tensor"),
        (dict(normalizer=0), ValueError, "normalizer must be positive and finite, got 0"),
        (dict(normalizer="B"), TypeError, "normalizer must be a number, got str"),
        (dict(normalizer=torch.ones(2)), ValueError, r"must be one real number, got \[2\]"),
        (dict(normalizer=2, reduction="none"), ValueError, "not with reduction='none'"),
        (dict(labels=torch.zeros(4)), ValueError, r"labels must be \[3\], got \[4\]"),
    ):
        with pytest.raises(error, match=words):
            js_div(p, p, **options)
    with pytest.raises(ValueError, match="beta must be"):
        path_js_div(torch.zeros(2, 3, 4), beta=-1)
