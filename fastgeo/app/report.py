"""report.json, report.md and the summary table of a run."""

import platform
from collections.abc import Iterable, Mapping

import torch

from fastgeo import figures
from fastgeo.app.config import Config, about
from fastgeo.app.given import is_function
from fastgeo.figures import LENGTHS, PATHS, SPLITS, markdown_table
from fastgeo.profiling.measure import cpu_name, version_of
from fastgeo.symmetry.spec import PermutationSpec

# Settings that say nothing of a user's own network, and of a user's own loaders.
OF_NETWORKS = {"width", "norm"}
OF_IMAGES = {
    *("data_root", "train_subset", "augment"),
    *("batch_size", "train_batch_size", "eval_batch_size"),
}


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
        "config": config.settings,
        "seconds": seconds | {"total": sum(seconds.values())},
        "matching": matching,
        "engines": dict(engines),
        "files": dict(files),
        "paths": {name: {"augmented_train": None, **result} for name, result in results.items()},
    }


def environment(device: torch.device) -> dict[str, str]:
    """What a reader needs to know of the machine and the software."""
    names = {"fastgeo": "fastgeo", "torch": "torch", "triton": "triton"}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        **{key: version_of(name) for key, name in names.items()},
        "python": platform.python_version(),
        "device": gpu or f"{cpu_name()}, {torch.get_num_threads()} threads",
        "platform": f"{platform.system()} {platform.machine()}",
    }


def summary(report: Mapping) -> str:
    """The table that a run ends with."""
    bound = report["paths"]["geodesic"]["fisher_rao_lower_bound"]
    return (
        f"{figures.table(report['paths'], splits=('train', 'test'))}\n\n"
        "The barrier is over the mean of the ends. No path between these ends has a Fisher-Rao\n"
        f"length below {bound:.3f} rad.\n"
    )


def markdown(report: Mapping) -> str:
    """report.md."""
    c, e, seconds = report["config"], report["environment"], report["seconds"]
    first = report["paths"]["geodesic"]
    parts = [
        "# Geodesic between two trained networks",
        f"{_networks(c)}, on {c['data']}; N = {c['points']} points; {c['steps']} steps, each on "
        f"{_batch(c)}, {_descent(c)}.",
        "![Loss along the paths](path_loss.png)",
    ]
    for split, title in SPLITS.items():
        if first[split]:
            parts += [f"## Along the path, {title}", markdown_table(_split_rows(report, split))]
    parts += [
        "## Lengths, on the training images",
        markdown_table(_length_rows(report)),
        f"Chord: no path between these ends is shorter than {first['fisher_rao_lower_bound']:.4f} "
        "rad, the Fisher-Rao distance of their predictions.",
        "![Lengths during optimisation](path_length.png)",
        "## Matching",
        _matching(report["matching"]),
        "## Engines",
        markdown_table(_engine_rows(report)),
        "## Time",
        markdown_table(
            [["stage", "seconds"], *([name, f"{s:.1f}"] for name, s in seconds.items())]
        ),
        ", ".join(f"{key} {value}" for key, value in e.items()),
        "## Settings",
        markdown_table(
            [
                ["setting", "value", "meaning"],
                *([f"`{key}`", f"`{c[key]}`", about()[key]] for key in _settings(c)),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _settings(config: Mapping) -> list[str]:
    """Those that the run depended on."""
    idle = OF_NETWORKS if is_function(config["model"]) else set()
    idle = idle | (OF_IMAGES if is_function(config["data"]) else set())
    return [name for name in about() if name in config and name not in idle]


def _batch(config: Mapping) -> str:
    if is_function(config["data"]):
        return "a batch as the loader gives it"
    return f"a batch of {config['batch_size']}"


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
        f"{_networks(config.settings)}; by {config.matching.match_method}.",
        _matching(found),
        "## Permutations",
        f"```\n{spec}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def network(config: Mapping) -> str:
    """What the network is: a user's own has no width."""
    model = config["model"]
    return model if is_function(model) else f"{model}, width {config['width']:g}"


def _networks(config: Mapping) -> str:
    c = config
    ends = f"seeds {c['seed_a']} and {c['seed_b']}" if c["a"] is None else f"{c['a']} and {c['b']}"
    return f"{network(c)}, {ends}"


def _matching(found: Mapping) -> str:
    spread = ", ".join(f"{objective:.2f}" for objective in found["objectives"])
    left = ", ".join(found.get("left_out", ()))
    return (
        f"Inner product of the two ends' parameters: {found['objective_before']:.2f} before, "
        f"{found['objective_after']:.2f} after {found['sweeps']} sweeps; at the end of each of "
        f"{len(found['objectives'])} starts: {spread}. The permuted network's outputs are those of "
        f"b within {found['relative_change']:.1e} of the largest."
        + (f" Left out, since no start does more work than the first: {left}." if left else "")
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
    for name, title in PATHS.items():
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
    yield ["path", *(f"{name}, {unit}" if unit else name for name, unit in LENGTHS.values())]
    for name, title in PATHS.items():
        yield [title, *(f"{report['paths'][name][key]:.4f}" for key in LENGTHS)]
