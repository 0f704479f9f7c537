"""Train one cell: a network with one arm, from one seed, recorded and interruptible.

At each evaluation a line is appended to the record and then a checkpoint replaces the one before;
the checkpoint knows how long the record was. Whoever is killed in between finds the longer record
cut back, and ends with the numbers of a run that was never interrupted.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from batchnorm.errors import BatchNormError, brief
from batchnorm.lab import arms, checkpoint, files, networks
from batchnorm.lab.batches import Batch, Batches, epoch_seed
from batchnorm.lab.checkpoint import Counters
from batchnorm.lab.environment import environment
from batchnorm.lab.evaluation import (
    evaluate,
    evaluating,
    layer_statistics,
    population_statistics,
)
from batchnorm.lab.progress import Progress, Silent
from batchnorm.lab.record import (
    CellConfig,
    Done,
    Evaluation,
    Header,
    cell_path,
    finite,
    is_finished,
    json_line,
    read_cell,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}
SCHEDULES = ("constant", "cosine", "one-cycle")


@dataclass
class Training:
    """A cell at work."""

    config: CellConfig
    batches: Batches
    model: nn.Module
    places: list[str]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    record: Path
    progress: Progress
    counters: Counters = field(default_factory=Counters)
    started: float = field(default_factory=time.perf_counter)

    @property
    def checkpoint(self) -> Path:
        return self.record.with_suffix(".pt")

    @property
    def steps(self) -> int:
        return self.config.epochs * self.batches.steps_per_epoch

    @property
    def wall_seconds(self) -> float:
        return self.counters.wall_seconds + time.perf_counter() - self.started


def train_cell(
    config: CellConfig,
    network: networks.Network,
    batches: Batches,
    folder: Path,
    progress: Progress,
) -> None:
    """Bring a cell to its last line, from wherever its record stands."""
    record = cell_path(folder, config)
    if is_finished(record):
        return
    with _borrowed(config), _blamed(config):
        training = _prepare(config, network, batches, record, progress)
        _resume_or_begin(training)
        progress.start(config, training.steps, training.counters.step)
        _run(training)


def rehearse(config: CellConfig, network: networks.Network, batches: Batches) -> None:
    """See that the network can be built with the arm, and takes the data."""
    with _borrowed(config), _blamed(config):
        model = _prepare(config, network, batches, Path(), Silent()).model
        inputs, labels = next(batches.test())
        with evaluating(model):
            F.cross_entropy(model(inputs.to(config.device)), labels.to(config.device))


@contextmanager
def _blamed(config: CellConfig) -> Iterator[None]:
    """What the user's network raises on the user's data is said in a line."""
    try:
        yield
    except (BatchNormError, OSError):
        raise
    except Exception as error:
        raise BatchNormError(
            f"the network {config.network} with the arm {config.arm} on the data {config.data} "
            f"raised {brief(error)}. What is recorded stays."
        ) from error


@contextmanager
def _borrowed(config: CellConfig) -> Iterator[None]:
    """The thread count of the cell, and a random state that comes back."""
    with threads(config.threads), torch.random.fork_rng(_cuda_devices(config.device)):
        yield


def _prepare(
    config: CellConfig,
    network: networks.Network,
    batches: Batches,
    record: Path,
    progress: Progress,
) -> Training:
    """Everything at step 0; the same weights for every arm of a seed."""
    torch.manual_seed(config.seed)
    model = networks.build(config.network, network)
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        inputs, _ = next(batches.test())
        with evaluating(model):
            model(inputs)
    networks.initialize(model, config.initialization)
    model, places = arms.apply(model, config.arm, config.ghost_size)
    model.to(config.device)
    decay = {"weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        decay["momentum"] = config.momentum
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), lr=config.learning_rate, **decay)
    steps = config.epochs * batches.steps_per_epoch
    scheduler = _schedule(config, optimizer, steps)
    return Training(config, batches, model, places, optimizer, scheduler, record, progress)


def _schedule(
    config: CellConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over the steps; one step of the schedule is one of the optimizer."""
    schedulers = torch.optim.lr_scheduler
    match config.schedule:
        case "cosine":
            return schedulers.CosineAnnealingLR(optimizer, steps)
        case "one-cycle":
            rate = config.learning_rate
            return schedulers.OneCycleLR(
                optimizer, max_lr=rate, total_steps=steps, cycle_momentum=False
            )
        case _:
            return schedulers.ConstantLR(optimizer, factor=1.0)


