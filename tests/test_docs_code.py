"""The docs: their code runs and prints what they show; verdicts find their places in the note."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import pages
import verdicts
from batchnorm.errors import BatchNormError
from batchnorm.lab import studies
from batchnorm.views.words import Words

DOCS = Path(__file__).parent.parent / "docs"
NOTES = ["note.md", "note.zh-CN.md"]
PAGES = pages.PAGES
WRITTEN = [*PAGES, *(DOCS / name for name in NOTES)]
VERSIONS = (DOCS / "versions.md").read_text(encoding="utf-8")
PUBLIC = re.findall(r"`(batchnorm(?:\.\w+){2,})`", VERSIONS)  # in modules of their own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_code_prints_what_the_page_shows(page):
    assert pages.BLOCK.search(page.read_text(encoding="utf-8"))
    assert pages.remade(page) == page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_a_page_imports_what_stays_from_version_to_version(page):
    text = page.read_text(encoding="utf-8")
    trees = [ast.parse(code) for code in re.findall(r"```python.*?\n(.*?)```", text, re.DOTALL)]
    names = [
        f"{node.module}.{name.name}"
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("batchnorm")
        for name in node.names
    ]
    assert set(names) <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_in_a_module_of_its_own_is_there(name):
    module, _, attribute = name.rpartition(".")
    assert getattr(importlib.import_module(module), attribute).__doc__


def test_an_output_that_is_not_printed_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\nprint(x + 1)\n```\n\n```text\n3\n```\n")
    assert pages.remade(page).endswith("```text\n2\n```\n")


def test_files_and_commands_of_a_page_are_run(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python a.py\nprint(6 * 7)\n```\n\n```console\n$ python a.py\n```\n")
    assert pages.remade(page).endswith("```console\n$ python a.py\n42\n```\n")
    page.write_text("```console\n$ python missing.py\n```\n")
    with pytest.raises(RuntimeError, match=r"missing\.py ended with 2"):
        pages.remade(page)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", NOTES)
def test_the_note_has_a_place_for_every_study(name):
    places = re.findall(r"<!-- verdict (\S+) -->", (DOCS / name).read_text(encoding="utf-8"))
    assert sorted(places) == sorted(studies.NAMES)


FOUND = {
    "linear": {
        "claim": {"en": "It is linear.", "zh": "它是线性的。"},
        "size": "quick",
        "questions": [
            {
                "name": "evaluation", "claim": {"en": "In |evaluation|.", "zh": "评估时。"},
                "verdict": "supported", "effect": 0.25, "interval": [0.125, 0.5],
                "p": 0.01, "p_adjusted": 0.02, "seeds": 8, "exploratory": False,
            },
            {
                "name": "training", "claim": {"en": "In training.", "zh": "训练时。"},
                "verdict": "inconclusive", "effect": None, "interval": None,
                "p": None, "p_adjusted": None, "seeds": 8, "exploratory": True,
            },
        ],
    }
}  # fmt: skip


@pytest.mark.parametrize(
    ("language", "rows"),
    [
        (
            "en",
            (
                "| In \\|evaluation\\|. | supported | 0.25 | 0.125 … 0.5 | 0.02 |\n"
                "| In training. | inconclusive (exploratory) | – | – | – |\n\n"
                "`batchnorm study linear --quick`, seeds: 8\n"
            ),
        ),
        (
            "zh",
            (
                "| 评估时。 | 成立 | 0.25 | 0.125 … 0.5 | 0.02 |\n"
                "| 训练时。 | 无定论（探索性） | – | – | – |\n\n"
                "`batchnorm study linear --quick`，种子数：8\n"
            ),
        ),
    ],
)
def test_a_verdict_is_put_into_its_place(language, rows, tmp_path):
    page, other = tmp_path / "note.md", "<!-- verdict axes -->\nold\n<!-- /verdict axes -->\nend\n"
    page.write_text(f"a\n<!-- verdict linear -->\nold\n<!-- /verdict linear -->\nb\n{other}")
    assert verdicts.fill(page, FOUND, language) == ["linear"]
    text = page.read_text(encoding="utf-8")
    assert rows in text
    assert text.count("old") == 1
    assert text.endswith(f"b\n{other}")
    verdicts.fill(page, FOUND, language)
    assert page.read_text(encoding="utf-8") == text


def test_the_note_s_claims_are_counted():
    every = dict.fromkeys(verdicts.of_the_note(), FOUND["linear"])
    papers = {"only-norms": FOUND["linear"]}
    header, _, *rows = verdicts.table(every | papers, "en").splitlines()
    assert header.startswith("| the note's claim | supported | contradicted | inconclusive |")
    assert rows == [f"| It is linear. | 1 | – | 1 | `{name}` |" for name in every]
    assert "linear" in every
    assert "| 它是线性的。 | 1 | – | 1 | `linear` |" in verdicts.table(every, "zh")


def test_a_part_of_the_studies_leaves_the_readme(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- verdicts -->\nold\n<!-- /verdicts -->\n")
    monkeypatch.setattr(verdicts, "NOTES", {})
    monkeypatch.setattr(verdicts, "READMES", {page: "en"})
    monkeypatch.setattr("sys.argv", ["verdicts.py", str(tmp_path)])
    (tmp_path / "verdicts.json").write_text(json.dumps(FOUND))
    verdicts.main()
    assert "lacks learning-rate" in capsys.readouterr().out
    assert "old" in page.read_text()
    every = dict.fromkeys(verdicts.of_the_note(), FOUND["linear"])
    (tmp_path / "verdicts.json").write_text(json.dumps(every))
    verdicts.main()
    assert "| It is linear. | 1 | – | 1 | `axes` |" in page.read_text()


def test_a_rate_at_the_end_of_what_was_tried_is_marked():
    points = {"batch": {"learning_rate": 30.0}, "none": {"learning_rate": 0.3}}
    found = FOUND["linear"] | {"questions": [FOUND["linear"]["questions"][0] | {"points": points}]}
    shown = verdicts.verdict("learning-rate", found, Words("en")).splitlines()
    assert shown[0].endswith("| p (Holm) | learning rates |")
    assert shown[2].endswith("| 0.02 | `batch` 30, `none` 0.3 |")
    few = found["questions"][0] | {"seeds": 7}
    both = found | {"questions": [*found["questions"], few]}
    shown = verdicts.verdict("learning-rate", both, Words("en")).splitlines()
    assert [" (seeds: 7) |" in line for line in shown[2:4]] == [False, True]
    tried = studies.find("learning-rate").sizes["normal"].grid["learning_rate"]
    assert (min(tried), max(tried)) == (0.01, 30.0)
    shown = verdicts.verdict("learning-rate", found | {"size": "normal"}, Words("en"))
    assert "| `batch` 30°, `none` 0.3 |" in shown


def test_what_has_no_place_is_refused(tmp_path):
    page = tmp_path / "note.md"
    page.write_text("nothing")
    with pytest.raises(BatchNormError, match="verdict linear"):
        verdicts.fill(page, FOUND, "en")
    with pytest.raises(BatchNormError, match=r"no verdicts\.json"):
        verdicts.read(tmp_path)
    (tmp_path / "verdicts.json").write_text(json.dumps(FOUND))
    assert verdicts.read(tmp_path) == FOUND
