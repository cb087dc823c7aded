"""A path on a mesh of processes is that of one process, and so is what is said and saved."""

import re
import shutil
import subprocess
import sys
import warnings
import weakref

import pytest
import tasks
import torch
from cases import CASES, STEPS, Net, linear, run
from spawned import SECONDS, Raised, results

from fastgeo import Descent, Forward
from fastgeo.ranks.blocks import END, POINT, Blocks
from fastgeo.step.memory import point_bytes
from fastgeo.step.step import Step

EQUAL = {  # which of the cases are done on which mesh
    (2, 1): ["coarse to fine", "bezier"],
    (1, 2): ["geodesic", "chunks of two", "one row", "labels"],
    (3, 1): ["coarse to fine", "chunks of two", "labels", "random nodes", "one point"],
    (4, 1): ["geodesic", "chunks", "coarse to fine", "one point", "bezier, own points"],
    (2, 2): ["chunks of two", "not preconditioned", "bezier", "polychain, labels", "one row"],
}
ERRORS = {  # of rank 1 alone: what the others say of it
    "loader raises": "the disk of the data went away",
    "network fails at once": "no room for the activations",
    "network fails late": "no room for the activations",
}
SOON = SECONDS / 2  # what is far from a timeout, on a machine that others use as well
STATES = "coarse to fine"  # with levels of 5, 9 and 11 points that begin at steps 0, 10 and 17


def of_two(folder):
    return {
        "weights": ((2, 1), tasks.not_finite, ("weights",)),
        "rate": ((2, 1), tasks.not_finite, ("rate",)),
        "loader raises": ((2, 1), tasks.loader_raises, ()),
        "loaders disagree": ((1, 2), tasks.loaders_disagree, ()),
        "one loader ends": ((2, 1), tasks.one_loader_ends, ()),
        "settings differ": ((2, 1), tasks.settings_differ, ()),
        "folder is a file": ((2, 1), tasks.folder_is_a_file, (folder / "file",)),
        "state": ((2, 1), tasks.disk_is_full, (folder, "state")),
        "log": ((2, 1), tasks.disk_is_full, (folder, "log")),
        "folders differ": ((2, 1), tasks.folders_differ, (folder,)),
        "coupled": ((1, 2), tasks.coupled, ()),
        "phases": ((2, 1), tasks.phases, ()),
        "traffic (1, 2)": ((1, 2), tasks.traffic, (7,)),
        "chain": ((2, 1), tasks.with_states, (folder / "chain", STATES, 11)),
    }


def of_three(folder):
    return {
        "network fails at once": ((3, 1), tasks.network_fails, (Forward(engine="stacked"), 1)),
        "network fails late": ((3, 1), tasks.network_fails, (Forward(engine="loop", chunk=1), 2)),
        "callback": ((3, 1), tasks.callback_raises, ()),
        "evaluated": ((3, 1), tasks.evaluated, ()),
        "sections": ((3, 1), tasks.sections, ()),
        "chain": ((3, 1), tasks.with_states, (folder / "chain", STATES, None)),
        "grid": ((3, 1), tasks.with_states, (folder / "grid", STATES, None)),
        "damaged": ((3, 1), tasks.with_states, (folder / "damaged", STATES, None)),
        "missing": ((3, 1), tasks.with_states, (folder / "missing", STATES, None)),
        "all damaged": ((3, 1), tasks.with_states, (folder / "all damaged", STATES, None)),
    }


