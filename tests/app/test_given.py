"""Files of weights that users have."""

import pytest
import torch
from torch import nn

from fastgeo.app.given import read_state


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
def test_checkpoints_of_wrapped_modules_are_read(tmp_path, prefix, key):
    state = net().state_dict()
    content = {prefix + name: tensor for name, tensor in state.items()}
    content = content if key is None else {"epoch": 3, key: content}
    torch.save(content, tmp_path / "a.pt")
    torch.testing.assert_close(read_state(str(tmp_path / "a.pt"), net()), dict(state))


def test_names_that_are_the_modules_own_stay(tmp_path):
    module = nn.Module()
    module.module = net()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    got = read_state(str(tmp_path / "a.pt"), module)
    torch.testing.assert_close(got, dict(module.state_dict()))
