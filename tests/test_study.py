"""The study of recalibration: what is done to networks and images, and a record that can be cut."""

import json
import re

import pytest
import torch
from torch import nn

import tiny
from batchnorm import BatchNormError
from batchnorm.lab import networks
from batchnorm.lab.studies import recalibration as study
from batchnorm.views import dumbbell
from batchnorm.views.words import Words
from processes import command

CONFIG = study.StudyConfig(epochs=2, batch_size=32, learning_rate=0.5, threads=2)


def run(folder, seeds, config=CONFIG):
    told = []
    study.run(config, seeds, tiny.as_images(), folder, lambda seed, _: told.append(seed))
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    assert run(out, range(2)) == [0, 1]
    return out


def test_weights_are_rounded_to_their_levels():
    model = networks.lenet()
    before = model.conv1.weight.detach().clone()
    study.rounded(model, 3)
    assert len(model.conv1.weight.unique()) <= 7
    step = before.abs().max() / 3
    assert (model.conv1.weight - before).abs().max() <= step / 2 * (1 + 1e-6)
    assert len(model.linear3.weight.unique()) <= 7


def test_the_smallest_half_of_the_convolutions_is_pruned():
    model = networks.lenet()
    before = model.conv2.weight.detach().clone()
    study.pruned(model, 0.5)
    gone = model.conv2.weight == 0
    assert gone.double().mean() == pytest.approx(0.5, abs=1e-3)
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert (model.linear1.weight != 0).all()


def test_an_average_is_half_way_in_parameters_and_statistics():
    one, other = networks.lenet(), networks.lenet()
    one.norm1.running_mean.fill_(1)
    other.norm1.running_mean.fill_(3)
    middle = study.averaged(one, other)
    assert (middle.norm1.running_mean == 2).all()
    torch.testing.assert_close(middle.conv1.weight, (one.conv1.weight + other.conv1.weight) / 2)


def test_images_stay_images_and_noise_is_the_same_each_time():
    images = tiny.as_images().test_images
    for condition in study.CONDITIONS:
        changed = condition.images(images)
        assert changed.shape == images.shape
        assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(study.noisy(images), study.noisy(images))


def test_the_record_holds_every_seed_and_condition(folder):
    found = study.read(folder)
    assert found.config == CONFIG
    assert found.conditions == [condition.name for condition in study.CONDITIONS]
    for condition in found.conditions:
        assert [rescue.seed for rescue in found.of(condition)] == [0, 1]
        assert all(0 <= r.before <= 1 and 0 <= r.after <= 1 for r in found.of(condition))


def test_accuracy_before_is_that_of_the_network_as_it_is():
    """The control by hand: train, evaluate, recalibrate, evaluate."""
    images = tiny.as_images()
    torch.manual_seed(0)
    with torch.random.fork_rng([]):
        model = study._train(CONFIG, 0, images).healthy
        (control,) = [c for c in study._measure(CONFIG, 0, images) if c.condition == "control"]
    with torch.no_grad():
        right = model(images.test_images).argmax(1) if model.eval() else None
    assert control.before == (right == images.test_labels).double().mean().item()


def test_a_study_that_was_killed_goes_on_and_ends_with_the_same_numbers(folder, tmp_path):
    lines = (folder / study.RECORD).read_text().splitlines(keepends=True)
    whole = 1 + len(study.CONDITIONS)
    for kept in (1, whole, whole + 3):
        cut = tmp_path / str(kept)
        cut.mkdir()
        (cut / study.RECORD).write_text("".join(lines[:kept]) + lines[kept][:10])
        assert run(cut, range(2)) == ([0, 1] if kept == 1 else [1])
        assert study.read(cut).rescues == study.read(folder).rescues


def test_a_finished_study_is_not_run_again_and_seeds_are_added(folder):
    assert run(folder, range(2)) == []


def test_another_configuration_is_refused(folder):
    before = (folder / study.RECORD).read_bytes()
    with pytest.raises(BatchNormError, match="another configuration"):
        run(folder, [0], study.StudyConfig(epochs=3))
    assert (folder / study.RECORD).read_bytes() == before


@pytest.mark.parametrize("content", ["", "no JSON\n", '{"config": {"colour": 1}}\n'])
def test_a_record_that_is_none_is_said(tmp_path, content):
    (tmp_path / study.RECORD).write_text(content)
    with pytest.raises(BatchNormError, match="is not the record of a study"):
        study.read(tmp_path)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_picture_shows_the_means(folder, tmp_path, language):
    found = study.read(folder)
    words = Words(language)
    axes = dumbbell.draw(found, words).axes[0]
    texts = {text.get_text() for text in axes.texts}
    for condition in found.conditions:
        rescues = found.of(condition)
        assert f"{sum(r.before for r in rescues) / 2:.3f}" in texts
        assert f"{sum(r.after for r in rescues) / 2:.3f}" in texts
    dumbbell.save(found, tmp_path, words)
    first = (tmp_path / "dumbbell.svg").read_bytes()
    dumbbell.save(found, tmp_path, words)
    assert (tmp_path / "dumbbell.svg").read_bytes() == first
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(found.conditions)


def test_the_command(tmp_path):
    options = ["--data", "tiny:images", "--epochs", 1, "--seeds", 1, "--out", tmp_path]
    result = command("study", "recalibration", *options)
    assert result.returncode == 0, result.stderr
    assert "seed 0: moving 0." in result.stderr
    assert re.search(r"healthy \(control\)\s+│\s+[01]\.\d{3}", result.stdout)
    assert {"record.jsonl", "dumbbell.svg", "table.csv"} <= {p.name for p in tmp_path.iterdir()}
    assert (
        json.loads((tmp_path / study.RECORD).read_text().splitlines()[0])["config"]["epochs"] == 1
    )
    for wrong in (["--seeds", "0"], ["--data", "tiny:loaders"]):
        failed = command("study", "recalibration", *options, *wrong)
        assert failed.returncode == 2
        assert "Traceback" not in failed.stderr


def test_the_network_that_is_studied_has_our_layers():
    torch.manual_seed(0)
    model = study._train(CONFIG, 0, tiny.as_images()).moving
    assert sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d) for m in model) == 4
