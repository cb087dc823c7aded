"""Files of weights that users have."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from fastgeo.app.weights import read_state


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net."),
        *("_fsdp_wrapped_module.", "model.module."),
    ],
)
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model", "net"])
def test_checkpoints_of_wrapped_modules_are_read(tmp_path, capsys, prefix, key):
    state = net().state_dict()
    content = {prefix + name: tensor for name, tensor in state.items()}
    content = content if key is None else {"epoch": 3, key: content}
    torch.save(content, tmp_path / "a.pt")
    torch.testing.assert_close(read_state(str(tmp_path / "a.pt"), net()), dict(state))
    assert ("names are taken without" in capsys.readouterr().err) == bool(prefix)


def test_wrappers_of_layers_averages_and_extra_states_are_read(tmp_path):
    module, file = net(), tmp_path / "a.pt"
    state = dict(module.state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(module)
    for content in (
        averaged.state_dict(),
        {name.replace("1.", "1._checkpoint_wrapped_module."): t for name, t in state.items()},
        state | {"0._extra_state": None},
        {"state_dict": {"model": state}, "state_dict_ema": {}},
        {name: t.double() for name, t in state.items()},
    ):
        torch.save(content, file)
        torch.testing.assert_close(read_state(str(file), net()), state)


def test_names_that_are_the_modules_own_stay(tmp_path):
    module = nn.Module()
    module.module = net()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    got = read_state(str(tmp_path / "a.pt"), module)
    torch.testing.assert_close(got, dict(module.state_dict()))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_parts_and_folders_are_read(tmp_path, suffix):
    state = dict(net().state_dict())
    names, save = list(state), torch.save if suffix == "bin" else safetensors.torch.save_file
    base = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    save(state, str(tmp_path / base))
    torch.testing.assert_close(read_state(str(tmp_path), net()), state)
    (tmp_path / base).unlink()
    parts = {f"part-{i}.{suffix}": names[2 * i : 2 * i + 2] for i in range(2)}
    for part, own in parts.items():
        save({name: state[name] for name in own}, str(tmp_path / part))
    index = tmp_path / f"{base}.index.json"
    index.write_text(json.dumps({"weight_map": {n: p for p, own in parts.items() for n in own}}))
    for file in (tmp_path, index):
        torch.testing.assert_close(read_state(str(file), net()), state)
    (tmp_path / f"part-1.{suffix}").unlink()
    with pytest.raises(ValueError, match=f"part-1.{suffix}: there is no such file"):
        read_state(str(tmp_path), net())


def test_what_a_file_is_decides_and_not_its_name(tmp_path):
    state = dict(net().state_dict())
    safetensors.torch.save_file(state, str(tmp_path / "weights"))
    torch.save(state, tmp_path / "torch.safetensors")
    for name in ("weights", "torch.safetensors"):
        torch.testing.assert_close(read_state(str(tmp_path / name), net()), state)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOT_WEIGHTS = {
    "pointer.pt": (LFS, "it is a Git LFS pointer, .*: git lfs pull"),
    "pointer.safetensors": (LFS, "it is a Git LFS pointer"),
    "page.pt": ("\n<!DOCTYPE html><html>403</html>", "it is an HTML page and no weights"),
    "empty.pt": ("", "it is empty"),
    "text.pt": ("weights", "it is neither safetensors nor what torch.save writes"),
    "config.json": ('{"hidden": 3}', "it is JSON and no index of weights"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_what_holds_no_weights_is_named_as_what_it_is(tmp_path, name):
    content, words = NOT_WEIGHTS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"cannot read .*{name}: {words}"):
        read_state(str(tmp_path / name), net())


def test_what_is_no_state_of_numbers_is_named(tmp_path):
    file, state = tmp_path / "a.pt", dict(net().state_dict())
    quantised = torch.quantize_per_tensor(state["0.weight"], 0.1, 0, torch.qint8)
    for content, words in (
        (state | {"0._packed": ("a", 1)}, "0._packed is a tuple, and no tensor of numbers"),
        (state | {"0.weight": quantised}, "0.weight is quantised, and no tensor of numbers"),
        (list(state.values()), "holds no state dict"),
        (state | {"more": torch.ones(1)}, "holds more, which the module does not have"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=words):
            read_state(str(file), net())
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="it is a folder with no model.safetensors and no pytorch"):
        read_state(str(tmp_path / "folder"), net())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot read .*a.pt: "):
        read_state(str(file), net())
