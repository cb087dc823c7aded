"""report.json, report.md and the summary table of a run."""

import platform
from collections.abc import Iterable, Mapping
from dataclasses import fields

import torch

from fastgeo import figures
from fastgeo.app.config import Config, about
from fastgeo.app.given import Given, is_function
from fastgeo.basis import COARSEST
from fastgeo.figures import LENGTHS, PATHS, SPLITS, markdown_table, optimised
from fastgeo.profiling.measure import cpu_name, version_of
from fastgeo.schedule import Training
from fastgeo.symmetry.spec import PermutationSpec

# Settings that say nothing of a user's own network, of a user's own loaders, and of given weights.
OF_NETWORKS = {"width", "norm"}
OF_IMAGES = {"data_root", "augment"}
OF_TEXT = {"block_size", "tokens"}
OF_BATCHES = {"train_subset", "batch_size", "train_batch_size", "eval_batch_size"}
OF_TRAINING = {"count", "seed_a", "seed_b", *(setting.name for setting in fields(Training))}

MOVING = {"points": "point", "bezier": "control point", "polychain": "bend"}  # what a curve moves


def build(
    given: Given,
    stages: Mapping[str, Mapping],
    engines: Mapping[str, Mapping],
    files: Mapping[str, str],
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
        "environment": environment(given.device),
        "config": given.config.settings,
        "batch_size": given.batch_size,
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
        "device": gpu or f"{cpu_name()}, {counted(torch.get_num_threads(), 'thread')}",
        "platform": f"{platform.system()} {platform.machine()}",
    }


def summary(report: Mapping) -> str:
    """The table that a run ends with."""
    paths = report["paths"]
    bound = paths[optimised(paths)]["fisher_rao_lower_bound"]
    return (
        f"{figures.table(paths, splits=('train', 'test'))}\n\n"
        "The mean loss is along arc length, and the barrier the highest loss less the mean of the\n"
        "two ends'. Σ√JSD is the sum of the roots of the Jensen-Shannon divergences between\n"
        "neighbours' predictions, Fisher-Rao the angle by which the predictions turn along the\n"
        "path, and Σ‖Δθ‖ its length in the weights."
        f"{' Losses are those of a token.' if is_text(report['config']) else ''}\n"
        f"No path between these ends has a Fisher-Rao length below {bound:.3f} rad.\n"
    )


