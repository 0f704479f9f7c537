"""What was measured, and what it says: the rounds of a row, their ratios, what is slower than torch."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from batchnorm.speed.cases import Plan

MARGIN = 0.03  # a smaller difference is not seen on a machine that others use, too
CHANCE = 0.05  # how often equal speeds may look like these rounds


@dataclass(frozen=True)
class Row:
    """One shape and operation: seconds of a call, a number a round, of everyone who was timed."""

    family: str
    shape: str
    step: str
    fusion: str
    dtype: str
    threads: int
    setting: str
    times: dict[str, list[float]]  # torch, ours, floor, and compiled where it was asked for

    def seconds(self, name: str) -> float:
        """The median."""
        return statistics.median(self.times[name])

    def ratios(self, above: str, below: str) -> list[float]:
        """Of the two, round by round."""
        pairs = zip(self.times[above], self.times[below], strict=True)
        return [first / second for first, second in pairs]

    def ratio(self, above: str = "torch", below: str = "ours") -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios(above, below))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of torch ÷ ours: half of the rounds lie between."""
        ratios = self.ratios("torch", "ours")
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    @property
    def slower(self) -> bool:
        """Slower than torch, by more than the margin, and not by chance."""
        ratios = self.ratios("torch", "ours")
        return self.ratio() < 1 - MARGIN and chance(ratios) < CHANCE

    def __str__(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.shape}, {self.step}, {self.fusion}, {self.dtype}, {self.threads} "
            f"thread{'s' * (self.threads > 1)}, {self.setting}: torch ÷ ours {self.ratio():.2f} "
            f"({low:.2f} to {high:.2f})"
        )

    def content(self) -> dict[str, Any]:
        """For programs: the rounds, and what is computed from them."""
        low, high = self.quartiles
        return {
            **asdict(self),
            "medians": {name: self.seconds(name) for name in self.times},
            "torch_to_ours": {"median": self.ratio(), "quartiles": [low, high]},
            "ours_to_floor": self.ratio("ours", "floor"),
            "slower": self.slower,
        }


def chance(ratios: list[float]) -> float:
    """P(as many of n ratios below 1, or more | each is there with probability 1/2): the sign test.

    It knows nothing of how times are distributed, and so fewer than five rounds prove nothing.
    """
    count = len(ratios)
    below = sum(ratio < 1 for ratio in ratios)
    return sum(math.comb(count, k) for k in range(below, count + 1)) / 2.0**count


@dataclass
class Report:
    """The rows, and where they come from."""

    plan: Plan
    settings: tuple[str, ...]
    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    interrupted: bool = False
    failure: str | None = None  # why it ended early

    @property
    def slower(self) -> list[Row]:
        """Where this library loses to torch."""
        return [row for row in self.rows if row.slower]

    @property
    def status(self) -> int:
        """Of the command: 130 interrupted, 2 ended early, 1 slower than torch somewhere."""
        return 130 if self.interrupted else 2 if self.failure else 1 if self.slower else 0
