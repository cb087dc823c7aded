"""Path: the line, points, interpolation, lengths, files."""

import json

import pytest
import torch
from conftest import tiny_resnet
from torch import nn

from fastgeo import Path
from fastgeo.path import check_path_of


def test_linear_places_points_evenly(path):
    a, b, n = path.start, path.end, len(path)
    points = list(path.points())
    assert n == len(points) == 7
    for i, point in enumerate(points):
        for name in a:
            expected = a[name] + i / (n - 1) * (b[name] - a[name])
            torch.testing.assert_close(point[name], expected)


def test_release_spacing_is_i_over_n_plus_1():
    a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    path = Path.linear(a, b, 5, spacing="release")
    position = [point["w"][0].item() for point in path.points()]
    assert position == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 1])


def test_at_hits_points_and_is_linear_between_them(path):
    path.interior["linear.bias"] += torch.randn_like(path.interior["linear.bias"])
    points = list(path.points())
    for i in range(7):
        torch.testing.assert_close(path.at(i / 6), points[i])
    middle = path.at(2.25 / 6)
    for name in middle:
        expected = 0.75 * points[2][name] + 0.25 * points[3][name]
        torch.testing.assert_close(middle[name], expected)


def test_at_is_a_state_dict_of_the_module(path, module):
    module.load_state_dict(path.at(0.5))
    with pytest.raises(ValueError, match=r"within \[0, 1\], got 1.5"):
        path.at(1.5)


def test_stacked_has_the_form_of_torch_func(path):
    networks = [tiny_resnet() for _ in range(7)]
    for network, point in zip(networks, path.points(), strict=True):
        network.load_state_dict(point)
    expected, _ = torch.func.stack_module_state(networks)
    assert list(path.stacked()) == list(expected)
    torch.testing.assert_close(path.stacked(), {k: v.detach() for k, v in expected.items()})


def test_euclidean_is_the_distance_of_flattened_neighbours(path):
    path.interior["linear.weight"] += torch.randn_like(path.interior["linear.weight"])
    flat = [torch.cat([t.flatten() for t in point.values()]) for point in path.points()]
    expected = [(q - p).norm().item() for p, q in zip(flat[:-1], flat[1:], strict=True)]
    assert path.euclidean().tolist() == pytest.approx(expected)


def test_a_path_is_a_copy_of_its_ends():
    a, b = tiny_resnet(seed=1), tiny_resnet(seed=2)
    path = Path.linear(a, b, 3)
    before = path.start["conv1.weight"].clone()
    with torch.no_grad():
        a.conv1.weight.zero_()
    assert torch.equal(path.start["conv1.weight"], before)


def test_save_and_load_round_trip_bit_for_bit(path, tmp_path):
    path.save(tmp_path / "path.safetensors")
    loaded = Path.load(tmp_path / "path.safetensors")
    for part in ("start", "interior", "end"):
        stored, original = getattr(loaded, part), getattr(path, part)
        assert list(stored) == list(original)
        assert all(torch.equal(stored[name], original[name]) for name in original)
    assert [f.name for f in tmp_path.iterdir()] == ["path.safetensors"]