def of_four(folder):
    return {
        "evaluated": ((2, 2), tasks.evaluated, ()),
        "again": ((2, 2), tasks.optimized, ("chunks of two",)),
        "traffic (4, 1)": ((4, 1), tasks.traffic, (23,)),
        "traffic (2, 2)": ((2, 2), tasks.traffic, (7,)),
        "chain": ((4, 1), tasks.with_states, (folder / "chain", STATES, 5)),
        "grid": ((2, 2), tasks.with_states, (folder / "grid", STATES, 12)),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(ranks, name) -> (result, seconds) of each rank, all of it by as few processes as can be."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}

    def do(ranks, more):
        own = {f"fp32 {ranks}": ((ranks, 1), tasks.in_fp32, ())} | more
        for shape, names in EQUAL.items():
            if shape[0] * shape[1] == ranks:
                own |= {f"{shape} {name}": (shape, tasks.optimized, (name,)) for name in names}
        every = results(own, ranks, folder / f"of {ranks}")
        found.update({(ranks, name): result for name, result in every.items()})

    do(1, {})
    do(4, of_four(folder))
    damage(folder)
    do(2, of_two(folder))
    try:
        tasks.with_states(None, folder / "chain", STATES, 14)
    except KeyboardInterrupt as stopped:
        found["one process"] = stopped
    do(3, of_three(folder))
    found["folder"] = folder
    return found


def damage(folder):
    """Copies of the states of four ranks, in which the newest cannot be read, or none can."""
    for name in ("damaged", "missing", "all damaged"):
        shutil.copytree(folder / "grid", folder / name)
        shutil.copy(folder / "grid.jsonl", folder / f"{name}.jsonl")
        older, newest = sorted((folder / name).iterdir())
        for state in [older, newest] if name == "all damaged" else [newest]:
            part = sorted(state.glob("part-*"))[2]
            if name == "missing":
                part.unlink()
            else:
                content = bytearray(part.read_bytes())
                content[-100] ^= 1
                part.write_bytes(content)


@pytest.fixture(scope="module")
def one_process():
    """name -> the case's path in one process."""
    known = {}

    def of(name):
        if name not in known:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the (energy|loss) did not fall")
                known[name] = run(name)
        return known[name]

    return of


def assert_close(interior, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(interior[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape, name", [(s, name) for s, names in EQUAL.items() for name in names])
def test_a_mesh_optimises_as_one_process_does(found, one_process, shape, name):
    expected, (start, *_) = one_process(name), CASES[name]()
    moved = max((t - start.interior[n]).abs().max() for n, t in expected.interior.items())
    assert moved > 1e-2  # else it would prove nothing
    for result, _ in found[shape[0] * shape[1], f"{shape} {name}"]:
        interior, history = result
        assert_close(interior, expected.interior)
        for line, of_one in zip(history, expected.history, strict=True):
            assert line.keys() == of_one.keys()
            for key in line.keys() - {"seconds"}:
                assert line[key] == pytest.approx(of_one[key], rel=1e-12, abs=1e-12), key


def test_in_fp32_any_number_of_ranks_along_the_path_gives_the_same_bits(found):
    """With the loop engine; of 64 inputs, since vector instructions take other ways at the ends of
    tensors whose lengths they do not divide."""
    every = [result for ranks in (1, 2, 3, 4) for result, _ in found[ranks, f"fp32 {ranks}"]]
    assert len(every) == 10
    for interior in every[1:]:
        assert all(torch.equal(interior[name], tensor) for name, tensor in every[0].items())
    torch.testing.assert_close(every[0], tasks.in_fp32(None), rtol=1e-5, atol=1e-5)


def test_a_mesh_repeats_itself_to_the_last_bit(found):
    for (first, _), (again, _) in zip(
        found[4, "(2, 2) chunks of two"], found[4, "again"], strict=True
    ):
        assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
        assert [line["energy"] for line in first[1]] == [line["energy"] for line in again[1]]


def test_every_rank_is_given_its_section(found, one_process):
    """Neighbours' ends are each other's points, and lengths are those of the whole."""
    every = [result for result, _ in found[3, "sections"]]
    assert not every[0][0]  # no on_step there, which the others must not wait for
    whole = every[0][2]
    first = 0
    for seen, section, same in every:
        torch.testing.assert_close(same.interior, whole.interior, rtol=0, atol=0)
        for i, point in enumerate(section):
            torch.testing.assert_close(point, whole[first + i], rtol=0, atol=0)
        first += len(section) - 2
        assert len(seen) in (0, 8)
    assert first == len(whole) - 2
    length = sum(s.euclidean()[: None if s is every[-1][1] else -1].sum() for _, s, _ in every)
    assert whole.history[-1]["euclidean"] == pytest.approx(length.item(), rel=1e-12)
    middle = every[1][0]
    assert [metrics["points"] for metrics, _ in middle] == [5] * 4 + [9] * 3 + [11]
    assert [len(section) - 2 for _, section in middle] == [1] * 4 + [3] * 3 + [3]


@pytest.mark.parametrize("ranks", [3, 4])
def test_ranks_evaluate_a_path_together(found, ranks):
    def numbers(value):
        nested = value.values() if isinstance(value, dict) else value
        return [n for one in nested for n in (numbers(one) if hasattr(one, "__len__") else [one])]

    expected = numbers(tasks.evaluated(None))
    assert len(expected) == 2 * (6 + 6 + 4) + 5
    for result, _ in found[ranks, "evaluated"]:
        assert numbers(result) == pytest.approx(expected, rel=1e-12, abs=1e-12)


# --- States ---------------------------------------------------------------------------------------


def test_a_state_is_gone_on_from_on_any_mesh(found, one_process):
    """4 -> 2 -> 1 -> 3 ranks, each stopped by a signal to one rank in the middle of a level."""
    for ranks in (4, 2):
        assert {r.kind for r, _ in found[ranks, "chain"]} == {"Stopped"}
        assert {r.text for r, _ in found[ranks, "chain"]} == {"terminated"}
    assert found["one process"].exit_code == 143
    for (interior, told), _ in found[3, "chain"]:
        assert_close(interior, one_process(STATES).interior)
        assert not told
    log = (found["folder"] / "chain.jsonl").read_text().splitlines()
    assert len(log) == STEPS


def test_a_state_of_a_grid_is_gone_on_from_along_the_path(found, one_process):
    assert {r.kind for r, _ in found[4, "grid"]} == {"Stopped"}
    for (interior, told), _ in found[3, "grid"]:
        assert_close(interior, one_process(STATES).interior)
        assert not told


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_of_a_damaged_state_the_part_is_named_and_the_older_one_taken(found, one_process, how):
    for (interior, told), _ in found[3, how]:
        assert_close(interior, one_process(STATES).interior)
        (sentence,) = told
        assert re.search(r"part-00002-of-00004.*; going on from step 13 instead", sentence)


def test_without_an_intact_state_all_ranks_say_so(found):
    for raised, _ in found[3, "all damaged"]:
        assert raised.kind == "ValueError" and "no other state of optimize is there" in raised.text


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weights", "rate"])
def test_what_is_not_finite_in_one_block_is_said_as_by_one_process(found, where):
    with pytest.raises(ValueError) as expected:
        tasks.not_finite(None, where)
    for raised, seconds in found[2, where]:
        assert (raised.kind, raised.text) == ("ValueError", str(expected.value))
        assert seconds < SOON


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_ends_all_of_them(found, name):
    every = found[3 if "network" in name else 2, name]
    for rank, (raised, seconds) in enumerate(every):
        assert isinstance(raised, Raised)
        assert raised.text == ("" if rank == 1 else "rank 1 stopped: ") + ERRORS[name]
        assert raised.kind == "OtherRank" or rank == 1
        assert seconds < SOON


def test_an_error_of_a_callback_ends_all_ranks(found):
    first, *others = [raised for raised, _ in found[3, "callback"]]
    assert (first.kind, first.text) == ("ValueError", "nobody reads this")
    assert {raised.text for raised in others} == {"rank 0 stopped: nobody reads this"}


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("loaders disagree", "the ranks have drawn different batches; draw the same ones"),
        ("one loader ends", "the batches ended on 1 of 2 ranks and go on on others"),
        ("settings differ", "descent must be the same on all ranks; rank "),
        ("coupled", "what the module returns of an input depends on the others of its batch"),
    ],
)
def test_what_differs_between_ranks_is_said_on_all(found, name, sentence):
    for raised, seconds in found[2, name]:
        assert raised.kind == "ValueError" and raised.text.startswith(sentence)
        assert seconds < SOON


def test_where_rank_0_cannot_write_all_say_so(found):
    for raised, _ in found[2, "folder is a file"]:
        assert raised.kind == "OSError" and raised.text.startswith("cannot write ")


@pytest.mark.parametrize("what, file", [("state", "optimize-00000000[1-9]"), ("log", "log")])
def test_a_full_disk_of_rank_0_ends_all_and_leaves_the_states_before(found, what, file):
    for rank, (raised, seconds) in enumerate(found[2, what]):
        assert raised.kind == ("OtherRank" if rank and what == "log" else "OSError")
        assert re.search(rf"cannot write .*{file}: No space left on device$", raised.text)
        assert seconds < SOON
    left = [entry.name for entry in (found["folder"] / what).iterdir()]
    assert left and all(re.fullmatch(r"optimize-\d{9}", name) for name in left)


def test_a_folder_that_one_rank_does_not_see_is_said_on_all(found):
    for raised, seconds in found[2, "folders differ"]:
        assert raised.kind == "OSError" and "which rank 0 has made: all need one" in raised.text
        assert seconds < SOON


# --- What is sent and held ------------------------------------------------------------------------


P, B, C = 40 * 90 + 90 + 90 * 30 + 30, 64, 30


@pytest.mark.parametrize("shape, points", [((4, 1), 23), ((2, 2), 7), ((1, 2), 7)])
def test_bytes_a_step_are_those_of_the_formulas(found, shape, points):
    """A row of logits and a sum each way at every boundary; of the weights what a ring sends."""
    path, data = shape
    blocks = Blocks.deal(points - 2, path)
    for rank, (traffic, _) in enumerate(found[path * data, f"traffic {shape}"]):
        beside = sum(peer is not None for peer in blocks.beside(rank // data))
        row = B // data * C
        expected = dict(logits=4 * row * beside, sums=4 * P // data * beside)
        users = blocks.holding[0], blocks.holding[-1]
        ends = sum(r == rank // data != user for r, user in zip(blocks.ends, users, strict=True))
        expected["ends"] = 4 * row * ends
        held = 4 * blocks.of[rank // data].size * P
        for kind in ("gradients", "weights"):
            expected[kind] = held * (data - 1) / data
        sent = {kind: traffic["sent"].get(kind, 0) for kind in expected}
        assert sent == expected
        assert traffic["sent"]["agreement"] < 2000
        kinds = {kind for kind, count in traffic["sent"].items() if count}
        assert kinds <= {*expected, "agreement"}
        point = point_bytes(P, momentum=True, ranks=data)
        sizes = [tensor for what, tensor in point.items() if what != "gradient"]
        assert traffic["held"] == blocks.of[rank // data].size * sum(sizes)
        # The system's own count: with headers, and gloo reduces whole gradients, not a ring's share
        # of them; but there is no gather that is not told of.
        least = sum(expected.values())
        assert least <= traffic["seen"] < 1.1 * (least + expected["gradients"]) + 15_000


def test_communication_is_a_phase_of_a_step(found):
    first, late = (one for one, _ in found[2, "phases"])
    for rank, one in enumerate((first, late)):
        assert sum(one.phases.values()) == pytest.approx(one.ms)
        assert one.communication[rank] == pytest.approx(one.phases["communication"] / one.ms)
        assert all(0 < one.phases[name] for name in ("forward", "backward", "update"))
    assert late.phases["data"] > 50 and first.phases["communication"] > 40  # ms, waiting for it
    assert "Ranks send and wait for others in " in str(first)


def test_no_rank_makes_room_for_all_points(found):
    for traffic, _ in found[4, "traffic (4, 1)"]:
        rows = {shape[0] for shape in traffic["shapes"] if shape[1:].numel() > 23}
        assert rows and not rows & {21, 22, 23}


def test_steps_keep_nothing_of_the_path_that_they_are_given():
    path = linear(5)
    given = [weakref.ref(path.interior[name]) for name in ("first.weight", "twice.weight")]
    step = Step(path, Net().double(), Descent())
    del path
    assert [one() for one in given] == [None, None]
    assert len(step.copied_path()) == 5


def test_without_a_mesh_nothing_of_ranks_is_imported():
    code = (
        "import sys, torch, fastgeo;"
        "m = torch.nn.Linear(2, 3);"
        "p = fastgeo.Path.linear(m, torch.nn.Linear(2, 3), 3);"
        "fastgeo.optimize(p, m, [torch.randn(4, 2)], steps=1);"
        "assert not [n for n in sys.modules if n.startswith('fastgeo.ranks')];"
        "assert not torch.distributed.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("points", [1, 2, 7, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_blocks_are_even_and_the_ends_are_where_there_is_least_to_do(points, ranks):
    blocks = Blocks.deal(points, ranks)
    sizes = [block.size for block in blocks.of]
    assert sum(sizes) == points and max(sizes) - min(sizes) <= 1
    assert [block.first for block in blocks.of[1:]] == [block.last for block in blocks.of[:-1]]
    load = [POINT * size + END * blocks.ends.count(r) for r, size in enumerate(sizes)]
    assert max(load) <= max(POINT * max(sizes), POINT * min(sizes) + 2 * END) or ranks == 1
