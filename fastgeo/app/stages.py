"""The stages of a run, each on the folder that the one before left (`fastgeo.app.folder`)."""

import contextlib
import csv
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch.distributed.device_mesh import DeviceMesh

from fastgeo.app import plot, preflight, report
from fastgeo.app.company import mesh_of, mesh_of_all
from fastgeo.app.config import Config
from fastgeo.app.folder import PLANE, READS, STAGES, WEIGHTS, Run
from fastgeo.app.given import Given, State
from fastgeo.evaluate import evaluate
from fastgeo.figures import write_figure
from fastgeo.forward.options import Forward
from fastgeo.matching.pair import match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.plane import Plane, plane
from fastgeo.profiling.breakdown import breakdown
from fastgeo.profiling.compare import chosen_forward, compare
from fastgeo.profiling.measure import headline, machine, table
from fastgeo.ranks.axis import OtherRank
from fastgeo.ranks.mesh import Ranks
from fastgeo.recalibrate import recalibrate
from fastgeo.step.engines import checked_once
from fastgeo.store import checkpoint
from fastgeo.store.checkpoint import Checkpoints, Stopped
from fastgeo.store.files import (
    read_json,
    read_json_lines,
    write_bytes,
    write_json,
    write_tensors,
)
from fastgeo.train import LETTERS, seeded, train_ends

OnStep = Callable[[dict, Any], None]
LEGEND = (
    'p20, p50 and p80 are percentiles of the measurements. "of matmul" is the share of the rate\n'
    'of a large matrix product, "peak MiB" memory beyond the weights, and "error" that of energy\n'
    "and gradient against the loop in float64, relative to the largest entry."
)


def train(run: Run) -> None:
    """Train the ends in one stacked pass, or take the weights that were given."""
    c = run.config
    with _stage(run, "train") as found:
        if c.ends.files:
            states = run.given.weights()
            found.update(a=c.ends.a, b=c.ends.b)
        else:
            forward, on_choice = run.forward("train")
            with _steps(run, "train", "training", found) as (checkpoints, on_step):
                states = train_ends(
                    *(run.given.new_module, run.given.dataset, c.ends.seeds, c.training),
                    forward=forward,
                    cuda_graph=c.path.cuda_graph,
                    on_choice=on_choice,
                    on_step=on_step,
                    checkpoints=checkpoints,
                    progress=not run.quiet,
                )
        groups = dict(zip(LETTERS, states, strict=False))
        write_tensors(run.file("ends.safetensors"), "ends", groups)


def match_ends(run: Run) -> None:
    """Match b to a, and check that the permuted b computes what b computes."""
    c = run.config.matching
    with _stage(run, "match") as found:
        size = run.config.evaluation.eval_batch_size
        inputs, _ = next(iter(run.given.dataset.in_order("train", size)))
        matching = match(
            *(*run.ends, inputs),
            module=run.given.module,
            symmetries=c.symmetries,
            method=c.match_method,
            restarts=c.match_restarts,
            max_sweeps=c.match_sweeps,
            seed=c.match_seed,
            progress=not run.quiet,
        )
        found.update(
            objective_before=matching.objective_before,
            objective_after=matching.objective_after,
            objectives=matching.objectives,
            sweeps=matching.sweeps,
            relative_change=matching.relative_change,
            left_out=matching.left_out,
        )
        permutations = {"permutation": matching.permutations}
        write_tensors(run.file("permutation.safetensors"), "permutation", permutations)
        states = {"matched.safetensors": matching.state_dict}
        if c.symmetries == "all":
            states["folded.safetensors"] = dict(matching.a)
        for file, state in states.items():
            state = {name: t.cpu().clone().contiguous() for name, t in state.items()}
            write_bytes(run.file(file), safetensors.torch.save(state))
        text = report.matching(found, matching.spec, run.config)
        write_bytes(run.file("matching.md"), text.encode())


