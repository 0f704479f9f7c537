"""Cells that are trained on data that fit a test, and what their record says."""

import json

import tiny
from batchnorm.lab import grid
from batchnorm.lab.progress import Silent
from batchnorm.lab.record import CELLS

TIMES = {"seconds", "wall_seconds", "examples_per_second", "started"}


def run(folder, *, arms=("none", "batch"), network="lenet", data=None, progress=None, **options):
    data = tiny.as_images() if data is None else data
    options = {"batch_size": 32, "train_images": None, **options}
    epochs = options.pop("epochs", 2)
    common, build = grid.configure(network, data, epochs, 2, None, options)
    configs = grid.plan(common, arms, [0])
    grid.run(configs, build, data, None, folder, progress or Silent())
    return configs


def without_times(value):
    """A record's content but for what a clock says."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def contents(folder):
    return {
        path.name: [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (folder / CELLS).glob("*.jsonl")
    }


class Interrupts(Silent):
    """Ctrl-C at one step of one arm."""

    def __init__(self, arm: str, step: int) -> None:
        self.arm, self.at = arm, step

    def step(self, config, step, loss, accuracy, speed):  # noqa: ARG002
        if config.arm == self.arm and step == self.at:
            raise KeyboardInterrupt
