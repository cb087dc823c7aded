"""A path between two language models of transformers: python -m benchmarks.examples.language_model

The models are tiny and untrained, so that nothing is downloaded; yours come from `from_pretrained`.
Batches look like a tokenizer's, whose attention mask says which tokens are padding: they do not
count.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import fastgeo
from fastgeo import Forward


def model(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    size = dict(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    config = GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """As a tokenizer gives them: some rows are shorter, and padded."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        tokens = torch.randint(64, (8, 16), generator=generator)
        length = torch.randint(8, 17, (8, 1), generator=generator)
        found.append({"input_ids": tokens, "attention_mask": (torch.arange(16) < length).long()})
    return found


def main(steps: int = 30) -> list[float]:
    """The energy, nats, before each step and after the last one."""
    a, b = model(0), model(1)
    texts = batches(4)
    matching = fastgeo.match(a, b, texts[0])
    print(matching)
    path = fastgeo.Path.linear(a, matching.module, 7)
    forward = Forward(mask="attention_mask")
    path = fastgeo.optimize(path, a, texts, steps=steps, forward=forward)
    energies = [line["energy"] for line in path.history]
    print(f"energy: {energies[0]:.4g} nats before, {energies[-1]:.4g} after {steps} steps")
    return energies


if __name__ == "__main__":
    main()
