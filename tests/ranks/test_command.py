"""`fastgeo run` on the processes of torchrun leaves what one process leaves."""

import os
import subprocess
import sys
from pathlib import Path as FilePath

import pytest
import torch
from commands import FILES, SMALL

from fastgeo import Path
from fastgeo.app.cli import main
from fastgeo.store.files import read_json

ROOT = FilePath(__file__).parents[2]
SETTINGS = [*SMALL, "--engine", "stacked", "--chunk", "2"]


def torchrun(ranks, *argv):
    """What a command prints on so many processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*launch, str(ranks), "-m", "fastgeo", *map(str, argv)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_run_of_torchrun_leaves_the_report_and_files_of_one_process(tmp_path, capsys):
    alone, several = tmp_path / "alone", tmp_path / "several"
    main(["run", "--out", str(alone), *SETTINGS])
    found = torchrun(3, "run", "--out", several, *SETTINGS)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Report, figures and weights") == 1
    assert {f.name for f in several.iterdir()} >= FILES | {"stopped.json"}
    one, other = (Path.load(folder / "path.safetensors") for folder in (alone, several))
    torch.testing.assert_close(other.interior, one.interior, rtol=0, atol=1e-4)
    reports = [
        read_json(folder / "report.json")["paths"]["geodesic"] for folder in (alone, several)
    ]
    for name in ("energy", "sqrt_jsd", "euclidean"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-3)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (alone, several)]
    assert len(lines[0]) == len(lines[1]) == 4

    assert status(several, capsys) == (0, "finished\n")
    main(["evaluate", str(several), "--overwrite"])  # in one process

    found = torchrun(2, "optimize", several, "--overwrite", "--max-minutes", "1e-9")
    assert found.returncode
    assert found.stderr.count("fastgeo: the time is over") == 1
    assert found.stderr.count("Traceback") <= 1  # torchrun's own
    assert status(several, capsys) == (75, "the time is over\n")
    (state,) = (several / "checkpoint").iterdir()
    assert len(list(state.glob("part-*-of-00002.safetensors"))) == 2
    main(["optimize", str(several), "--resume"])
    other = Path.load(several / "path.safetensors")
    torch.testing.assert_close(other.interior, one.interior, rtol=0, atol=1e-4)


def status(folder, capsys):
    """Exit code and line of `fastgeo status`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["status", str(folder)])
    return ended.value.code, capsys.readouterr().out
