"""Fine-tunings of one base through the command: from folders of transformers to such folders."""

import json
import re
import sys

import pytest
import torch
import transformers
from commands import refused

from fastgeo import Path
from fastgeo.app.cli import main
from fastgeo.store.weights import read_weights

CODE = """
import transformers

def gpt2(vocabulary=256):
    size = dict(vocab_size=vocabulary, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)

def llama():
    size = dict(vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, bos_token_id=0, eos_token_id=0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads))
"""
OPTIONS = [
    *("--preset", "text", "--block-size", "16", "--train-subset", "60", "--tokens", "bytes"),
    *("--data", "text:a.txt", "--points", "4", "--steps", "2", "--out", "r"),
]


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "tuned_models.py").write_text(CODE)
    text = "".join(f"line {i} of a text that is {i * i} times as long. " for i in range(40))
    (tmp_path / "a.txt").write_text(text)
    import tuned_models

    yield tuned_models
    del sys.modules["tuned_models"]


def tuned(folder, base, seed, dtype, shard="1GB"):
    """A folder of the base with changed weights."""
    network = type(base)(base.config)
    network.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    network.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return network


@pytest.mark.parametrize(
    "make, dtype, shard", [("gpt2", torch.bfloat16, "10KB"), ("llama", torch.float32, "1GB")]
)
def test_a_run_goes_from_folders_to_a_folder(tmp_path, models, make, dtype, shard):
    base = getattr(models, make)()
    a, _ = (tuned(name, base, i, dtype, shard) for i, name in enumerate("ab"))
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == (shard == "10KB")
    main(["run", *OPTIONS, "--model", f"tuned_models:{make}", "--a", "a", "--b", "b"])
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    losses = report["paths"]["geodesic"]["test"]["loss"]
    assert len(losses) == 4 and max(losses) < 6
    path = Path.load("r/path.safetensors")
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(path.start[name], tensor.float(), rtol=0, atol=0)
    path.export(1 / 3, "merged", like="a")
    assert {tensor.dtype for tensor in read_weights(tmp_path / "merged").values()} == {dtype}
    loaded = type(base).from_pretrained("merged", dtype="auto")
    assert loaded.dtype == dtype
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (make == "gpt2")
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, path[1][name].to(dtype), rtol=0, atol=0)


def test_other_vocabularies_are_refused_with_both_sizes(tmp_path, models, capsys):
    for name, vocabulary in (("a", 256), ("b", 259)):
        models.gpt2(vocabulary).save_pretrained(name)
    words = refused(capsys, "run", *OPTIONS, "--model", "tuned_models:gpt2", "--a", "a", "--b", "b")
    assert re.search(
        r"wte.weight has shape \[259, 16\] in .*b and \[256, 16\] in the module", words
    )
    assert not (tmp_path / "r").exists()
    networks = map(transformers.GPT2LMHeadModel.from_pretrained, ("a", "b"))
    with pytest.raises(ValueError, match=r"wte.weight has shape \[256, 16\] in a and \[259, 16\]"):
        Path.linear(*networks, 3)
