"""The stages of a run, each on the folder that the one before left (`fastgeo.app.folder`)."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastgeo.app import plot, report
from fastgeo.app.folder import READS, STAGES, WEIGHTS, Run
from fastgeo.evaluate import evaluate
from fastgeo.figures import write_figure
from fastgeo.matching.pair import match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.profiling.breakdown import breakdown
from fastgeo.profiling.compare import chosen_forward, compare
from fastgeo.profiling.measure import headline, machine, table
from fastgeo.recalibrate import recalibrate
from fastgeo.store.checkpoint import Checkpoints, State, Stopped
from fastgeo.store.files import (
    read_json,
    read_json_lines,
    write_bytes,
    write_json,
    write_tensors,
)
from fastgeo.train import LETTERS, seeded, train_ends


def train(run: Run) -> None:
    """Train the ends in one stacked pass, or take the weights that were given."""
    c = run.config
    with _stage(run, "train") as found:
        if c.a is not None:
            ends = run.given_ends()
            found.update(a=c.a, b=c.b)
        else:
            with _steps(run, "train", "training.jsonl", found) as checkpoints:
                ends = train_ends(
                    run.new_module,
                    run.dataset,
                    c.seeds,
                    c.training,
                    checkpoints=checkpoints,
                    progress=True,
                    **run.forward("train"),
                )
        groups = dict(zip(LETTERS, ends, strict=False))
        write_tensors(run.file("ends.safetensors"), "ends", groups)


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


def optimize_path(run: Run, on_step: Callable[[dict, Path], None] | None = None) -> None:
    """Optimise the interior of the line from a to the matched b.

    Args:
        on_step: as of `fastgeo.optimize`.
    """
    c = run.config
    with _stage(run, "optimize") as found:
        a, b = run.ends()
        batches = run.dataset.shuffled(c.batch_size, torch.Generator().manual_seed(c.path_seed))
        given = _line(run, a, run.matched(b)), run.new_module(), batches
        with _steps(run, "optimize", "metrics.jsonl", found) as checkpoints:
            path = optimize(
                *given,
                steps=c.steps,
                descent=c.descent,
                cuda_graph=c.cuda_graph,
                on_step=on_step,
                checkpoints=checkpoints,
                progress=True,
                **run.forward("optimize"),
            )
        if c.batchnorm == "recalibrate":
            batches = run.dataset.in_order("train", c.batch_size)
            path = recalibrate(path, run.new_module(), batches, forward=c.forward, progress=True)
        path.save(run.file("path.safetensors"))


def evaluate_paths(run: Run) -> None:
    """Evaluate the line, the matched line and the geodesic, and write report.json."""
    c = run.config
    with _stage(run, "evaluate") as found:
        started = time.perf_counter()
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
        checkpoints = run.checkpoints("evaluate")
        saved = checkpoints.load("evaluate")
        results = {} if saved is None else saved.values["results"]
        found["seconds"] = checkpoints.seconds_before
        for name, path in paths.items():
            if name in results:
                continue
            options = run.forward("evaluate")
            result = evaluate(
                path, module, splits, progress=True, description=f"evaluate {name}", **options
            )
            results[name] = result.to_json()
            checkpoints.reached(State(len(results), {}, {"results": results}), save=True)
        seconds = found["seconds"] + time.perf_counter() - started
        stages = run.stages | {"evaluate": {"seconds": seconds}}
        files = {name: run.recorded(name) for name in WEIGHTS}
        content = report.build(c, stages, run.engines, files, run.device, results)
        write_json(run.file("report.json"), content)


def plot_report(run: Run) -> str:
    """Draw the figures and write report.md; returns the summary table."""
    with _stage(run, "plot"):
        content = read_json(run.file("report.json"))
        metrics = read_json_lines(run.file("metrics.jsonl"))
        for name in WEIGHTS:
            if content["files"][name] != run.recorded(name):
                raise ValueError(
                    f"{run.file('report.json')} is about another {name}; make it anew with: "
                    f"{run.again('evaluate')} --overwrite"
                )
        figures = {
            "path_loss.png": plot.loss_figure(content),
            "path_length.png": plot.length_figure(metrics, content),
        }
        for name, figure in figures.items():
            write_figure(run.file(name), figure)
        write_bytes(run.file("report.md"), report.markdown(content).encode())
    return report.summary(content)


DO = {
    "train": train,
    "match": match_ends,
    "optimize": optimize_path,
    "evaluate": evaluate_paths,
    "plot": plot_report,
}


def run_all(run: Run) -> str:
    """All stages in order, but for those that are finished; returns the summary table."""
    for stage in STAGES:
        if stage not in run.stages:
            DO[stage](run)
    return report.summary(read_json(run.file("report.json")))


def profile(
    run: Run, *, repeats: int, compiled: bool, trace: FilePath | None, rows_file: FilePath | None
) -> None:
    """Print how fast a step is and where its time goes; writes nothing into the run's folder.

    The ends are the weights that were given, or freshly initialised networks.
    """
    c = run.config
    if c.batchnorm != "refuse":
        raise ValueError("profile measures networks without BatchNorm only")
    if c.cuda_graph:
        raise ValueError("profile measures steps that are not replayed; leave out --cuda-graph")
    if c.output != "logits" or c.mask is not None:
        raise ValueError("profile measures steps on all logits; leave out --output and --mask")
    run.check()
    print(headline(machine()), flush=True)
    if c.a is not None:
        a, b = run.given_ends()
    else:
        a, b = (run.new_module().to(run.device).state_dict() for _ in range(2))
    path, module = _line(run, a, b), run.new_module().eval()
    batches = run.dataset.shuffled(c.batch_size, torch.Generator().manual_seed(c.path_seed))
    inputs, _ = next(batches)
    forward = chosen_forward(module, path, inputs, replace(c.step_forward, precision="fp32"))
    rows = compare(module, path, inputs, repeats=repeats, compiled=compiled, forward=forward)
    setting = f"{c.model}, {c.data}, N = {c.points}, B = {c.batch_size}"
    print(f"\n{setting}\n\n{table(rows)}\n", flush=True)
    descent = replace(c.descent, lr_schedule="constant", coarse_to_fine=False)
    print(breakdown(module, path, batches, descent=descent, forward=forward, trace=trace))
    if rows_file is not None:
        rows = [{"setting": setting, **row} for row in rows]
        write_json(rows_file, {"environment": machine(), "rows": rows})


@contextlib.contextmanager
def _stage(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Time a stage and record it with what it found; if it is cut short, note how to go on.

    The files that it reads are those that the stages before it left, or it is refused.
    """
    started, found = time.perf_counter(), {"seconds": 0.0}
    try:
        run.verify(READS[name])
        with seeded(run.config.path_seed, run.device):
            yield found
    except (Stopped, KeyboardInterrupt, OSError) as error:
        error.add_note(f"go on with: {run.go_on}")
        raise
    except Exception as error:
        again = run.again(name).removesuffix(" --overwrite")
        error.add_note(f"with other settings: {again} --overwrite")
        raise
    found["seconds"] += time.perf_counter() - started  # earlier processes' are in it
    run.finish(name, **found)


@contextlib.contextmanager
def _steps(run: Run, stage: str, log: str, found: dict[str, Any]) -> Iterator[Checkpoints]:
    """The states of a stage that goes step by step, and its log with a line a step."""
    with run.checkpoints(stage, log) as checkpoints:
        yield checkpoints
    found["seconds"] = checkpoints.seconds_before


def _line(run: Run, a: dict[str, Tensor], b: dict[str, Tensor]) -> Path:
    c = run.config
    return Path.linear(a, b, c.points, spacing=c.spacing, batchnorm=c.batchnorm)
