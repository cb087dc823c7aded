"""Fine-tuned ends in folders of transformers, and points of a path as such folders."""

import json

import pytest
import safetensors.torch
import torch
import transformers

from fastgeo import Path
from fastgeo.app.weights import read_state
from fastgeo.store.weights import read_weights

SMALL = dict(n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
TOKENS = torch.randint(100, (3, 16), generator=torch.Generator().manual_seed(0))


def gpt2(seed, vocabulary=100):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=vocabulary, **SMALL)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def saved(folder, network, shard="1GB"):
    network.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def logits(network):
    with torch.no_grad():
        return network.double()(TOKENS).logits


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_an_exported_point_is_what_from_pretrained_loads(tmp_path, make, shard):
    folders = [saved(tmp_path / name, make(i), shard) for i, name in enumerate("ab")]
    sharded = len(list(folders[0].glob("*.safetensors"))) > 1
    assert sharded == (shard == "20KB")
    path = Path.linear(*(read_state(str(folder), make(2)) for folder in folders), 5)
    path.export(0.5, tmp_path / "merged", like=folders[0])
    loaded = type(make(0)).from_pretrained(tmp_path / "merged").eval()
    middle = make(2)
    middle.load_state_dict(path.at(0.5))
    expected = logits(middle)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-12, atol=1e-12)
    ends = [logits(make(i)) for i in range(2)]
    assert min((expected - end).abs().max() for end in ends) > 1e-2
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    kept = {f.name for f in folders[0].iterdir() if f.suffix == ".json" and "index" not in f.name}
    assert names == kept | {"model.safetensors"}
    for name in kept:
        assert (tmp_path / "merged" / name).read_bytes() == (folders[0] / name).read_bytes()


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    a, b = gpt2(0), gpt2(1)
    path = Path.linear(a, b, 3)
    path.export(0.5, tmp_path / "merged", like=saved(tmp_path / "a", a))
    stored = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert "lm_head.weight" in path.start and "lm_head.weight" not in stored
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    untied = dict(path.at(0.5))
    untied["lm_head.weight"] = untied["lm_head.weight"] + 1
    between = {name: t[None] for name, t in untied.items() if t.is_floating_point()}
    with pytest.raises(ValueError, match="lacks lm_head.weight, which is tied to no weight"):
        path.with_interior(between).export(0.5, tmp_path / "other", like=tmp_path / "a")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("module_type", [torch.float32, torch.bfloat16])
def test_weights_keep_the_type_that_their_folder_has(tmp_path, module_type):
    folders = [saved(tmp_path / name, gpt2(i).bfloat16()) for i, name in enumerate("ab")]
    module = gpt2(2).to(module_type)
    path = Path.linear(*(read_state(str(folder), module) for folder in folders), 3)
    assert path.start["transformer.wte.weight"].dtype == module_type
    path.export(0.5, tmp_path / "merged", like=folders[1])
    stored = read_weights(tmp_path / "merged")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, tensor in stored.items():
        assert torch.equal(tensor, path.at(0.5)[name].bfloat16())
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_vocabularies_of_other_sizes_are_refused_with_both(tmp_path):
    a, b = gpt2(0), gpt2(1, vocabulary=103)
    with pytest.raises(ValueError, match=r"wte.weight has shape \[100, 32\] in a and \[103, 32\]"):
        Path.linear(a, b, 3)
    folder = saved(tmp_path / "b", b)
    with pytest.raises(ValueError, match=r"shape \[103, 32\] in .*b and \[100, 32\] in the module"):
        read_state(str(folder), a)
    path = Path.linear(a, gpt2(2), 3)
    with pytest.raises(ValueError, match=r"shape \[103, 32\] in .*b and \[100, 32\] in the path"):
        path.export(0.5, tmp_path / "merged", like=folder)
    assert not (tmp_path / "merged").exists()


def test_folders_that_cannot_be_are_refused(tmp_path):
    path, there = Path.linear(llama(0), llama(1), 3), saved(tmp_path / "there", llama(0))
    with pytest.raises(ValueError, match="there is there and is no empty folder"):
        path.export(0.5, there, like=there)
    with pytest.raises(ValueError, match="none is no folder of save_pretrained"):
        path.export(0.5, tmp_path / "new", like=tmp_path / "none")
    with pytest.raises(ValueError, match="which the path does not have"):
        path.export(0.5, tmp_path / "new", like=saved(tmp_path / "gpt2", gpt2(0)))
    with pytest.raises(ValueError, match="within"):
        path.export(1.5, tmp_path / "new", like=there)
    assert not (tmp_path / "new").exists()