def optimize_path(run: Run, on_step: OnStep | None = None) -> None:
    """Optimise the path from a to the matched b, which is a line at first.

    Args:
        on_step: as of `fastgeo.optimize`.
    """
    c, given = run.config, run.given
    with _stage(run, "optimize") as found:
        forward, on_choice = run.forward("optimize")
        line, mesh = first_path(run), mesh_of(run, "optimize")
        with _steps(run, "optimize", "metrics", found) as (checkpoints, log):
            path = optimized(
                *(run, line, forward, checkpoints),
                on_choice=on_choice,
                on_step=on_step or log,
                mesh=mesh,
            )
        if c.forward.batchnorm == "recalibrate":
            path = recalibrate(
                path,
                given.module,
                given.dataset.in_order("train", c.path.batch_size),
                forward=c.forward_of("evaluate"),
                progress=not run.quiet,
            )
        path.save(run.file("path.safetensors"))


def first_path(run: Run) -> Path:
    """The line from a to the matched b, as the curve that is to bend."""
    return _first(run.config, *run.matched)


def optimized(
    run: Run,
    path: Path,
    forward: Forward,
    checkpoints: Checkpoints,
    *,
    on_choice: Callable[[dict], None] | None = None,
    on_step: OnStep | None = None,
    mesh: DeviceMesh | None = None,
) -> Path:
    """The path of a run, of the first one; on a mesh in all of its processes."""
    c, given = run.config, run.given
    path = optimize(
        path,
        given.module,
        given.dataset.shuffled(c.path.batch_size, torch.Generator().manual_seed(c.path.path_seed)),
        steps=c.path.steps,
        descent=c.descent,
        forward=forward,
        cuda_graph=c.path.cuda_graph,
        on_choice=on_choice,
        on_step=on_step,
        checkpoints=checkpoints,
        progress=not run.quiet,
        mesh=mesh,
    )
    if mesh is None:
        return path
    from fastgeo.ranks.gather import gather

    return gather(path, mesh)


def evaluate_paths(run: Run) -> None:
    """Evaluate the line, the matched line and the optimised path, and write report.json."""
    given = run.given
    with _stage(run, "evaluate") as found:
        started = time.perf_counter()
        checkpoints = run.checkpoints("evaluate")
        saved = checkpoints.load("evaluate")
        results = {} if saved is None else saved.values["results"]
        found["seconds"] = checkpoints.seconds_before
        mesh = mesh_of(run, "evaluate")
        for name, result in evaluations(run, mesh, len(results)):
            results[name] = result
            state = checkpoint.State(len(results), {}, {"results": results})
            checkpoints.reached(state, save=True)
        seconds = found["seconds"] + time.perf_counter() - started
        stages = run.stages | {"evaluate": {"seconds": seconds}}
        files = {name: run.recorded(name) or "" for name in WEIGHTS}
        content = report.build(given, stages, run.engines, files, results)
        write_json(run.file("report.json"), content)


def evaluations(run: Run, mesh: DeviceMesh | None, known: int) -> Iterator[tuple[str, dict]]:
    """Names of the paths of a run and what is found of them, but for those that are known; on a
    mesh in all of its processes, where the first knows them."""
    c, given = run.config, run.given
    ranks = None if mesh is None else Ranks(mesh)
    known = known if ranks is None else ranks.agreement.objects(known)[0]
    paths = {
        "linear": _line(c, *run.ends),
        "matched": _line(c, *run.matched),
        c.method: Path.load(run.file("path.safetensors"), given.device),
    }
    in_order, size = given.dataset.in_order, c.evaluation.eval_batch_size
    splits = {split: in_order(split, size) for split in ("train", "test")}
    if given.dataset.augmented:
        splits["augmented_train"] = in_order("train", size, augment_seed=c.path.path_seed)
    for name, path in list(paths.items())[known:]:
        forward, on_choice = run.forward("evaluate")
        found = evaluate(
            path,
            given.module,
            splits,
            forward=forward,
            on_choice=on_choice if ranks is None or ranks.first else None,
            progress=not run.quiet,
            description=f"evaluate {name}",
            mesh=mesh,
        )
        yield name, found.to_json()


