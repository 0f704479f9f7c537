"""Findings as a page: one file, which asks the network for nothing."""

from pathlib import Path

from batchnorm.checks.findings import Findings
from batchnorm.checks.rules import all_rules
from batchnorm.views.page import fill


def write(found: Findings, path: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fill("findings.html.j2", found=found, rules=all_rules()), encoding="utf-8")
