"""Images and labels of a data set as arrays: the bundled one, torchvision's, or a file's.

`digits` is bundled: Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0.
"""

import zipfile
import zlib
from importlib import resources
from pathlib import Path as FilePath

import numpy as np

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "mnist": "MNIST",
    "fashion-mnist": "FashionMNIST",
}
NAMES = ("digits", *TORCHVISION, "text:FILE_OR_FOLDER (in Python load_text)", "npz:PATH")


def read_arrays(name: str, root: str) -> list[np.ndarray]:
    """Training images and labels, then those for testing, of `name` as in `fastgeo.data.load`.

    Raises:
        ValueError: an unknown name, or data that cannot be read or obtained.
    """
    if name == "digits":
        return _from_npz(FilePath(str(resources.files("fastgeo.data") / "digits.npz")))
    if name in TORCHVISION:
        return _from_torchvision(name, root)
    if name.startswith("npz:"):
        return _from_npz(FilePath(name.removeprefix("npz:")).expanduser())
    raise ValueError(
        f"data must be one of {', '.join(NAMES)}, or a function that returns loaders as "
        f"PACKAGE.MODULE:FUNCTION, got {name!r}"
    )


def _from_npz(file: FilePath) -> list[np.ndarray]:
    keys = ("x_train", "y_train", "x_test", "y_test")
    try:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
        with archive:
            arrays = [archive[key] for key in keys]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("members that are no arrays")
    except KeyError as error:
        raise ValueError(f"{file} must hold {', '.join(keys)}: {error.args[0]}") from error
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {file}: there is no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except (OSError, ValueError, EOFError, NotImplementedError, MemoryError) as error:
        raise ValueError(f"cannot read {file}: it is not a NumPy archive (.npz)") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot read {file}: it is damaged ({error})") from error
    return arrays


def _from_torchvision(name: str, root: str) -> list[np.ndarray]:
    from torchvision import datasets

    folder = FilePath(root).expanduser()
    arrays = []
    for train in (True, False):
        try:
            stored = getattr(datasets, TORCHVISION[name])(folder, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"cannot obtain {name} in {folder}: {str(error).splitlines()[0]}; "
                "a local copy can be given as npz:PATH"
            ) from error
        arrays += [np.asarray(stored.data), np.asarray(stored.targets)]
    return arrays