def _run(training: Training) -> None:
    """The loop: epochs of steps, an evaluation every so often, one at the start and the end."""
    counters, per_epoch = training.counters, training.batches.steps_per_epoch
    marks = evaluation_steps(per_epoch, training.config.evaluations_per_epoch)
    while counters.step < training.steps and not counters.diverged:
        epoch, done = divmod(counters.step, per_epoch)
        if done == 0:
            counters.start_epoch()
        for inputs, labels in _rest_of_epoch(training, epoch, done):
            _step(training, inputs, labels)
            if counters.diverged or (counters.step - 1) % per_epoch + 1 in marks:
                _evaluate_and_save(training)
            if counters.diverged:
                break
        else:
            if counters.step != (epoch + 1) * per_epoch:
                raise BatchNormError(
                    f"the train loader gave {counters.step - epoch * per_epoch} batches in epoch "
                    f"{epoch + 1} and its length says {per_epoch}. Make the two agree."
                )
    done_line = Done(counters.diverged, counters.seconds, training.wall_seconds)
    files.append(training.record, json_line("done", done_line))
    training.checkpoint.unlink(missing_ok=True)
    training.progress.finish(training.config, done_line)


def evaluation_steps(per_epoch: int, evaluations: int) -> set[int]:
    """After which steps of an epoch (1 to per_epoch) to evaluate; always after the last."""
    return {math.ceil(per_epoch * k / evaluations) for k in range(1, evaluations + 1)}


def _rest_of_epoch(training: Training, epoch: int, done: int) -> Iterator[Batch]:
    """The batches of an epoch from the `done`-th on, in the same random state as without a pause."""
    if done == 0:
        torch.manual_seed(epoch_seed(training.config.seed, epoch))
        yield from training.batches.train(training.config.seed, epoch)
        return
    state = torch.get_rng_state()  # as the checkpoint had it, behind `done` batches
    batches = training.batches.train(training.config.seed, epoch)
    for _ in range(done):
        next(batches)  # its order was drawn at the start; what it draws for a batch comes again
    torch.set_rng_state(state)
    yield from batches


def _step(training: Training, inputs: Tensor, labels: Tensor) -> None:
    model, counters, config = training.model, training.counters, training.config
    start = time.perf_counter()
    model.train()
    target = labels.to(config.device)
    logits = model(inputs.to(config.device))
    loss = F.cross_entropy(logits, target)
    value = loss.item()
    counters.diverged = not math.isfinite(value)
    if not counters.diverged:
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        training.scheduler.step()
    correct = int((logits.detach().argmax(1) == target).sum())  # waits for the device
    counters.seconds += time.perf_counter() - start
    counters.step += 1
    counters.epoch_loss += value * len(labels)
    counters.epoch_correct += correct
    counters.epoch_images += len(labels)
    counters.last_images += len(labels)
    seen = counters.epoch_images
    training.progress.step(
        config, counters.step, counters.epoch_loss / seen, counters.epoch_correct / seen,
        _speed(counters),
    )  # fmt: skip


def _speed(counters: Counters) -> float | None:
    """Examples per second since the evaluation before."""
    seconds = counters.seconds - counters.last_seconds
    return counters.last_images / seconds if seconds > 0 else None


def _evaluate_and_save(training: Training) -> None:
    # arms measure differently; what they draw for it must not change what they train on
    with torch.random.fork_rng(_cuda_devices(training.config.device)):
        evaluation = _evaluate(training)
    counters = training.counters
    counters.diverged |= not all(p.isfinite().all() for p in training.model.parameters())
    counters.last_seconds, counters.last_images = counters.seconds, 0
    files.append(training.record, json_line("evaluation", evaluation))
    checkpoint.save(
        training.checkpoint,
        training.model,
        training.optimizer,
        training.scheduler,
        replace(counters, wall_seconds=training.wall_seconds),
        training.record.stat().st_size,
    )
    training.progress.evaluation(training.config, evaluation)


