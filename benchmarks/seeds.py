"""The digits preset over several pairs of seeds: `python -m benchmarks.seeds`.

The height of the matched line's bump depends much on the pair; that the geodesic has none should
not.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path as FilePath

import tyro

from benchmarks.harness import environment, printed, write_result
from fastgeo import keep_pages
from fastgeo.app.config import PRESETS
from fastgeo.app.folder import Run
from fastgeo.app.stages import run_all
from fastgeo.profiling.measure import headline
from fastgeo.store.files import read_json


@dataclass(frozen=True)
class Options:
    """Runs the digits preset for pairs of seeds (0, 1), (2, 3), ..."""

    pairs: int = 8
    """how many"""
    save: bool = False
    """write benchmarks/results/seeds.json"""


def measure(seed_a: int, seed_b: int, folder: FilePath) -> dict[str, object]:
    """A row: what one run of the preset found."""
    config = PRESETS["digits"].changed(seed_a=seed_a, seed_b=seed_b)
    with Run.create(folder, config) as run:
        run_all(run)
    report = read_json(run.file("report.json"))
    paths = report["paths"]
    highest = {name: max(path["train"]["loss"]) for name, path in paths.items()}
    barrier = {name: path["train"]["barrier"] for name, path in paths.items()}
    return {
        "seeds": f"{seed_a}, {seed_b}",
        **{f"{name}: highest train loss, nats": f"{loss:.4f}" for name, loss in highest.items()},
        "barrier, geodesic / matched": f"{barrier['geodesic'] / barrier['matched']:.3f}",
        "matched: Σ√JSD, √nats": f"{paths['matched']['sqrt_jsd']:.3f}",
        "geodesic: Σ√JSD, √nats": f"{paths['geodesic']['sqrt_jsd']:.3f}",
        "seconds": f"{report['seconds']['total']:.1f}",
    }


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.seeds")
    keep_pages()
    print(headline(environment()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = printed(
            [measure(2 * pair, 2 * pair + 1, FilePath(folder) / str(pair))]
            for pair in range(options.pairs)
        )
    if options.save:
        print(f"\nwrote {write_result('seeds', {'rows': rows})}")


if __name__ == "__main__":
    main()