def plot_report(run: Run) -> None:
    """Draw the figures and write report.md."""
    with _stage(run, "plot"):
        content = read_json(run.file("report.json"))
        metrics = read_json_lines(run.file("metrics.jsonl"))
        for name in WEIGHTS:
            if content["files"][name] != run.recorded(name):
                raise ValueError(
                    f"{run.file('report.json')} is about another {name}; make it again with: "
                    f"{run.again('evaluate')} --overwrite"
                )
        how = run.drawing
        figures = {
            "path_loss": plot.loss_figure(content, how.title),
            "path_length": plot.length_figure(metrics, content, how.title),
        }
        for name, figure in figures.items():
            for file in how.files(name):
                write_figure(run.file(file), figure, dpi=how.dpi)
        if run.file("plane.json").exists():
            _draw_plane(run)
        write_bytes(run.file("report.md"), report.markdown(content).encode())


def find_plane(run: Run, size: int, split: str) -> Plane:
    """The loss over the plane through the ends and the middle of the path, drawn, too."""
    given, batch_size = run.given, run.config.evaluation.eval_batch_size
    found = plane(
        Path.load(run.file("path.safetensors"), given.device),
        given.module,
        given.dataset.in_order(split, batch_size),
        size=size,
        forward=run.forward("evaluate")[0],
        progress=not run.quiet,
    )
    write_json(run.file("plane.json"), {"split": split} | found.to_json())
    _draw_plane(run)
    return found


def _draw_plane(run: Run) -> None:
    """In the formats that are asked for, and in no other of before."""
    how = run.drawing
    content, found = (read_json(run.file(f"{name}.json")) for name in ("report", "plane"))
    figure = plot.plane_figure(found, content, how.title)
    for file in PLANE[1:]:
        run.file(file).unlink(missing_ok=True)
    for file in how.files("plane"):
        write_figure(run.file(file), figure, dpi=how.dpi)


DO: dict[str, Callable[[Run], None]] = {
    "train": train,
    "match": match_ends,
    "optimize": optimize_path,
    "evaluate": evaluate_paths,
    "plot": plot_report,
}


def _help_to_optimize(run: Run, mesh: DeviceMesh) -> None:
    with run.checkpoints("optimize", "metrics.jsonl") as checkpoints:
        optimized(run, first_path(run), run.forward("optimize")[0], checkpoints, mesh=mesh)


def _help_to_evaluate(run: Run, mesh: DeviceMesh) -> None:
    for _ in evaluations(run, mesh, 0):
        pass


HELP = {"optimize": _help_to_optimize, "evaluate": _help_to_evaluate}
"""what other processes do for the first one's in a stage"""


def run_all(run: Run) -> str:
    """All stages in order, but for those that are finished; returns the summary table."""
    with checked_once():
        for stage in STAGES:
            if stage not in run.stages:
                DO[stage](run)
    return run.summary()


def profile(
    config: Config,
    *,
    repeats: int,
    compiled: bool,
    trace: FilePath | None,
    rows_file: FilePath | None,
) -> None:
    """Print how fast a step is and where its time goes.

    The ends are the weights that were given, or freshly initialised networks.
    """
    c, given = config, Given(config)
    if c.forward.batchnorm != "refuse":
        raise ValueError(
            "profile measures networks without BatchNorm only; leave out --batchnorm recalibrate"
        )
    if c.path.cuda_graph:
        raise ValueError(
            "profile measures steps outside of a CUDA graph only; leave out --cuda-graph"
        )
    if c.forward.output != "logits" or c.forward.mask is not None:
        raise ValueError(
            "profile measures steps on all rows of plain logits only; leave out --output and --mask"
        )
    if c.method != "geodesic" or c.descent.nodes or c.descent.objective != "jsd":
        raise ValueError(
            "profile measures steps at the points of a geodesic only; leave out --curve, --nodes "
            "and --objective"
        )
    preflight.check(given)
    print(headline(machine()), flush=True)
    with seeded(c.path.path_seed, given.device):  # alike in all processes
        new = (given.new_module().to(given.device).state_dict() for _ in range(2))
        a, b = given.weights() or new
    path, module = _line(c, a, b), given.module
    order = torch.Generator().manual_seed(c.path.path_seed)
    batches = given.dataset.shuffled(c.path.batch_size, order)
    inputs, _ = next(batches)
    setting = f"{c.ends.model}, {c.data.data}, N = {c.path.points}, B = {given.batch_size}"
    how: dict[str, Any] = dict(trace=trace)
    how["descent"] = replace(c.descent, lr_schedule="constant", coarse_to_fine=False)
    if (mesh := mesh_of_all(given)) is not None:
        if rows_file is not None:
            raise ValueError("--json takes the table of one process; leave it out under torchrun")
        print(f"\n{setting}\n", flush=True)
        print(breakdown(module, path, batches, forward=c.forward, mesh=mesh, **how))
        return
    forward = chosen_forward(module, path, inputs, c.forward)
    rows = compare(module, path, inputs, repeats=repeats, compiled=compiled, forward=forward)
    print(f"\n{setting}\n\n{table(rows)}\n\n{LEGEND}\n", flush=True)
    print(breakdown(module, path, batches, forward=forward, **how))
    if rows_file is not None:
        rows = [{"setting": setting, **row} for row in rows]
        write_json(rows_file, {"environment": machine(), "rows": rows})


