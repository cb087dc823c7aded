"""A geodesic between two networks of your own: python -m benchmarks.examples.own_cnn

Any nn.Module and any loader will do. Two small CNNs are trained on the bundled digits, the second
is permuted to resemble the first, and the path between them is optimised without labels.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastgeo
from fastgeo import data


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
    )


def train(loader: DataLoader, epochs: int) -> nn.Module:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net


def main(epochs: int = 10, steps: int = 60) -> dict[str, float]:
    """The highest test loss, nats, along the line, the matched line and the geodesic."""
    torch.manual_seed(0)
    digits = data.load("digits")
    splits = (digits.train, digits.test)
    train_set, test_set = (TensorDataset(digits.normalize(x), y) for x, y in splits)
    loader = DataLoader(train_set, batch_size=64, shuffle=True, drop_last=True)
    a, b = (train(loader, epochs) for _ in range(2))
    images, _ = next(iter(loader))
    matched = fastgeo.match(a, b, images).module
    line = fastgeo.Path.linear(a, matched, 15)
    paths = {
        "line": fastgeo.Path.linear(a, b, 15),
        "matched line": line,
        "geodesic": fastgeo.optimize(line, a, loader, steps=steps),
    }
    test = {"test": DataLoader(test_set, batch_size=256)}
    found = {name: fastgeo.evaluate(path, a, test) for name, path in paths.items()}
    print(fastgeo.compare(found))
    return {name: max(one.splits["test"].loss) for name, one in found.items()}


if __name__ == "__main__":
    main()
