"""`check`: what is wrong with the batch normalization in a model, and what mends it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from batchnorm.checks.findings import Finding, Findings, Level
from batchnorm.checks.probing import SAMPLES, probe
from batchnorm.checks.rules import Evidence, Rule, chosen, failed
from batchnorm.checks.subject import Subject, loading_of
from batchnorm.errors import BatchNormError, brief
from batchnorm.model.recalibration import Forward, recalibrate

Names = Sequence[str]


def check(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    optimizer: Any = None,
    forward: Forward | None = None,
    *,
    level: str | Level = Level.WARNING,
    select: Names | None = None,
    ignore: Names | None = None,
    samples: int = SAMPLES,
    fix: bool = False,
) -> Findings:
    """Find what is wrong with a model's batch normalization; the model comes back bit for bit.

    The model alone tells what its modules, buffers and graph tell. With a loader a few batches are
    passed through it, without gradients, and every layer's input is looked at; with the optimizer
    its groups are, too. What only a training shows is found by `watch`.

    Args:
        model: in the mode in which it is used: trained, or evaluated.
        loader: batches as `recalibrate` takes them: of training data, in batches as in training.
            Labels are used where a batch is (inputs, classes).
        optimizer: one, or several.
        forward: how to run the model on a batch, `forward(model, batch)`.
        level: the lowest that is reported: "note", "warning" or "error".
        select: identifiers, or their beginnings, of the rules to check; all by default.
        ignore: of those not to check.
        samples: of the loader, at most about so many.
        fix: mend what can be mended safely, in place, and check again. `Findings.fixed` tells.

    Returns:
        The findings, the worst first.

    Raises:
        BatchNormError: not a model; a level or rule that is not known.
    """
    least = level_of(level)
    if not isinstance(model, nn.Module):
        raise BatchNormError(f"check got a {type(model).__name__} and wants a torch.nn.Module.")
    rules = chosen(_listed(select), _listed(ignore))
    optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    optimizers = [each for each in optimizers if each is not None]

    def examine() -> tuple[Subject, Findings]:
        subject = Subject(model, optimizers, loading_of(loader))
        skipped = {}
        if loader is not None and subject.layers:
            if any(is_lazy(t) for t in itertools.chain(model.parameters(), model.buffers())):
                # a pass would give the layers their sizes, and that cannot be taken back
                skipped["loader"] = "lazy layers have not learned their sizes: run one batch first"
            else:
                try:
                    subject.probe = probe(subject, loader, forward, samples)
                except Exception as error:  # noqa: BLE001  # the user's, which may raise anything
                    skipped["loader"] = f"a batch could not be passed: {brief(error)}"
        return subject, judge(subject, rules, least, skipped)

    subject, findings = examine()
    if not fix or not findings:
        return findings
    done = list(mend(subject, findings, rules, loader, forward))
    if not done:
        return findings
    _, after = examine()
    return Findings(
        list(after), model=after.model, checked=after.checked, skipped=after.skipped, fixed=done
    )


def level_of(level: str | Level) -> Level:
    """A level by its name."""
    if isinstance(level, Level):
        return level
    names = [str(each) for each in Level]
    if level not in names:
        raise BatchNormError(f"there is no level {level!r}; there are {', '.join(names)}.")
    return Level(names.index(level) + 1)


def _listed(names: Names | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def judge(
    subject: Subject, rules: Iterable[Rule], least: Level, skipped: dict[str, str]
) -> Findings:
    """Ask every rule; a rule that fails is told as skipped, and the others go on."""
    found: list[Finding] = []
    checked = []
    reasons = {f"(all that need the {what})": why for what, why in skipped.items()}
    reasons |= {f"(the rules of {package})": why for package, why in failed().items()}
    if scripted := [n for n, m in subject.model.named_modules() if isinstance(m, ScriptModule)]:
        where = scripted[0] or "the model"
        reasons[f"({where})"] = "scripted: its layers cannot be looked at from Python"
    for rule in rules:
        if missing := [need for need in rule.needs if not _has(subject, need)]:
            reasons[rule.identifier] = f"needs {', '.join(missing)}"
            continue
        try:
            evidence = [_finding(rule, each) for each in rule.find(subject)]
        except Exception as error:  # noqa: BLE001  # models are of every kind; none may stop a check
            reasons[rule.identifier] = f"could not be checked: {brief(error)}"
            continue
        checked.append(rule.identifier)
        found += evidence
    found = [each for each in found if each.level >= least]
    name = type(subject.model).__name__
    return Findings(found, model=name, checked=checked, skipped=reasons)


def _has(subject: Subject, need: str) -> bool:
    has = {
        "loader": subject.probe is not None and subject.probe.batches > 0,
        "optimizer": bool(subject.optimizers),
        "training": subject.training is not None,
    }
    return has.get(need, False)


def _finding(rule: Rule, evidence: Evidence) -> Finding:
    level = rule.level if evidence.level is None else evidence.level
    return Finding(
        rule.identifier, rule.title, level, evidence.layer, evidence.text,
        rule.remedy.replace("LAYER", evidence.layer or "*"), evidence.numbers,
        fixable=rule.mend is not None or rule.identifier in RECALIBRATED,
    )  # fmt: skip


RECALIBRATED = {"BN001", "BN008", "BN009", "BN012", "BN028"}  # with a loader, all at once


def mend(
    subject: Subject,
    findings: Findings,
    rules: Iterable[Rule],
    loader: Iterable[Any] | None,
    forward: Forward | None,
) -> Iterable[str]:
    """Do what each finding's rule knows to do, then recalibrate, if any of them asks for it."""
    known = {rule.identifier: rule for rule in rules}
    for each in findings:
        doing = known[each.rule].mend
        if doing is not None and each.layer in subject.layers:
            done = doing(subject, each.layer)
            if done is not None:
                yield f"{each.rule} {done}"
    asked = ", ".join(sorted({each.rule for each in findings} & RECALIBRATED))
    if not asked or loader is None:
        return
    if isinstance(loader, Iterator):
        yield f"{asked} not recalibrated: what is read once was read to check. Pass a list or DataLoader"
        return
    try:
        recalibrate(subject.model, loader, forward=forward)
    except Exception as error:  # noqa: BLE001  # the user's loader and model; nothing was changed
        yield f"{asked} not recalibrated: {brief(error)}"
    else:
        yield f"{asked} recalibrated on the loader's data"
