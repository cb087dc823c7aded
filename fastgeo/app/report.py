"""report.json, report.md and the summary table of a run."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch

from fastgeo.app.config import BEFORE, Config, about
from fastgeo.symmetry.spec import PermutationSpec

TITLES = {"linear": "line", "matched": "matched line", "geodesic": "geodesic"}
SPLITS = {"train": "train", "augmented_train": "augmented train", "test": "test"}


def build(
    config: Config,
    stages: Mapping[str, Mapping],
    engines: Mapping[str, Mapping],
    files: Mapping[str, str],
    device: torch.device,
    results: Mapping[str, Mapping],
) -> dict:
    """The content of report.json.

    Args:
        files: name -> SHA-256 of the files that it is about.
        results: name of each path -> `Evaluation.to_json`.
    """
    seconds = {name: found["seconds"] for name, found in stages.items()}
    own = ("seconds", "files")
    matching = {key: value for key, value in stages["match"].items() if key not in own}
    return {
        "environment": environment(device),
        "config": asdict(config),
        "seconds": seconds | {"total": sum(seconds.values())},
        "matching": matching,
        "engines": dict(engines),
        "files": dict(files),
        "paths": {name: {"augmented_train": None, **result} for name, result in results.items()},
    }


def environment(device: torch.device) -> dict[str, str | int]:
    """What a reader needs to know of the machine and the software."""
    names = {"fastgeo": "fastgeo", "torch": "torch", "triton": "triton"}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {key: _version(name) for key, name in names.items()} | {
        "python": platform.python_version(),
        "device": gpu or f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "platform": f"{platform.system()} {platform.machine()}",
    }


def summary(report: Mapping) -> str:
    """The table that a run ends with."""
    head = ["", "highest loss", "", "barrier", "", "lowest acc.", "Σ√JSD", "Fisher-Rao", "Σ‖Δθ‖"]
    units = ["", "train", "test", "train", "test", "test", "√nats", "rad", ""]
    rows = [head, units]
    for name, title in TITLES.items():
        p = report["paths"][name]
        rows.append(
            [
                title,
                *(f"{max(p[split]['loss']):.3f}" for split in ("train", "test")),
                *(f"{p[split]['barrier']:.3f}" for split in ("train", "test")),
                f"{100 * min(p['test']['accuracy']):.1f} %",
                f"{p['sqrt_jsd']:.3f}",
                f"{p['fisher_rao']:.3f}",
                f"{p['euclidean']:.2f}",
            ]
        )
    bound = report["paths"]["geodesic"]["fisher_rao_lower_bound"]
    return (
        f"{_aligned(rows)}\n\nLosses and barriers in nats; the barrier is over the mean of the "
        f"ends. No path between\nthese ends has a Fisher-Rao length below {bound:.3f} rad.\n"
    )


def markdown(report: Mapping) -> str:
    """report.md."""
    c, e, seconds = BEFORE | report["config"], report["environment"], report["seconds"]
    first = report["paths"]["geodesic"]
    parts = [
        "# Geodesic between two trained networks",
        f"{_networks(c)}, on {c['data']}; N = {c['points']} points; {c['steps']} steps of batch "
        f"{c['batch_size']}, {_descent(c)}.",
        "![Loss along the paths](path_loss.png)",
    ]
    for split, title in SPLITS.items():
        if first[split]:
            parts += [f"## Along the path, {title}", _table(_split_rows(report, split))]
    parts += [
        "## Lengths, on the training images",
        _table(_length_rows(report)),
        f"Chord: no path between these ends is shorter than {first['fisher_rao_lower_bound']:.4f} "
        "rad, the Fisher-Rao distance of their predictions.",
        "![Lengths during optimisation](path_length.png)",
        "## Matching",
        _matching(report["matching"]),
        "## Engines",
        _table(_engine_rows(report)),
        "## Time",
        _table([["stage", "seconds"], *([name, f"{s:.1f}"] for name, s in seconds.items())]),
        ", ".join(f"{key} {value}" for key, value in e.items()),
        "## Settings",
        _table(
            [
                ["setting", "value", "meaning"],
                *([f"`{key}`", f"`{c[key]}`", text] for key, text in about().items() if key in c),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _descent(config: Mapping) -> str:
    c = config
    words = f"{'preconditioned' if c['precondition'] else 'plain'} SGD at rate {c['lr']:g}"
    if c["lr_schedule"] != "constant":
        words += f" falling to 0 ({c['lr_schedule']})"
    if c["momentum"]:
        words += f" with Nesterov momentum {c['momentum']:g}"
    return words + (", from few points to many" if c["coarse_to_fine"] else "")


def matching(found: Mapping, spec: PermutationSpec, config: Config) -> str:
    """matching.md."""
    parts = [
        "# Matching of b to a",
        f"{_networks(asdict(config))}; by {config.match_method}.",
        _matching(found),
        "## Permutations",
        f"```\n{spec}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _networks(config: Mapping) -> str:
    c = config
    if c["a"] is not None:
        return f"{c['model']}, {c['a']} and {c['b']}"
    width = "" if ":" in c["model"] else f", width {c['width']:g}"
    return f"{c['model']}{width}, seeds {c['seed_a']} and {c['seed_b']}"


def _matching(found: Mapping) -> str:
    spread = ", ".join(f"{objective:.2f}" for objective in found["objectives"])
    return (
        f"Inner product of the two ends' parameters: {found['objective_before']:.2f} before, "
        f"{found['objective_after']:.2f} after {found['sweeps']} sweeps; at the end of each of "
        f"{len(found['objectives'])} starts: {spread}. The permuted network's outputs are those of "
        f"b within {found['relative_change']:.1e} of the largest."
    )


def _engine_rows(report: Mapping) -> Iterable[list[str]]:
    yield ["stage", "engine", "channels-last", "networks at a time", "measured, ms"]
    for stage, choice in report["engines"].items():
        times = (f"{name} {1e3 * s:.0f}" for name, s in choice["seconds"].items())
        yield [
            stage,
            choice["engine"],
            "yes" if choice["channels_last"] else "no",
            str(choice["chunk"] or "all"),
            "; ".join(times) or "named, not measured",
        ]


def _split_rows(report: Mapping, split: str) -> Iterable[list[str]]:
    yield [
        "path",
        "loss at a, nats",
        "loss at b, nats",
        "highest loss, nats",
        "barrier over the mean of the ends, nats",
        "barrier above the line between the ends, nats",
        "lowest accuracy",
    ]
    for name, title in TITLES.items():
        s = report["paths"][name][split]
        yield [
            title,
            f"{s['loss'][0]:.4f}",
            f"{s['loss'][-1]:.4f}",
            f"{max(s['loss']):.4f}",
            f"{s['barrier']:.4f}",
            f"{s['barrier_above_line']:.4f}",
            f"{100 * min(s['accuracy']):.2f} %",
        ]


def _length_rows(report: Mapping) -> Iterable[list[str]]:
    yield ["path", "energy Σ JSD, nats", "Σ√JSD, √nats", "Fisher-Rao, rad", "Σ‖Δθ‖"]
    for name, title in TITLES.items():
        p = report["paths"][name]
        values = (p[key] for key in ("energy", "sqrt_jsd", "fisher_rao", "euclidean"))
        yield [title, *(f"{value:.4f}" for value in values)]


def _table(rows: Iterable[list[str]]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1] for line in stream if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
