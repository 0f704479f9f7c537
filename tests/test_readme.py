"""Both READMEs: their code runs, their commands parse, their links lead somewhere, their figures are the docs'."""

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
from batchnorm.lab import arms

ROOT = Path(__file__).parent.parent
READMES = ["README.md", "README.zh-CN.md"]
GUIDE = "docs/whole-models.md"
FAMILY = "docs/family.md"


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, kind):
    return re.findall(rf"```{kind}\n(.*?)```", text(name), re.DOTALL)


@pytest.mark.parametrize("name", READMES)
def test_the_rescue_runs(name):
    (code,) = blocks(name, "python")
    model, images = torch.nn.Sequential(torch.nn.BatchNorm2d(1)), tiny.as_images().test_images
    exec(compile(code, name, "exec"), {"model": model, "loader": images.split(32)})  # noqa: S102  # our own README
    torch.testing.assert_close(model[0].running_mean, images.mean((0, 2, 3)))


@pytest.mark.parametrize("name", READMES)
def test_the_layer_runs(name):
    (code,) = blocks(name, "python layer")
    names = {"batchnorm": batchnorm, "torch": torch}
    exec(compile(code, name, "exec"), names)  # noqa: S102
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


def bold(name, page):
    """The numbers in bold in the row of the README that leads to this page."""
    (row,) = [
        line for line in text(name).splitlines() if line.startswith("|") and f"({page})" in line
    ]
    return sorted(
        float(n) for n in re.findall(r"[\d.]+", " ".join(re.findall(r"\*\*.*?\*\*", row)))
    )


def column(page, place):
    """Of a page's tables, without their heads."""
    rows = [line.strip("|\n ").split(" | ") for line in text(page).splitlines() if line[:2] == "| "]
    return [row[place] for row in rows[1:]]


@pytest.mark.parametrize("name", READMES)
def test_models_and_false_alarms_are_counted_in_the_docs(name):
    kinds = column("docs/models.md", 0)
    models = len(kinds) - kinds.count("model")
    assert bold(name, "docs/models.md") == [models, models]
    found = column("docs/false-alarms.md", 3)
    assert bold(name, "docs/false-alarms.md") == [len(found) - found.count("nothing"), len(found)]


def speeds():
    """torch ÷ ours by class: forward and backward with ReLU, float32, memory reused, two threads."""
    page = text("docs/performance.md")
    table = re.search(
        r"<!-- bench float32 -->.*?\*\*reused memory, 2 threads\*\*\n\n(.*?)\n\n", page, re.DOTALL
    )[1]
    family, found = "", {}
    for row in table.splitlines()[2:]:
        first, _, fusion, _, _, both, _ = (cell.strip() for cell in row.strip("|").split("|"))
        family = first or family
        if fusion == "ReLU":
            found.setdefault(family, []).append(float(both.partition(" ")[0]))
    return found


@pytest.mark.parametrize("name", READMES)
def test_the_speed_is_that_of_the_docs(name):
    found = speeds()
    last = found["channels_last beyond L3"] + found["channels_last, 2-D, in L3"]
    expected = [f(of) for of in (found["NCHW, large"], last) for f in (min, max)]
    lenet = {round(ratio, 1) for ratio in found["LeNet convolutions"]}
    assert bold(name, "docs/performance.md") == sorted([*lenet, *(round(x, 1) for x in expected)])


@pytest.mark.parametrize("name", READMES)
def test_the_laboratory_names_every_arm(name):
    (section,) = re.findall(r"\n## Arms\n(.*?)\n## ", text("docs/laboratory.md"), re.DOTALL)
    firsts = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    assert re.findall(r"`([\w-]+)`", " ".join(firsts)) == list(arms.ARMS)
    assert re.search(r"\[[^]]*17[^]]*\]\(docs/laboratory\.md#arms\)", text(name))
    assert len(arms.ARMS) == 17


def test_both_languages_give_the_same_numbers():
    english, chinese = (set(re.findall(r"\d*\.\d{2,}", text(name))) for name in READMES)
    assert english == chinese
