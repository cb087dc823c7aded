"""Two networks and the data between which benchmarks find paths."""

from dataclasses import dataclass
from pathlib import Path as FilePath

import torch

from fastgeo import Forward, Path, match
from fastgeo.app.config import PRESETS
from fastgeo.app.folder import Run
from fastgeo.app.given import Given, State
from fastgeo.data.stored import Shuffled
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
            given = Given(preset.changed(data=options.data or preset.data.data))
            self.a, _, self.b = trained(given, Forward(engine="stacked"))
        else:
            run = Run.open(options.run)
            given, own = run.given, preset.changed(data=run.config.data.data)
            if run.config != own or options.data is not None:
                raise ValueError(f"{options.run} is not a run of preset {options.preset} as it is")
            self.a, self.b = run.matched
        self.config = c = given.config.changed(steps=options.steps or preset.path.steps)
        self.setting = f"{c.ends.model}, width {c.ends.width:g}, {c.path.steps} steps"
        self.dataset, self.module = given.dataset, given.new_module().to(given.device)

    def line(self, points: int) -> Path:
        """The matched line."""
        return Path.linear(self.a, self.b, points)

    def batches(self, seed: int) -> Shuffled:
        """Of the optimisation."""
        order = torch.Generator().manual_seed(seed)
        return self.dataset.shuffled(self.config.path.batch_size, order)


def trained(given: Given, forward: Forward) -> tuple[State, ...]:
    """The states of a, of b, and of b matched to a."""
    c, data = given.config, given.dataset
    a, b = train_ends(
        *(given.new_module, data, c.ends.seeds, c.training), forward=forward, progress=True
    )
    inputs, _ = next(iter(data.in_order("train", c.evaluation.eval_batch_size)))
    module = given.new_module().to(given.device)
    return a, b, match(a, b, inputs, module=module, restarts=c.matching.match_restarts).state_dict
