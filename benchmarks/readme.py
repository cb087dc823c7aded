"""The tables of README.md and of the README here, from result files: `python -m benchmarks.readme`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is replaced.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.__main__ import SPEED
from benchmarks.device_parts.tables import SECTIONS
from benchmarks.harness import RESULTS
from fastgeo.profiling.measure import table

HERE = Path(__file__).parent
DOCUMENTS = (HERE.parent / "README.md", HERE / "README.md")
BLOCK = re.compile(r"(<!-- table: ([^>]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def source(result: dict[str, Any]) -> str:
    """How, where and when the numbers of a result were taken."""
    e = result["environment"]
    threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}"
    machine = f"{threads} of {e['cpu']}" if e["device"] == "cpu" else e["device"]
    version = e["torch"].split("+")[0]
    return f"Measured by `{e['command']}` on {machine} on {e['date']}, with torch {version}."


def run(preset: str) -> str:
    """A preset's run, and what else joins the same ends: geodesics by the paper's plain SGD and by
    the preset, and its Bezier curve."""
    ours, plain = (read(f"{preset}/report{kind}") for kind in ("", "-plain-sgd"))
    other = read(f"{preset}/report-{'geodesic' if 'bezier' in ours['paths'] else 'bezier'}")
    steps = {name: each["config"]["steps"] for each in (ours, other) for name in each["paths"]}
    found = ours["paths"] | other["paths"]
    p, name = plain["config"], f"path, N = {ours['config']['points']}"
    by_sgd = f"geodesic by {p['steps']} steps of the paper's plain SGD at rate {p['lr']:g}"
    paths = {
        "line": found["linear"],
        "matched line": found["matched"],
        by_sgd: plain["paths"]["geodesic"],
        f"geodesic by {steps['geodesic']} steps": found["geodesic"],
        f"Bezier curve by {steps['bezier']} steps": found["bezier"],
    }
    rows = [
        {
            name: title,
            "highest train loss, nats": f"{max(path['train']['loss']):.3f}",
            "test": f"{max(path['test']['loss']):.3f}",
            "lowest test accuracy": f"{100 * min(path['test']['accuracy']):.1f} %",
            "Σ√JSD": f"{path['sqrt_jsd']:.3f}",
            "Fisher-Rao length, rad": f"{path['fisher_rao']:.3f}",
        }
        for title, path in paths.items()
    ]
    seconds = {stage: f"{s:.0f}" for stage, s in ours["seconds"].items()}
    total, e = seconds.pop("total"), ours["environment"]
    stages = ", ".join(f"{stage} {s}" for stage, s in seconds.items())
    bound = found["linear"]["fisher_rao_lower_bound"]
    return (
        f"{table(rows)}\n\nNo path between these two ends can be shorter than {bound:.3f} rad, the "
        f"Fisher-Rao distance of their predictions.\nThe run took {total} seconds ({stages}) on "
        f"{e['device']}, with torch {e['torch'].split('+')[0]}."
    )


def convergence(preset: str) -> str:
    """How far every way to optimise comes in the same number of steps, at several rates."""
    result = read(f"convergence-{preset}")
    rows = [
        {
            result["setting"]: f"{row['step']}, rate {row['rate']:g}",
            **{name: _number(row[name]) for name in REACHED},
        }
        for row in result["rows"]
    ]
    return f"{table(rows)}\n\n{source(result)}"


def points(preset: str) -> str:
    """The matched line and the geodesic for several N."""
    result = read(f"points-{preset}")
    rows = [
        {
            f"{result['setting']}, N": f"{row['N']}, {row['path']}",
            **{name: _number(row[name]) for name in REACHED},
        }
        for row in result["rows"]
    ]
    return f"{table(rows)}\n\n{source(result)}"


def curves(name: str) -> str:
    """Geodesics beside curve finding, at the same cost."""
    result = read(f"curves-{name}")
    rows = [
        {
            f"{result['setting']}, image·points": row["image·points"],
            **{key: row[key] for key in ("ends", "path", "labels", "rate", "pairs", *CURVES)},
        }
        for row in result["rows"]
    ]
    measured = source(result).replace(" --no-measure", "")  # which was only left to make the table
    return f"{table(rows)}\n\n{measured}"


def precision(preset: str) -> str:
    """What bf16 changes in a whole run, and what another order of the images does."""
    result = read(f"precision-{preset}-cpu")
    rows = [
        {
            f"{result['setting']}, nats": row["nats"],
            "fp32": row["fp32"],
            f"{row['precision']} from it": row["from fp32"],
            f"mean of {result['orders'] - 1} other orders": row["another order from fp32"],
            "least to most": row["least to most"],
        }
        for row in result["rows"]
        if row["nats"] != "barrier" or float(row["another order from fp32"])
    ]
    return f"{table(rows)}\n\n{source(result)}"


def precision_of_ends() -> str:
    """What bf16 changes in networks that are trained in it."""
    result = read("precision-ends-digits-cpu")
    return f"{table(result['rows'])}\n\n{source(result)}"


CURVES = (
    *("highest train loss, nats", "highest test loss", "Fisher-Rao, rad"),
    *("highest train loss, nats: less the geodesic's", "Fisher-Rao, rad: less the geodesic's"),
)
REACHED = (
    *("energy, nats", "Σ√JSD", "highest train loss", "between the points"),
    *("barrier, train", "test", "seconds"),
)


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def seeds() -> str:
    """Highest training losses over pairs of seeds."""
    names = {"linear": "line", "matched": "matched line", "geodesic": "geodesic"}
    rows: list[dict[str, str]] = [{"seeds": title} for title in names.values()]
    result = read("seeds")
    for pair in result["rows"]:
        for row, key in zip(rows, names, strict=True):
            row[pair["seeds"]] = f"{float(pair[f'{key}: highest train loss, nats']):.3f}"
    return f"{table(rows)}\n\n{source(result)}"


def quick() -> str:
    """Every operation beside what it stands in for."""
    result = read("benchmarks-cpu")
    rows = [
        {
            "what": f"{row['group']}: {row['setting']}",
            "implementation": row["implementation"],
            "ms": row["ms"]["p50"],
            SPEED: f"{row[SPEED]['p50']:.2f}",
        }
        for row in result["rows"]
    ]
    return f"{table(rows)}\n\n{source(result)}"


def step() -> str:
    """Times the loop's speed, in the median; a row for each setting."""
    result = read("step-cpu")
    rows = []
    for setting, own in _by_setting(result).items():
        *others, chosen = own  # the last is what engine="auto" chose
        named = {row["implementation"]: row for row in others}
        named.setdefault("fastgeo, stacked", chosen)  # listed once if that is the choice
        columns = ("loop, channels-last", "loop, compiled", "torch.func.vmap", "fastgeo, stacked")
        engine = chosen["implementation"].removeprefix("fastgeo, ")
        rows.append(
            {
                "network": setting,
                "loop, images·points/s": f"{named['loop over modules']['images·points/s']:,}",
                **{
                    name: _times_the_loop(named[name]) if name in named else "-" for name in columns
                },
                "fastgeo, auto": f"{_times_the_loop(chosen)} ({engine})",
                "auto, images·points/s": f"{chosen['images·points/s']:,}",
            }
        )
    return f"{table(rows)}\n\n{source(result)}"


