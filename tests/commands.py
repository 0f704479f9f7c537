"""The command, called in this process, and a module that it is called on."""

import sys

import pytest
from typer.testing import CliRunner

from batchnorm.cli import app

MODULE = """
import torch, torchvision
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
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    (tmp_path / "faulty.py").write_text(MODULE)
    return tmp_path


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())
