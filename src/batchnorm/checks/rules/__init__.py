"""The rules: each knows one thing that goes wrong, how it shows, and how to mend it.

A rule is a function of a `Subject` that yields its evidence, a layer at a time. Its docstring is its
page: what goes wrong and why the threshold is what it is. Another package adds rules by an entry
point in the group `batchnorm.rules` that names a module; importing it registers them.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from inspect import cleandoc
from typing import Any

from batchnorm.checks.findings import Level
from batchnorm.checks.subject import Subject
from batchnorm.errors import BatchNormError, brief

Names = Sequence[str]  # of rules, or one of them as it is
GROUP = "batchnorm.rules"
MODULES = ("state", "statistics", "batches", "trainings", "surroundings")


@dataclass(frozen=True)
class Evidence:
    """Where, and by what numbers."""

    layer: str  # "" for the model
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    level: Level | None = None  # where it differs from the rule's


Find = Callable[[Subject], Iterator[Evidence]]
Mend = Callable[[Subject, str], str]  # the layer's name -> what was done; raises Left


class Left(Exception):  # noqa: N818  # no error
    """What a mend cannot do safely it leaves, and this says why."""


@dataclass(frozen=True)
class Rule:
    """One thing that goes wrong."""

    identifier: str
    title: str  # a sentence
    level: Level
    needs: tuple[str, ...]  # of loader, optimizer, training, graph: without them it is skipped
    remedy: str  # code
    find: Find
    mend: Mend | None = None  # changes the model or the optimizer
    saved: bool = False  # what it mends stands in a state dict
    recalibrated: bool = False  # new statistics of the layers that were found mend it

    @property
    def explanation(self) -> str:
        """Why it goes wrong, how it shows, and why the threshold is what it is."""
        return cleandoc(self.find.__doc__ or "")


_RULES: dict[str, Rule] = {}
_FAILED: dict[str, str] = {}


def rule(
    identifier: str,
    title: str,
    level: Level = Level.WARNING,
    *,
    needs: tuple[str, ...] = (),
    remedy: str,
    mend: Mend | None = None,
    saved: bool = False,
    recalibrated: bool = False,
) -> Callable[[Find], Find]:
    """Register a rule; the function below it finds."""

    def register(find: Find) -> Find:
        if identifier in _RULES and _RULES[identifier].find.__qualname__ != find.__qualname__:
            raise BatchNormError(
                f"the rule {identifier} is there already: {_RULES[identifier].title} "
                "Give the new one another identifier."
            )
        _RULES[identifier] = Rule(
            identifier, title, level, needs, cleandoc(remedy), find, mend, saved, recalibrated
        )
        return find

    return register


@cache
def _load() -> None:
    for name in MODULES:
        importlib.import_module(f"{__name__}.{name}")
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # noqa: BLE001  # another package's; ours are checked all the same
            _FAILED[entry.value] = f"could not be loaded: {brief(error)}"


def failed() -> dict[str, str]:
    """The packages whose rules could not be loaded, and why."""
    _load()
    return dict(_FAILED)


def all_rules() -> dict[str, Rule]:
    """Every rule by its identifier, ours and those that other packages add."""
    _load()
    return dict(sorted(_RULES.items()))


def chosen(select: Names | None, ignore: Names | None) -> list[Rule]:
    """Those whose identifiers begin with one of `select`, and with none of `ignore`."""
    rules = all_rules()
    wanted, unwanted = _prefixes(select), _prefixes(ignore)
    for prefix in (*wanted, *unwanted):
        if not any(name.startswith(prefix) for name in rules):
            raise unknown(prefix)
    return [
        each
        for name, each in rules.items()
        if (not wanted or name.startswith(wanted)) and not name.startswith(unwanted)
    ]


def _prefixes(names: Names | None) -> tuple[str, ...]:
    listed = [names] if isinstance(names, str) else names or ()
    return tuple(name.upper() for name in listed)


def unknown(identifier: str) -> BatchNormError:
    """What to say of a rule that is not there."""
    rules = all_rules()
    near = get_close_matches(identifier.upper(), rules, n=3)
    hint = f"; do you mean {' or '.join(near)}?" if near else "."
    return BatchNormError(
        f"there is no rule {identifier!r}{hint} The {len(rules)} rules are {min(rules)} to "
        f"{max(rules)}; batchnorm check --explain tells of each."
    )
