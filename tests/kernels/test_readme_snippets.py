"""The Python in kernels/README.md runs and gives what it stands in for."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastgeo_kernels import js_div

README = Path(__file__).parents[2] / "kernels" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def snippet(words):
    (found,) = [block for block in BLOCKS if words in block]
    return found


def logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator)


def run(words, **names):
    exec(compile(snippet(words), str(README), "exec"), names)
    return names


def trl(student, teacher, labels=None, beta=0.5, temperature=1.0, count=None):
    """As TRL's GKD trainer writes it, [batch, tokens, classes]."""
    q, p = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    if beta == 0:
        jsd = F.kl_div(q, p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(p, q, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=q.dtype)
        mixture = torch.logsumexp(torch.stack([q + torch.log1p(-b), p + torch.log(b)]), 0)
        kl = [F.kl_div(mixture, x, reduction="none", log_target=True) for x in (p, q)]
        jsd = b * kl[0] + (1 - b) * kl[1]
    kept = torch.ones(q.shape[:-1], dtype=torch.bool) if labels is None else labels != -100
    return jsd[kept].sum() / (kept.sum() if count is None else count)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_s_loss(beta):
    loss = run("def generalized_jsd_loss")["generalized_jsd_loss"]
    student, teacher = logits(2, 5, 11).double(), logits(2, 5, 11, seed=1).double()
    labels = torch.tensor([[1, -100, 2, 3, -100], [0, 0, 0, -100, 1]])
    for options in ({}, dict(labels=labels), dict(labels=labels, count=torch.tensor(19))):
        ours = dict(options)
        ours["num_items_in_batch"] = ours.pop("count", None)
        results = []
        for function, given in ((loss, ours), (trl, options)):
            leaf = student.clone().requires_grad_()
            value = function(leaf, teacher, beta=beta, temperature=2.0, **given)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_liger_s_layers(monkeypatch):
    """Its own kernels do not run on a CPU; TRL's formula is the same. With Liger itself: see
    `triton_interpreted.py`."""
    from liger_kernel import transformers

    for layer in (transformers.LigerJSD, transformers.LigerFusedLinearJSD):
        monkeypatch.setattr(layer, "forward", layer.forward)  # which is put back afterwards
    run("LigerJSD.forward = layers")
    x, w, t, v = logits(6, 4), logits(11, 4), logits(6, 3), logits(11, 3)
    student, teacher = x @ w.T, t @ v.T
    labels = torch.tensor([1, -100, 2, 3, -100, 0])
    expected = trl(student, teacher, labels, beta=0.1)
    layer = transformers.LigerJSD(beta=0.1)
    got = layer(student.log_softmax(-1), teacher.log_softmax(-1), labels)
    torch.testing.assert_close(got, expected)
    fused = transformers.LigerFusedLinearJSD(jsd_beta=0.1, temperature=2.0)
    expected = trl(student, teacher, labels, beta=0.1, temperature=2.0)
    torch.testing.assert_close(fused(x, w, t, v, labels), expected)


def test_torch_s_three_lines():
    student, teacher, T = logits(2, 5, 11), logits(2, 5, 11, seed=1), 2.0
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    names = run("loss = js_div(teacher, student, temperature=T", **locals())
    lines = re.findall(r"^# (.*?)(?:  +#.*)?$", snippet("sample_weight=mask"), re.MULTILINE)
    expected = dict(student=student, teacher=teacher, T=T, mask=mask, F=F)
    exec("\n".join(lines), expected)
    torch.testing.assert_close(names["loss"], expected["loss"])
    one, other = student.flatten(0, 1).log_softmax(-1), teacher.flatten(0, 1).softmax(-1)
    torch.testing.assert_close(names["forward_kl"], F.kl_div(one, other, reduction="batchmean"))


def test_parts_of_a_batch_a_vocabulary_and_a_stored_teacher():
    student, teacher = logits(6, 20), logits(6, 20, seed=1)
    labels = torch.tensor([1, -100, 2, 3, -100, 0])
    names = run("all_reduce(count)", js_div=js_div, **locals())
    torch.testing.assert_close(names["loss"], js_div(teacher, student, labels=labels))
    names = run(
        "from fastgeo_kernels import fused_linear_js_div",
        hidden=logits(6, 4),
        head=torch.nn.Linear(4, 20),
        teacher_hidden=logits(6, 3),
        teacher_head=torch.nn.Linear(3, 20),
        labels=labels,
    )
    assert names["loss"].isfinite()
    names = run("from fastgeo_kernels import top_k_js_div", student=student, teacher=teacher)
    assert 0 < names["loss"] <= js_div(teacher, student, beta=0.0)


def test_paths():
    path = logits(3, 4, 5).requires_grad_()
    assert run("no copy", logits=path.transpose(0, 1))["loss"].isfinite()
    run("energy, dlogits", logits=path)
    assert path.grad.abs().sum() > 0


def test_every_snippet_is_tested():
    tested = ("def generalized", "LigerJSD.forward", "temperature=T", "all_reduce", "softcap")
    tested += ("topk(8)", "no copy", "energy, dlogits", "get_local_kernel")
    assert all(any(words in block for words in tested) for block in BLOCKS)
