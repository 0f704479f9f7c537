"""Every rule finds its fault, says nothing of its twin, and has a page."""

from pathlib import Path

import pytest
import torch

import batchnorm
import rules as cases
from batchnorm.checks import rules as registry
from batchnorm.checks.findings import Level

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.rule)
def test_each_rule_finds_its_fault_and_is_silent_on_its_twin_and_after_the_remedy(case):
    result = cases.examine(case)
    assert result.holds(case), result


# the twin of a note's case may have faults of other kinds, as it is in training mode
NOT_NOTES = [case for case in cases.CASES if case.level is not Level.NOTE]


@pytest.mark.parametrize("case", NOT_NOTES, ids=lambda case: case.rule)
def test_a_healthy_twin_gives_no_other_finding(case):
    torch.manual_seed(0)
    twin = case.healthy()
    if twin.train is None:
        found = batchnorm.check(twin.model, twin.loader, twin.optimizer)
        assert not found, found


def test_every_rule_has_a_case_and_a_page():
    rules = registry.all_rules()
    assert {case.rule for case in cases.CASES} == set(rules)
    for identifier, rule in rules.items():
        assert rule.title.endswith(".")
        assert len(rule.explanation) > 100, identifier
        compile(rule.remedy, identifier, "exec")
        assert f"## {identifier}\n" in (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


def test_docs_are_those_of_the_rules():
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    for rule in registry.all_rules().values():
        assert rule.explanation in page, rule.identifier
        assert rule.remedy in page
