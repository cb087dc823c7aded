"""Two networks and the data between which benchmarks find paths."""

from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import torch
from torch import Tensor

from fastgeo import Forward, Path, match
from fastgeo.app.config import PRESETS
from fastgeo.app.folder import Run
from fastgeo.data.images import Shuffled
from fastgeo.train import train_ends


@dataclass(frozen=True)
class Options:
    """Between which ends, and how long."""

    preset: str = "digits"
    """whose ends, data and path: digits, paper-small, cifar10 or paper"""
    data: str | None = None
    """as of `fastgeo run`; the preset's by default"""
    run: FilePath | None = None
    """folder of a run of that preset, whose ends are taken instead of training them anew"""
    steps: int | None = 100
    """optimisation steps of each; None for the preset's"""
    save: bool = False
    """write benchmarks/results/BENCHMARK-PRESET.json, and the figure if there is one"""


class Ends:
    """The matched ends of a preset.

    Attributes:
        config: the preset's, with the options' steps and data.
        setting: network and steps, in words.
        module: the network, on the device of the data.
        a, b: states; b is matched to a.
    """

    def __init__(self, options: Options):
        preset = PRESETS[options.preset]
        if options.run is None:
            run = Run(FilePath(), replace(preset, data=options.data or preset.data))
            self.a, self.b = _trained(run)
        else:
            run = Run.open(options.run)
            if run.config != replace(preset, data=run.config.data) or options.data is not None:
                raise ValueError(f"{options.run} is not a run of preset {options.preset} as it is")
            self.a, b = run.ends()
            self.b = run.matched(b)
        self.config = c = replace(run.config, steps=options.steps or preset.steps)
        self.setting = f"{c.model}, width {c.width:g}, {c.steps} steps"
        self.dataset, self.module = run.dataset, run.new_module().to(run.device)

    def line(self, points: int) -> Path:
        """The matched line."""
        return Path.linear(self.a, self.b, points)

    def batches(self, seed: int) -> Shuffled:
        """Of the optimisation."""
        order = torch.Generator().manual_seed(seed)
        return self.dataset.shuffled(self.config.batch_size, order)


def _trained(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    c, data = run.config, run.dataset
    a, b = train_ends(
        run.new_module, data, c.seeds, c.training, progress=True, forward=Forward(engine="stacked")
    )
    inputs, _ = next(iter(data.in_order("train", c.eval_batch_size)))
    module = run.new_module().to(run.device)
    return a, match(a, b, inputs, module=module, restarts=c.match_restarts).state_dict
