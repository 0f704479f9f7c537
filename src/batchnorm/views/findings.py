"""Findings in a terminal: short first, grouped by layer."""

import rich.console
from rich.markup import escape
from rich.text import Text

from batchnorm.checks.findings import Finding, Findings, Level
from batchnorm.checks.rules import Rule
from batchnorm.views.terminal import terminal

COLOURS = {Level.ERROR: "bold red", Level.WARNING: "yellow", Level.NOTE: "cyan"}
LAYERS = 5  # of a rule that are shown; the rest are counted


def show(found: Findings, *, stderr: bool = False, whole: bool = False) -> None:
    """Print the headline, each rule with its layers, and the remedy once a rule."""
    console = terminal(stderr=stderr, soft_wrap=True)
    worst = COLOURS[found.worst] if found.worst is not None else "green"
    console.print(Text(found.headline, style=worst))
    for line in found.preface:
        console.print(line, markup=False)
    for rule, each in found.by_rule().items():
        console.print()
        _rule(console, rule, each, whole)
    if found or found.unasked:
        console.print()
    if found.unasked:
        console.print(f"[dim]rules not asked: {found.unasked}[/]")
    if found:
        rules = " ".join(found.by_rule())
        console.print(
            f"[dim]why, and why the threshold: batchnorm check --explain {rules.split()[0]}[/]"
        )


def _rule(console: rich.console.Console, rule: str, found: list[Finding], whole: bool) -> None:
    first = found[0]
    console.print(f"[{COLOURS[first.level]}]{rule} {first.level}[/] [bold]{escape(first.title)}[/]")
    shown = found if whole else found[:LAYERS]
    width = max(len(each.layer) for each in shown)
    for each in shown:
        console.print(f"  {each.layer.ljust(width)}  {each.evidence}".rstrip(), markup=False)
    if len(found) > len(shown):
        console.print(f"  and {len(found) - len(shown)} layers more: --whole shows them")
    _code(console, first.remedy)


def _code(console: rich.console.Console, code: str) -> None:
    for line in code.splitlines():
        console.print(f"    {line}", markup=False, style="green", soft_wrap=True)


def explain(rule: Rule) -> None:
    """Print a rule's page."""
    console = terminal()
    console.print(f"[bold]{rule.identifier}[/] {rule.level}: [bold]{escape(rule.title)}[/]\n")
    for paragraph in rule.explanation.split("\n\n"):
        console.print(" ".join(paragraph.split()) + "\n", markup=False)
    console.print("The remedy:\n")
    _code(console, rule.remedy)
    if rule.needs:
        console.print(f"\nIt needs: {', '.join(rule.needs)}.")