def _evaluate(training: Training) -> Evaluation:
    model, batches, counters = training.model, training.batches, training.counters
    config = training.config
    test_loss, test_accuracy = evaluate(model, batches.test(), config.device)
    _, held_out = evaluate(model, batches.held_out(), config.device)
    population = batches.population(config.recalibration_images)
    loss = accuracy = again = None
    with population_statistics(model, population, config.device) as found:
        if found:
            loss, accuracy = evaluate(model, batches.test(), config.device)
            _, again = evaluate(model, batches.held_out(), config.device)
    seen = counters.epoch_images
    inputs, _ = next(batches.test())
    layers = layer_statistics(model, training.places, inputs.to(config.device))
    return Evaluation(
        step=counters.step,
        epoch=counters.step / batches.steps_per_epoch,
        seconds=counters.seconds,
        examples_per_second=_speed(counters),
        train_loss=finite(counters.epoch_loss / seen) if seen else None,
        train_accuracy=counters.epoch_correct / seen if seen else None,
        test_loss=finite(test_loss),
        test_accuracy=test_accuracy,
        recalibrated_test_loss=finite(loss),
        recalibrated_test_accuracy=accuracy,
        layers=layers,
        held_out_accuracy=finite(held_out),
        recalibrated_held_out_accuracy=finite(again),
    )


def _resume_or_begin(training: Training) -> None:
    header = _header(training)
    cell = read_cell(training.record)
    if cell is None or not training.checkpoint.exists():
        training.record.parent.mkdir(parents=True, exist_ok=True)
        training.record.write_text("", encoding="utf-8")  # what a killed start may have left
        files.append(training.record, json_line("header", header))
        _evaluate_and_save(training)
        return
    _refuse_another_origin(cell.header, header)
    training.counters, record_bytes = checkpoint.load(
        training.checkpoint, training.model, training.optimizer, training.scheduler
    )
    if training.record.stat().st_size < record_bytes:
        raise BatchNormError(
            f"{training.record} is shorter than its checkpoint says: something was cut from it. "
            f"Move {training.checkpoint.name} away; the cell then begins again."
        )
    os.truncate(training.record, record_bytes)


def refuse_another_origin(
    config: CellConfig, network: networks.Network, batches: Batches, folder: Path
) -> None:
    """A cell that was begun, or is finished, began with this network and these data, or else…"""
    record = cell_path(folder, config)
    if (cell := read_cell(record)) is not None:
        with _borrowed(config), _blamed(config):
            now = _header(_prepare(config, network, batches, record, Silent()))
        _refuse_another_origin(cell.header, now)


def _refuse_another_origin(before: Header, now: Header) -> None:
    """The configuration names the network and the data; their content may have changed since."""
    for what, was, found in (
        ("network", before.initial_weights, now.initial_weights),
        ("data", before.data_digest, now.data_digest),
    ):
        if was != found:
            raise BatchNormError(
                f"the {what} {getattr(now.config, what)} is not the one that this folder's cells "
                f"began with (SHA-256 {found[:12]}…, was {was[:12]}…). Nothing was changed. Name "
                "another folder with --out (in Python, out=), or bring the old one back."
            )


def _header(training: Training) -> Header:
    batches, model = training.batches, training.model
    return Header(
        config=training.config,
        environment=environment(),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        initial_weights=_digest(model, training.places),
        data_digest=batches.digest,
        train_images=batches.train_images,
        test_images=batches.test_images,
        statistics_images=len(next(batches.test())[0]),
        steps_per_epoch=batches.steps_per_epoch,
        layers=training.places,
    )


def _digest(model: nn.Module, places: list[str]) -> str:
    """SHA-256 of the state outside the places of the norms: equal for every arm of a seed."""
    digest = hashlib.sha256()
    norms = {model.get_submodule(place) for place in places}
    # a shared norm has several names
    named = model.named_modules(remove_duplicate=False)
    prefixes = tuple(f"{name}." for name, module in named if module in norms)
    for name, value in model.state_dict().items():
        if not name.startswith(prefixes):
            digest.update(name.encode())
            if not isinstance(value, Tensor):  # a module's extra state
                digest.update(repr(value).encode())
                continue
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on so many threads; the former count comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cuda_devices(device: str) -> list[int]:
    """The devices whose random state is borrowed besides the processor's."""
    return [torch.device(device).index or 0] if device.startswith("cuda") else []
