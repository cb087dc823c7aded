"""Three networks in one frame, averaged: python -m benchmarks.examples.average_three

The mean of independently trained networks is useless, since each has its channels in its own order.
After the channels were permuted to agree (`fastgeo.match_many`), their mean is a good network.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fastgeo
from fastgeo import Training, data, models


def accuracy(module: nn.Module, state: dict[str, Tensor], digits: data.Dataset) -> float:
    images, labels = digits.normalize(digits.test.images), digits.test.labels
    logits = functional_call(module.eval(), state, (images,))
    return (logits.argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def main(epochs: int = 10, width: float = 1.0) -> dict[str, float]:
    """Test accuracies: of the worst of the three, of their mean, and of their mean in one frame."""
    digits = data.load("digits")
    module = models.resnet(8, width, in_channels=1)
    states = fastgeo.train_ends(  # all three in one pass
        lambda: models.resnet(8, width, in_channels=1),
        digits,
        seeds=(0, 1, 2),
        training=Training(epochs=epochs),
        progress=True,
    )
    images, _ = next(iter(digits.in_order("train", 256)))
    frame = fastgeo.match_many(states, images, module=module)
    found = {
        "worst of the three": min(accuracy(module, state, digits) for state in states),
        "mean as they are": accuracy(module, mean(states), digits),
        "mean in one frame": accuracy(module, frame.average(), digits),
    }
    for name, share in found.items():
        print(f"{name}: {100 * share:.1f} % of the test images")
    return found


if __name__ == "__main__":
    main()
