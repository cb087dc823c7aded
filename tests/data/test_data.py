"""Data sets: what is bundled, what torchvision and npz files give, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgeo import Path, data, evaluate, optimize
from fastgeo.data import images
from fastgeo.data.arrays import TORCHVISION

ARRAYS = {
    "x_train": np.arange(20 * 8 * 6 * 3).reshape(20, 8, 6, 3).astype(np.uint8),
    "y_train": np.arange(20) % 4,
    "x_test": np.arange(8 * 8 * 6 * 3).reshape(8, 8, 6, 3).astype(np.uint8),
    "y_test": np.arange(8)[:, None] % 4,  # [n, 1], as Keras stores CIFAR
}


def npz(folder, **changes):
    np.savez(folder / "data.npz", **{k: v for k, v in (ARRAYS | changes).items() if v is not None})
    return f"npz:{folder / 'data.npz'}"


def test_digits_are_the_uci_digits_in_a_fixed_split():
    digits = data.load("digits")
    assert digits.train.images.shape == (1437, 1, 8, 8) and digits.test.images.shape[0] == 360
    assert digits.num_classes == 10 and not digits.augmented
    labels = torch.cat([digits.train.labels, digits.test.labels])
    # the class counts and pixel sum of the published 1,797 images
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    pixels = torch.cat([digits.train.images, digits.test.images])
    assert pixels.max() == 16 and pixels.long().sum() == 561718


def test_normalised_training_images_have_mean_0_and_deviation_1(tmp_path):
    floats = {"x_train": np.random.rand(20, 8, 6, 3), "x_test": np.random.rand(8, 8, 6, 3)}
    for name in ("digits", npz(tmp_path), npz(tmp_path, **floats)):
        dataset = data.load(name)
        x = dataset.normalize(dataset.train.images).double()
        assert x.mean((0, 2, 3)).abs().max() < 1e-5
        torch.testing.assert_close(
            x.std((0, 2, 3), correction=0), torch.ones_like(x[0, :, 0, 0]), rtol=1e-4, atol=0
        )


def test_npz_images_arrive_channels_first_and_unchanged(tmp_path):
    dataset = data.load(npz(tmp_path))
    assert dataset.image_shape == (3, 8, 6) and dataset.num_classes == 4
    assert dataset.train.images.dtype == torch.uint8
    expected = ARRAYS["x_train"].transpose(0, 3, 1, 2)
    assert np.array_equal(dataset.train.images.numpy(), expected)
    assert dataset.test.labels.tolist() == [0, 1, 2, 3] * 2
    grey = {k: ARRAYS[k][..., 0] for k in ("x_train", "x_test")}
    assert data.load(npz(tmp_path, **grey)).image_shape == (1, 8, 6)


@pytest.mark.parametrize("channels, sides", [(1, (8, 6)), (3, (9, 5)), (4, (6, 5)), (12, (7, 7))])
def test_channels_first_is_seen_where_only_that_makes_sense(tmp_path, channels, sides):
    """Both layouts of the same images arrive the same."""
    first = {
        f"x_{split}": np.random.randint(0, 256, (n, channels, *sides), np.uint8)
        for split, n in (("train", 20), ("test", 8))
    }
    last = {name: x.transpose(0, 2, 3, 1) for name, x in first.items()}
    for arrays in (first, last):
        dataset = data.load(npz(tmp_path, **arrays))
        assert dataset.image_shape == (channels, *sides)
        assert np.array_equal(dataset.train.images.numpy(), first["x_train"])
        assert np.array_equal(dataset.test.images.numpy(), first["x_test"])
        assert dataset.mean.shape == (channels, 1, 1)


@pytest.mark.parametrize(
    "shape, which", [((3, 8, 3), "either"), ((9, 9, 9), "either"), ((20, 30, 12), "neither")]
)
def test_a_layout_that_cannot_be_seen_is_refused(tmp_path, shape, which):
    arrays = {f"x_{s}": np.ones((n, *shape), "u1") for s, n in (("train", 20), ("test", 8))}
    with pytest.raises(ValueError, match=rf"x_train is \[20, .*{which} of \[n, H, W, C\] and"):
        data.load(npz(tmp_path, **arrays))


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            dict(x_train=ARRAYS["x_train"] / 255),
            "x_train is float32 within 0..1 and x_test is uint8",
        ),
        (dict(x_test=ARRAYS["x_test"] / 255), "x_train is uint8 .* x_test is float32 within 0..1;"),
        (
            {"x_train": ARRAYS["x_train"] / 255, "x_test": ARRAYS["x_test"].astype(float)},
            "float32 within 0..1 and x_test is float32 within 0..255; scale both alike",
        ),
        (
            {"x_train": ARRAYS["x_train"] / 64 - 2, "x_test": ARRAYS["x_test"] / 64},
            "within -2..1.98438 and x_test is float32 within 0..3.98",
        ),
        (dict(x_test=ARRAYS["x_test"] // 128), "within 0..255 and x_test is uint8 within 0..1"),
    ],
)
def test_splits_of_another_scale_are_refused(tmp_path, changes, words):
    """The moments of one would not normalise the other."""
    with pytest.raises(ValueError, match=words):
        data.load(npz(tmp_path, **changes))


def test_splits_that_differ_a_little_are_of_one_scale(tmp_path):
    x, dark = ARRAYS["x_train"] / 255, np.zeros_like(ARRAYS["x_test"])
    for train, test in (
        (x, x[:8] / 3),
        (x.astype("f2"), x[:8]),
        (x - 0.004, x[:8]),  # as a filter leaves them
        (ARRAYS["x_train"], dark),
    ):
        data.load(npz(tmp_path, x_train=train, x_test=test))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64"])
def test_labels_may_be_unsigned(dtype, module, path):
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.arange(20) % 5
    unsigned = y.to(getattr(torch, dtype))
    expected = evaluate(path, module, {"test": (x, y)}).to_json()
    assert evaluate(path, module, {"test": (x, unsigned)}).to_json() == expected
    batches = [(x[:8], unsigned[:8]), (x[8:], unsigned[8:])]
    in_batches = evaluate(path, module, {"test": batches}).splits["test"]
    assert in_batches.loss == pytest.approx(expected["test"]["loss"])
    moved = [optimize(path, module, [(x, targets)], steps=2).interior for targets in (y, unsigned)]
    torch.testing.assert_close(*moved)


class Binary(nn.Module):
    """One logit, as [B, 1] or [B], or as two of the same probabilities."""

    def __init__(self, form):
        super().__init__()
        self.form, self.layer = form, nn.Linear(3, 1)

    def forward(self, x):
        z = self.layer(x)
        if self.form == "two":
            return torch.cat([torch.zeros_like(z), z], -1)
        return z[:, 0] if self.form == "[B]" else z


@pytest.mark.parametrize("form, words", [("[B, 1]", "torch.cat"), ("[B]", "torch.stack")])
def test_one_logit_is_refused_and_two_are_made_of_it(form, words):
    x, y = torch.randn(10, 3), torch.arange(10) % 2
    path = Path.linear(Binary(form), Binary(form), 5)
    with pytest.raises(ValueError, match=rf"of a binary classifier,? return {words}"):
        optimize(path, Binary(form), [x])
    with pytest.raises(ValueError, match="binary classifier"):
        evaluate(path, Binary(form), {"test": (x, y)})
    found = evaluate(path, Binary("two"), {"test": (x, y)})
    q = torch.stack([F.linear(x, *point.values())[:, 0] for point in path]).double().sigmoid()
    p = torch.stack([1 - q, q], -1)
    m = (p[1:] + p[:-1]) / 2
    js_div = sum((r * (r / m).log()).sum(-1) / 2 for r in (p[1:], p[:-1])).mean(1)
    assert found.energy == pytest.approx(js_div.sum().item(), rel=1e-4)


def test_train_subset_takes_the_first_images_and_keeps_the_normalisation(tmp_path):
    whole, part = data.load(npz(tmp_path)), data.load(npz(tmp_path), train_subset=5)
    assert torch.equal(part.train.images, whole.train.images[:5])
    assert torch.equal(part.mean, whole.mean) and len(part.test.labels) == 8
    for count in (0, 21):
        with pytest.raises(ValueError, match=f"within 1..20.* got {count}"):
            data.load(npz(tmp_path), train_subset=count)


def test_flip_and_crop_is_a_window_of_the_reflected_image():
    """Every result is one of the 2 x 81 windows of numpy's reflect-padded image; all occur."""
    image = torch.arange(3 * 8 * 10).view(1, 3, 8, 10)
    padded = np.pad(image[0].numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = {}
    for y in range(9):
        for x in range(9):
            window = padded[:, y : y + 8, x : x + 10]
            windows[window.tobytes()] = (y, x, False)
            windows[np.ascontiguousarray(window[:, :, ::-1]).tobytes()] = (y, x, True)
    assert len(windows) == 162
    out = images.flip_and_crop(image.expand(5000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert out.stride() == torch.empty(out.shape).stride()
    assert out.shape == (5000, 3, 8, 10)
    seen = {windows[np.ascontiguousarray(each).tobytes()] for each in out.numpy()}
    assert len(seen) == 162


def test_shuffled_batches_cover_an_epoch_in_a_seeded_order(tmp_path):
    dataset = data.load(npz(tmp_path, y_train=np.arange(20)))

    def labels(seed, epochs):
        generator = torch.Generator().manual_seed(seed)
        return [y.tolist() for _, y in dataset.shuffled(6, generator, epochs=epochs)]

    first = labels(0, 2)
    assert len(first) == 6 and all(len(y) == 6 for y in first)
    assert len(set(sum(first[:3], []))) == 18 and first[:3] != first[3:]
    assert labels(0, 2) == first != labels(1, 2)


def test_inputs_belong_to_their_labels(tmp_path):
    shade = np.arange(20, dtype=np.uint8)
    x_train = np.broadcast_to(shade[:, None, None], (20, 8, 8))
    grey = dict(x_train=x_train, x_test=x_train[:8], y_train=np.arange(20))
    dataset = data.load(npz(tmp_path, **grey), augment="flip-crop")
    for x, y in dataset.shuffled(4, torch.Generator().manual_seed(0), epochs=1):
        assert torch.equal(x, dataset.normalize(y[:, None, None, None].expand(4, 1, 8, 8)))
    batches = dataset.in_order("train", 6)
    assert len(batches) == 4 and torch.cat([y for _, y in batches]).tolist() == list(range(20))


def test_augmentation_happens_only_where_it_was_asked_for(tmp_path):
    name = npz(tmp_path)
    for augment, changed in (("auto", False), ("none", False), ("flip-crop", True)):
        dataset = data.load(name, augment=augment)
        index = torch.arange(20)
        x = dataset.inputs(index, torch.Generator().manual_seed(0))
        assert torch.equal(x, dataset.inputs(index)) != changed


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_torchvision_data_sets_are_read_from_their_files(name, folder, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    x = np.arange(30 * 28 * 28).reshape(30, 28, 28).astype(np.uint8)
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + x[:count].tobytes()
        labels = struct.pack(">II", 0x801, count) + (np.arange(count) % 10).astype("u1").tobytes()
        for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)
            (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    dataset = data.load(name, root=str(tmp_path))
    assert np.array_equal(dataset.train.images[:, 0].numpy(), x)
    assert dataset.test.labels.tolist() == list(range(10)) and not dataset.augmented


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_as_torchvision_holds_it(name, classes, tmp_path, monkeypatch):
    """torchvision checks the digest of its archive, so its class is replaced by its interface."""
    from torchvision import datasets

    class Stored:
        def __init__(self, root, train, download):
            assert download
            count = 2 * classes if train else classes
            self.data = np.full((count, 32, 32, 3), 7, np.uint8)
            self.targets = [i % classes for i in range(count)]

    monkeypatch.setattr(datasets, TORCHVISION[name], Stored)
    dataset = data.load(name, root=str(tmp_path))
    assert dataset.image_shape == (3, 32, 32) and dataset.num_classes == classes
    assert len(dataset.train.labels) == 2 * classes and dataset.augmented


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    from torchvision import datasets

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(ValueError, match="cannot obtain cifar10 .* no network; .* npz:PATH"):
        data.load("cifar10", root=str(tmp_path))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(x_test=None), "must hold x_train, y_train, x_test, y_test: x_test is not"),
        (dict(y_train=np.zeros(19, int)), "x_train has 20 images and y_train 19 labels"),
        (dict(y_test=np.full(8, 4)), "y_test has class 4, outside 0..3"),
        (dict(y_train=np.full(20, -1)), "y_train has class -1; classes count from 0"),
        (dict(y_test=np.zeros(8)), "y_test must be integers"),
        (dict(y_test=np.array(3)), "y_test must be integers"),
        (dict(y_test=np.full(8, 2**63, "u8")), "y_test has class 9223372036854775808"),
        (dict(y_train=np.full(20, 2**40)), "y_train has class 1099511627776; classes count"),
        (
            dict(y_train=np.zeros((20, 4), int)),
            r"y_train must be integers \[n\], got int64 \[20, 4",
        ),
        (dict(x_test=np.ones((8, 9, 6, 3), np.uint8)), "train images are .* and test images"),
        (dict(x_train=np.zeros((20, 5), np.uint8)), r"must be images .* got \[20, 5\]"),
        (dict(y_train=np.full(20, 2)), "y_train has class 2 only; there is nothing to tell"),
        (dict(x_train=np.zeros((20, 8, 6, 3), int)), "must be uint8 or float, got int64"),
        (dict(x_train=np.full((20, 8, 6, 3), np.nan)), "not finite"),
        (dict(y_train=np.array([None] * 20)), "cannot read .*data.npz"),
    ],
)
def test_damaged_npz_files_are_named(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        data.load(npz(tmp_path, **changes))


def test_files_that_are_no_archives_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.npz: there is no such file"):
        data.load(f"npz:{tmp_path / 'none.npz'}")
    file = tmp_path / "data.npz"
    for content in (b"", b"hello", npz(tmp_path).encode()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="data.npz: it is not a NumPy archive"):
            data.load(f"npz:{file}")
    npz(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        data.load(f"npz:{file}")
    np.savez_compressed(file, **ARRAYS)
    content = bytearray(file.read_bytes())
    content[60:90] = bytes(30)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read"):
        data.load(f"npz:{file}")
    np.save(tmp_path / "single.npy", ARRAYS["x_train"])
    with pytest.raises(ValueError, match="cannot read"):
        data.load(f"npz:{tmp_path / 'single.npy'}")
    with pytest.raises(ValueError, match="Is a directory"):
        data.load(f"npz:{tmp_path}")


def test_batches_that_cannot_be_are_refused(tmp_path):
    dataset, generator = data.load(npz(tmp_path)), torch.Generator()
    for size in (0, 21):
        with pytest.raises(ValueError, match=f"within 1..20, the training images, got {size}"):
            next(dataset.shuffled(size, generator))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        dataset.in_order("train", 0)
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        dataset.in_order("valid", 4)


def test_augmented_batches_in_order_are_the_same_in_every_pass(tmp_path):
    dataset = data.load(npz(tmp_path))
    first, again, other = (
        torch.cat([x for x, _ in batches])
        for batches in [dataset.in_order("train", 6, augment_seed=1)] * 2
        + [dataset.in_order("train", 6, augment_seed=2)]
    )
    plain = torch.cat([x for x, _ in dataset.in_order("train", 6)])
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, plain)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match="one of digits, cifar10, .* npz:PATH, or a function .*, got 'imagenet'"
    ):
        data.load("imagenet")
    with pytest.raises(ValueError, match="'flip-crop', got 'mixup'"):
        data.load("digits", augment="mixup")