def grid() -> str:
    """fastgeo's choice against the loop over width, N and B, in a sentence."""
    result = read("step-grid-cpu")
    ours = [rows[-1] for rows in _by_setting(result).values()]
    low, *_, high = sorted(ours, key=lambda row: row["times the loop"]["p50"])
    return (
        f"Over {len(ours)} settings of width, N and B the engine that `auto` chooses is "
        f"{_times_the_loop(low)} ({low['setting']}) to {_times_the_loop(high)} "
        f"({high['setting']}) times as fast as the loop.\n\n{source(result)}"
    )


def _by_setting(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["setting"], []).append(row)
    return found


def _times_the_loop(row: dict[str, Any]) -> str:
    ratio = row["times the loop"]
    return ratio if isinstance(ratio, str) else f"{ratio['p50']:.2f}"


def memory() -> str:
    """Peak memory of a step against N."""
    result = read("memory-cpu")
    return f"{table(result['rows'])}\n\n{source(result)}"


def estimate() -> str:
    """Memory as a run foresees it, against what it takes."""
    result = read("memory-estimate-cpu")
    return f"{table(result['rows'])}\n\n{source(result)}"


def vocabulary() -> str:
    """Peak memory of a step against the tokens of a batch, of a large vocabulary."""
    result = read("memory-vocabulary-cpu")
    return f"{table(result['rows'])}\n\n{source(result)}"


