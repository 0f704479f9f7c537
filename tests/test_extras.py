"""`pip install batchnorm` is light: what an extra brings is asked for by the extra's name."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import batchnorm
from batchnorm.errors import EXTRAS
from commands import invoke
from processes import python

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# imported only where the user has them already: a notebook's display, Lightning's callback
THE_USERS = {"IPython", "lightning"}


def distributions(requirements):
    """Of "dask[distributed]" both."""
    wanted = [Requirement(text) for text in requirements]
    return {canonicalize_name(name) for each in wanted for name in (each.name, *each.extras)}


def test_an_extra_installs_the_modules_that_it_is_named_for():
    brought_by = importlib.metadata.packages_distributions()
    assert EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - {"dev"}
    for extra, modules in EXTRAS.items():
        found = {canonicalize_name(brought_by[module][0]) for module in modules}
        assert found == distributions(PROJECT["optional-dependencies"][extra]), extra


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_nothing_else_is_imported():
    files = sorted((ROOT / "src").rglob("*.py"))
    found = {name.partition(".")[0] for path in files for name in imported(path)}
    of_extras = {module for modules in EXTRAS.values() for module in modules}
    required = distributions(PROJECT["dependencies"])
    assert found - sys.stdlib_module_names <= {"batchnorm"} | required | of_extras | THE_USERS


# everything is loaded, then each of the laboratory's libraries in turn is as if it were not there
ONE_BY_ONE = """
import importlib, sys
from typer.testing import CliRunner
import batchnorm
from batchnorm.errors import EXTRAS

def ask():
    batchnorm.compare
    cli = importlib.import_module("batchnorm.cli")
    return CliRunner().invoke(cli.app, ["study", "axes", "--seeds", "0"]).output.strip()

assert "seeds is 0" in ask()
OURS = ("batchnorm.cli", "batchnorm.comparison", "batchnorm.lab", "batchnorm.studies", "batchnorm.views")
for module in EXTRAS["lab"]:
    there, sys.modules[module] = sys.modules[module], None
    for name in [name for name in sys.modules if name.startswith(OURS)]:
        del sys.modules[name]
    try:
        print(ask())
    except (ModuleNotFoundError, SystemExit) as error:
        print(error)
    sys.modules[module] = there
"""


def test_each_library_of_the_laboratory_is_missed_before_a_training():
    said = python(ONE_BY_ONE).stdout.splitlines()
    assert len(said) == len(EXTRAS["lab"])
    for module, line in zip(EXTRAS["lab"], said, strict=True):
        asked = rf"batchnorm(\.compare|: the command) needs {module}\. "
        assert re.fullmatch(asked + r"Install it: pip install 'batchnorm\[lab\]'", line), line


@pytest.fixture
def without(monkeypatch):
    """A function that makes a library as if it were not there, whatever was imported before."""

    def hide(module):
        for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


@pytest.mark.parametrize("name", ["from_onnx", "to_onnx"])
def test_onnx_s_layers_ask_for_onnx(name, without):
    without("onnx")
    with pytest.raises(ModuleNotFoundError) as raised:
        getattr(batchnorm, name)(batchnorm.BatchNorm2d(3))
    assert str(raised.value) == f"{name} needs onnx. Install it: pip install 'batchnorm[export]'"


@pytest.mark.parametrize(
    ("module", "suffix"),
    [("onnxscript", "onnx"), ("onnxruntime", "onnx"), ("safetensors", "safetensors")],
)
def test_nothing_is_written_that_cannot_be_finished(module, suffix, without, tmp_path):
    without(module)
    to = tmp_path / f"m.{suffix}"
    status, said = invoke("fold", "tiny:network", "--input", "2,1,28,28", "--to", to)
    assert status == 2
    assert said.strip().endswith(
        f"the command needs {module}. Install it: pip install 'batchnorm[export]'"
    )
    assert not list(tmp_path.iterdir())
