"""Others' models, a few of those in docs/models.md, through everything that the table shows."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import models

ROOT = Path(__file__).parent.parent


# name -> norms, of them folded, fused
SAMPLE = {
    "shufflenet_v2_x0_5": (56, 56, 37),
    "timm mobilenetv3_small_050": (34, 34, 0),  # timm's norms have their activations already
    "timm fasternet_t0": (17, 17, 13),
    "smp FPN": (20, 20, 17),
    "ssdlite320_mobilenet_v3_large": (70, 70, 31),
    "r3d_18": (20, 20, 9),
    "torchaudio Conformer": (2, 2, 2),
}


def small(text):
    """It is a difference, and within the rounding of float32 through a deep network."""
    return text == "0" or (re.fullmatch(r"\de-\d\d", text) is not None and float(text) <= 1e-4)


@pytest.mark.filterwarnings("ignore")  # of others' models
@pytest.mark.parametrize(("name", "counts"), SAMPLE.items(), ids=SAMPLE)
def test_every_tool_on_it(name, counts):
    group, build = models.all_models()[name]
    line = models.examine(group, name, build)
    done, error = line.recalibrated.split(", ")
    assert (int(done), int(line.folded), int(line.fused.split(", ")[0])) == counts
    assert float(error) < 1e-3
    assert line.frozen == "0"
    assert float(line.difference) < 1e-12
    exportable = group != "detection" and "Conformer" not in name
    assert [small(line.exported), small(line.onnx)] == [exportable] * 2, line
    # as far apart as two right results in float32; back, the same bits, or the line would say so
    count, difference = line.converted.split(", ")
    assert (int(count), float(difference) < 1e-4) == (line.norms, True)
    assert all(
        small(each) or (each, group) == ("–", "detection") for each in line.fused.split(", ")[1:]
    )


def test_the_page_has_every_model():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name, (group, build) in models.all_models().items():
        if group == "timm":
            assert f"| {name} |" in page
        elif f"| {name} |" not in page:
            with torch.device("meta"):
                model = build()
            assert not any(
                isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
            ), name


def lines_of(page):
    """What the page's tables hold."""
    for section in page.split("\n## ")[1:]:
        group = section.partition("\n")[0].lower()
        notes = dict(re.findall(r"^(\d+)\. (.*)$", section, re.MULTILINE))
        for row in re.findall(r"^\| (?!model )(.*) \|$", section, re.MULTILINE):
            cells = row.split(" | ")
            cells[5], _, note = cells[5].rstrip(")").partition(" (")
            yield models.Line(
                group, *cells[:2], int(cells[2]), *cells[3:6], notes.get(note, ""), *cells[6:]
            )


def test_the_page_says_of_its_rows_what_they_are():
    """How many pass, layers, exports: as the command would write it of the same rows."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    lines = list(lines_of(page))
    assert len(lines) > 100
    assert models.page(lines) == page


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recalibrated", "5, 2e-03"),
        ("frozen", "statistics moved"),
        ("difference", "2e-12"),
        ("onnx", "2e-03"),
        ("converted", "4, 0"),
        ("converted", "5, 0; back: 0, same: False"),
        ("fused", "3, 0, other shapes"),
    ],
)
def test_what_does_not_pass(field, value):
    line = models.Line(
        "timm", "some", "2×3×8×8", 5, "5, 9e-04", "0", "5", "", "9e-13", "–", "9e-04", "5, 0",
        "3, 0, –",
    )  # fmt: skip
    assert models.passes(line)
    assert not models.passes(dataclasses.replace(line, **{field: value}))
