"""Distillation with the kernel alone: python -m benchmarks.examples.distillation

`fastgeo_kernels` needs nothing of fastgeo. A small student learns a teacher's distributions by the
Jensen-Shannon divergence, without labels.
"""

import torch
from fastgeo_kernels import js_div

from fastgeo import Training, data, models, train_ends


def main(epochs: int = 8) -> dict[str, float]:
    """Test accuracies of the teacher and of the student."""
    digits = data.load("digits")

    def make() -> models.ResNet:
        return models.resnet(8, 0.5, in_channels=1)

    (state,) = train_ends(make, digits, seeds=(0,), training=Training(epochs=epochs))
    teacher = make().eval().requires_grad_(False)
    teacher.load_state_dict(state)
    torch.manual_seed(0)
    student = models.mlp(64, (128,))
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    for images, _ in digits.shuffled(64, torch.Generator().manual_seed(0), epochs=epochs):
        optimizer.zero_grad()
        js_div(student(images), teacher(images)).backward()
        optimizer.step()
    images, labels = digits.normalize(digits.test.images), digits.test.labels
    found = {}
    for name, network in (("teacher", teacher), ("student", student)):
        share = (network(images).argmax(-1) == labels).double().mean().item()
        print(f"{name}: {100 * share:.1f} % of the test images")
        found[name] = share
    return found


if __name__ == "__main__":
    main()