def markdown(report: Mapping) -> str:
    """report.md."""
    c, e, seconds = report["config"], report["environment"], report["seconds"]
    name = optimised(report["paths"])
    found, called = report["paths"][name], PATHS[name]
    parts = [
        f"# {called[0].upper()}{called[1:]} between two trained networks",
        f"Two networks ({_networks(c)}) are joined on {c['data']} by three paths of "
        f"N = {c['points']} networks, both ends included. The *line* goes straight from a to b. "
        "The *matched line* does so after the channels of b were permuted to resemble a's, which "
        f"does not change what b computes. The *{called}*{_controls(c)} began as the matched line "
        f"and was optimised by {c['steps']} steps of {_descent(c)}, each step on {_batch(report)}.",
        "![Loss along the paths](path_loss.png)",
    ]
    for split, title in SPLITS.items():
        if found[split]:
            parts += [f"## Along the path, {title}", markdown_table(_split_rows(report, split))]
    parts += [
        "The barrier is the highest loss on the path less the mean of the two ends' losses; above "
        "the line, it is the most by which the loss exceeds a straight line between those two. The "
        "mean and the integral are along arc length in the space of the weights, and so do not "
        "depend on where on the path its networks are.",
        f"## Lengths, on the training {'text' if is_text(c) else 'images'}",
        markdown_table(_length_rows(report)),
        f"The energy{'' if _on_labels(c) else ', which the optimisation lowers,'} is the sum over "
        "neighbours on the path of the "
        "Jensen-Shannon divergence (JSD) of their predictions; Σ√JSD sums its square roots, which "
        "makes it a length, the one in the paper's figure. The Fisher-Rao length is the angle by "
        "which the predicted distributions turn along the path, and Σ‖Δθ‖ the length in the space "
        "of the weights. No path between these ends has a Fisher-Rao length below "
        f"{found['fisher_rao_lower_bound']:.4f} rad, the distance of the two ends' predictions.",
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
    own = is_function(config["data"])
    idle = OF_NETWORKS if is_function(config["model"]) else set()
    idle = idle | (OF_BATCHES if own else set()) | (OF_IMAGES if own or is_text(config) else set())
    idle = idle | (set() if is_text(config) else OF_TEXT)
    idle = idle | (set() if config["model"] == "gpt" else {"depth"})
    idle = idle | (OF_TRAINING if config["a"] else set())
    idle = idle | ({"controls"} if _curve(config) == "points" else set())
    return [name for name in about() if name in config and name not in idle]


def _batch(report: Mapping) -> str:
    config = report["config"]
    if is_function(config["data"]):
        size = report.get("batch_size")
        return "a batch of the loader" + (f", the first of which has {size} inputs" if size else "")
    if is_text(config):
        return f"a batch of {config['batch_size']} blocks of {config['block_size']} tokens"
    return f"a batch of {config['batch_size']} images"


def is_text(config: Mapping) -> bool:
    return config["data"].startswith("text:")


def each(config: Mapping) -> str:
    """What losses are of, in words that follow their unit; empty where that is an image."""
    return " a token" if is_text(config) else ""


def _descent(config: Mapping) -> str:
    c = config
    words = "preconditioned SGD" if c["precondition"] else "plain SGD"
    if c["momentum"]:
        words += f" with Nesterov momentum {c['momentum']:g}"
    words += f" at rate {c['lr']:g}"
    if c["lr_schedule"] != "constant":
        words += f", which falls to 0 ({c['lr_schedule']})"
    if c["coarse_to_fine"] and _grows(c):
        words += f", with few {MOVING[_curve(c)]}s first and more on the way"
    if c.get("nodes"):  # a setting that older reports lack
        words += f", at {counted(c['nodes'], 'random place')} in each step"
    return words + (", on the labels" if _on_labels(c) else "")


def _on_labels(config: Mapping) -> bool:
    return config.get("objective") == "cross_entropy"


def _controls(config: Mapping) -> str:
    """How many a curve has."""
    moving = MOVING[_curve(config)]
    return "" if moving == "point" else f", of {counted(config['controls'], moving)},"


def _grows(config: Mapping) -> bool:
    """Whether coarse to fine begins with fewer points than it ends with."""
    curve = _curve(config)
    if curve == "points":
        return config["points"] > COARSEST["polychain"]
    return config["controls"] + 2 > COARSEST[curve]


def _curve(config: Mapping) -> str:
    return config.get("curve", "points")  # a setting that older reports lack


def matching(found: Mapping, spec: PermutationSpec, config: Config) -> str:
    """matching.md."""
    parts = [
        "# Matching of b to a",
        f"The two networks are {_networks(config.settings)}. The channels of b were permuted to "
        f"resemble a's, by their {config.matching.match_method}." + _rotated(spec),
        _matching(found),
        "## Permutations",
        f"```\n{spec}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _rotated(spec: PermutationSpec) -> str:
    """What was done besides."""
    if not spec.mixed:
        return ""
    return (
        " Orthogonal maps were among the permutations, and both networks were brought to one form "
        f"first: {counted(len(spec.folds), 'weight')} of norms folded into what reads them, and "
        "queries with keys and values with outputs balanced. The path joins folded.safetensors, "
        "which computes what a does, and matched.safetensors."
    )


def network(config: Mapping) -> str:
    """What the network is: a user's own has no width."""
    model = config["model"]
    if is_function(model):
        return model
    depth = f"{counted(config['depth'], 'block')} and " if model == "gpt" else ""
    return f"{model} of {depth}width {config['width']:g}"


def _networks(config: Mapping) -> str:
    c = config
    if c["a"] is None:
        return f"{network(c)}, trained with the seeds {c['seed_a']} and {c['seed_b']}"
    return f"{network(c)}, with the weights {c['a']} and {c['b']}"


def _matching(found: Mapping) -> str:
    starts = [f"{objective:.2f}" for objective in found["objectives"]]
    left = ", ".join(found.get("left_out", ()))
    return (
        f"The inner product of the two ends' parameters was {found['objective_before']:.2f} before "
        f"and is {found['objective_after']:.2f} after {counted(found['sweeps'], 'sweep')} over all "
        "permutations"
        + (f", the best of {len(starts)} starts ({', '.join(starts)})" if starts[1:] else "")
        + ". The outputs of the permuted network are those of b within "
        f"{found['relative_change']:.1e} of the largest one."
        + (f" Left out, since no start does more work than the first: {left}." if left else "")
    )


def counted(number: int, noun: str) -> str:
    """As "1 sweep" or "2 sweeps"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _engine_rows(report: Mapping) -> Iterable[list[str]]:
    yield ["stage", "engine", "channels-last", "networks at a time", "precision", "measured, ms"]
    for stage, choice in report["engines"].items():
        times = (f"{name} {1e3 * s:.0f}" for name, s in choice["seconds"].items())
        yield [
            stage,
            choice["engine"],
            "yes" if choice["channels_last"] else "no",
            str(choice["chunk"] or "all"),
            choice.get("precision", "fp32"),  # older reports have no other
            "; ".join(times) or "none, since it was named",
        ]


def _split_rows(report: Mapping, split: str) -> Iterable[list[str]]:
    measures = (
        *("loss at a", "loss at b", "highest loss"),
        *("mean loss along arc length", "integral along arc length"),
        *("barrier over the mean of the ends", "barrier above the line between the ends"),
    )
    unit = f"nats{each(report['config'])}"
    yield ["path", *(f"{measure}, {unit}" for measure in measures), "lowest accuracy"]
    for name, path in report["paths"].items():
        s = path[split]
        yield [
            PATHS[name],
            f"{s['loss'][0]:.4f}",
            f"{s['loss'][-1]:.4f}",
            f"{max(s['loss']):.4f}",
            *(f"{s[key]:.4f}" if key in s else "" for key in ("mean", "integral")),
            f"{s['barrier']:.4f}",
            f"{s['barrier_above_line']:.4f}",
            f"{100 * min(s['accuracy']):.2f} %",
        ]


def _length_rows(report: Mapping) -> Iterable[list[str]]:
    yield ["path", *(f"{name}, {unit}" if unit else name for name, unit in LENGTHS.values())]
    for name, path in report["paths"].items():
        yield [PATHS[name], *(f"{path[key]:.4f}" for key in LENGTHS)]
