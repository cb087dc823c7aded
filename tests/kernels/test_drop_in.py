"""The kernels in other people's projects: copied, loaded from a Hub folder, without Triton."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "torch-ext" / "fastgeo_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))


def run(code, cwd, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


# Fails whatever is imported beside the standard library, torch with what it needs itself, and
# triton; then uses the copied folder under another name.
USE_THE_COPY = """
import sys
import torch, torch.utils._pytree, torch._dynamo
try:
    import triton, triton.language
except ImportError:
    pass

class OnlyTorchAndTriton:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        allowed = ("torch", "triton", "copied", "numpy", *sys.stdlib_module_names)
        if top not in allowed:
            raise ImportError(f"{name} must not be needed")

before = {name.partition(".")[0] for name in sys.modules}
sys.meta_path.insert(0, OnlyTorchAndTriton())
from copied.fastgeo_kernels import js_div, layers, path_fisher_rao, path_js_div_value_and_grad
value, grad = path_js_div_value_and_grad(torch.randn(4, 3, 5))
loss = layers.JSDiv()(torch.randn(2, 5, requires_grad=True), torch.randn(2, 5))
loss.backward()
path_fisher_rao(torch.randn(4, 3, 5))
new = {name.partition(".")[0] for name in sys.modules} - before
print(sorted(new - {"copied"} - set(sys.stdlib_module_names)), "fastgeo" in sys.modules)
"""


def test_the_copied_folder_needs_torch_and_triton_alone(tmp_path):
    copied = tmp_path / "copied" / "fastgeo_kernels"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    assert run(USE_THE_COPY, tmp_path).split() == ["[]", "False"]


def test_the_copied_folder_passes_its_own_tests(tmp_path):
    """In an empty project, without pytest, and with nothing of this repository to be found."""
    copied = tmp_path / "project" / "vendored"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    result = subprocess.run(
        [sys.executable, "-m", "unittest", "vendored.tests"],
        cwd=tmp_path / "project",
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Ran 8 tests" in result.stderr and result.stderr.rstrip().endswith("OK")


def test_the_folder_is_a_wheel_of_its_own(tmp_path):
    """With its own name, version, licence and every file; it installs and passes its tests."""
    source = shutil.copytree(PACKAGE.parent, tmp_path / "source")
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", "."]
    subprocess.run([sys.executable, *build, str(source)], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "fastgeo_kernels-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
    files = {*FILES, *(PACKAGE / name for name in ("LICENSE", "metadata.json", "py.typed"))}
    assert {str(file.relative_to(PACKAGE.parent)) for file in files} <= names
    metadata = (tmp_path / "installed/fastgeo_kernels-0.1.0.dist-info/METADATA").read_text()
    for line in ("Name: fastgeo-kernels", "License-Expression: Apache-2.0", "Requires-Dist: torch"):
        assert line in metadata
    code = "import fastgeo_kernels; print(fastgeo_kernels.__file__)"
    out = run(code, tmp_path / "installed", PYTHONPATH=str(tmp_path / "installed"))
    assert str(tmp_path / "installed") in out


def test_the_folder_has_the_licence_of_the_repository():
    assert (PACKAGE / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_two_copies_live_in_one_process(tmp_path):
    """Operators are registered under the module's name."""
    for name in ("first", "second"):
        shutil.copytree(PACKAGE, tmp_path / name / "fastgeo_kernels")
    code = "import first.fastgeo_kernels, second.fastgeo_kernels, fastgeo_kernels"
    run(code, tmp_path)


