"""A deep ensemble, trained and evaluated in one pass: python -m benchmarks.examples.ensemble

`fastgeo.train_ends` trains K networks at once, and `fastgeo.stack` evaluates them as one.
"""

import torch

from fastgeo import Training, data, models, stack, train_ends


def main(epochs: int = 6, networks: int = 4) -> dict[str, float]:
    """Test accuracies: the members' mean, and that of their mean prediction."""
    digits = data.load("digits")

    def make() -> models.MLP:
        return models.mlp(64, (64, 64))

    states = train_ends(make, digits, seeds=range(networks), training=Training(epochs=epochs))
    params = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    images, labels = digits.normalize(digits.test.images), digits.test.labels
    with torch.no_grad():
        p = stack(make().eval())(params, images).softmax(-1)  # [K, n, 10]
    members = (p.argmax(-1) == labels).double().mean(1)
    found = {
        "members": members.mean().item(),
        "ensemble": (p.mean(0).argmax(-1) == labels).double().mean().item(),
    }
    for name, share in found.items():
        print(f"{name}: {100 * share:.1f} % of the test images")
    return found


if __name__ == "__main__":
    main()
