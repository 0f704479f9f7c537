"""Records for the views, written without training."""

import math

from batchnorm.lab.record import (
    CELLS,
    CellConfig,
    Done,
    Evaluation,
    Header,
    LayerStatistics,
    cell_path,
    json_line,
    read,
)

PLACES = ["norm1", "norm2"]
ENVIRONMENT = {"torch": "2.14", "processor": "a processor", "started": "2026-01-01T00:00:00+00:00"}


def write(
    folder, arms=("none", "batch"), seeds=(0,), evaluations=5, diverged=(), unfinished=(), **config
):
    """A record of cells with made-up numbers; `diverged` and `unfinished` name arms."""
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    for arm in arms:
        for seed in seeds:
            cell = CellConfig(arm=arm, seed=seed, **config)
            lines = [json_line("header", _header(cell))]
            lines += [
                json_line("evaluation", _evaluation(arm, seed, k, diverged=arm in diverged))
                for k in range(evaluations if arm not in diverged else min(3, evaluations))
            ]
            if arm not in unfinished:
                lines.append(json_line("done", Done(arm in diverged, 20.0, 25.0)))
            cell_path(folder, cell).write_text("".join(lines), encoding="utf-8")
    return read(folder)


def accuracy(arm, seed, k, recalibrated=False):
    """What the k-th evaluation of a cell says."""
    level = {"none": 0.8}.get(arm, 0.9) + 0.01 * seed + 0.02 * recalibrated
    return level * (1 - math.exp(-k)) + 0.1 * math.exp(-k)


def _header(config):
    return Header(
        config=config,
        environment=ENVIRONMENT,
        parameters=61_706,
        initial_weights="0" * 64,
        data_digest="",
        train_images=60_000,
        test_images=10_000,
        statistics_images=256,
        steps_per_epoch=235,
        layers=PLACES,
    )


def _evaluation(arm, seed, k, *, diverged):
    gone = diverged and k == 2
    batch = arm.startswith("batch")
    test = accuracy(arm, seed, k)
    return Evaluation(
        step=118 * k,
        epoch=k / 2,
        seconds=float(k),
        examples_per_second=20_000.0 if k else None,
        train_loss=None if gone or not k else math.exp(-k),
        train_accuracy=test if k else None,
        test_loss=None if gone else math.exp(-k),
        test_accuracy=test,
        recalibrated_test_loss=math.exp(-k) if batch and not gone else None,
        recalibrated_test_accuracy=accuracy(arm, seed, k, recalibrated=True) if batch else None,
        layers={place: _statistics(arm, k, gone) for place in PLACES},
    )


def _statistics(arm, k, gone):
    values = [None, None, None] if gone else [0.1 * k, 0.2, 0.3 * k]
    parameters = values if arm != "none" else None
    return LayerStatistics(values, values, values, values, parameters, parameters)
