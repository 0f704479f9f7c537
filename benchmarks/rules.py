"""Every rule with its planted fault, its healthy twin, and the remedy after which it is silent.

    python benchmarks/rules.py        docs/rules.md: the table, and a page of each rule

A case is a small model (or a short training) with the fault, another without it, and what mends the
first. A rule must find the fault, at the level that is named, say nothing of the twin at any level
that is reported by default, and say nothing after the remedy.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm.checks.checking import check
from batchnorm.checks.findings import Finding, Level
from batchnorm.checks.rules import all_rules
from batchnorm.checks.watching import watch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "rules.md"


@dataclass
class Situation:
    """What is checked: a model with what stands around it, or a training."""

    model: nn.Module
    loader: Any = None
    optimizer: Any = None
    train: Callable[["Situation"], None] | None = None  # run under watch

    def findings(self, rule: str, level: str) -> list[Finding]:
        """What the rule says of it."""
        if self.train is None:
            found = check(self.model, self.loader, self.optimizer, select=[rule], level=level)
            return list(found)
        with watch(self.model, select=[rule], level=level, every=1) as watching:
            self.train(self)
        return [each for one in watching.findings() for each in one]


@dataclass
class Case:
    """A rule's fault, its twin, and what mends it."""

    rule: str
    planted: Callable[[], Situation]
    healthy: Callable[[], Situation]
    repair: Callable[[Situation], Situation]
    level: Level = Level.WARNING


def images(count: int = 64, size: int = 8, seed: int = 1) -> Tensor:
    """Of unlike brightness, so that outputs are unlike, too."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator)
    return x + torch.randn(count, 3, 1, 1, generator=generator)


def loader(batch_size: int = 16, count: int = 64, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    """Images and classes."""
    x = images(count)
    return DataLoader(TensorDataset(x, torch.arange(count) % 2), batch_size, **options)


def network(seed: int = 0) -> nn.Sequential:
    """Two convolutions with norms, a classifier; trained statistics."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    found: nn.Sequential = trained(model)
    return found


def trained(model: Any, data: Any = None) -> Any:
    """With the statistics of the data, and a counter as after a training."""
    batchnorm.recalibrate(model, loader() if data is None else data)
    for layer in model.modules():
        if getattr(layer, "num_batches_tracked", None) is not None:
            layer.num_batches_tracked.fill_(1000)
    return model.eval()


def healthy() -> Situation:
    """The network as it should be."""
    return Situation(network(), loader())


def changed(change: Callable[[Any], object]) -> Situation:
    """The network with a fault in it."""
    model = network()
    change(model)
    return Situation(model, loader())


def fixed(situation: Situation) -> Situation:
    """By check(fix=True)."""
    check(situation.model, situation.loader, situation.optimizer, fix=True, level="note")
    return situation


def by(change: Callable[[Any], object]) -> Callable[[Situation], Situation]:
    """By the remedy's code."""

    def repair(situation: Situation) -> Situation:
        change(situation.model)
        return situation

    return repair


# trainings


