"""Imports between the rooms of fastgeo go one way."""

import ast
from pathlib import Path

FLOORS = [  # what is above may import what is below
    "app",
    "profiling",
    *("train", "matching", "plane"),
    *("optimize", "evaluate", "recalibrate"),
    "step",
    "ranks",
    "operations",
    *("stacking", "symmetry"),
    "forward",
    *("data", "path", "models"),
    *("figures", "basis"),
    *("store", "schedule"),
]
SIDE_BY_SIDE = [("stacking", "symmetry"), ("train", "matching"), ("data", "path")]
ROOT = Path(__file__).parents[1] / "fastgeo"


def imports():
    """(file, room, room that it imports) of every import of fastgeo's own."""
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastgeo":
                inside = node.module.split(".")[1:2]
                for other in inside or [name.name for name in node.names]:
                    if other != room:
                        yield file, room, other


def test_rooms_import_only_what_is_below():
    seen = set()
    for file, room, other in imports():
        if room in ("__init__", "__main__", "_public"):
            continue
        seen.add(room)
        assert FLOORS.index(room) < FLOORS.index(other), f"{file} imports {other}"
        pair = {room, other}
        assert not any(pair == set(pairs) for pairs in SIDE_BY_SIDE), f"{file} imports {other}"
    assert {"app", "step", "stacking", "symmetry"} <= seen


def test_every_room_has_its_floor():
    rooms = {entry.name.removesuffix(".py") for entry in ROOT.iterdir() if entry.name[0] != "_"}
    assert rooms - {"py.typed"} == set(FLOORS)


def test_a_room_hides_no_function_of_its_name():
    import fastgeo

    for name in fastgeo.__all__:
        assert not isinstance(getattr(fastgeo, name), type(ast)), name
