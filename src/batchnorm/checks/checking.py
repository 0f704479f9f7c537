"""`check`: what is wrong with the batch normalization in a model, and what mends it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from batchnorm.checks.findings import NEEDS, Finding, Findings, Level, level_of
from batchnorm.checks.probing import SAMPLES, probe
from batchnorm.checks.rules import Evidence, Left, Names, Rule, chosen, failed
from batchnorm.checks.subject import Subject, loading_of
from batchnorm.errors import brief
from batchnorm.model.calling import eagerly
from batchnorm.model.discovery import refuse_no_model
from batchnorm.model.recalibration import Forward, recalibrate

ENOUGH = 10_000  # samples to recalibrate with: a loader may have no end


def check(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    optimizer: Any = None,
    forward: Forward | None = None,
    *,
    level: str | Level = Level.WARNING,
    select: Names | None = None,
    ignore: Names | None = None,
    samples: int | None = None,
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
        samples: of the loader, at most about so many; by default 256 to look at, 10,000 to
            recalibrate with.
        fix: mend what can be mended safely, in place, and check again: `Findings.fixed` tells, and
            `Findings.left` what was not, and why. Not between a forward pass and its backward pass,
            which would find other parameters.

    Returns:
        The findings, the worst first.

    Raises:
        BatchNormError: not a model; a level or rule that is not known.
    """
    examining = Examining(model, loader, optimizer, forward, level, select, ignore, samples)
    return examining.mended() if fix else examining.examine()[1]


