"""Transformers joined by every symmetry there is: `python -m benchmarks.transformers`.

The straight line between two networks, the line after permutations were matched, the line after
all symmetries were (`fastgeo.match(..., symmetries="all")`), and a geodesic and a Bezier curve of
one control point from those ends, at equal image·points: a forward and backward pass of one input
through one network is one. All paths are seen at their points and the middles between, on as many
inputs of each part of the data as are named.

Every result is a line in a file, from which a benchmark that was stopped goes on.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from time import process_time
from typing import Any

import torch
import transformers
import tyro
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.curves import in_a_step, networks, spread
from benchmarks.harness import Kept, environment, write_result
from fastgeo import Forward, Path, evaluate, keep_pages, match, optimize
from fastgeo.app.config import PRESETS, Config
from fastgeo.app.given import Given, State
from fastgeo.profiling.measure import headline, table
from fastgeo.train import train_ends

LINES = {"line": "as they are", "permutations": "permutation", "all symmetries": "all"}
PATHS = (*LINES, "geodesic", "Bezier")
FOUND = (
    "barrier, train, nats",
    "barrier, test, nats",
    "highest train loss",
    "highest test loss",
    "Σ‖Δθ‖",
)
SECONDS = "processor seconds"
STACKED = Forward(engine="stacked")  # so that a benchmark repeats itself


def vit(dataset: Any) -> nn.Module:
    """16 patches of digits, 64 of CIFAR-10."""
    _, channels, size, _ = dataset.train.images.shape
    large = size > 16
    return VisionTransformer(
        **dict(img_size=size, patch_size=4 if large else size // 4, in_chans=channels),
        **dict(embed_dim=128 if large else 64, depth=4 if large else 2, num_heads=4),
        num_classes=dataset.num_classes,
    )


def gpt2(dataset: Any, tied: bool = True) -> nn.Module:
    size = dict(vocab_size=dataset.num_classes, n_positions=dataset.train.shape[1] - 1)
    size |= dict(n_embd=64, n_layer=2, n_head=4)
    config = transformers.GPT2Config(
        **size, bos_token_id=0, eos_token_id=0, use_cache=False, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config)


def llama(dataset: Any) -> nn.Module:
    size = dict(vocab_size=dataset.num_classes, max_position_embeddings=dataset.train.shape[1] - 1)
    size |= dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2)
    size |= dict(num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(
        **size, bos_token_id=0, eos_token_id=0, use_cache=False, tie_word_embeddings=False
    )
    return transformers.LlamaForCausalLM(config)


TEXT = PRESETS["text"].changed(match_restarts=3)
IMAGES = PRESETS["digits"].changed(
    **dict(optimizer="adamw", train_lr=2e-3, weight_decay=0.05, epochs=40, train_batch_size=64),
    **dict(points=9, steps=400, batch_size=64, lr=0.1, match_restarts=3, eval_batch_size=64),
)


@dataclass(frozen=True)
class Case:
    """Networks of one kind on their data.

    Attributes:
        config: how they are trained and joined.
        make: the data -> a network; None for the configuration's.
    """

    config: Config
    make: Callable[[Any], nn.Module] | None = None


CASES = {
    "gpt, LayerNorm": Case(TEXT),
    "gpt, RMSNorm": Case(TEXT.changed(norm="rms")),
    "vit": Case(IMAGES, vit),
    "gpt2": Case(TEXT, gpt2),
    "gpt2, untied": Case(TEXT, lambda dataset: gpt2(dataset, tied=False)),
    "llama": Case(TEXT, llama),
}


@dataclass(frozen=True)
class Options:
    """Joins pairs of transformers by lines and curves after matching by more and more."""

    pairs: int = 4
    """pairs of seeds (0, 1), (2, 3), ..."""
    cases: tuple[str, ...] = tuple(CASES)
    data: str | None = None
    """of the cases on images: digits by default, or cifar10"""
    subset: int | None = None
    """training inputs; the preset's by default"""
    epochs: int | None = None
    """of training; the preset's by default"""
    steps: int | None = None
    """of the geodesic; the preset's by default"""
    seen: int = 512
    """inputs of each part of the data on which paths are evaluated"""
    out: FilePath | None = None
    """file of all results, with the networks beside it; by default runs/transformers.jsonl"""
    measure: bool = True
    """no: only the table of the results there are"""
    save: bool = False
    """write benchmarks/results/transformers.json"""

    @property
    def name(self) -> str:
        return "transformers" + (f"-{self.data}" if self.data else "")

    def config(self, case: str, pair: int) -> Config:
        """Of a pair of networks."""
        own = CASES[case].config
        given = dict(train_subset=self.subset, epochs=self.epochs, steps=self.steps)
        if not own.data.data.startswith("text"):
            given["data"] = self.data
        changes = {name: value for name, value in given.items() if value is not None}
        return own.changed(**changes, seed_a=2 * pair, seed_b=2 * pair + 1)


