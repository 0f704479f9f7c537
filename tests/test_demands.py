"""docs/demands.md: every demand has its row, and the tests that it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "demands.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (\d+) \| (.*) \|$", TEXT, re.MULTILINE))


def test_every_demand_has_its_row():
    assert list(ROWS) == [str(number) for number in range(1, 27)]


@pytest.mark.parametrize("number", ROWS)
def test_what_shows_it_is_there(number):
    shown = ROWS[number].split(" | ")[-1]
    files = re.findall(r"`(test_\w+\.py)((?:::\w+)*)`|`((?:::\w+)+)`", shown)
    pages = re.findall(r"\]\(([\w-]+\.md)\)", shown)
    assert files or pages
    assert all((ROOT / "docs" / page).exists() for page in pages)
    code = ""
    for file, names, more in files:
        if file:
            code = (ROOT / "tests" / file).read_text(encoding="utf-8")
        for name in filter(None, (names or more).split("::")):
            assert re.search(rf"(def|class) {name}\b", code), f"{name} in {file}"
