"""From the outcomes of a study's cells to one number per seed: the effects that rules judge."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from batchnorm.errors import BatchNormError

LEARNED = 0.5  # ten classes: halfway from chance, .1, to the .9 that is claimed for such networks
HELD_OUT = "held_out_accuracy"  # what choices are made by: never the test images


@dataclass(frozen=True)
class Outcome:
    """What a finished cell gave."""

    arm: str
    point: Mapping[str, Any]  # its place in the grid
    seed: int
    hash: str
    values: Mapping[str, float | None]
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


Quantity: TypeAlias = str | Callable[[Outcome], float | None]


@dataclass(frozen=True)
class EpochsTo:
    """The first evaluation at which a curve reaches the target, in epochs.

    One that never does counts as the last epoch: too little, so a difference is not flattered.
    """

    target: float
    curve: str = "test_accuracy"

    def __call__(self, outcome: Outcome) -> float | None:
        epochs, values = outcome.curves["epoch"], outcome.curves[self.curve]
        for epoch, value in zip(epochs, values, strict=True):
            if value is not None and value >= self.target:
                return epoch
        return epochs[-1]


class Table:
    """The outcomes of a study, by arm, point and seed."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = outcomes
        self._found = {(o.arm, _key(o.point), o.seed): o for o in outcomes}

    def points(self, arm: str) -> list[Mapping[str, Any]]:
        """The arm's places in the grid, in its order."""
        return list({_key(o.point): o.point for o in self.outcomes if o.arm == arm}.values())

    def seeds(self) -> list[int]:
        return sorted({outcome.seed for outcome in self.outcomes})

    def at(self, arm: str, point: Mapping[str, Any]) -> dict[int, Outcome]:
        """An arm's outcomes at a point, by seed; a cell that failed is missing."""
        return {
            seed: outcome
            for seed in self.seeds()
            if (outcome := self._found.get((arm, _key(point), seed))) is not None
        }

    def values(self, quantity: Quantity, arm: str, point: Mapping[str, Any]) -> dict[int, float]:
        """One quantity by seed; a cell without it is left out."""
        found = {seed: read(quantity, o) for seed, o in self.at(arm, point).items()}
        return {seed: value for seed, value in found.items() if value is not None}


def read(quantity: Quantity, outcome: Outcome) -> float | None:
    """A quantity of an outcome: a value by its name, or what a function makes of it."""
    if callable(quantity):
        return quantity(outcome)
    if quantity not in outcome.values:
        raise BatchNormError(
            f"a study measures {quantity!r}, which its cells do not give. They give "
            f"{', '.join(outcome.values)}."
        )
    return outcome.values[quantity]


def _key(point: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))


class Choice(Protocol):
    """Where in the grid an arm is looked at."""

    def point(self, table: Table, arm: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class At:
    """A point by its values; without any, the only point of a study without a grid."""

    values: Mapping[str, Any] = field(default_factory=dict)

    def point(self, _table: Table, _arm: str) -> Mapping[str, Any]:
        return self.values


@dataclass(frozen=True)
class Best:
    """The point where the mean over the seeds is highest: one for all seeds of an arm.

    Chosen by held-out images. `of` names the arm whose best point is taken; by default each arm has
    its own, and with `of` the arms are compared at matched settings.
    """

    by: str = HELD_OUT
    of: str | None = None

    def point(self, table: Table, arm: str) -> Mapping[str, Any]:
        chooser = self.of or arm
        points = table.points(chooser)
        if not points:
            return {}
        return max(points, key=lambda point: _mean(table.values(self.by, chooser, point)))


def _mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values()) if values else -math.inf


class Effect(Protocol):
    """One number per seed."""

    def per_seed(self, table: Table) -> dict[int, float]: ...

    def points(self, table: Table) -> dict[str, Mapping[str, Any]]:
        """Where in the grid each arm was looked at."""


@dataclass(frozen=True)
class Level:
    """A quantity of one arm."""

    quantity: Quantity
    arm: str
    at: Choice = field(default_factory=At)

    def per_seed(self, table: Table) -> dict[int, float]:
        return table.values(self.quantity, self.arm, self.at.point(table, self.arm))

    def points(self, table: Table) -> dict[str, Mapping[str, Any]]:
        return {self.arm: self.at.point(table, self.arm)}


@dataclass(frozen=True)
class Difference:
    """arm − baseline of one quantity, seed by seed; with `ratio` the logarithm of arm / baseline."""

    quantity: Quantity
    arm: str
    baseline: str
    at: Choice = field(default_factory=At)
    ratio: bool = False

    def per_seed(self, table: Table) -> dict[int, float]:
        mine, theirs = (
            table.values(self.quantity, arm, self.at.point(table, arm))
            for arm in (self.arm, self.baseline)
        )
        both = mine.keys() & theirs.keys()
        if self.ratio:
            return {seed: math.log(mine[seed] / theirs[seed]) for seed in sorted(both)}
        return {seed: mine[seed] - theirs[seed] for seed in sorted(both)}

    def points(self, table: Table) -> dict[str, Mapping[str, Any]]:
        return {arm: self.at.point(table, arm) for arm in (self.arm, self.baseline)}


@dataclass(frozen=True)
class Gap:
    """The difference of two effects, seed by seed: how much of one the other does not explain."""

    first: Effect
    second: Effect

    def per_seed(self, table: Table) -> dict[int, float]:
        one, other = self.first.per_seed(table), self.second.per_seed(table)
        return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}

    def points(self, table: Table) -> dict[str, Mapping[str, Any]]:
        return self.first.points(table)


@dataclass(frozen=True)
class Reach:
    """log₁₀ of the largest usable value of a field, arm − baseline.

    Usable: the cell did not diverge, and its held-out accuracy at the end is at least `least`. Where
    the rate decays, it is the first one that is named. A seed from which one of the arms never gets
    there is left out, and an arm whose largest value is the grid's end might reach further: both
    make a difference smaller than it is, where the arm is the one that reaches further.
    """

    over: str  # a field of the grid
    arm: str
    baseline: str
    least: float = LEARNED

    def per_seed(self, table: Table) -> dict[int, float]:
        mine, theirs = self._largest(table, self.arm), self._largest(table, self.baseline)
        return {
            seed: math.log10(mine[seed] / theirs[seed])
            for seed in sorted(mine.keys() & theirs.keys())
        }

    def points(self, table: Table) -> dict[str, Mapping[str, Any]]:
        """The median over the seeds."""
        return {
            arm: {self.over: statistics.median_low(found.values())}
            for arm in (self.arm, self.baseline)
            if (found := self._largest(table, arm))
        }

    def _largest(self, table: Table, arm: str) -> dict[int, float]:
        largest: dict[int, float] = {}
        for seed in table.seeds():
            found = [table.at(arm, point).get(seed) for point in table.points(arm)]
            usable = [
                float(outcome.point[self.over])
                for outcome in found
                if outcome is not None
                and not outcome.values["diverged"]
                and (outcome.values[HELD_OUT] or 0.0) >= self.least
            ]
            if usable:
                largest[seed] = max(usable)
        return largest