def test_without_triton_it_is_the_torch_implementation(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('not here')\n")
    code = """
import torch
from fastgeo_kernels import launching, path_js_div
assert launching.triton is None
print(path_js_div(torch.zeros(3, 2, 4)).tolist())
try:
    path_js_div(torch.zeros(3, 2, 4), impl="triton")
except RuntimeError as error:
    print(error)
"""
    out = run(code, tmp_path, PYTHONPATH=str(tmp_path))
    reason = "the path divergence: impl='triton' cannot run: the package triton is not installed"
    assert out == f"[0.0, 0.0]\n{reason}\n"


def test_importing_the_kernels_does_not_import_fastgeo(tmp_path):
    code = "import sys, fastgeo_kernels; print('fastgeo' in sys.modules)"
    assert run(code, tmp_path) == "False\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_python_3_9_and_import_relatively(file):
    tree = ast.parse(file.read_text(), feature_version=(3, 9))
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        assert all(name.partition(".")[0] in allowed for name in names), names


def test_no_room_hides_a_function_of_its_name(tmp_path):
    """`path_js_div` and `path_update` are a folder and a file as well, loaded before or after."""
    code = """
import importlib
from fastgeo_kernels import path_js_div, path_update
for name in ("path_js_div.launch", "path_js_div", "path_update"):
    importlib.import_module(f"fastgeo_kernels.{name}")
import fastgeo_kernels
from fastgeo_kernels.path_js_div import launch
assert fastgeo_kernels.path_js_div is path_js_div and callable(path_js_div)
assert fastgeo_kernels.path_update is path_update and callable(path_update)
for name in fastgeo_kernels.__all__:
    value = getattr(fastgeo_kernels, name)
    assert callable(value) == (name != "layers"), name
print("functions")
"""
    assert run(code, tmp_path) == "functions\n"


def test_a_wheel_has_every_room():
    import tomllib

    from setuptools import find_packages

    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    where, include = find["find"]["where"][1], find["find"]["include"]
    found = set(find_packages(str(ROOT / where), include=include))
    rooms = {file.parent.relative_to(PACKAGE.parent) for file in FILES}
    assert found == {str(room).replace(os.sep, ".") for room in rooms}


def test_the_folder_of_the_kernels_is_no_package():
    """An `__init__.py` there would shadow the package `kernels` of the Hub."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_metadata_agrees_with_the_build_file():
    import tomllib

    metadata = json.loads((PACKAGE / "metadata.json").read_text())
    general = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())["general"]
    for key in ("name", "version", "license"):
        assert metadata[key] == general[key]
    assert metadata["python-depends"] == []


def test_the_build_file_has_what_its_edition_asks_for():
    """Required keys of edition 5 of the builder's format, in
    https://huggingface.co/docs/kernels/builder/writing-kernels, which refuses any other key."""
    import tomllib

    build = tomllib.loads((ROOT / "kernels" / "build.toml").read_text())
    general = build["general"]
    assert set(build) == {"general", "torch-noarch"} and set(build["torch-noarch"]) == {"pyext"}
    assert set(general) == {"name", "version", "edition", "license", "backends"}
    assert general["edition"] == 5 and isinstance(general["version"], int)
    assert set(general["backends"]) <= {"cpu", "cuda", "metal", "rocm", "xpu"}
    # The code lies in torch-ext/, in a folder of the kernel's name.
    assert PACKAGE.relative_to(ROOT / "kernels") == Path("torch-ext") / general["name"].replace(
        "-", "_"
    )
    endings = {file.suffix[1:] for file in (*FILES, PACKAGE / "py.typed")}
    assert endings == set(build["torch-noarch"]["pyext"])
    assert "genKernelFlakeOutputs" in (ROOT / "kernels" / "flake.nix").read_text()


HUB = """
import sys
import zipfile
from pathlib import Path
import torch
from torch import nn
import kernels

folder = Path(sys.argv[1])
loaded = kernels.get_local_kernel(folder)
assert loaded.path_js_div(torch.zeros(3, 2, 4)).tolist() == [0.0, 0.0]

@kernels.use_kernel_forward_from_hub("JSDiv")
class Divergence(nn.Module):
    def forward(self, p_logits, q_logits):
        raise AssertionError("the plain forward ran")

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.divergence = Divergence()

    def forward(self, p_logits, q_logits):
        return self.divergence(p_logits, q_logits)

layer = kernels.LocalLayerRepository(folder, layer_name="JSDiv")
p, q = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
with kernels.use_kernel_mapping({"JSDiv": {"cpu": layer}}):
    model = kernels.kernelize(Model(), mode=kernels.Mode.TRAINING, device="cpu")
loss = model(p, q)
loss.backward()
assert torch.equal(loss, loaded.js_div(p, q)) and p.grad.abs().sum() > 0
print("mapped")
"""


def test_the_hub_loads_the_folder_and_maps_the_layer(tmp_path):
    script = tmp_path / "hub.py"
    script.write_text(HUB)
    code = (
        f"import sys, runpy; sys.argv = ['hub', {str(PACKAGE)!r}]; runpy.run_path({str(script)!r})"
    )
    assert "mapped" in run(code, tmp_path, HF_HUB_OFFLINE="1")