class Pair:
    """Two networks and what joins them.

    Attributes:
        ends: key of LINES -> states (a, b).
    """

    def __init__(self, options: Options, case: str, number: int, kept: FilePath):
        given = Given(options.config(case, number))
        self.config, self.dataset, make = given.config, given.dataset, CASES[case].make
        self.new = given.new_module if make is None else lambda: make(given.dataset)
        self.module, self.seen = self.new().to(given.device), options.seen
        if not kept.exists():
            torch.save(self._trained(), kept)
        self.ends: dict[str, tuple[State, State]] = torch.load(kept, map_location=given.device)

    def _trained(self) -> dict[str, tuple[State, State]]:
        c = self.config
        a, b = train_ends(
            *(self.new, self.dataset, c.ends.seeds, c.training), forward=STACKED, progress=True
        )
        inputs, _ = next(iter(self.dataset.in_order("train", c.evaluation.eval_batch_size)))
        ends = {"line": (a, b)}
        for name in ("permutations", "all symmetries"):
            how = dict(symmetries=LINES[name], restarts=c.matching.match_restarts)
            matching = match(a, b, inputs, module=self.module, **how)
            print(matching, flush=True)
            ends[name] = dict(matching.a), matching.state_dict
        return ends

    def path(self, name: str) -> Path:
        c = self.config
        if name in LINES:
            return Path.linear(*self.ends[name], c.path.points)
        ends, descent, steps = self.ends["all symmetries"], c.descent, c.path.steps
        make: Callable[..., Path] = Path.linear
        if name == "Bezier":
            make, descent = Path.bezier, replace(descent, nodes=3)
            steps = round(networks(c, 1.0) / in_a_step(descent, c.path.points))
        torch.manual_seed(c.path.path_seed)  # of random nodes
        order = torch.Generator().manual_seed(c.path.path_seed)
        batches = self.dataset.shuffled(c.path.batch_size, order)
        first = make(*ends, c.path.points)
        return optimize(
            *(first, self.module, batches), steps=steps, descent=descent, forward=STACKED
        )

    def result(self, name: str) -> dict[str, float]:
        started = process_time()
        path = self.path(name)
        seconds = process_time() - started
        path = path.resample(2 * self.config.path.points - 1)
        splits = {split: self._first(split) for split in ("train", "test")}
        found = evaluate(path, self.module, splits, forward=STACKED)
        train, test = (found.splits[split] for split in splits)
        values = (train.barrier, test.barrier, max(train.loss), max(test.loss), found.euclidean)
        return dict(zip((*FOUND, SECONDS), map(float, (*values, seconds)), strict=True))

    def _first(self, split: str) -> list:
        size = self.config.evaluation.eval_batch_size
        return list(itertools.islice(self.dataset.in_order(split, size), -(-self.seen // size)))


class Results:
    """What was found, kept in a file as soon as it is.

    Raises:
        ValueError: the file is of other settings.
    """

    def __init__(self, options: Options):
        self.options = options
        self.file = options.out or FilePath("runs") / f"{options.name}.jsonl"
        self.known: dict[tuple[str, int, str], dict[str, float]] = {}
        own = {name: getattr(options, name) for name in "data subset epochs steps seen".split()}
        self._kept = Kept(self.file, own)
        for line in self._kept.lines:
            self.known[line.pop("case"), line.pop("pair"), line.pop("path")] = line

    def measure(self) -> None:
        """All that is not known yet, a pair of each case at a time."""
        for number, case in itertools.product(range(self.options.pairs), self.options.cases):
            unknown = [name for name in PATHS if (case, number, name) not in self.known]
            if not unknown:
                continue
            stem = f"{self.file.stem}-{case.replace(', ', '-')}-{number}.pt"
            pair = Pair(self.options, case, number, self.file.with_name(stem))
            for name in unknown:
                found = self.known[case, number, name] = pair.result(name)
                self._kept.add({"case": case, "pair": number, "path": name} | found)
                print(case, number, name, *(f"{found[k]:.4g}" for k in FOUND), flush=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each case and path, as far as it is known."""
        for case, name in itertools.product(self.options.cases, PATHS):
            keys = [(case, number, name) for number in range(self.options.pairs)]
            own = [self.known[key] for key in keys if key in self.known]
            if own:
                means = {key: spread([one[key] for one in own]) for key in (*FOUND, SECONDS)}
                row = {"network": case, "path": name, "pairs": len(own), **means}
                yield row | {"of each": own}


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.transformers")
    keep_pages()
    print(headline(environment()), flush=True)
    results = Results(options)
    if options.measure:
        results.measure()
    rows = list(results.rows())
    print(table([{k: v for k, v in row.items() if k != "of each"} for row in rows]))
    if options.save:
        print(f"\nwrote {write_result(options.name, {'rows': rows})}")


if __name__ == "__main__":
    main()
