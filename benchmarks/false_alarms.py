"""What `check` and `watch` say of healthy models and trainings: nothing, at the default level.

    python benchmarks/false_alarms.py             all: docs/false-alarms.md
    python benchmarks/false_alarms.py resnet18    those with this in their names, to the terminal

The models are those of benchmarks/models.py, with random weights and the statistics of the data that
is then checked; the trainings are written as they should be.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import batchnorm
import models
import resuming
from batchnorm.checks.checking import check
from batchnorm.checks.findings import Findings, joined
from batchnorm.checks.rules import all_rules
from batchnorm.checks.watching import watch
from batchnorm.lab import networks

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "false-alarms.md"
RECORD = ROOT / "runs" / "false-alarms.jsonl"  # a line a model, so that a run that stops goes on


def settled(model: nn.Module, batches: list[Any]) -> nn.Module:
    """As after a training: the data's statistics, and counters that have run."""
    batchnorm.recalibrate(model, batches, forward=lambda model, batch: model(*batch))
    for norm in models.norms(model):
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(1000)
    return model


def larger(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Eight times as many samples of the same kind."""
    generator = torch.Generator().manual_seed(seed)

    def grown(x: Any) -> Any:
        if isinstance(x, list):
            return [each for _ in range(8) for each in x]
        if not x.is_floating_point():
            return x.repeat(8, *[1] * (x.dim() - 1))
        shape = (8 * x.shape[0], *x.shape[1:])
        each = torch.randn(shape[0], *[1] * (x.dim() - 1), generator=generator)
        return torch.randn(shape, generator=generator) + each  # of unlike brightness

    return tuple(grown(x) for x in inputs)


def of_model(group: str, build: models.Build) -> list[Findings]:
    """Evaluated and about to go on training, with data and optimizer."""
    torch.manual_seed(0)
    model = build().eval()
    if not models.norms(model):
        return []
    models.shake(model)
    inputs = models.inputs_for(group, model)
    batches = [larger(inputs, seed) for seed in range(2)]
    settled(model, batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)

    def forward(model: nn.Module, batch: Any) -> Any:
        return model(*batch)

    found = [check(model.eval(), batches, optimizer, forward)]
    model.train()
    if group != "detection":  # whose training wants targets
        found.append(check(model, batches, optimizer, forward))
    return found


# trainings as they should be


def batches(count: int = 40, size: int = 32) -> Any:
    """Images of two kinds."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        y = torch.randint(0, 2, (size,), generator=generator)
        x = torch.randn(size, 3, 12, 12, generator=generator) + 0.5 * y[:, None, None, None]
        yield x, y


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip


def train(
    model: Any, count: int = 200, step: Callable[[], object] = lambda: None, rate: float = 0.1
) -> None:
    """A rate that decays to 0; an evaluation in evaluation mode now and then."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for place, (x, y) in enumerate(batches(count)):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step()
        if place % 50 == 49:
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()


def plain() -> Findings:
    with watch() as watching:
        train(small().train())
    return joined(watching.findings())


def lenet() -> Findings:
    """The lab's, its rate decaying to 0."""
    torch.manual_seed(0)
    model = networks.lenet()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    data = []
    with watch() as watching:
        for x, y in batches(300, 64):
            x28 = nn.functional.interpolate(x.mean(1, keepdim=True), 28)
            data.append(x28)
            nn.functional.cross_entropy(model(x28), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    found = joined(watching.findings())
    return Findings([*found, *check(model.eval(), data[-8:])], model="LeNet", checked=found.checked)


def frozen_fine_tuning() -> Findings:
    model = settled(small(), [(x,) for x, _ in batches(4)])
    batchnorm.freeze(model, parameters=True).train()
    with watch() as watching:
        train(model, rate=0.01)
    return joined(watching.findings())


def frozen_by_a_train_of_its_own() -> Findings:
    """As detection toolboxes do it."""

    class Backbone(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            for norm in models.norms(self):
                norm.eval()
            return self

    model = Backbone(*settled(small(), [(x,) for x, _ in batches(4)]).children()).train()
    with watch() as watching:
        train(model, rate=0.01)
    return joined(watching.findings())


def gan() -> Findings:
    """The discriminator sees real and made images in turn; the generator's are made without gradients."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 6, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 7),
    )
    discriminator = nn.Sequential(*small()[:-1], nn.Linear(8, 1))
    half = [torch.optim.Adam(m.parameters(), 2e-4) for m in (generator, discriminator)]
    with watch() as watching:
        for x, _ in batches(200):
            noise = torch.randn(32, 4, 1, 1)
            with torch.no_grad():
                made = generator(noise)
            loss = nn.functional.softplus(-discriminator(x)) + nn.functional.softplus(
                discriminator(made)
            )
            loss.mean().backward()
            half[1].step()
            discriminator.requires_grad_(False)
            nn.functional.softplus(-discriminator(generator(noise))).mean().backward()
            half[0].step()
            discriminator.requires_grad_(True)
            for optimizer in half:
                optimizer.zero_grad()
    return joined(watching.findings())


def averaged_with_its_buffers() -> Findings:
    """An exponential average of weights and statistics, evaluated."""
    model = small().train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    train(model, step=lambda: average.update_parameters(model))
    data = [x for x, _ in batches(200)][-8:]
    return check(average.eval(), data)


def averaged_and_recalibrated() -> Findings:
    model = small().train()
    average = AveragedModel(model)
    train(model, step=lambda: average.update_parameters(model))
    data = [x for x, _ in batches(200)][-8:]
    batchnorm.recalibrate(average, data)
    return check(average.eval(), data)


def quantization_aware() -> Findings:
    """torch.ao's, whose fused layers hold norms."""
    model = torchvision.models.quantization.resnet18(weights=None)
    model.train()
    model.fuse_model(is_qat=True)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    torch.ao.quantization.prepare_qat(model, inplace=True)
    data = [(torch.randn(16, 3, 64, 64),) for _ in range(2)]
    settled(model, data)
    return check(model.eval(), [x for (x,) in data])


def accumulated() -> Findings:
    """Four batches to a step, each large enough."""
    model = small().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    with watch() as watching:
        for place, (x, y) in enumerate(batches(240)):
            (nn.functional.cross_entropy(model(x), y) / 4).backward()
            if place % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return joined(watching.findings())


def siamese() -> Findings:
    """Two views of the same images through one network."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small()

        def forward(self, x: Tensor) -> Any:
            return self.net(x) + self.net(x.flip(3))

    model = settled(Pair(), [(x,) for x, _ in batches(8)])
    return check(model.eval(), [x for x, _ in batches(8)])


TRAININGS: dict[str, Callable[[], Findings]] = {
    "a plain loop": plain,
    "the lab's LeNet, cosine rate": lenet,
    "fine-tuning, frozen by freeze()": frozen_fine_tuning,
    "fine-tuning, frozen by a train() of its own": frozen_by_a_train_of_its_own,
    "a GAN": gan,
    "an EMA with its buffers": averaged_with_its_buffers,
    "averaged weights, recalibrated": averaged_and_recalibrated,
    "quantization-aware training": quantization_aware,
    "gradient accumulation of large batches": accumulated,
    "a siamese network": siamese,
}


def told(found: list[Findings]) -> list[str]:
    """Each finding in a line."""
    return sorted({f"{f.rule} {f.layer}: {f.evidence}" for each in found for f in each})


def unchecked(found: list[Findings]) -> list[str]:
    """What could not be looked at."""
    return sorted(
        {f"{r}: {w}" for each in found for r, w in each.skipped.items() if "could not" in w}
    )


def line_of(name: str, kind: str, find: Callable[[], list[Findings]]) -> resuming.Line | None:
    """For the record; None where there is no batch norm in it."""
    found = find()
    if not found:
        return None
    return {
        "name": name,
        "kind": kind,
        "rules": len(found[0].checked),
        "found": told(found),
        "unchecked": unchecked(found),
    }


def looks() -> dict[str, Callable[[], resuming.Line | None]]:
    """By name: the trainings, then the models."""
    found: dict[str, Callable[[], resuming.Line | None]] = {
        name: partial(line_of, name, "training", partial(_alone, run))
        for name, run in TRAININGS.items()
    }
    for name, (group, build) in models.all_models().items():
        found[name] = partial(line_of, name, group, partial(of_model, group, build))
    return found


def _alone(run: Callable[[], Findings]) -> list[Findings]:
    return [run()]


def main() -> None:
    """Check, record, write the page."""
    part = resuming.part_of(__doc__)
    resuming.look(looks(), RECORD, "name", part)
    if part is None:
        PAGE.write_text(page(resuming.read(RECORD)), encoding="utf-8")


def page(lines: list[resuming.Line]) -> str:
    """The table as Markdown."""
    loud = sum(bool(line["found"]) for line in lines)
    head = f"""\
# False alarms

`check` and `watch`, at their default level and by {len(all_rules())} rules, on {len(lines)} healthy models and
trainings: **false alarms in {loud} of {len(lines)}**. Made by `python benchmarks/false_alarms.py`. The models have
random weights and the statistics of the data that is checked, and are checked in evaluation and in training
mode; the trainings are written as they should be.

*Rules checked* are those for which there is what they look at: a loader, an optimizer, a training.

| | kind | rules checked | found |
|---|---|---|---|"""
    text = [head]
    text += [
        f"| {line['name']} | {line['kind']} | {line['rules']} | {'<br>'.join(line['found']) or 'nothing'} |"
        for line in lines
    ]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
