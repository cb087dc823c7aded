"""The stages of a run, each on the folder that the one before left (`fastgeo.run`)."""

import contextlib
import json
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastgeo import plot, report
from fastgeo.breakdown import breakdown
from fastgeo.evaluate import evaluate
from fastgeo.files import (
    read_json,
    read_json_lines,
    write_bytes,
    write_figure,
    write_json,
    write_tensors,
)
from fastgeo.matching import match
from fastgeo.measure import headline, machine, table
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.profiling import chosen_engine, compare
from fastgeo.recalibrate import recalibrate
from fastgeo.run import Run
from fastgeo.train import train_ends


def train(run: Run) -> None:
    """Train the ends in one stacked pass, or take the weights that were given."""
    c = run.config
    if c.a is not None:
        with _stage(run, "train") as found:
            _write_ends(run.file("ends.safetensors"), run.given_ends())
            found.update(a=c.a, b=c.b)
        return
    with (
        _stage(run, "train"),
        _steps(run, "training.jsonl", "ends.partial.safetensors", _write_ends) as on_step,
    ):
        options = run.engine_options("train")
        ends = train_ends(
            run.new_module, run.dataset, c.seeds, c, on_step=on_step, progress=True, **options
        )
        _write_ends(run.file("ends.safetensors"), ends)


def match_ends(run: Run) -> None:
    """Match b to a, and check that the permuted b computes what b computes."""
    c = run.config
    with _stage(run, "match") as found:
        a, b = run.ends()
        inputs, _ = next(iter(run.dataset.in_order("train", c.eval_batch_size)))
        matching = match(
            a,
            b,
            inputs,
            module=run.new_module(),
            method=c.match_method,
            restarts=c.match_restarts,
            max_sweeps=c.match_sweeps,
            seed=c.match_seed,
            progress=True,
        )
        found.update(
            objective_before=matching.objective_before,
            objective_after=matching.objective_after,
            objectives=matching.objectives,
            sweeps=matching.sweeps,
            relative_change=matching.relative_change,
        )
        permutations = {"permutation": matching.permutations}
        write_tensors(run.file("permutation.safetensors"), "permutation", permutations)
        state = {name: t.cpu().clone().contiguous() for name, t in matching.state_dict.items()}
        write_bytes(run.file("matched.safetensors"), safetensors.torch.save(state))
        text = report.matching(found, matching.spec, c)
        write_bytes(run.file("matching.md"), text.encode())


def optimize_path(run: Run) -> None:
    """Optimise the interior of the line from a to the matched b."""
    c = run.config
    with (
        _stage(run, "optimize"),
        _steps(run, "metrics.jsonl", "path.partial.safetensors", _write_path) as on_step,
    ):
        a, b = run.ends()
        module = run.new_module()
        path = optimize(
            _line(run, a, run.matched(b)),
            module,
            run.dataset.shuffled(c.batch_size, torch.Generator().manual_seed(c.path_seed)),
            steps=c.steps,
            lr=c.lr,
            precondition=c.precondition,
            on_step=on_step,
            progress=True,
            **run.engine_options("optimize"),
        )
        if c.batchnorm == "recalibrate":
            batches = run.dataset.in_order("train", c.batch_size)
            path = recalibrate(path, module, batches, chunk=c.chunk, progress=True)
        _write_path(run.file("path.safetensors"), path)


def evaluate_paths(run: Run) -> None:
    """Evaluate the line, the matched line and the geodesic, and write report.json."""
    c = run.config
    with _stage(run, "evaluate"):
        a, b = run.ends()
        paths = {
            "linear": _line(run, a, b),
            "matched": _line(run, a, run.matched(b)),
            "geodesic": Path.load(run.file("path.safetensors"), run.device),
        }
        in_order, size = run.dataset.in_order, c.eval_batch_size
        splits = {split: in_order(split, size) for split in ("train", "test")}
        if run.dataset.augmented:
            splits["augmented_train"] = in_order("train", size, augment_seed=c.path_seed)
        module = run.new_module()
        results = {}
        for name, path in paths.items():
            options = run.engine_options("evaluate")
            results[name] = evaluate(
                path, module, splits, progress=True, description=f"evaluate {name}", **options
            )
    content = report.build(c, run.stages, run.engines, run.device, results)
    write_json(run.file("report.json"), content)


