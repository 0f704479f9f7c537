"""The commands `check` and `watch`: build, look, mend, write."""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

import batchnorm
from batchnorm import deployment
from batchnorm.checks import checking, scripts, watching
from batchnorm.checks.findings import Findings, Level, joined
from batchnorm.checks.rules import Rule, all_rules, unknown
from batchnorm.errors import BatchNormError
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
        raise unknown(identifier)
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
    made = deployment.made_by(spec)
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
    module: bool,
    json_file: Path | None,
    page: Path | None,
    guard: bool,
    whole: bool,
    **options: Any,
) -> NoReturn:
    """Refuse what would fail at the end, then become the script's interpreter."""
    watching.Watch(**options)
    if not module and script != scripts.STDIN and not Path(script).exists():
        raise BatchNormError(
            f"there is no script {script}. For a module: batchnorm watch -m package.module"
        )
    for file in (json_file, page):
        if file is not None and not file.absolute().parent.is_dir():
            raise BatchNormError(f"{file} is in no folder. Make it: mkdir -p {file.parent}")
    _refuse_our_name(Path(scripts.first_of_the_path(script, module=module)))
    files = {"json_file": json_file, "page": page}
    paths = {name: None if file is None else str(file.absolute()) for name, file in files.items()}
    scripts.start(
        script, arguments, {**options, **paths, "module": module, "guard": guard, "whole": whole}
    )


def _refuse_our_name(folder: Path) -> None:
    """A script that imports its own batchnorm.py would get this library in its place."""
    for own in (folder / "batchnorm.py", folder / "batchnorm" / "__init__.py"):
        if own.is_file() and not own.samefile(batchnorm.__file__):
            raise BatchNormError(
                f"watch got a script beside a {own.relative_to(folder)} of its own, and in this process "
                "batchnorm is this library: the script would import the wrong one. Rename it, or put "
                "`with batchnorm.watch()` into a script that does not import it."
            )


def report(
    watched: watching.Watch | None,
    failure: str | None,
    end: int,
    *,
    json_file: str | None,
    page: str | None,
    guard: bool,
    whole: bool,
) -> int:
    """Behind the script: say what was found in each of its models; the exit status."""
    from batchnorm.views import findings  # noqa: PLC0415  # rich only where it prints

    if os.environ.get("RANK", "0") != "0":
        return end  # under torchrun the first process speaks for all
    found = [] if watched is None else watched.findings()
    with suppress(OSError, ValueError):  # the script may have closed its standard error
        if failure is not None:
            sys.stderr.write(f"batchnorm watch: nothing was watched: {failure}\n")
        elif not found:
            sys.stderr.write("batchnorm watch: no model with batch norm in it was called\n")
        if end and found:
            sys.stderr.write(
                f"batchnorm watch: the script ended early, with status {end}: what follows is of what ran\n"
            )
        for each in found:
            findings.show(each, stderr=True, whole=whole)
    try:
        if json_file is not None:
            content = [json.loads(each.to_json()) for each in found]
            text = json.dumps(content, indent=2, ensure_ascii=False)
            Path(json_file).write_text(text, encoding="utf-8")
        if page is not None and found:
            write_page(found[0] if len(found) == 1 else joined(found), Path(page))
    except OSError as error:
        with suppress(OSError, ValueError):
            sys.stderr.write(f"batchnorm watch: {error.strerror or error} ({error.filename})\n")
        return end or 2
    worst = max((status(each) for each in found), default=0)
    return end or (worst if guard else 0)


def write_page(found: Findings, path: Path) -> None:
    """The findings as a page that needs no network."""
    from batchnorm.views import findings_page  # noqa: PLC0415  # Jinja2 only where it is asked for

    findings_page.write(found, path)
