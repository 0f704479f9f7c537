"""Same weights, same images, only the statistics of batch normalization differ.

For each seed a LeNet is trained with a rate that decays (healthy), and another at a constant rate.
Then something is done to the weights or to the images that the running statistics know nothing of.
Test accuracy is measured before and after `recalibrate` on training images that had the same done
to them, without labels.

    record.jsonl   first line: the configuration and where it ran; then a line a seed and condition
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.errors import BatchNormError
from batchnorm.lab import files, fitting
from batchnorm.lab.batches import EVALUATION_BATCH, TensorBatches
from batchnorm.lab.data import Images
from batchnorm.lab.environment import environment
from batchnorm.lab.evaluation import accuracy_of
from batchnorm.lab.training import threads
from batchnorm.model.recalibration import recalibrate

RECORD = "record.jsonl"
FEW = 16  # images: so few statistics are worse than those that were there


@dataclass(frozen=True)
class StudyConfig:
    """What decides the numbers of the study; seeds can be added to a folder."""

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1.0
    recalibration_images: int = 10_000
    train_images: int | None = None  # None: all of them
    threads: int = 2


@dataclass(frozen=True)
class Rescue:
    """Test accuracy of one seed under one condition, before and after."""

    seed: int
    condition: str
    before: float
    after: float


@dataclass(frozen=True)
class Study:
    """What a folder holds."""

    config: StudyConfig
    environment: dict[str, Any]
    rescues: list[Rescue]

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(rescue.condition for rescue in self.rescues))

    def of(self, condition: str) -> list[Rescue]:
        """One condition, by seed."""
        found = [rescue for rescue in self.rescues if rescue.condition == condition]
        return sorted(found, key=lambda rescue: rescue.seed)


@dataclass(frozen=True)
class Trained:
    """The networks of one seed."""

    healthy: nn.Module  # at the end of a rate that decayed
    moving: nn.Module  # in the middle of training at a constant rate
    sibling: nn.Module  # as `moving`, from the same weights, with another order of the data


@dataclass(frozen=True)
class Condition:
    """What is done to a network, to all images, and how many images it is recalibrated with."""

    name: str
    network: Callable[[Trained], nn.Module] = lambda trained: copy.deepcopy(trained.healthy)
    images: Callable[[Tensor], Tensor] = lambda images: images
    count: int | None = None  # None: as the configuration says


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """Weights of convolutions and linear layers on 2^bits − 1 levels, symmetric, one scale each."""
    levels = 2 ** (bits - 1) - 1
    for weight in _weights(model, nn.Conv2d | nn.Linear):
        scale = weight.abs().max() / levels
        weight.copy_((weight / scale).round() * scale)
    return model


def pruned(model: nn.Module, share: float) -> nn.Module:
    """The smallest weights of each convolution set to 0."""
    for weight in _weights(model, nn.Conv2d):
        threshold = weight.abs().flatten().kthvalue(max(1, int(share * weight.numel()))).values
        weight.mul_(weight.abs() > threshold)
    return model


def averaged(one: nn.Module, other: nn.Module) -> nn.Module:
    """Halfway between two networks: parameters and running statistics alike."""
    middle = copy.deepcopy(one)
    with torch.no_grad():
        for value, theirs in zip(
            middle.state_dict().values(), other.state_dict().values(), strict=True
        ):
            if value.is_floating_point():
                value.lerp_(theirs, 0.5)
    return middle


def noisy(images: Tensor) -> Tensor:
    """Gaussian noise of standard deviation 0.3, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return (images + 0.3 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


CONDITIONS = (
    Condition("moving", network=lambda trained: copy.deepcopy(trained.moving)),
    Condition("averaged", network=lambda trained: averaged(trained.moving, trained.sibling)),
    Condition("4 bits", network=lambda trained: rounded(copy.deepcopy(trained.healthy), 4)),
    Condition("3 bits", network=lambda trained: rounded(copy.deepcopy(trained.healthy), 3)),
    Condition("pruned", network=lambda trained: pruned(copy.deepcopy(trained.healthy), 0.5)),
    Condition("brightness", images=lambda images: (images + 0.3).clamp(0, 1)),
    Condition("contrast", images=lambda images: images * 0.3 + 0.35),
    Condition("noise", images=noisy),
    Condition("blur", images=lambda images: F.avg_pool2d(images, 5, 1, padding=2)),
    Condition("control"),
    Condition("few", count=FEW),
)


def run(
    config: StudyConfig,
    seeds: Iterable[int],
    images: Images,
    folder: Path,
    told: Callable[[int, Sequence[Rescue]], None],
) -> None:
    """Measure every seed that the folder does not hold yet; each is recorded when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / RECORD
    before = read(folder) if record.exists() else None
    if before is not None and before.config != config:
        raise BatchNormError(
            f"{folder} holds the study of another configuration: {before.config}. Nothing was "
            "changed. Name another folder with --out."
        )
    rescues = [] if before is None else before.rescues
    where = environment() if before is None else before.environment
    header = {"config": dataclasses.asdict(config), "environment": where}
    kept = [header, *map(dataclasses.asdict, rescues)]  # without a seed that was cut
    files.keep(_text(kept).encode(), record)
    done = {rescue.seed for rescue in rescues}
    with threads(config.threads), torch.random.fork_rng([]):
        for seed in seeds:
            if seed not in done:
                found = list(_measure(config, seed, images))
                files.append(record, _text(map(dataclasses.asdict, found)))
                told(seed, found)


def read(folder: Path) -> Study:
    """A folder's record."""
    record = folder / RECORD
    try:
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        # a kill in the middle of a write leaves a line without an end: its seed is measured again
        header, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
        rescues = [Rescue(**row) for row in rows]
        study = Study(StudyConfig(**header["config"]), header["environment"], rescues)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BatchNormError(
            f"{record} is not the record of a study ({error}). Make one with `batchnorm study "
            "recalibration --out DIR`."
        ) from error
    whole = {c.name for c in CONDITIONS}
    complete = [
        seed
        for seed in {rescue.seed for rescue in rescues}
        if {rescue.condition for rescue in rescues if rescue.seed == seed} == whole
    ]
    return dataclasses.replace(study, rescues=[r for r in rescues if r.seed in complete])


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _measure(config: StudyConfig, seed: int, images: Images) -> Iterator[Rescue]:
    trained = _train(config, seed, images)
    for condition in CONDITIONS:
        model = condition.network(trained)
        train = condition.images(images.train_images[: config.recalibration_images])
        test = condition.images(images.test_images)
        before = accuracy_of(model, test, images.test_labels)
        recalibrate(model, train[: condition.count].split(EVALUATION_BATCH))
        yield Rescue(seed, condition.name, before, accuracy_of(model, test, images.test_labels))


def _train(config: StudyConfig, seed: int, images: Images) -> Trained:
    """Three runs from the same weights, two of them half as long and at a constant rate."""
    batches = TensorBatches(images, config.batch_size, config.train_images)
    start = fitting.start("lenet", "batch", seed)
    healthy, moving, sibling = (copy.deepcopy(start) for _ in range(3))
    half, rate = max(1, config.epochs // 2), config.learning_rate
    fitting.fit(healthy, batches, rate, [seed] * config.epochs)
    fitting.fit(moving, batches, rate, [seed] * half, decays=False)
    fitting.fit(sibling, batches, rate, [seed + 500_000] * half, decays=False)
    return Trained(healthy, moving, sibling)


def _weights(model: nn.Module, kinds: Any) -> Iterator[Tensor]:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, kinds):
                yield module.weight