def soak() -> str:
    """Memory and open files along a long run, in a sentence."""
    result = read("soak")
    early, *_, last = (row for row in result["rows"] if row["step"] >= 600)
    return (
        f"The process held {early['resident, MiB']:.0f} MiB after {early['step']} steps and "
        f"{last['resident, MiB']:.0f} MiB after {last['step'] + 1}, and had {early['open files']} "
        f"open files then and {last['open files']} at the end.\n\n{source(result)}"
    )


def matching() -> str:
    """Ways to match trained networks, over pairs."""
    return _matching("matching-digits")


def matching_cifar() -> str:
    """The same of CIFAR-10's."""
    return _matching("matching-cifar10")


def _matching(name: str) -> str:
    result = read(name)
    columns = {
        "squared distance": "squared distance",
        "barrier, train, nats": "barrier, train, nats",
        "barrier, test, nats": "test",
        "objective over the usual: higher, lower": "nearer, farther than usual",
        "barrier lower": "lower barrier",
    }
    rows = [
        {f"{result['pairs']} pairs": row["way"]} | {new: row[old] for old, new in columns.items()}
        for row in result["rows"]
    ]
    found = result["common frame"]["mean barrier of all pairs, nats"]
    barriers = ", ".join(f"{barrier:.3f} {how}" for how, barrier in found.items())
    barriers = barriers.replace("match_many", "by `match_many`")
    return (
        f"{table(rows)}\n\nThe mean barrier of all pairs of the first four networks, in nats: "
        f"{barriers}.\n{source(result)}"
    )


def matching_speed() -> str:
    """Seconds of matching large networks."""
    result = read("matching-speed")
    return f"{table(result['rows'])}\n\n{source(result)}"


def device(name: str, section: str) -> str:
    """A part of what `benchmarks.device` has measured on a GPU."""
    result = read(name)
    return f"{SECTIONS[section](result['rows'])}\n\n{source(result)}"


TABLES: dict[str, Callable[[], str]] = {
    **{preset: partial(run, preset) for preset in ("digits", "paper-small")},
    **{
        f"{made.__name__} {preset}": partial(made, preset)
        for made in (convergence, points, precision)
        for preset in ("digits", "paper-small")
    },
    "precision of ends": precision_of_ends,
    **{f"curves {name}": partial(curves, name) for name in ("digits", "digits-mlp", "paper-small")},
    "seeds": seeds,
    "step": step,
    "grid": grid,
    "quick": quick,
    "memory": memory,
    "estimate": estimate,
    "vocabulary": vocabulary,
    "soak": soak,
    "matching": matching,
    "matching-cifar10": matching_cifar,
    "matching-speed": matching_speed,
    **{
        f"{file.stem} {section}": partial(device, file.stem, section)
        for file in RESULTS.glob("device-*.json")
        for section in SECTIONS
    },
}


def with_tables(text: str) -> str:
    """A document with its tables made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[4]}", text)


def main() -> None:
    for document in DOCUMENTS:
        before = document.read_text()
        after = with_tables(before)
        if "--check" not in sys.argv[1:]:
            document.write_text(after)
        elif before != after:
            sys.exit(f"{document} is not what its result files say")


if __name__ == "__main__":
    main()
