"""The notebooks run from beginning to end, find what they say, and keep the outputs of their code.

The images are a stand-in: nothing is downloaded here.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "examples/notebooks"
NAMES = ["note", "rescue", "watch"]
IMAGES = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import tiny
images = tiny.Images(*tiny.images(3200, 500))
"""

_spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS / "execute.py")
notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebooks)


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def answers(name, folder, questions):
    """Run the notebook, and ask: names of its own, and expressions in them."""
    notebook = read(name)
    for cell in notebook.cells:
        if "data" in cell.metadata.get("tags", []):
            cell.source = IMAGES
    asked = ", ".join(f"{name!r}: {expression}" for name, expression in questions.items())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps({{{asked}}}))"))
    notebooks.execute(notebook, folder)
    return json.loads(notebook.cells[-1].outputs[0].text)


def test_the_note(tmp_path):
    found = answers(
        "note",
        tmp_path,
        {
            "same": "bool((of_pictures.permute(0, 2, 3, 1).reshape(-1, 3) - of_pixels).abs().max() < 1e-6)",
            "last mean": "course[-1][0]",
            "tests": "{a: s.test_accuracy.mean for a, s in result.summary.items()}",
            "spread": "{n: float((f[-20:, 2] - f[-20:, 0]).mean()) for n, f in fans.items()}",
            "exact": "accuracy(exact)",
            "poor": "accuracy(poor)",
            "gap": "float(gap)",
        },
    )
    assert found["same"]
    assert found["last mean"] == pytest.approx(5, abs=0.5)
    assert found["tests"]["batch"] > found["tests"]["none"] + 0.2
    assert found["spread"]["with"] > 3 * found["spread"]["without"]
    assert found["exact"] > found["poor"] - 0.02
    assert found["gap"] < 1e-4


def test_the_rescue(tmp_path):
    found = answers(
        "rescue",
        tmp_path,
        {
            "healthy": "accuracy(model)",
            "pruned": "[before_pruned, after_pruned]",
            "bright": "[before_bright, after_bright]",
            "rules": "sorted(findings.by_rule())",
            "gap": "float(gap)",
        },
    )
    assert found["healthy"] > 0.9
    for before, after in (found["pruned"], found["bright"]):
        assert after > before + 0.1
    assert "BN001" in found["rules"]
    assert found["gap"] < 1e-4


def test_the_watch(tmp_path):
    found = answers(
        "watch",
        tmp_path,
        {
            "model": "findings.model",
            "broken": "sorted(findings.by_rule())",
            "mended": "sorted(after.by_rule())",
            "moved": "[moved(broken), moved(mended)]",
        },
    )
    moved, of_mended = found.pop("moved")
    assert moved > 0.01
    assert of_mended == 0
    assert found == {
        "model": "broken (Sequential)",
        "broken": ["BN002", "BN011"],
        "mended": [],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_those_of_the_code(name):
    notebook = read(name)
    assert notebook.metadata["code"] == notebooks.code_of(notebook), (
        f"{name}.ipynb was changed and not run: python examples/notebooks/execute.py {name}"
    )
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kept = nbformat.writes(notebook)
    for private in (str(Path.home()), str(HERE.parent), tempfile.gettempdir(), "Traceback"):
        assert private not in kept
