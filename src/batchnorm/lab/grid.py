"""The cells of a comparison: which there are, whether they may run here, and running them."""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from filelock import FileLock, Timeout

from batchnorm.errors import BatchNormError
from batchnorm.lab import networks
from batchnorm.lab.arms import ARMS
from batchnorm.lab.batches import Batches, LoaderBatches, TensorBatches
from batchnorm.lab.data import Images, Loaders, load
from batchnorm.lab.progress import Progress
from batchnorm.lab.record import CELLS, CellConfig, cell_path, is_finished, read_cell
from batchnorm.lab.training import (
    OPTIMIZERS,
    SCHEDULES,
    refuse_another_origin,
    rehearse,
    train_cell,
)

MOST_THREADS = 4096
MOST_SEEDS = 2**40  # a seed is multiplied for each epoch, and torch takes 64 bits

Data: TypeAlias = str | Images | Loaders


def configure(
    network: str | networks.Network,
    data: Data,
    epochs: int,
    threads: int | None,
    initialization: str | None,
    options: Mapping[str, Any],
) -> tuple[CellConfig, networks.Network]:
    """What the cells have in common, and the function that builds their network."""
    name, build = networks.find(network)
    known = {f.name for f in dataclasses.fields(CellConfig)} - {"arm", "seed"}
    if unknown := options.keys() - known:
        raise BatchNormError(
            f"compare got the options {', '.join(sorted(unknown))}, which it does not know. "
            f"Known are {', '.join(sorted(known))}."
        )
    common = CellConfig(
        arm="",
        network=name,
        data=data if isinstance(data, str) else type(data).__name__,
        epochs=epochs,
        threads=threads if threads is not None else torch.get_num_threads(),
        initialization=initialization or ("xavier-uniform" if name == "lenet" else "as-built"),
        **options,
    )
    check(common)
    return common, build


def plan(common: CellConfig, arms: Sequence[str], seeds: Sequence[int]) -> list[CellConfig]:
    """The cells: all arms of the first seed, then of the next."""
    if isinstance(arms, str):
        arms = [arms]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise BatchNormError(f"there is no arm called {unknown[0]!r}. Known are {', '.join(ARMS)}.")
    if not arms or not seeds:
        raise BatchNormError(
            f"compare got {len(arms)} arms and {len(seeds)} seeds and wants one or more of each."
        )
    if not 0 <= min(seeds) <= max(seeds) < MOST_SEEDS:
        raise BatchNormError(
            f"the seeds go from {min(seeds)} to {max(seeds)} and should be from 0 to below "
            f"{MOST_SEEDS:,}."
        )
    return [
        dataclasses.replace(common, arm=arm, seed=seed)
        for seed in seeds
        for arm in dict.fromkeys(arms)
    ]


def run(
    configs: Sequence[CellConfig],
    network: networks.Network,
    data: Data,
    data_dir: str | os.PathLike[str] | None,
    folder: Path,
    progress: Progress,
) -> None:
    """Train every cell that is not done yet, one after another: each is timed alone."""
    _refuse_another_configuration(folder, configs[0])
    waiting = [config for config in configs if not is_finished(cell_path(folder, config))]
    named = data == "fashion-mnist" and configs[0].network in networks.NETWORKS
    if not waiting and named:
        return
    batches = batches_of(data, data_dir, configs[0])
    if not named:  # what a user's name stands for may have changed, and objects may share one
        for config in configs:
            refuse_another_origin(config, network, batches, folder)
    for config in {config.arm: config for config in waiting}.values():
        rehearse(config, network, batches)  # before the hours, not after them
    with progress:
        for config in waiting:
            train_cell(config, network, batches, folder, progress)


def default_folder(common: CellConfig) -> Path:
    """Named after what the cells share: the same command goes on with the same record."""
    return Path("runs") / f"compare-{common.hash[:8]}"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other processes out of it; a killed one lets go by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BatchNormError(
            f"another process is at work in {folder}. Wait for it, or name another folder."
        ) from error


def check(config: CellConfig) -> None:
    """Numbers that no training can start from."""
    choices = {
        "schedule": SCHEDULES,
        "optimizer": tuple(OPTIMIZERS),
        "initialization": tuple(networks.INITIALIZATIONS),
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise BatchNormError(f"{name} is {value!r} and should be one of {', '.join(known)}.")
    for name in (
        "epochs",
        "evaluations_per_epoch",
        "recalibration_images",
        "threads",
        "ghost_size",
    ):
        _at_least(config, name, 1)
    if config.threads > MOST_THREADS:
        raise BatchNormError(f"threads is {config.threads} and should be at most {MOST_THREADS}.")
    _at_least(config, "batch_size", 2)  # one value per channel has no variance
    for name, least in (("train_images", 2), ("test_images", 1)):
        if getattr(config, name) is not None:
            _at_least(config, name, least)
    _at_least(config, "held_out_images", 0)
    for name in ("learning_rate", "momentum", "weight_decay"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise BatchNormError(f"{name} is {value} and should be a finite number from 0.")
    _check_device(config)


def _check_device(config: CellConfig) -> None:
    if config.device.startswith("meta"):
        raise BatchNormError("the device 'meta' computes nothing. `cpu` always does.")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise BatchNormError(
            f"the device {config.device!r} cannot be used here ({reason}). `cpu` always can."
        ) from error


def _at_least(config: CellConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if not isinstance(value, int) or value < least:
        raise BatchNormError(f"{name} is {value} and should be a whole number from {least}.")


def _refuse_another_configuration(folder: Path, config: CellConfig) -> None:
    """A folder holds one comparison: its cells differ in arm and seed alone."""
    wanted = config.without_arm_and_seed()
    for path in sorted((folder / CELLS).glob("*.jsonl")):
        cell = read_cell(path)
        if cell is None:
            continue
        found = cell.config.without_arm_and_seed()
        if different := [name for name in wanted if wanted[name] != found[name]]:
            listed = ", ".join(f"{n} is {found[n]} there and {wanted[n]} here" for n in different)
            raise BatchNormError(
                f"{folder} holds a comparison of another configuration: {listed}. Nothing was "
                "changed. Name another folder with --out, or ask for the same configuration."
            )


def batches_of(data: Data, data_dir: str | os.PathLike[str] | None, config: CellConfig) -> Batches:
    """The batches that a cell trains on and is measured with."""
    if isinstance(data, str):
        data = load(data, Path(data_dir) if data_dir is not None else None)
    if isinstance(data, Images):
        return TensorBatches(
            data, config.batch_size, config.train_images,
            held_out_images=config.held_out_images, test_images=config.test_images,
        )  # fmt: skip
    if config.held_out_images or config.test_images is not None:
        raise BatchNormError(
            "held_out_images and test_images choose among tensors, and the data are loaders. Leave "
            "both out, and give a test loader of the images that you mean."
        )
    return LoaderBatches(data)
