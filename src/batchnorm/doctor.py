"""The commands `check` and `watch`: build, look, mend, write."""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from batchnorm import deployment
from batchnorm.checks import checking, scripts
from batchnorm.checks.findings import Findings, Level
from batchnorm.checks.rules import Rule, all_rules
from batchnorm.errors import BatchNormError, brief
from batchnorm.lab.plugins import resolve
from batchnorm.model import weights
from batchnorm.model.weights import Checkpoint

STATUS = {None: 0, Level.NOTE: 3, Level.WARNING: 3, Level.ERROR: 4}


def status(found: Findings) -> int:
    """0 where nothing is found, 3 for notes and warnings, 4 for errors."""
    return STATUS[found.worst]


def rule(identifier: str) -> Rule:
    """A rule by its identifier."""
    rules = all_rules()
    if identifier.upper() not in rules:
        raise BatchNormError(f"there is no rule {identifier!r}; there are {', '.join(rules)}.")
    return rules[identifier.upper()]


def check(
    spec: str | None,
    checkpoint: Path | None,
    data: str | None,
    *,
    train: bool | None,
    fix: bool,
    to: Path | None,
    **options: Any,
) -> Findings:
    """Build what the function gives, check it, and write what was mended."""
    if spec is None:
        raise BatchNormError(
            "check wants package.module:function, one that gives a model, or --explain BN001."
        )
    if fix != (to is not None):
        raise BatchNormError(
            "--fix mends what a checkpoint holds, and --to is where that goes: each wants the other. "
            "Without both nothing is mended; in Python there is batchnorm.check(model, fix=True)."
        )
    if to is not None:
        weights.refuse_suffix(to)
    model, loader, optimizer = _given(spec)
    read = None
    if checkpoint is not None:
        read = Checkpoint(checkpoint)
        read.load_into(model)
    if data is not None:
        loader = deployment.batches_of(resolve(data, "data")(), data)
    if train is not None:
        model.train(train)
    examining = checking.Examining(model, loader, optimizer, None, **options)
    if to is None:
        return examining.examine()[1]
    found = examining.mended(into_a_file=True)
    if read is not None:
        read.write(to, model)
    else:
        weights.write(to, model.state_dict())
    return found


def _given(spec: str) -> tuple[nn.Module, Iterable[Any] | None, Any]:
    """A model, or (model, loader), or (model, loader, optimizer)."""
    made: Any = resolve(spec, "model")
    if not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:
            raise BatchNormError(
                f"the model {spec} raised {brief(error)} when it was called without arguments."
            ) from error
    given = made if isinstance(made, tuple) else (made,)
    model, loader, optimizer = (*given, None, None, None)[:3]
    if not isinstance(model, nn.Module) or len(given) > 3:
        raise BatchNormError(
            f"{spec} gave a {type(made).__name__} and should give a torch.nn.Module, or a tuple of a "
            "model, a loader and an optimizer, of which the last two may be left out."
        )
    return model, loader, optimizer


def watch(
    script: str,
    arguments: list[str],
    *,
    json_file: Path | None,
    page: Path | None,
    **options: Any,
) -> tuple[int, list[Findings]]:
    """Run the script; its exit status, and what was found in each of its models."""
    end, watching = scripts.run(script, arguments, **options)
    if watching is None or os.environ.get("RANK", "0") != "0":
        return end, []  # under torchrun the first process speaks for all
    found = watching.findings()
    if not found:
        with suppress(OSError, ValueError):  # the script may have closed it
            sys.stderr.write("batchnorm watch: no model with batch norm in it was called\n")
    if json_file is not None:
        content = [json.loads(each.to_json()) for each in found]
        json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if page is not None and found:
        write_page(found[0] if len(found) == 1 else _joined(found), page)
    return end, found


def _joined(found: list[Findings]) -> Findings:
    return Findings(
        [each for one in found for each in one],
        model=", ".join(one.model for one in found),
        checked=found[0].checked,
    )


def write_page(found: Findings, path: Path) -> None:
    """The findings as a page that needs no network."""
    from batchnorm.views import findings_page  # noqa: PLC0415  # Jinja2 only where it is asked for

    findings_page.write(found, path)
