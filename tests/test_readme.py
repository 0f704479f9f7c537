"""Both READMEs: their code runs, their commands parse, their links lead somewhere."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils.checkpoint import checkpoint

import batchnorm
import commands
import tiny

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
GUIDE = "docs/whole-models.md"
FAMILY = "docs/family.md"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text(name), re.DOTALL)


@pytest.mark.parametrize("name", READMES)
def test_the_code_runs(name):
    (code,) = blocks(name, "python")
    names = {}
    exec(compile(code, name, "exec"), names)  # noqa: S102  # our own README
    assert isinstance(names["layer"], torch.nn.BatchNorm2d)
    assert names["y"].shape == (8, 64, 7, 7)
    assert names["z"].shape == (8, 5, 3)


@pytest.mark.parametrize("name", READMES)
def test_the_comparison_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(name, "python with-your-own")
    small = {"epochs": 1, "seeds": 1, "batch_size": 32}

    class Library:
        @staticmethod
        def compare(*arguments, **options):
            return batchnorm.compare(*arguments, **(options | small))

    names = {"batchnorm": Library, "build_network": tiny.network, "images": tiny.as_images()}
    exec(compile(code, name, "exec"), names)  # noqa: S102
    assert names["result"].summary["batch"].test_accuracy.values


@pytest.mark.parametrize("name", READMES)
def test_what_is_done_to_a_model_runs(name):
    (code,) = blocks(name, "python whole-models")
    images = tiny.as_images().test_images
    model = tiny.network().train()
    names = {"batchnorm": batchnorm, "torch": torch, "model": model, "images": images}
    exec(compile(code, name, "exec"), names | {"loader": images.split(32)})  # noqa: S102
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", READMES)
def test_the_search_for_faults_runs(name):
    (code,) = blocks(name, "python find-faults")
    model, images = tiny.network(), tiny.as_images().test_images
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {"batchnorm": batchnorm, "model": model, "optimizer": optimizer}
    names |= {"loader": images.split(32), "train": lambda model: model(images)}
    exec(compile(code, name, "exec"), names)  # noqa: S102
    assert isinstance(names["findings"], batchnorm.Findings)
    assert names["watching"].models == [model]


def test_the_guide_to_whole_models_runs():
    images = tiny.as_images().test_images
    names = {
        "batchnorm": batchnorm, "torch": torch, "model": tiny.network(), "images": images,
        "batches": list(images.split(32)), "target_loader": images.split(32),
        "speech": torch.nn.BatchNorm1d(3), "padded": torch.randn(2, 3, 9),
        "lengths": torch.tensor([4, 9]), "checkpoint": checkpoint,
    }  # fmt: skip
    for code in blocks(GUIDE, "python"):
        labelled = [{"image": batch} for batch in images.split(32)]
        for statement in ast.parse(code).body:
            line = ast.get_source_segment(code, statement)
            loader = labelled if '["image"]' in line else images.split(32)
            names["loader"] = loader
            exec(compile(line, GUIDE, "exec"), names)  # noqa: S102
            names["model"].train("fold" not in line)


def test_the_family_s_page_runs():
    images, labels = tiny.images()[2:]
    names = {
        "batchnorm": batchnorm, "torch": torch, "torchvision": torchvision, "images": images,
        "model": tiny.network(), "perturbed": images + 0.1, "labels": labels,
        "criterion": torch.nn.functional.cross_entropy,
    }  # fmt: skip
    for code in blocks(FAMILY, "python"):
        exec(compile(code, FAMILY, "exec"), names)  # noqa: S102
    assert names["y"].shape == (100, 64, 7, 7)
    assert names["again"].num_features == 64


@pytest.mark.parametrize("name", [*READMES, GUIDE])
def test_the_commands_options_exist(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shell = "\n".join(blocks(name, "sh")).replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in shell.splitlines()]
    lines += re.findall(r"`(batchnorm [^`]*)`", text(name))
    called = [shlex.split(line) for line in lines if "batchnorm" in line]
    assert len(called) > 3
    for _, *words in called:
        command = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        options = [word for word in words if word.startswith("--")]
        named = command if command[0] == "study" else command[:1]
        helped = commands.result_of(*named, "--help")
        assert helped.exit_code == 0
        for option in options:
            assert option in helped.stdout


@pytest.mark.parametrize("name", READMES)
def test_the_make_targets_exist(name):
    makefile = text("Makefile")
    for target in re.findall(r"make (\w+)", text(name)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", GUIDE, FAMILY])
def test_links_and_pictures_are_there(name):
    for link in re.findall(r"\]\(([^)#]+)\)", text(name)):
        if not link.startswith("http"):
            assert ((ROOT / name).parent / link).exists(), link


def test_both_languages_give_the_same_numbers():
    english, chinese = (set(re.findall(r"\d*\.\d{2,}", text(name))) for name in READMES)
    assert english == chinese