def plot_report(run: Run) -> str:
    """Draw the figures and write report.md; returns the summary table."""
    content = read_json(run.file("report.json"))
    metrics = read_json_lines(run.file("metrics.jsonl"))
    try:
        figures = {
            "path_loss.png": plot.loss_figure(content),
            "path_length.png": plot.length_figure(metrics, content),
        }
        for name, figure in figures.items():
            write_figure(run.file(name), figure)
        write_bytes(run.file("report.md"), report.markdown(content).encode())
        return report.summary(content)
    except KeyError as error:
        raise ValueError(
            f"report.json or metrics.jsonl in {run.folder} lacks {error}; make them anew with: "
            f"{run.again('optimize')} --overwrite"
        ) from error


def run_all(run: Run) -> str:
    """All stages in order; returns the summary table."""
    train(run)
    match_ends(run)
    optimize_path(run)
    evaluate_paths(run)
    return plot_report(run)


def profile(
    run: Run, *, repeats: int, compiled: bool, trace: FilePath | None, rows_file: FilePath | None
) -> None:
    """Print how fast a step is and where its time goes; writes nothing into the run's folder.

    The ends are the weights that were given, or freshly initialised networks.
    """
    c = run.config
    if c.batchnorm != "refuse":
        raise ValueError("profile measures networks without BatchNorm only")
    run.check()
    print(headline(machine()), flush=True)
    if c.a is not None:
        a, b = run.given_ends()
    else:
        a, b = (run.new_module().to(run.device).state_dict() for _ in range(2))
    path, module = _line(run, a, b), run.new_module().eval()
    batches = run.dataset.shuffled(c.batch_size, torch.Generator().manual_seed(c.path_seed))
    inputs, _ = next(batches)
    names = ("engine", "channels_last", "chunk", "memory_budget")
    engine = chosen_engine(module, path, inputs, **{name: getattr(c, name) for name in names})
    rows = compare(module, path, inputs, repeats=repeats, compiled=compiled, engine=engine)
    setting = f"{c.model}, {c.data}, N = {c.points}, B = {c.batch_size}"
    print(f"\n{setting}\n\n{table(rows)}\n", flush=True)
    options = dict(lr=c.lr, precondition=c.precondition, trace=trace)
    print(breakdown(module, path, batches, engine=engine, **options))
    if rows_file is not None:
        rows = [{"setting": setting, **row} for row in rows]
        write_json(rows_file, {"environment": machine(), "rows": rows})


@contextlib.contextmanager
def _stage(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Time a stage and record it with what it found; if it is cut short, note how to go on."""
    started, found = time.perf_counter(), {}
    try:
        yield found
    except BaseException as error:
        error.add_note(f"finished stages are in {run.folder}; go on with: {run.again(name)}")
        raise
    run.finish(name, seconds=time.perf_counter() - started, **found)


@contextlib.contextmanager
def _steps(
    run: Run, log: str, partial: str, write: Callable[[FilePath, Any], None]
) -> Iterator[Callable[[dict, Any], None]]:
    """An on_step callback that logs a line a step; if the stage is cut short, the last good state
    is kept in the file `partial`, and the exception carries a note that says so."""
    latest = None

    def on_step(metrics: dict, state: Any) -> None:
        nonlocal latest
        latest = state
        stream.write(json.dumps(metrics) + "\n")

    with open(run.file(log), "w", encoding="utf-8", buffering=1) as stream:
        try:
            yield on_step
        except BaseException as error:
            if latest is not None:
                write(run.file(partial), latest)
                error.add_note(f"the last good state is in {run.file(partial)}")
            raise


def _line(run: Run, a: dict[str, Tensor], b: dict[str, Tensor]) -> Path:
    c = run.config
    return Path.linear(a, b, c.points, spacing=c.spacing, batchnorm=c.batchnorm)


def _write_ends(file: FilePath, ends: list[dict[str, Tensor]]) -> None:
    write_tensors(file, "ends", dict(zip(string.ascii_lowercase, ends, strict=False)))


def _write_path(file: FilePath, path: Path) -> None:
    path.save(file)
