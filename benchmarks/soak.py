"""A long run in one process: memory and open files stay as they are: `python -m benchmarks.soak`.

The digits preset with many optimisation steps, all of them on N points, whose states are saved
every few seconds.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path as FilePath

import tyro

from benchmarks.harness import environment, write_result
from fastgeo import keep_pages
from fastgeo.app import stages as pipeline
from fastgeo.app.config import PRESETS, Config, Pace
from fastgeo.app.folder import Run
from fastgeo.profiling.measure import headline, table


@dataclass(frozen=True)
class Options:
    """Resident memory and open files along a run of the digits preset."""

    steps: int = 2000
    """optimisation steps"""
    save: bool = False
    """write benchmarks/results/soak.json"""


def soak(config: Config, folder: FilePath, every: int) -> list[dict[str, object]]:
    """A row every so many optimisation steps."""
    rows = []

    def look(metrics: dict, path: object) -> None:
        if metrics["step"] % every == 0 or metrics["step"] == config.path.steps - 1:
            rows.append(
                {
                    "step": metrics["step"],
                    "resident, MiB": round(resident() / 2**20, 1),
                    "open files": len(os.listdir("/proc/self/fd")),
                    "states": len(os.listdir(folder / "checkpoint"))
                    if (folder / "checkpoint").exists()
                    else 0,
                    "energy, nats": metrics["energy"],
                }
            )

    with Run.create(folder, config) as run:
        run.pace = Pace(checkpoint_seconds=2.0)
        pipeline.train(run)
        pipeline.match_ends(run)
        pipeline.optimize_path(run, on_step=look)
        pipeline.evaluate_paths(run)
    return rows


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(FilePath("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.soak")
    keep_pages()
    print(headline(environment()))
    with tempfile.TemporaryDirectory() as folder:
        config = PRESETS["digits"].changed(steps=options.steps, coarse_to_fine=False)
        rows = soak(config, FilePath(folder) / "run", max(1, options.steps // 20))
    print(table(rows))
    if options.save:
        print(f"\nwrote {write_result('soak', {'rows': rows})}")


if __name__ == "__main__":
    main()
