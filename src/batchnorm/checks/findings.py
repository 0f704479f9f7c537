"""What was found: by which rule, in which layer, by what evidence, and how to mend it."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, overload

from batchnorm.errors import BatchNormError

NEEDS = "needs "  # begins the reason of a rule that wants what was not given


class Level(IntEnum):
    """How sure it is that something goes wrong."""

    NOTE = 1  # healthy, published models do it, too
    WARNING = 2  # costs accuracy, or will, under conditions that are named
    ERROR = 3  # the numbers are wrong, or the training will stop

    def __str__(self) -> str:
        return self.name.lower()


def level_of(level: str | Level) -> Level:
    """A level by its name."""
    if isinstance(level, Level):
        return level
    names = [str(each) for each in Level]
    if level not in names:
        raise BatchNormError(f"there is no level {level!r}; there are {', '.join(names)}.")
    return Level(names.index(level) + 1)


@dataclass(frozen=True)
class Finding:
    """One rule's finding in one layer, or in the model as a whole."""

    rule: str  # "BN001"
    title: str
    level: Level
    layer: str  # "" for the model
    evidence: str  # a sentence with the numbers, the threshold, and why it is that
    remedy: str  # code
    numbers: dict[str, Any] = field(default_factory=dict)
    fixable: bool = False  # check(fix=True) mends it

    def __str__(self) -> str:
        where = f" {self.layer}:" if self.layer else ""
        return f"{self.rule} {self.level}:{where} {self.evidence}"


class Findings(Sequence[Finding]):
    """The findings, the worst first; printed, a line each with the remedy of each rule once."""

    def __init__(
        self,
        findings: Sequence[Finding],
        *,
        model: str,
        checked: Sequence[str] = (),
        skipped: dict[str, str] | None = None,
        lowered: Sequence[str] = (),
        fixed: Sequence[str] = (),
        left: Sequence[str] = (),
    ) -> None:
        self._findings = sorted(findings, key=lambda f: (-f.level, f.rule))
        self.model = model
        self.checked = list(checked)  # the rules that could be checked
        self.skipped = skipped or {}  # those that could not, and why
        self.lowered = list(lowered)  # the rules that found what is but a note here
        self.fixed = list(fixed)  # what fix=True did
        self.left = list(left)  # what it did not, and why

    @overload
    def __getitem__(self, index: int) -> Finding: ...
    @overload
    def __getitem__(self, index: slice) -> list[Finding]: ...
    def __getitem__(self, index: int | slice) -> Finding | list[Finding]:
        return self._findings[index]

    def __len__(self) -> int:
        return len(self._findings)

    @property
    def worst(self) -> Level | None:
        """The highest level; None where nothing was found."""
        return self._findings[0].level if self._findings else None

    def by_rule(self) -> dict[str, list[Finding]]:
        """The findings of each rule, in order."""
        found: dict[str, list[Finding]] = {}
        for each in self._findings:
            found.setdefault(each.rule, []).append(each)
        return found

    @property
    def headline(self) -> str:
        """One line for the whole."""
        if not self._findings:
            count = len(self.checked)
            return f"{self.model}: nothing found by {count} rule{'s' if count != 1 else ''}"
        counts = [
            f"{count} {level}{'s' if count > 1 else ''}"
            for level in reversed(Level)
            if (count := sum(f.level is level for f in self._findings))
        ]
        return f"{self.model}: {', '.join(counts)}"

    @property
    def preface(self) -> list[str]:
        """What was mended, what was left, and what could not be looked at."""
        lines = [f"fixed: {line}" for line in self.fixed]
        lines += [f"left: {line}" for line in self.left]
        rules_of: dict[str, list[str]] = {}
        for rule, why in self.skipped.items():
            if not why.startswith(NEEDS):  # nobody gave it
                rules_of.setdefault(why, []).append(rule)
        lines += [f"not checked: {', '.join(of)}: {why}" for why, of in rules_of.items()]
        if self.lowered:
            lines.append(f"only a note here: {', '.join(self.lowered)}; the level note tells why")
        return lines

    @property
    def unasked(self) -> str:
        """How many rules want what was not given; "" where none does."""
        needs = Counter(
            why.removeprefix(NEEDS) for why in self.skipped.values() if why.startswith(NEEDS)
        )
        return ", ".join(f"{count} without {need}" for need, count in needs.items())

    def _lines(self) -> Iterator[str]:
        yield self.headline
        yield from self.preface
        for rule, found in self.by_rule().items():
            yield ""
            yield f"{rule} {found[0].level}: {found[0].title}"
            for each in found:
                yield f"  {each.layer or '(the model)'}: {each.evidence}"
            yield from (f"    {line}" for line in found[0].remedy.splitlines())

    def __str__(self) -> str:
        return "\n".join(self._lines())

    __repr__ = __str__

    def to_json(self) -> str:
        """For programs."""
        content = {
            "model": self.model,
            "findings": [
                {
                    "rule": f.rule, "title": f.title, "level": str(f.level), "layer": f.layer,
                    "evidence": f.evidence, "remedy": f.remedy, "numbers": f.numbers,
                    "fixable": f.fixable,
                }
                for f in self._findings
            ],
            "checked": self.checked,
            "skipped": self.skipped,
            "lowered": self.lowered,
            "fixed": self.fixed,
            "left": self.left,
        }  # fmt: skip
        return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)


def joined(found: Sequence[Findings]) -> Findings:
    """Those of several models as one's; there is one at least."""
    return Findings(
        [each for one in found for each in one],
        model=", ".join(one.model for one in found),
        checked=found[0].checked,
    )


def _plain(value: Any) -> Any:
    """What JSON can hold: a number that is not finite as text, what it does not know as text, too."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