def steps(
    situation: Situation,
    count: int = 40,
    *,
    micro: int = 1,
    size: int = 16,
    evaluate: str = "eval",
    every: int = 10,
) -> None:
    """A plain loop, with an evaluation now and then, in the mode that is named."""
    model, rate = situation.model, 0.05
    optimizer = situation.optimizer or torch.optim.SGD(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    data = itertools.cycle(loader(size, shuffle=False))
    for step in range(count):
        for _ in range(micro):
            x, y = next(data)
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % every == every - 1:
            if evaluate != "train":
                model.eval()
            with torch.no_grad():
                model(images())
            model.train()


def training(model: nn.Module, **options: Any) -> Situation:
    """To be watched."""
    return Situation(model.train(), train=lambda situation: steps(situation, **options))


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.net, self.use_reentrant = network(), use_reentrant
        self.once = False  # the remedy: the second computation updates nothing

    def forward(self, x: Tensor) -> Any:
        if self.once:
            once = functools.partial(batchnorm.update_once, self.net)
            return checkpoint(self.net, x, use_reentrant=False, context_fn=once)
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


def changed_to(model: Any, **attributes: Any) -> Any:
    """The model with other attributes."""
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class Twice(nn.Module):
    """One norm behind two convolutions of unlike inputs."""

    def __init__(self, *, split: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.near, self.far = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.far.bias.data += 3  # type: ignore[union-attr]  # has one
        self.norm = nn.BatchNorm2d(8)
        self.other = nn.BatchNorm2d(8) if split else self.norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.other(self.far(self.norm(self.near(x)).relu()))
        return y.mean((2, 3))


class Branching(nn.Module):
    """A synchronised norm that every other batch goes around."""

    def __init__(self, *, always: bool = False) -> None:
        super().__init__()
        self.net = batchnorm.convert(network(), to="sync")
        self.branch = nn.SyncBatchNorm(3)
        self.always = always
        self.count = 0

    def forward(self, x: Tensor) -> Any:
        self.count += 1
        if self.always or self.count % 2:
            x = self.branch(x)
        return self.net(x)


class Sequences(nn.Module):
    """A convolution over time, which knows nothing of lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()  # type: ignore[no-any-return]  # a tensor


def sequences(*, padded: bool) -> list[Tensor]:
    """(N, 4, 20), zero from each one's end on."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(32, 4, 20, generator=generator)
    if padded:
        lengths = torch.randint(5, 21, (32,), generator=generator)
        x = x * (torch.arange(20) < lengths[:, None])[:, None]
    return [x[:16], x[16:]]


class Tokens(nn.Module):
    """(N, L, C) from a linear layer; the norm's channels are axis 1."""

    def __init__(self, *, right: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.right = nn.Linear(6, 8), nn.BatchNorm1d(8), right

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        y: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.right else self.norm(x)
        return y


class NotesLayer(nn.Module):
    """As in the note: plain attributes, and grad mode as the switch."""

    def __init__(self, *, buffers: bool) -> None:
        super().__init__()
        if buffers:
            self.register_buffer("moving_mean", torch.zeros(1, 3, 1, 1))
            self.register_buffer("moving_var", torch.ones(1, 3, 1, 1))
        else:
            self.moving_mean, self.moving_var = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm((x - self.moving_mean) / self.moving_var.sqrt())  # type: ignore[no-any-return]


class ByBatch(nn.Module):
    """A hand-written norm that always takes the batch's statistics."""

    def __init__(self, *, by_batch: bool) -> None:
        super().__init__()
        self.norm, self.by_batch = nn.BatchNorm2d(3), by_batch

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return nn.functional.batch_norm(x, None, None, training=True) if self.by_batch else x


class GradSampleModule(nn.Module):
    """What a privacy engine wraps a model in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


def head(size: int, count: int) -> Situation:
    """A norm over features: one value a sample."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8)).train()
    trained(model)
    return Situation(model.train(), loader(size, count))


def with_optimizer(model: nn.Module, optimizer: Any) -> Situation:
    return Situation(model, loader(), optimizer)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def replaced_after() -> Situation:
    model = network().train()
    optimizer = sgd(model)
    model[1] = nn.BatchNorm2d(8)
    return Situation(model, optimizer=optimizer)


def averaged(**options: Any) -> Situation:
    """The average of two networks."""
    average = AveragedModel(network(), **options)
    for seed in (0, 1):
        average.update_parameters(network(seed))
    return Situation(average.eval(), loader())


def average_of_one_training() -> Situation:
    """The average of a network and itself, as at the end of a rate that decays to 0."""
    average = AveragedModel(network())
    for _ in range(3):
        average.update_parameters(network())
    return Situation(average.eval(), loader())


def freeze_parameters(model: nn.Sequential) -> None:
    model.train()
    model[1].requires_grad_(False)


def thaw(situation: Situation) -> None:
    """eval() on the norm alone, and a train() in every epoch that undoes it."""
    model: Any = situation.model
    model[1].eval()
    steps(situation, 20, every=10)


def teacher(situation: Situation) -> None:
    """A look at other data in training mode, more often than the training itself."""
    steps(situation, 8, every=4)
    with torch.no_grad():
        for _ in range(20):
            situation.model(images(seed=9) + 2)


def quiet_teacher(situation: Situation) -> None:
    steps(situation, 8, every=4)
    with batchnorm.no_update(situation.model), torch.no_grad():
        for _ in range(20):
            situation.model(images(seed=9) + 2)


def shifted(model: Any) -> None:
    model[4].running_mean += 2


def young_and_shifted(model: Any) -> None:
    shifted(model)
    model[1].num_batches_tracked.fill_(5)


def large_mean() -> Situation:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    data = [images(16) + 1e5 for _ in range(3)]
    return Situation(trained(model, data), data)


def normalized(situation: Situation) -> Situation:
    data = [x - 1e5 for x in situation.loader]
    return Situation(trained(situation.model, data), data)


CASES = [
    Case("BN001", lambda: changed(shifted), healthy, fixed),
    Case(
        "BN002",
        lambda: changed(lambda m: m[1].train()),
        healthy,
        by(lambda m: m.eval()),
        Level.ERROR,
    ),
    Case(
        "BN003",
        lambda: changed(freeze_parameters),
        lambda: changed(lambda m: batchnorm.freeze(m.train(), "1", parameters=True)),
        fixed,
    ),
    Case(
        "BN004",
        lambda: Situation(network().train(), train=thaw),
        lambda: training(batchnorm.freeze(network(), "1")),
        lambda s: training(batchnorm.freeze(s.model, "1")),
    ),
    Case(
        "BN005",
        lambda: Situation(network().train(), train=teacher),
        lambda: training(network()),
        lambda s: Situation(s.model, train=quiet_teacher),
    ),
    Case(
        "BN006",
        lambda: head(16, 49),
        lambda: head(16, 48),
        lambda s: Situation(s.model, loader(16, 49, drop_last=True)),
        Level.ERROR,
    ),
    Case(
        "BN007",
        lambda: head(8, 64),
        lambda: head(32, 64),
        lambda s: Situation(batchnorm.freeze(s.model), s.loader),
    ),
    Case(
        "BN008",
        lambda: changed(lambda m: m[1].running_var.sub_(1e4)),
        healthy,
        fixed,
        Level.ERROR,
    ),
    Case("BN009", lambda: changed(lambda m: m[1].reset_running_stats()), healthy, fixed),
    Case(
        "BN010",
        lambda: Situation(nn.BatchNorm2d(3, track_running_stats=False).eval(), loader()),
        healthy,
        lambda _: Situation(trained(nn.BatchNorm2d(3)), loader()),
    ),
    Case("BN011", lambda: changed(lambda m: setattr(m[1], "momentum", 0.99)), healthy, fixed),
    Case(
        "BN012",
        lambda: changed(young_and_shifted),
        healthy,
        fixed,
    ),
    Case(
        "BN013",
        lambda: changed(lambda m: setattr(m[1], "eps", 1e-3)),
        healthy,
        by(lambda m: setattr(m[1], "eps", 1e-5)),
        Level.NOTE,
    ),
    Case(
        "BN014",
        lambda: Situation(trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), loader()),
        healthy,
        fixed,
        Level.NOTE,
    ),
    Case(
        "BN015",
        lambda: Situation(trained(Twice()), loader()),
        lambda: Situation(trained(Twice(split=True)), loader()),
        lambda _: Situation(trained(Twice(split=True)), loader()),
    ),
    Case(
        "BN016",
        lambda: training(Checkpointed()),
        lambda: training(network()),
        lambda s: training(changed_to(s.model, once=True)),
    ),
    Case(
        "BN017",
        lambda: training(head(4, 64).model, micro=4, size=4),
        lambda: training(network()),
        lambda s: training(batchnorm.freeze(s.model), micro=4, size=4),
    ),
    Case(
        "BN018",
        lambda: Situation(trained(Sequences(), sequences(padded=True)), sequences(padded=True)),
        lambda: Situation(trained(Sequences(), sequences(padded=False)), sequences(padded=False)),
        lambda s: Situation(s.model, sequences(padded=False)),
    ),
    Case(
        "BN019",
        lambda: Situation(Tokens().train(), [torch.randn(16, 8, 6)]),
        lambda: Situation(Tokens(right=True).train(), [torch.randn(16, 8, 6)]),
        lambda _: Situation(Tokens(right=True).train(), [torch.randn(16, 8, 6)]),
    ),
    Case(
        "BN020",
        lambda: Situation(network().bfloat16().train()),
        lambda: Situation(network().train()),
        fixed,
    ),
    Case("BN021", large_mean, healthy, normalized),
    Case(
        "BN022",
        lambda: changed(lambda m: [m[1].weight.data[:5].zero_()]),
        lambda: changed(lambda m: m[4].weight.data.zero_()),  # as a residual block begins
        by(lambda m: m[1].weight.data.fill_(1)),
    ),
    Case(
        "BN023",
        lambda: with_optimizer(model := network(), sgd(model, weight_decay=1e-4)),
        lambda: with_optimizer(
            model := network(), torch.optim.SGD(batchnorm.param_groups(model, 1e-4), lr=0.1)
        ),
        fixed,
        Level.NOTE,
    ),
    Case(
        "BN024",
        lambda: Situation(
            nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        ),
        lambda: Situation(
            nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(0.5))
        ),
        by(lambda m: setattr(m[0], "p", 0.0)),
        Level.NOTE,
    ),
    Case(
        "BN025",
        lambda: Situation(parallel(network(), [0, 1])),
        lambda: Situation(parallel(network(), [0])),
        lambda s: Situation(s.model.module),  # type: ignore[arg-type]  # a module
    ),
    Case(
        "BN026",
        lambda: training(Branching(), count=20),
        lambda: training(Branching(always=True), count=20),
        lambda _: training(Branching(always=True), count=20),
    ),
    Case(
        "BN027",
        lambda: Situation(batchnorm.convert(network(), to="sync")),
        healthy,
        by(lambda m: batchnorm.convert(m, to="ours")),
        Level.NOTE,
    ),
    Case("BN028", averaged, average_of_one_training, fixed),
    Case(
        "BN029",
        replaced_after,
        lambda: with_optimizer(model := network().train(), sgd(model)),
        lambda s: Situation(s.model, optimizer=sgd(s.model)),
    ),
    Case(
        "BN030",
        lambda: Situation(trained(Twice()), loader()),
        lambda: Situation(trained(Twice(split=True)), loader()),
        lambda _: Situation(trained(Twice(split=True)), loader()),
        Level.NOTE,
    ),
    Case(
        "BN031",
        lambda: Situation(NotesLayer(buffers=False)),
        lambda: Situation(NotesLayer(buffers=True)),
        lambda _: Situation(NotesLayer(buffers=True)),
        Level.ERROR,
    ),
    Case(
        "BN032",
        lambda: Situation(GradSampleModule(network()).train()),
        healthy,
        by(lambda m: batchnorm.convert(m, to="group")),
        Level.ERROR,
    ),
    Case(
        "BN033",
        lambda: Situation(trained(ByBatch(by_batch=True)), loader()),
        lambda: Situation(trained(ByBatch(by_batch=False)), loader()),
        by(lambda m: setattr(m, "by_batch", False)),
        Level.ERROR,
    ),
    Case(
        "BN034",
        lambda: Situation(trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)))),
        healthy,
        lambda _: healthy(),
        Level.NOTE,
    ),
]