@contextlib.contextmanager
def _stage(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Time a stage and record it with what it found; if it is cut short, note how to go on.

    The files that it reads are those that the stages before it left, or it is refused.
    """
    started = time.perf_counter()
    found: dict[str, Any] = {"seconds": 0.0}
    try:
        run.verify(READS[name])
        with seeded(run.config.path.path_seed, run.given.device):
            yield found
    except (Stopped, KeyboardInterrupt, OSError, OtherRank) as error:
        error.add_note(f"go on with: {run.go_on}")
        raise
    except Exception as error:
        again = run.again(name).removesuffix(" --overwrite")
        error.add_note(f"with other settings: {again} --overwrite")
        raise
    found["seconds"] += time.perf_counter() - started  # earlier processes' are in it
    run.finish(name, **found)


@contextlib.contextmanager
def _steps(
    run: Run, stage: str, log: str, found: dict[str, Any]
) -> Iterator[tuple[Checkpoints, OnStep | None]]:
    """The states of a stage that goes step by step, and what else is told of every step."""
    lines, on_step = run.file(f"{log}.jsonl"), None
    with contextlib.ExitStack() as stack:
        if run.pace.log == "csv":
            stack.callback(_write_csv, run.file(f"{log}.csv"), lines)
        if run.pace.log == "tensorboard":
            on_step = stack.enter_context(_board(run.file("tensorboard") / stage))
        checkpoints = stack.enter_context(run.checkpoints(stage, lines.name))
        yield checkpoints, on_step
    found["seconds"] = checkpoints.seconds_before


def _write_csv(file: FilePath, log: FilePath) -> None:
    """A row a step; numbers of several networks in columns of their own."""
    rows = []
    if log.exists():
        rows = [{"step": line["step"], **_scalars(line)} for line in read_json_lines(log)]
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_bytes(file, text.getvalue().encode())


@contextlib.contextmanager
def _board(folder: FilePath) -> Iterator[OnStep]:
    """What every step finds, for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def on_step(metrics: dict, _: object) -> None:
        nonlocal writer
        if writer is None:  # what was written beyond this step was of a process that was killed
            writer = SummaryWriter(folder, purge_step=metrics["step"])
        for name, value in _scalars(metrics).items():
            writer.add_scalar(name, value, metrics["step"])

    try:
        yield on_step
    finally:
        if writer is not None:
            writer.close()


def _scalars(metrics: dict) -> dict[str, float]:
    """Single numbers of a step; those of several networks are named as "loss/a", "loss/b"."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            found |= {f"{name}/{LETTERS[k]}": one for k, one in enumerate(value)}
        elif name != "step":
            found[name] = value
    return found


def _line(config: Config, a: State, b: State) -> Path:
    spacing, batchnorm = config.path.spacing, config.forward.batchnorm
    return Path.linear(a, b, config.path.points, spacing=spacing, batchnorm=batchnorm)


def _first(config: Config, a: State, b: State) -> Path:
    """The line as the curve that is to bend."""
    c, how = config.path, dict(batchnorm=config.forward.batchnorm)
    if c.curve == "bezier":
        return Path.bezier(a, b, c.points, controls=c.controls, **how)
    if c.curve == "polychain":
        return Path.polychain(a, b, c.points, bends=c.controls, **how)
    return _line(config, a, b)
