"""The commands, called in this process, and a module that they are called on."""

import sys

import pytest
from typer.testing import CliRunner

from batchnorm.cli import app

MODULE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.99))
    return model.train()

def all_three():
    model = build()
    return model, loader(), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)

def loader():
    return [torch.randn(16, 3, 8, 8) for _ in range(3)]

def number():
    return 3

def raises():
    raise KeyError("a")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return importable(tmp_path, monkeypatch, "faulty", MODULE)


def importable(folder, monkeypatch, module, code):
    """The folder, where one works, with a module in it."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    (folder / f"{module}.py").write_text(code)
    return folder


def result_of(*arguments):
    """What a command ends with and says; what it raises, and did not say in a line, is raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def invoke(*arguments):
    """(exit status, everything that it says)."""
    result = result_of(*arguments)
    return result.exit_code, result.output


def invoke_unwrapped(*arguments):
    status, output = invoke(*arguments)
    return status, " ".join(output.split())