def parallel(model: nn.Module, devices: list[int]) -> nn.Module:
    """DataParallel as it stands on a machine with devices."""
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = devices
    return wrapped


@dataclass
class Result:
    """What a rule said of its case."""

    planted: list[Finding]
    healthy: list[Finding]
    repaired: list[Finding]

    def holds(self, case: Case) -> bool:
        """Found at its level, and silent twice."""
        found = any(each.level is case.level for each in self.planted)
        return found and not self.healthy and not self.repaired


def examine(case: Case) -> Result:
    """Planted, healthy, repaired."""
    torch.manual_seed(0)
    level = str(case.level)
    fault = case.planted()
    planted = fault.findings(case.rule, level)
    repaired = case.repair(fault)
    return Result(
        planted, case.healthy().findings(case.rule, level), repaired.findings(case.rule, level)
    )


def page(cases: dict[str, tuple[Case, Result]]) -> str:
    """The table, and a page of each rule, as Markdown; `cases` by rule."""
    lines = [
        "# The rules of `check` and `watch`\n",
        (
            "Each rule with a planted fault that it finds, a healthy twin of which it says nothing, and "
            "the remedy after which it is silent; made by `python benchmarks/rules.py`.\n"
        ),
        "| rule | | level | planted | healthy | repaired |\n|---|---|---|---|---|---|",
    ]
    for identifier, rule in all_rules().items():
        case, result = cases[identifier]
        silent = ["silent" if not found else "found" for found in (result.healthy, result.repaired)]
        lines.append(
            f"| [{identifier}](#{identifier.lower()}) | {rule.title} | {case.level} | "
            f"{'found' if result.planted else 'silent'} | {silent[0]} | {silent[1]} |"
        )
    for identifier, rule in all_rules().items():
        lines += [f"\n## {identifier}\n", f"**{rule.title}** ({rule.level})\n", rule.explanation]
        planted = cases[identifier][1].planted
        lines.append("\n```\n" + "\n".join(str(found) for found in planted[:3]) + "\n```")
        lines += ["\nThe remedy:\n", f"```python\n{rule.remedy}\n```"]
        needs = ", ".join(rule.needs)
        lines.append(f"\nNeeds: {needs}." if needs else "")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Examine every case, say what does not hold, write the page."""
    results = {}
    for case in CASES:
        result = examine(case)
        results[case.rule] = case, result
        sign = "ok  " if result.holds(case) else "NOT "
        print(
            sign,
            case.rule,
            *map(str, [result.planted[:1], result.healthy[:1], result.repaired[:1]]),
        )
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