def test_the_file_is_plain_safetensors_with_a_version(path, tmp_path):
    path.save(tmp_path / "path.safetensors")
    content = (tmp_path / "path.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    ours = json.loads(header["__metadata__"]["fastgeo"])
    assert (ours["kind"], ours["schema"]) == ("path", 1)
    assert header["interior/linear.weight"]["shape"] == [5, 5, 16]


def test_points_are_had_by_number_and_one_after_the_other(path):
    for i in range(7):
        torch.testing.assert_close(path[i], path.at(i / 6), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(path[i - 7], path[i], rtol=0, atol=0)
    torch.testing.assert_close(list(path), list(path.points()), rtol=0, atol=0)
    assert path[torch.tensor(2)].keys() == path.start.keys()
    for i in (7, -8):
        with pytest.raises(IndexError, match=rf"has 7 points, 0..6 or -7..-1, got {i}"):
            path[i]
    with pytest.raises(TypeError):
        path["conv1.weight"]


def test_a_path_says_how_large_it_is():
    path = Path.linear({"w": torch.zeros(2**20)}, {"w": torch.ones(2**20)}, 5)
    assert repr(path) == "Path(5 points of 1,048,576 numbers (float32) each; 20.0 MiB, cpu)"
    mixed = {"w": torch.zeros(3).bfloat16(), "n": torch.ones(2), "calls": torch.tensor(1)}
    assert "6 numbers (bfloat16, float32, int64) each" in repr(Path.linear(mixed, mixed, 3))


def test_unreadable_path_files_get_a_sentence(path, tmp_path):
    file = tmp_path / "path.safetensors"
    with pytest.raises(ValueError, match="path.safetensors: there is no such file"):
        Path.load(file)
    path.save(file)
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[:-1], b"\x80\x04junk" * 20):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read .*path.safetensors"):
            Path.load(file)
    file.write_bytes(content.replace(rb"kind\": \"path", rb"kind\": \"ends"))
    with pytest.raises(ValueError, match="holds no path"):
        Path.load(file)
    file.write_bytes(content.replace(rb"schema\": 1", rb"schema\": 2"))
    with pytest.raises(ValueError, match="schema 2"):
        Path.load(file)


def test_integer_entries_stay_and_floating_buffers_interpolate(tmp_path):
    def network(scale):
        module = nn.Linear(2, 2)
        module.register_buffer("index", torch.arange(3))
        module.register_buffer("table", torch.full((2,), scale))
        return module

    path = Path.linear(network(1.0), network(3.0), 3, interpolate_buffers=["table"])
    assert "index" not in path.interior
    middle = path.at(0.5)
    assert torch.equal(middle["index"], torch.arange(3))
    assert torch.equal(middle["table"], torch.full((2,), 2.0))
    assert path.stacked()["index"].shape == (3, 3)
    path.save(tmp_path / "p")
    loaded = Path.load(tmp_path / "p")
    assert torch.equal(loaded.at(0.2)["index"], torch.arange(3))
    assert loaded.interpolated == path.resample(5).interpolated == {"table"}


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda b: b.pop("linear.bias"), ValueError, "linear.bias is in a and not in b"),
        (lambda b: b.update(extra=torch.ones(1)), ValueError, "extra is in b and not in a"),
        (
            lambda b: b.update({"conv1.weight": torch.ones(4, 3, 3, 3)}),
            ValueError,
            r"conv1.weight has shape \[4, 1, 3, 3\] in a and \[4, 3, 3, 3\] in b",
        ),
        (
            lambda b: b.update({"linear.bias": b["linear.bias"].half()}),
            ValueError,
            "linear.bias has dtype torch.float64 in a and torch.float16 in b",
        ),
        (lambda b: b.update(extra="text"), TypeError, "a state dict: extra is a str"),
    ],
)
def test_ends_that_differ_are_named(change, error, words):
    a, b = tiny_resnet(seed=1).state_dict(), tiny_resnet(seed=2).state_dict()
    change(b)
    with pytest.raises(error, match=words):
        Path.linear(a, b, 5)


def test_half_precision_lengths_do_not_overflow():
    for dtype in (torch.float16, torch.bfloat16):
        a, b = {"w": torch.zeros(100, dtype=dtype)}, {"w": torch.full((100,), 300, dtype=dtype)}
        assert Path.linear(a, b, 3).euclidean().sum().item() == pytest.approx(3000, rel=1e-2)


def test_ends_without_numbers_to_interpolate_are_refused():
    for end in ({}, {"index": torch.arange(3)}):
        with pytest.raises(ValueError, match="no floating point entries"):
            Path.linear(end, end, 5)


def test_fewer_than_three_points_are_refused(path):
    with pytest.raises(ValueError, match="at least 3 .* got 2"):
        Path.linear(path.start, path.end, 2)
    with pytest.raises(ValueError, match="'even' or 'release', got 'odd'"):
        Path.linear(path.start, path.end, 5, spacing="odd")


def test_batch_norm_statistics_are_refused():
    with pytest.raises(ValueError, match="running_mean belongs to a BatchNorm.*GroupNorm"):
        Path.linear(nn.BatchNorm1d(3), nn.BatchNorm1d(3), 3)


def test_extra_states_are_left_out_and_packed_ones_are_named():
    class Extra(torch.nn.Linear):
        def get_extra_state(self):
            return {"scale": 1}

        def set_extra_state(self, state):
            pass

    path = Path.linear(Extra(4, 2), Extra(4, 2), 3)
    assert list(path.start) == ["weight", "bias"]
    assert check_path_of(path, Extra(4, 2))
    state = {"weight": torch.ones(2), "packed": ("a", 1)}
    with pytest.raises(TypeError, match="a state dict: packed is a tuple, and no tensor of num"):
        Path.linear(state, state, 3)
    state["packed"] = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match="a state dict: packed is quantised"):
        Path.linear(state, state, 3)


def test_half_precision_states_want_a_module_of_their_type():
    state = torch.nn.Linear(3, 2).bfloat16().state_dict()
    path = Path.linear(state, state, 3)
    with pytest.raises(ValueError, match=r"dtype torch.bfloat16 in the path and torch.float32 in"):
        check_path_of(path, torch.nn.Linear(3, 2))
    assert check_path_of(path, torch.nn.Linear(3, 2).bfloat16())


def test_a_mask_of_infinite_numbers_has_no_length():
    """A buffer that is alike in both ends, and infinite as additive masks are."""

    def masked(seed):
        module = nn.Linear(3, 2)
        torch.manual_seed(seed)
        nn.init.normal_(module.weight)
        module.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        return module

    a, b = masked(0), masked(1)
    step = (
        torch.cat([(p - q).flatten() for p, q in zip(a.parameters(), b.parameters(), strict=True)])
        / 4
    )
    torch.testing.assert_close(Path.linear(a, b, 5).euclidean(), step.norm().detach().expand(4))
