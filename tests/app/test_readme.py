"""What the README and the package's layout promise."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import readme
from fastgeo import models

ROOT = Path(__file__).parents[2]


def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        torch.save(models.resnet(8, 0.5, in_channels=1).state_dict(), name)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block.replace("steps=100", "steps=2"), {})
    barrier, length, bound = map(float, capsys.readouterr().out.split()[:3])
    assert length >= bound > 0 and barrier < 3
    assert (tmp_path / "path.safetensors").exists()


def test_the_readmes_tables_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text()
    assert len(readme.BLOCK.findall(text)) >= 4
    assert readme.with_tables(text) == text


def test_fastgeo_kernels_imports_without_fastgeo():
    code = "import sys, fastgeo_kernels; assert not any(m.split('.')[0] == 'fastgeo' "
    subprocess.run([sys.executable, "-c", code + "for m in sys.modules)"], check=True)


def test_no_package_shadows_the_name_kernels():
    """An `__init__.py` in kernels/ would hide the Kernel Hub's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
