"""What an operation did to a model: kept beside the model, told by `changes`."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from batchnorm.errors import BatchNormError

log = logging.getLogger("batchnorm")


@dataclass(frozen=True)
class Change:
    """What was done to one layer, or why it was left as it was."""

    layer: str  # its first name in the model; "" for the model itself
    done: bool
    what: str

    def __str__(self) -> str:
        return f"{'done' if self.done else 'left'}  {self.layer or '(the model)'}: {self.what}"


@dataclass(frozen=True)
class Changes:
    """The account of one operation, in the order of the model's layers."""

    operation: str
    entries: list[Change]
    facts: dict[str, Any] = field(default_factory=dict)  # numbers of the whole operation
    note: str = ""  # what the user has to do now

    @property
    def done(self) -> list[Change]:
        return [entry for entry in self.entries if entry.done]

    @property
    def left(self) -> list[Change]:
        return [entry for entry in self.entries if not entry.done]

    def __str__(self) -> str:
        facts = [f"{name.replace('_', ' ')}: {_short(v)}" for name, v in self.facts.items()]
        return "\n".join([self.headline, *facts, *map(str, self.entries)])

    @property
    def headline(self) -> str:
        if not self.entries:
            return f"{self.operation}: no such batch norm in the model, nothing to do"
        left = f", {len(self.left)} left" if self.left else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.operation}: {len(self.done)} layers{left}{note}"


def _short(value: Any) -> str:
    return format(value, ".3g") if isinstance(value, float) else str(value)


_ACCOUNTS: WeakKeyDictionary[nn.Module, Changes] = WeakKeyDictionary()


def record(
    model: nn.Module, operation: str, entries: Iterable[Change], *, note: str = "", **facts: Any
) -> nn.Module:
    """Keep the account, say it in a line, and return the model."""
    account = Changes(operation, list(entries), facts, note)
    _ACCOUNTS[model] = account
    told = bool(note) or not account.done
    log.log(logging.WARNING if told else logging.INFO, "%s", account.headline)
    return model


def changes(model: nn.Module) -> Changes:
    """What the last operation of this library did to the model, what it left, and why.

    Raises:
        BatchNormError: no operation was run on this model object. A copy of a model has no account.
    """
    if model not in _ACCOUNTS:
        raise BatchNormError(
            f"changes({type(model).__name__}): no operation of batchnorm was run on this object. "
            "Ask the model that recalibrate, freeze, fold or convert returned."
        )
    return _ACCOUNTS[model]
