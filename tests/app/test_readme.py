"""What README, guide and benchmarks' README promise, and the package's layout."""

import re
import subprocess
import sys
from pathlib import Path

import fastgeo
from benchmarks import readme

ROOT = Path(__file__).parents[2]
README, GUIDE = ROOT / "README.md", ROOT / ".github" / "USAGE.md"
TABLES = ROOT / "benchmarks" / "README.md"


def examples(document: Path) -> list[str]:
    """The Python in it, with so few steps that it takes seconds."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    return [b.replace("steps=100", "steps=4").replace("epochs=10", "epochs=1") for b in blocks]


def test_the_python_of_readme_and_guide_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, *others = examples(README)
    names: dict = {}
    exec(first, names)
    line, geodesic = (list(map(float, row.split())) for row in capsys.readouterr().out.splitlines())
    assert line[1] > geodesic[1] >= geodesic[2] == line[2] > 0
    assert geodesic[0] > line[0]
    assert len(fastgeo.Path.load("path.safetensors")) == 25
    for block in others:
        exec(block, {})
    for block in examples(GUIDE):  # which goes on with the names of README's first example
        exec(block, names)
    apart, framed = map(float, capsys.readouterr().out.split("\n")[1].split())
    assert framed > apart
    before, after = names["frame"].barriers_before, names["frame"].barriers_after
    assert (after <= before).all() and after.sum() < before.sum()


def test_readme_is_one_page_with_two_tables_and_all_others_are_in_benchmarks():
    text = README.read_text()
    assert text.count("\n") <= 150
    assert [name for _, name, *_ in readme.BLOCK.findall(text)] == ["digits", "step"]
    assert text.count("![") == 1
    names = [name for _, name, *_ in readme.BLOCK.findall(TABLES.read_text())]
    assert sorted(names) == sorted(readme.TABLES)


def test_tables_are_those_of_the_result_files():
    for document in readme.DOCUMENTS:
        text = document.read_text()
        assert readme.with_tables(text) == text


def test_links_lead_somewhere():
    def anchor(heading: str) -> str:
        return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")

    for document in (README, GUIDE, TABLES):
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            if not target.startswith("https://"):
                file, _, place = target.partition("#")
                there = document.parent / file if file else document
                assert there.exists(), (document, target)
                headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M) if place else []
                assert not place or place in map(anchor, headings), (document, target)


def test_readmes_layout_is_that_of_the_package():
    layout = README.read_text().partition("## Layout of fastgeo/")[2].partition("\n## ")[0]
    rooms = {
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in (ROOT / "fastgeo").iterdir()
        if not entry.name.startswith("_") and entry.name != "py.typed"
    }
    assert set(re.findall(r"\w+(?:\.py|/)", layout)) == rooms


def test_ci_runs_the_readmes_commands():
    setups = re.findall(r"^    (pip install .+?) && (.+?)\s+#", README.read_text(), re.M)
    commands = [word.removeprefix("pip install ") for setup in setups for word in setup]
    assert commands == ["-e .", "fastgeo run", "-e '.[dev]'", "pytest -n 2 --dist loadfile"]
    script = (ROOT / ".ci" / "run").read_text()
    assert all(command in script for command in commands)


def test_fastgeo_kernels_imports_without_fastgeo():
    code = "import sys, fastgeo_kernels; assert not any(m.split('.')[0] == 'fastgeo' "
    subprocess.run([sys.executable, "-c", code + "for m in sys.modules)"], check=True)


def test_no_package_shadows_the_name_kernels():
    """An `__init__.py` in kernels/ would hide the Kernel Hub's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
