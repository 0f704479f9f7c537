"""A study as data: a claim, its arms, a grid, what is measured, and the rule that decides.

A study is a list of cells, each named by the hash of its configuration, so that two studies that
ask for the same cell share it. A cell is a training (`record.CellConfig`), or, where the study
names a `function`, a `Probe`: one call of that function from one seed.

Nothing here loads torch: the command lists the studies without it.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from batchnorm.errors import BatchNormError
from batchnorm.lab.effects import Effect
from batchnorm.lab.record import CellConfig
from batchnorm.lab.statistics import Rule

PROBE_FORMAT = 1
SIZES = ("quick", "normal", "full")


class Text(NamedTuple):
    """A sentence in both languages of the project."""

    en: str
    zh: str

    def of(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True)
class Probe:
    """A measurement that is not one training: `function(seed, images, **options)`.

    The function, `package.module:function`, returns its numbers by name, floats or lists of them
    (curves). `images` are the data set, or None where `data` is empty. It runs with torch's random
    state seeded by `seed`, on so many threads, and borrows nothing that does not come back.
    """

    function: str
    arm: str
    seed: int
    options: tuple[tuple[str, Any], ...] = ()
    data: str = ""
    threads: int = 1
    alone: bool = False  # a timing: nothing else runs meanwhile

    @property
    def hash(self) -> str:
        """A name for the configuration's content, 16 hexadecimal digits."""
        content = json.dumps({"probe": PROBE_FORMAT, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


Config: TypeAlias = CellConfig | Probe


@dataclass(frozen=True)
class Arm:
    """One way of doing it: its name, what it is called, and what it changes in a configuration.

    Of a training the changes are fields of `CellConfig` (the arm's place in a network is one of
    them: `arm`); of a probe they are options of its function.
    """

    name: str
    label: Text
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """How much of a study is run: quick, normal or full."""

    seeds: int
    common: Mapping[str, Any] = field(default_factory=dict)  # fields that all cells share
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # fields with several values

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the grid's values; one empty combination without a grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))


@dataclass(frozen=True)
class Question:
    """A sentence that the data may support: a number per seed, and the rule that decides."""

    name: str
    claim: Text
    effect: Effect
    rule: Rule


@dataclass(frozen=True)
class Planned:
    """A cell in its place in a study."""

    arm: str
    point: dict[str, Any]
    seed: int
    config: Config


@dataclass(frozen=True)
class Study:
    """A claim and how it is tested."""

    name: str
    claim: Text
    source: str
    arms: Sequence[Arm]
    sizes: Mapping[str, Size]
    questions: Sequence[Question]
    function: str | None = None  # of a probe; None: the cells are trainings
    alone: bool = False  # its cells are timings

    def cells(
        self, size: str, *, seeds: int | None = None, data: str | None = None
    ) -> list[Planned]:
        """The cells: all arms at all points of the first seed, then of the next."""
        scale = self.sizes[size]
        count = scale.seeds if seeds is None else seeds
        if count < 1:
            raise BatchNormError(f"seeds is {count} and should be a whole number from 1.")
        return [
            Planned(arm.name, point, seed, self._config(arm, {**scale.common, **point}, seed, data))
            for seed in range(count)
            for point in scale.points()
            for arm in self.arms
        ]

    def _config(self, arm: Arm, shared: dict[str, Any], seed: int, data: str | None) -> Config:
        fields = {**shared, **arm.changes}
        if self.function is None:
            given = {} if data is None else {"data": data}
            return CellConfig(**{"threads": 1, **fields, **given, "seed": seed})
        uses_data, threads = fields.pop("data", ""), fields.pop("threads", 1)
        return Probe(
            self.function,
            arm.name,
            seed,
            tuple(sorted(fields.items())),
            (data or uses_data) if uses_data else "",
            threads,
            self.alone,
        )
