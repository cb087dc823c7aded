"""The folder's own tests, for where it has been copied to: `python -m unittest NAME.tests`.

They need nothing but the folder and PyTorch, and take a second. On a GPU the divergence runs in
Triton; everything is compared with its definition in float64.
"""

from __future__ import annotations

import json
import math
import unittest
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    fused_linear_js_div,
    js_div,
    layers,
    path_fisher_rao,
    path_js_div,
    path_js_div_value_and_grad,
    path_update,
    stacked_channel_norm,
    stacked_conv,
    stacked_group_norm,
    stacked_linear,
    top_k_js_div,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def by_definition(p_logits: Tensor, q_logits: Tensor, beta: float) -> Tensor:
    """[B] nats, in float64."""
    p, q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    if beta in (0, 1):
        first, second = (p, q) if beta == 0 else (q, p)
        return (first.exp() * (first - second)).sum(-1)
    m = torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


class Divergence(unittest.TestCase):
    def assert_close(self, got: Tensor, expected: Tensor, rtol: float = 1e-5) -> None:
        torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=1e-7)

    def test_value_and_gradient_of_every_beta(self) -> None:
        for classes in (10, 1000, 5000):
            p, q = 3 * random(6, classes), 3 * random(6, classes) + random(6, classes, seed=1)
            for beta in (0.0, 0.1, 0.5, 1.0):
                student = q.clone().requires_grad_()
                got = js_div(p, student, beta=beta, reduction="none")
                expected = by_definition(p, student, beta)
                self.assert_close(got, expected)
                grads = [torch.autograd.grad(rows.sum(), student)[0] for rows in (got, expected)]
                self.assert_close(grads[0], grads[1], rtol=1e-4)

    def test_a_path_is_its_pairs(self) -> None:
        logits = random(4, 5, 10)
        expected = torch.stack([js_div(x, y) for x, y in zip(logits, logits[1:])])
        self.assert_close(path_js_div(logits), expected)
        value, grad = path_js_div_value_and_grad(logits)
        self.assert_close(value, expected)
        leaf = logits.clone().requires_grad_()
        self.assert_close(grad, torch.autograd.grad(path_js_div(leaf).sum(), leaf)[0])
        p = logits.double().softmax(-1).sqrt()
        angle = 2 * (p[:-1] * p[1:]).sum(-1).clamp(max=1).acos()
        self.assert_close(path_fisher_rao(logits, reduction="none"), angle)

    def test_rows_that_do_not_count_may_be_nan(self) -> None:
        p, q = random(6, 10), random(6, 10, seed=1)
        labels = torch.tensor([0, -100, 1, 2, -100, 3], device=DEVICE)
        expected = by_definition(p, q, 0.5)[labels != -100].sum() / 7
        q[1] = math.nan
        student = q.requires_grad_()
        value = js_div(p, student, labels=labels, normalizer=7)
        self.assert_close(value, expected)
        self.assertTrue(torch.autograd.grad(value, student)[0].isfinite().all())

    def test_behind_a_head_and_from_a_stored_teacher(self) -> None:
        x, w, t, v = (random(*shape) for shape in ((6, 4), (20, 4), (6, 3), (20, 3)))
        self.assert_close(fused_linear_js_div(x, w, t, v), js_div(t @ v.T, x @ w.T))
        values, indices = (t @ v.T).log_softmax(-1).topk(19)
        self.assert_close(top_k_js_div(values, indices, x @ w.T), js_div(t @ v.T, x @ w.T))

    def test_layers_are_the_functions(self) -> None:
        p, q = random(2, 6, 10)
        self.assertTrue(torch.equal(layers.JSDiv()(p, q), js_div(p, q)))
        self.assertTrue(
            torch.equal(layers.PathJSDiv()(torch.stack([p, q])), path_js_div(torch.stack([p, q])))
        )


class Stacked(unittest.TestCase):
    def assert_close(self, got: Tensor, each: list) -> None:
        torch.testing.assert_close(got, torch.stack(each), rtol=1e-4, atol=1e-4)

    def test_layers_are_the_loop(self) -> None:
        x, weight, bias = random(3, 2, 4, 6, 6), random(3, 5, 4, 3, 3), random(3, 5)
        with torch.backends.cudnn.flags(allow_tf32=False):
            each = [F.conv2d(*xwb, padding=1) for xwb in zip(x, weight, bias)]
            self.assert_close(stacked_conv(x, weight, bias, padding=1), each)
        scale, shift = random(3, 4), random(3, 4, seed=1)
        each = [F.group_norm(y, 1, w, b) for y, w, b in zip(x, scale, shift)]
        self.assert_close(stacked_group_norm(x, 1, scale, shift), each)
        each = [
            F.layer_norm(y.movedim(1, -1), (4,), w, b).movedim(-1, 1)
            for y, w, b in zip(x, scale, shift)
        ]
        self.assert_close(stacked_channel_norm(x, scale, shift), each)
        rows, weight = random(3, 7, 4), random(3, 5, 4)
        self.assert_close(
            stacked_linear(rows, weight, bias), list(map(F.linear, rows, weight, bias))
        )

    def test_the_update_of_a_path_solves_for_the_laplacian(self) -> None:
        grad, weight = random(3, 5), torch.zeros(3, 5, device=DEVICE)
        path_update(weight, grad, 1.0)
        laplacian = torch.tensor([[2.0, -1, 0], [-1, 2, -1], [0, -1, 2]], device=DEVICE)
        torch.testing.assert_close(laplacian @ -weight, grad, rtol=1e-4, atol=1e-5)


class Folder(unittest.TestCase):
    def test_it_has_its_licence_and_its_metadata(self) -> None:
        here = Path(__file__).parent
        self.assertIn("Apache License", (here / "LICENSE").read_text())
        self.assertEqual(json.loads((here / "metadata.json").read_text())["license"], "Apache-2.0")


if __name__ == "__main__":
    unittest.main()
