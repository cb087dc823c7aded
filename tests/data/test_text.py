"""Text: how it is read, cut into blocks and given in batches, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgeo import Path, data, evaluate, optimize
from fastgeo.data import text as module

LINE = "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch"
POEM = "".join(f"{i}. {LINE} {7**i}. " for i in range(5))


@pytest.fixture
def poem(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_bytes(POEM.encode())
    return file


def splits(length):
    return [0, int(0.9 * length), int(0.95 * length), length]


def all_of(found, split):
    inputs, targets = (torch.cat(t) for t in zip(*found.in_order(split, 3), strict=True))
    return inputs, targets


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_blocks_hold_every_token_once_and_the_one_that_follows(poem, size):
    found = data.load_text(str(poem), block_size=size)
    characters = sorted(set(POEM))
    assert found.num_classes == len(characters) and found.block_size == size
    ids = [characters.index(c) for c in POEM]
    bounds = splits(len(POEM))
    for split, start, end in zip(module.SPLITS, bounds, bounds[1:], strict=False):
        own = ids[start:end]
        inputs, targets = all_of(found, split)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (math.ceil((len(own) - 1) / size), size)
        flat, following = inputs.flatten().tolist(), targets.flatten().tolist()
        count = len(own) - 1
        assert flat[:count] == own[:-1] and following[:count] == own[1:]
        assert set(following[count:]) <= {-100} and set(flat[count + 1 :]) <= {0}


def test_bytes_are_tokens_whatever_the_file_holds(tmp_path):
    content = bytes(range(256)) * 2
    (tmp_path / "b.bin").write_bytes(content)
    found = data.load_text(str(tmp_path / "b.bin"), tokens="bytes", block_size=50)
    inputs, _ = all_of(found, "test")
    assert found.num_classes == 256
    assert bytes(inputs.flatten().tolist()[:25]) == content[-26:-1]


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_a_tokenizer_of_ones_own(poem, kind):
    found = data.load_text(str(poem), tokens=lambda text: (kind(list(map(len, text.split()))), 9))
    lengths = [len(word) for word in POEM.split()]
    inputs, _ = all_of(found, "train")
    assert found.num_classes == 9
    assert (
        inputs.flatten()[: splits(len(lengths))[1] - 1].tolist()
        == lengths[: inputs.numel()][: splits(len(lengths))[1] - 1]
    )


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    texts = {"b.txt": "second " * 9, "a.py": "first " * 9, "sub/c.md": "third " * 9}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "0.bin").write_text("not text by its name")
    expected = "\n".join(texts[name] for name in ("a.py", "b.txt", "sub/c.md"))
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe no UTF-8")
    found = data.load_text(str(tmp_path))
    said = capsys.readouterr().err
    assert said == f"left out, since they are not UTF-8: {tmp_path / '0.txt'}\n"
    characters = sorted(set(expected))
    inputs, _ = all_of(found, "train")
    end = splits(len(expected))[1] - 1
    assert "".join(characters[i] for i in inputs.flatten()[:end]) == expected[:end]


def test_the_standard_library_is_on_every_machine():
    files = module.text_files("stdlib")
    assert all(file.is_file() for file in files) and len(files) == len(set(files))
    assert 1e6 < sum(file.stat().st_size for file in files) < 3e6
    found = data.load_text("stdlib", train_subset=10)
    assert found.train.shape == (10, 65) and found.training_size == "10 training blocks"


def test_shuffled_blocks_go_on_from_where_they_were(poem):
    found = data.load_text(str(poem), block_size=8, tokens=lambda t: (range(len(t)), len(t)))
    stream = found.shuffled(4, torch.Generator().manual_seed(1))
    epoch = [next(stream) for _ in range(found.batches_per_epoch(4))]
    drawn = torch.cat([inputs for inputs, _ in epoch])
    assert len(drawn) == len(drawn.unique(dim=0)) == found.training_inputs // 4 * 4
    expected = [next(stream) for _ in range(3)]
    place = stream.state_dict()
    expected += [next(stream) for _ in range(found.batches_per_epoch(4))]
    again = found.shuffled(4, torch.Generator())
    again.load_state_dict(place)
    for inputs, targets in expected[3:]:
        own_inputs, own_targets = next(again)
        assert torch.equal(inputs, own_inputs) and torch.equal(targets, own_targets)
    assert not torch.equal(epoch[0][0], expected[0][0])


def test_padding_counts_in_no_loss(poem):
    """Blocks that end together and blocks with padding give the same mean over the tokens."""
    found = data.load_text(str(poem), block_size=1000)
    assert found.train.shape[0] == 1
    torch.manual_seed(0)
    ends = [nn.Sequential(nn.Embedding(found.num_classes, found.num_classes)) for _ in range(2)]
    path = Path.linear(*ends, 3)
    ((inputs, targets),) = found.in_order("train", 1)
    count = splits(len(POEM))[1] - 1
    evaluation = evaluate(path, ends[0], found.in_order("train", 1)).splits["data"]
    own = [F.cross_entropy(end(inputs)[0, :count], targets[0, :count]) for end in ends]
    assert [evaluation.loss[i] for i in (0, -1)] == pytest.approx([x.item() for x in own])
    padded = optimize(path, ends[0], [(inputs, targets)], steps=1)
    plain = optimize(path, ends[0], [(inputs[:, :count], targets[:, :count])], steps=1)
    assert padded.history[0]["energy"] == pytest.approx(plain.history[0]["energy"])
    torch.testing.assert_close(padded.interior, plain.interior)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(block_size=0), "block_size must be at least 1"),
        (dict(tokens="words"), "characters, bytes or a function, got 'words'"),
        (dict(tokens=lambda text: [1, 2]), r"as \(ids, size\): .* got list"),
        (dict(tokens=lambda text: ([0.5], 2)), "integers .* got torch.float32"),
        (dict(tokens=lambda text: ([3] * 99, 3)), r"got 3..3 and 3"),
        (dict(tokens=lambda text: ([1] * 9, 3)), "has 9 tokens of a vocabulary of 3, too few"),
        (dict(train_subset=999), "train-subset must be within 1..6, the training blocks"),
    ],
)
def test_what_cannot_be_meant_is_refused(poem, options, words):
    with pytest.raises(ValueError, match=words):
        data.load_text(str(poem), **options)


def test_files_that_are_no_text_are_named(tmp_path, poem):
    with pytest.raises(ValueError, match="none.txt: there is no such file"):
        data.load_text(str(tmp_path / "none.txt"))
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="sub has no files that end in .txt, .md, .py"):
        data.load_text(str(tmp_path / "sub"))
    poem.write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"poem.txt: it is not UTF-8 \(byte 2 of it\)"):
        data.load_text(str(poem))
    poem.write_bytes(b"")
    with pytest.raises(ValueError, match="0 tokens of a vocabulary of 0"):
        data.load_text(str(poem))
    poem.write_text("aaaa" * 20)
    with pytest.raises(ValueError, match="80 tokens of a vocabulary of 1, too few"):
        data.load_text(str(poem))
    poem.write_text(POEM)
    found = data.load_text(str(poem))
    with pytest.raises(ValueError, match="'train' or 'validation' or 'test', got 'valid'"):
        found.in_order("valid", 4)
    with pytest.raises(ValueError, match="within 1..6, the training blocks, got 7"):
        found.shuffled(7, torch.Generator())
