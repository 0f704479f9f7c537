"""A cell that is interrupted, or whose files are cut: it ends with the same numbers, or says why not."""

import functools
import io

import pytest
import torch

import tiny
from batchnorm import BatchNormError
from batchnorm.lab.data import Loaders
from batchnorm.lab.record import CELLS, json_line, read, read_cell
from trained import Interrupts, contents, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an arm that nothing interrupts, trained when the first test asks."""

    @functools.cache
    def folder_of(arm):
        folder = tmp_path_factory.mktemp(arm)
        run(folder, arms=[arm])
        return folder

    return folder_of


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """The same with data that draw noise, and how it is trained."""
    folder = tmp_path_factory.mktemp("noisy")
    options = {"network": "tiny:network", "arms": ["batch"], "learning_rate": 0.1}
    run(folder, data=Loaders(*tiny.augmented()), **options)
    return folder, options


@pytest.mark.parametrize("step", [1, 5, 6, 13, 20])
@pytest.mark.parametrize("arm", ["batch", "batch-note"])
def test_interrupted_anywhere_it_ends_with_the_same_numbers(tmp_path, whole, arm, step):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, arms=[arm], progress=Interrupts(arm, step))
    run(tmp_path, arms=[arm])
    assert contents(tmp_path) == contents(whole(arm))


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle"])
def test_interrupted_with_dropout_loaders_momentum_and_a_schedule(tmp_path, schedule):
    options = {
        "arms": ["batch"],
        "network": "tiny:network",
        "data": Loaders(*tiny.loaders()),
        "schedule": schedule,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "learning_rate": 0.05,
    }
    run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", progress=Interrupts("batch", 17), **options)
    run(tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_record_longer_than_its_checkpoint_is_cut_back(tmp_path, whole):
    """As left by a kill between the line and the checkpoint, or in the middle of a line."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, arms=["batch"], progress=Interrupts("batch", 7))
    (path,) = (tmp_path / CELLS).glob("*.jsonl")
    extra = json_line("evaluation", read_cell(path).last)
    with path.open("a") as file:
        file.write(extra + extra[:40])
    run(tmp_path, arms=["batch"])
    assert contents(tmp_path) == contents(whole("batch"))


def test_a_record_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path, whole):
    (path,) = (whole("batch") / CELLS).glob("*.jsonl")
    (tmp_path / CELLS).mkdir()
    (tmp_path / CELLS / path.name).write_text(path.read_text()[:100])
    run(tmp_path, arms=["batch"])
    assert contents(tmp_path) == contents(whole("batch"))


OTHER = io.BytesIO()
torch.save({"model": {"weight": torch.ones(3)}}, OTHER)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK and no more", None, OTHER.getvalue()],
    ids=["empty", "no archive", "cut", "another's"],
)
def test_a_corrupt_checkpoint_is_said_and_nothing_is_lost(tmp_path, whole, content):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, arms=["batch"], progress=Interrupts("batch", 13))
    (checkpoint,) = (tmp_path / CELLS).glob("*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000] if content is None else content)
    before = contents(tmp_path)
    with pytest.raises(BatchNormError, match=r"checkpoint .* cannot be read .* Move it away"):
        run(tmp_path, arms=["batch"])
    assert contents(tmp_path) == before
    checkpoint.unlink()
    run(tmp_path, arms=["batch"])
    assert contents(tmp_path) == contents(whole("batch"))


def test_an_odd_network_is_trained_and_goes_on_after_an_interruption(tmp_path):
    run(tmp_path / "whole", network="tiny:odd", arms=["none", "batch"], learning_rate=0.1)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "cut", network="tiny:odd", arms=["none", "batch"], learning_rate=0.1,
            progress=Interrupts("batch", 7),
        )  # fmt: skip
    run(tmp_path / "cut", network="tiny:odd", arms=["none", "batch"], learning_rate=0.1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(read(tmp_path / "cut").cells[1].last.layers) == 2


@pytest.mark.parametrize("step", [2, 5, 8, 14])
def test_interrupted_with_noise_drawn_by_the_data_it_ends_with_the_same_numbers(
    tmp_path, noisy, step
):
    """The data set and the dropout draw from one random state."""
    folder, options = noisy
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path, data=Loaders(*tiny.augmented()), progress=Interrupts("batch", step), **options
        )
    run(tmp_path, data=Loaders(*tiny.augmented()), **options)
    assert contents(tmp_path) == contents(folder)


def test_a_record_that_was_cut_behind_its_checkpoint_is_said(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, arms=["batch"], progress=Interrupts("batch", 13))
    (record,) = (tmp_path / CELLS).glob("*.jsonl")
    whole = record.read_bytes()
    record.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(BatchNormError, match="shorter than its checkpoint says"):
        run(tmp_path, arms=["batch"])
    record.write_bytes(b"")  # not even a header: the cell begins again
    run(tmp_path, arms=["batch"])
    assert read(tmp_path).cells[0].done is not None
