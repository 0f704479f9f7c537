"""The files for the forge and for who cites: valid, and true of this version."""

import re
from pathlib import Path

import pytest
import yaml

import batchnorm
from batchnorm.checks.rules import all_rules
from processes import run

ROOT = Path(__file__).parent.parent
FORMS = sorted(path.name for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
FILES = [
    ("citation-file-format", "CITATION.cff"),
    ("github-workflows", ".github/workflows/ci.yml"),
    ("github-workflows", ".github/workflows/wheels.yml"),
    ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    *(("github-issue-forms", f".github/ISSUE_TEMPLATE/{name}") for name in FORMS),
]
FILES.remove(("github-issue-forms", ".github/ISSUE_TEMPLATE/config.yml"))


def validated(schema, path):
    return run("-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", path)


@pytest.mark.parametrize(("schema", "name"), FILES)
def test_the_files_fit_their_schemas(schema, name):
    result = validated(schema, ROOT / name)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("schema", "name", "key"),
    [
        ("citation-file-format", "CITATION.cff", "authors"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml", "body"),
    ],
)
def test_a_key_that_is_missing_is_seen(schema, name, key, tmp_path):
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    (tmp_path / "whole.yml").write_text(yaml.safe_dump(content))
    del content[key]
    (tmp_path / "less.yml").write_text(yaml.safe_dump(content))
    assert validated(schema, tmp_path / "whole.yml").returncode == 0
    assert validated(schema, tmp_path / "less.yml").returncode == 1


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == batchnorm.__version__


def test_a_false_alarm_can_name_every_rule():
    form = (ROOT / ".github/ISSUE_TEMPLATE/finding.yml").read_text(encoding="utf-8")
    first, last = re.search(r"(BN\d{3}) to (BN\d{3})", form).groups()
    assert [first, last] == [min(all_rules()), max(all_rules())]
