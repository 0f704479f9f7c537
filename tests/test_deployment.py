"""The commands on a model and a checkpoint: fold, recalibrate, summary."""

import copy
import json
import re

import pytest
import safetensors.torch
import torch
from torch import nn

import batchnorm
from batchnorm.model.exporting import Agreement
from commands import importable, invoke, invoke_unwrapped

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6),
        nn.Conv2d(6, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )

built = build()

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x

def images():
    return torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(5)) + 1

def loaders():
    return [(x, None) for x in images().split(30)], None

def arguments():
    return torch.ones(2, 3, 8, 8)

def number():
    return 3

def raises():
    raise KeyError("weights")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the module `mine` and the checkpoint of a trained model of it."""
    importable(tmp_path, monkeypatch, "mine", MODULE)
    safetensors.torch.save_file(trained().state_dict(), "weights.safetensors", {"format": "pt"})
    return tmp_path


def trained():
    import mine

    torch.manual_seed(3)
    model = mine.build()
    for norm in (model[1], model[3]):
        for value in (norm.weight.data, norm.running_mean, norm.running_var):
            value.uniform_(0.5, 2)
    return model.eval()


SHAPE = ("--input", "2,3,8,8")


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_fold_exports_what_computes_the_same(folder, suffix):
    status, said = invoke(
        "fold",
        "mine:build",
        "--checkpoint",
        "weights.safetensors",
        "--to",
        f"out/m.{suffix}",
        *SHAPE,
    )
    assert status == 0, said
    assert "fold: 2 layers" in said
    assert "done  1: folded into 0" in said
    assert "difference in float64" in said
    assert f"{suffix} beside the model: largest difference" in said
    x = torch.randn(5, 3, 8, 8)  # another batch size
    if suffix == "onnx":
        from batchnorm.model.exporting import run_onnx as run
    else:
        from batchnorm.model.exporting import run_torch as run
    (y,) = run(folder / f"out/m.{suffix}", (x,))
    torch.testing.assert_close(y, trained()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "pth"])
def test_fold_writes_weights_that_a_folded_model_takes(folder, suffix):
    status, said = invoke(
        "fold", "mine:build", "--checkpoint", "weights.safetensors", "--to", f"f.{suffix}"
    )
    assert status == 0, said
    path = folder / f"f.{suffix}"
    state = safetensors.torch.load_file(path) if suffix == "safetensors" else torch.load(path)
    import mine

    model = batchnorm.fold(mine.build().eval())
    model.load_state_dict(state)
    x = mine.images()
    torch.testing.assert_close(model(x), trained()(x), rtol=1e-4, atol=1e-5)


def test_fold_alone_tells_what_it_would_do(folder):
    before = sorted(folder.iterdir())
    status, said = invoke("fold", "mine:built", "--inputs", "mine:arguments")
    assert status == 0, said
    assert "fold: 2 layers" in said
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == [
        p for p in before if p.name != "__pycache__"
    ]


@pytest.mark.usefixtures("folder")
def test_exported_outputs_that_differ_end_with_1(monkeypatch):
    from batchnorm import deployment

    export, run = deployment.EXPORTS[".onnx"]
    wrong = (export, lambda path, inputs: [y + 1e-3 for y in run(path, inputs)])
    monkeypatch.setitem(deployment.EXPORTS, ".onnx", wrong)
    status, said = invoke("fold", "mine:build", "--to", "m.onnx", *SHAPE)
    assert status == 1
    assert "largest difference from the model in float64 0.001" in said


def test_agreement_is_measured_in_the_models_own_rounding():
    assert Agreement(exported=1e-6, model=1e-7, largest=0.01).holds
    assert not Agreement(exported=2e-6, model=1e-7, largest=0.01).holds
    assert not Agreement(exported=float("nan"), model=1e-7, largest=0.01).holds


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("data", ["images", "loaders"])
def test_recalibrate_writes_the_checkpoint_again(data):
    import mine

    status, said = invoke(
        "recalibrate", "mine:build", "--checkpoint", "weights.safetensors",
        "--data", f"mine:{data}", "--exact", "--to", "new.safetensors",
    )  # fmt: skip
    assert status == 0, said
    assert "recalibrate: 2 layers" in said
    expected = batchnorm.recalibrate(trained(), [mine.images()], exact=True).state_dict()
    found = safetensors.torch.load_file("new.safetensors")
    for key in ("1.num_batches_tracked", "3.num_batches_tracked"):  # of batches: the split's
        assert found.pop(key) == {"images": 1, "loaders": 3}[data]
        expected.pop(key)
    torch.testing.assert_close(found, dict(expected))


@pytest.mark.usefixtures("folder")
def test_the_rest_of_a_checkpoint_stays():
    model = nn.DataParallel(trained())
    content = {"epoch": 7, "state_dict": model.state_dict(), "optimizer": {"lr": 0.1}}
    torch.save(content, "whole.pt")
    status, said = invoke(
        "recalibrate", "mine:build", "--checkpoint", "whole.pt", "--data", "mine:images",
        "--samples", "40", "--prior", "0.5", "--to", "whole.pt",
    )  # fmt: skip
    assert status == 0, said
    found = torch.load("whole.pt", weights_only=True)
    assert (found["epoch"], found["optimizer"]) == (7, {"lr": 0.1})
    assert list(found["state_dict"]) == list(content["state_dict"])
    assert not torch.equal(
        found["state_dict"]["module.1.running_mean"], model.module[1].running_mean
    )
    assert torch.equal(found["state_dict"]["module.0.weight"], model.module[0].weight)


@pytest.mark.usefixtures("folder")
def test_summary_prints_and_gives_json():
    status, said = invoke("summary", "mine:build", "--checkpoint", "weights.safetensors", *SHAPE)
    assert status == 0, said
    assert "Sequential: 2 batch-norm layers, 0 with something odd" in said
    status, said = invoke("summary", "mine:build", "--no-train", "--json")
    assert status == 0, said
    content = json.loads(said)
    assert [row["mode"] for row in content["layers"]] == ["eval", "eval"]
    assert content["layers"][1]["before"] == "2"


@pytest.mark.usefixtures("folder")
def test_summary_of_a_model_without_a_graph():
    status, said = invoke("summary", "mine:Branching")
    assert status == 0, said
    assert "Branching: 2 batch-norm layers" in said


WRONG = {
    "no such file": (["summary", "mine:build", "--checkpoint", "none.pt"], "there is no checkpoint"),
    "no checkpoint": (["summary", "mine:build", "--checkpoint", "mine.py"], "could not be read|holds more"),
    "code in it": (["summary", "mine:build", "--checkpoint", "code.pt"], "would run its code"),
    "another model's": (["summary", "torch.nn:Identity", "--checkpoint", "weights.safetensors"], "does not fit Identity"),
    "no state dict": (["summary", "mine:build", "--checkpoint", "other.pt"], "has no state dict.*epoch"),
    "not a model": (["summary", "mine:number"], "gave a int"),
    "a model that raises": (["summary", "mine:raises"], "raised KeyError"),
    "no function": (["summary", "mine:nothing"], "has none of that name"),
    "a shape": (["summary", "mine:build", "--input", "2,x"], "wants sizes"),
    "inputs": (["summary", "mine:build", "--inputs", "mine:number"], "a tuple of tensors"),
    "a suffix": (["fold", "mine:build", "--to", "m.h5"], "ends in one of"),
    "no input": (["fold", "mine:build", "--to", "m.onnx"], "wants --input"),
    "control flow": (["fold", "mine:Branching", "--to", "m.onnx", *SHAPE], "could not export Branching"),
    "data": (
        ["recalibrate", "mine:build", "--checkpoint", "weights.safetensors", "--data", "mine:number", "--to", "a.pt"],
        "gave a int",
    ),
    "a suffix of weights": (
        ["recalibrate", "mine:build", "--checkpoint", "weights.safetensors", "--data", "mine:images", "--to", "a.onnx"],
        "wants a name that ends in",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_a_user_can_mend(folder, arguments, message):
    torch.save({"epoch": 1}, "other.pt")
    torch.save(copy.deepcopy(trained()), "code.pt")
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    status, said = invoke_unwrapped(*arguments)
    assert status == 2, said
    assert re.search(message, said), said
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_a_checkpoint_is_complete_or_not_there(folder, monkeypatch):
    def fail(_content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    status, said = invoke("fold", "mine:build", "--to", "f.pt")
    assert status == 2
    assert "No space left" in said
    assert not list(folder.glob("*.pt*"))
    assert not list(folder.glob(".*part"))