class Examining:
    """A model with all that `check` was given."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any] | None,
        optimizer: Any,
        forward: Forward | None,
        level: str | Level,
        select: Names | None,
        ignore: Names | None,
        samples: int | None,
    ) -> None:
        self.least = level_of(level)
        refuse_no_model(model, "check")
        self.model, self.loader, self.forward, self.samples = model, loader, forward, samples
        self.rules = chosen(select, ignore)
        optimizers = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
        self.optimizers = [each for each in optimizers if each is not None]

    def examine(self) -> tuple[Subject, Findings]:
        """What was looked at, and what was found."""
        with eagerly():
            return self._examine()

    def _examine(self) -> tuple[Subject, Findings]:
        subject = Subject(self.model, self.optimizers, loading_of(self.loader))
        skipped = {}
        if self.loader is not None and subject.layers:
            if any(
                is_lazy(t) for t in itertools.chain(self.model.parameters(), self.model.buffers())
            ):
                # a pass would give the layers their sizes, and that cannot be taken back
                skipped["loader"] = "lazy layers have not learned their sizes: run one batch first"
            else:
                try:
                    subject.probe = probe(
                        subject, self.loader, self.forward, self.samples or SAMPLES
                    )
                except Exception as error:  # noqa: BLE001  # the user's, which may raise anything
                    skipped["loader"] = f"a batch could not be passed: {brief(error)}"
        return subject, judge(subject, self.rules, self.least, skipped)

    def mended(self, *, into_a_file: bool = False) -> Findings:
        """Mend what is safe, and examine again; for a file, what a state dict holds."""
        subject, findings = self.examine()
        if not findings:
            return findings
        mending = _Mending(self, subject, into_a_file=into_a_file)
        mending.by_rules(findings)
        mending.recalibrate(findings)
        after = self.examine()[1] if mending.fixed else findings
        return Findings(
            list(after), model=after.model, checked=after.checked, skipped=after.skipped,
            lowered=after.lowered, fixed=mending.fixed, left=mending.left,
        )  # fmt: skip


def judge(
    subject: Subject, rules: Sequence[Rule], least: Level, skipped: dict[str, str]
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
            reasons[rule.identifier] = f"{NEEDS}{', '.join(missing)}"
            continue
        try:
            evidence = [_finding(rule, each) for each in rule.find(subject)]
        except Exception as error:  # noqa: BLE001  # models are of every kind; none may stop a check
            reasons[rule.identifier] = f"could not be checked: {brief(error)}"
            continue
        checked.append(rule.identifier)
        found += evidence
    usual = {rule.identifier: rule.level for rule in rules}
    lowered = {f.rule for f in found if f.level < least <= usual[f.rule]}
    found = [each for each in found if each.level >= least]
    lowered -= {each.rule for each in found}
    name = type(subject.model).__name__
    return Findings(found, model=name, checked=checked, skipped=reasons, lowered=sorted(lowered))


def _has(subject: Subject, need: str) -> bool:
    has = {
        "loader": subject.probe is not None and subject.probe.batches > 0,
        "optimizer": bool(subject.optimizers),
        "training": subject.training is not None,
        "graph": subject.graph,
    }
    return has.get(need, False)


def _finding(rule: Rule, evidence: Evidence) -> Finding:
    level = rule.level if evidence.level is None else evidence.level
    return Finding(
        rule.identifier, rule.title, level, evidence.layer, evidence.text,
        rule.remedy.replace("LAYER", evidence.layer or "*"), evidence.numbers,
        fixable=rule.mend is not None or (rule.recalibrated and level > Level.NOTE),
    )  # fmt: skip


class _Mending:
    """What is done about the findings, and what is left."""

    def __init__(self, examining: Examining, subject: Subject, *, into_a_file: bool) -> None:
        self._examining, self._subject, self._into_a_file = examining, subject, into_a_file
        self._rules = {rule.identifier: rule for rule in examining.rules}
        self.fixed: list[str] = []
        self.left: list[str] = []

    def by_rules(self, findings: Findings) -> None:
        """What each finding's rule knows to do."""
        for each in findings:
            rule = self._rules[each.rule]
            if rule.mend is None or each.layer not in self._subject.layers:
                continue
            if self._into_a_file and not rule.saved:
                why = "a checkpoint does not hold it: change it in the code, or by check(fix=True)"
                self.left.append(f"{each.rule} {each.layer}: {why}")
                continue
            try:
                self.fixed.append(f"{each.rule} {rule.mend(self._subject, each.layer)}")
            except Left as reason:
                self.left.append(f"{each.rule} {each.layer}: {reason}")

    def recalibrate(self, findings: Findings) -> None:
        """New statistics for the layers that are found to want them, and for no others.

        Of what is but a note nothing is known to be wrong: running statistics that classify better
        than the data's, a model that is about to be trained.
        """
        asking = [f for f in findings if self._rules[f.rule].recalibrated and f.level > Level.NOTE]
        loader = self._examining.loader
        if not asking or loader is None:
            return
        names = self._layers_of(asking)
        what = f"{', '.join(sorted({f.rule for f in asking}))}: {', '.join(names)}"
        if isinstance(loader, Iterator):
            why = "what is read once was read to check. Pass a list or DataLoader"
            self.left.append(f"{what} not recalibrated: {why}")
            return
        try:
            self._recalibrate(loader, names)
        except Exception as error:  # noqa: BLE001  # the user's loader and model; nothing was changed
            self.left.append(f"{what} not recalibrated: {brief(error)}")
        else:
            self.fixed.append(f"{what} recalibrated on the loader's data")

    def _layers_of(self, asking: list[Finding]) -> list[str]:
        """Those that are named; where the model or a part of it is, every layer in there."""
        layers = self._subject.layers
        wide = [f.layer for f in asking if f.layer not in layers or f.rule == "BN001"]
        parts = ["" if name in layers else name for name in wide]
        return [
            name
            for name in layers
            if any(f.layer == name for f in asking)
            or any(not part or name.startswith(f"{part}.") for part in parts)
        ]

    def _recalibrate(self, loader: Iterable[Any], names: list[str]) -> None:
        others = [m for name, m in self._subject.tracking() if name not in names]
        buffers = [b for layer in others for b in layer.buffers(recurse=False)]
        before = [b.clone() for b in buffers]
        examining = self._examining
        recalibrate(
            self._subject.model, loader, forward=examining.forward,
            samples=examining.samples or ENOUGH,
        )  # fmt: skip
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
