"""A cell: the same start for every arm, what is trained, measured and recorded."""

import dataclasses
import hashlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import tiny
from batchnorm import BatchNormError
from batchnorm.lab import grid, networks, training
from batchnorm.lab.batches import TensorBatches
from batchnorm.lab.data import Images, Loaders
from batchnorm.lab.progress import Silent
from batchnorm.lab.record import ADDED, CELLS, CellConfig, cell_path, read, read_cell
from batchnorm.lab.summary import summarize
from batchnorm.lab.training import evaluation_steps, train_cell
from trained import Interrupts, contents, run, without_times


def test_arms_start_from_the_same_weights_and_see_the_same_order(tmp_path):
    run(tmp_path, arms=("batch", "batch-torch", "none"))
    cells = {cell.config.arm: cell for cell in read(tmp_path).cells}
    assert len({cell.header.initial_weights for cell in cells.values()}) == 1
    ours, torchs = (
        without_times(dataclasses.asdict(cells[arm].last)) for arm in cells if "b" in arm
    )
    assert ours["train_loss"] == pytest.approx(torchs["train_loss"], rel=1e-5)
    assert ours["layers"]["norm1"]["input_mean"] == pytest.approx(
        torchs["layers"]["norm1"]["input_mean"], rel=1e-3
    )


def test_another_seed_is_another_start(tmp_path):
    common, build = grid.configure("lenet", tiny.as_images(), 1, 2, None, {"batch_size": 32})
    grid.run(
        grid.plan(common, ["batch"], [0, 1]), build, tiny.as_images(), None, tmp_path, Silent()
    )
    first, second = read(tmp_path).cells
    assert first.header.initial_weights != second.header.initial_weights
    assert first.last.train_loss != second.last.train_loss


def test_a_cell_holds_an_evaluation_at_the_start_and_at_each_mark(tmp_path):
    (config,) = run(tmp_path, arms=["batch"], evaluations_per_epoch=2)
    cell = read_cell(cell_path(tmp_path, config))
    assert [e.step for e in cell.evaluations] == [0, 5, 10, 15, 20]
    assert [e.epoch for e in cell.evaluations] == [0, 0.5, 1, 1.5, 2]
    assert cell.evaluations[0].train_loss is None
    assert cell.last.train_loss < cell.evaluations[1].train_loss
    assert cell.last.recalibrated_test_accuracy is not None
    assert cell.last.examples_per_second > 0
    assert cell.done is not None
    assert not cell.done.diverged
    assert cell.done.wall_seconds > cell.done.seconds == cell.last.seconds
    assert set(cell.last.layers) == {"norm1", "norm2", "norm3", "norm4"}
    assert not list((tmp_path / CELLS).glob("*.pt"))


def test_training_loss_is_the_mean_over_the_epoch_so_far(tmp_path, monkeypatch):
    seen, told = [], []

    def cross_entropy(logits, labels):
        loss = F.cross_entropy(logits, labels)
        if loss.requires_grad:  # a step, and not the rehearsal
            seen.append(loss.item())
        return loss

    class Keep(Silent):
        def step(self, config, step, loss, accuracy, speed):  # noqa: ARG002
            told.append(loss)

    functions = SimpleNamespace(cross_entropy=cross_entropy)
    monkeypatch.setattr("batchnorm.lab.training.F", functions)
    (config,) = run(tmp_path, arms=["batch"], progress=Keep(), evaluations_per_epoch=2)
    assert told[:10] == pytest.approx([sum(seen[:k]) / k for k in range(1, 11)])
    cell = read_cell(cell_path(tmp_path, config))
    assert cell.evaluations[1].train_loss == pytest.approx(sum(seen[:5]) / 5)
    assert cell.evaluations[2].train_loss == pytest.approx(sum(seen[:10]) / 10)
    assert cell.evaluations[3].train_loss == pytest.approx(sum(seen[10:15]) / 5)


@pytest.mark.parametrize(
    ("evaluations", "steps"),
    [(1, {10}), (2, {5, 10}), (3, {4, 7, 10}), (10, set(range(1, 11))), (50, set(range(1, 11)))],
)
def test_evaluation_steps(evaluations, steps):
    assert evaluation_steps(10, evaluations) == steps


def test_a_finished_cell_is_not_trained_again(tmp_path):
    run(tmp_path)
    before = {p: p.read_bytes() for p in (tmp_path / CELLS).iterdir()}

    def no_network():
        pytest.fail("nothing is left to train")

    for config in run(tmp_path):
        train_cell(config, no_network, None, tmp_path, Silent())
    assert {p: p.read_bytes() for p in (tmp_path / CELLS).iterdir()} == before


def test_arms_can_be_added_to_a_folder(tmp_path):
    run(tmp_path, arms=["none"])
    run(tmp_path, arms=["none", "layer"])
    assert read(tmp_path).arms == ["none", "layer"]


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    run(tmp_path, arms=["none"])
    before = contents(tmp_path)
    with pytest.raises(BatchNormError, match=r"learning_rate is 1\.0 there and 0\.5 here"):
        run(tmp_path, arms=["none"], learning_rate=0.5)
    assert contents(tmp_path) == before


def test_a_network_that_changed_under_its_name_is_refused(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, network="tiny:network", progress=Interrupts("batch", 7))
    original = tiny.Residual

    class Wider(original):
        def __init__(self):
            super().__init__()
            torch.nn.init.ones_(self.linear.weight)

    monkeypatch.setattr(tiny, "Residual", Wider)
    with pytest.raises(BatchNormError, match="is not the one that this folder's cells began with"):
        run(tmp_path, network="tiny:network")


def test_divergence_is_an_outcome(tmp_path):
    (config,) = run(tmp_path, arms=["none"], network="tiny:network", learning_rate=1e30)
    cell = read_cell(cell_path(tmp_path, config))
    assert cell.diverged
    assert cell.last.train_loss is None
    assert cell.last.step < 20
    run(tmp_path, arms=["none"], network="tiny:network", learning_rate=1e30)


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        ("constant", lambda _t: 0.5),
        ("cosine", lambda t: 0.25 * (1 + math.cos(math.pi * t / 20))),
    ],
)
def test_the_schedule_is_stepped_once_a_step(tmp_path, monkeypatch, schedule, rate):
    seen = []
    step = torch.optim.SGD.step

    def keep(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", keep)
    run(tmp_path, arms=["none"], learning_rate=0.5, schedule=schedule)
    assert seen == pytest.approx([rate(t) for t in range(20)])


def test_what_is_borrowed_from_torch_comes_back(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    torch.set_num_threads(1)
    try:
        run(tmp_path, arms=["none"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(2)
    assert torch.equal(torch.rand(1), expected)


def test_what_is_borrowed_comes_back_when_a_loader_raises(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_num_threads(1)  # the cell takes 2
    try:
        with pytest.raises(BatchNormError, match=r"a loader .Breaking. raised OSError"):
            run(tmp_path, arms=["batch"], data=Loaders(*tiny.breaking()))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(read_cell(next((tmp_path / CELLS).glob("*.jsonl"))).evaluations) == 1


def test_every_arm_is_rehearsed_before_the_first_is_trained(tmp_path):
    def network():
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.SyncBatchNorm(4), torch.nn.Flatten(),
            torch.nn.Linear(4 * 26 * 26, 10),
        )  # fmt: skip

    with pytest.raises(BatchNormError, match="batch-torch got a SyncBatchNorm"):
        run(tmp_path, arms=["none", "batch-torch"], network=network)
    assert not (tmp_path / CELLS).exists()


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    (config,) = run(tmp_path, arms=["batch"], train_images=65)
    assert read_cell(cell_path(tmp_path, config)).header.steps_per_epoch == 2


def test_a_loader_whose_length_lies_is_named(tmp_path):
    train, test = tiny.loaders()

    class Short:
        dataset = train.dataset

        def __len__(self):
            return 12

        def __iter__(self):
            return iter(train)

    with pytest.raises(BatchNormError, match="gave 10 batches in epoch 1 and its length says 12"):
        run(tmp_path, arms=["batch"], data=Loaders(Short(), test))


def test_a_network_that_learns_its_sizes(tmp_path):
    from batchnorm import BatchNorm

    def network():
        return torch.nn.Sequential(torch.nn.Flatten(), BatchNorm(), torch.nn.Linear(784, 10))

    (config,) = run(tmp_path, arms=["batch"], network=network)
    assert read_cell(cell_path(tmp_path, config)).done is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnext", "there is no network called 'resnext'"),
        ("tiny:raises", "the network function tiny:raises raised KeyError"),
        ("tiny:not_a_network", "returned a int and should return a torch.nn.Module"),
        ("tiny:without_norm", "has no batch-norm layer"),
    ],
)
def test_a_network_that_cannot_be_used_is_named(tmp_path, name, message):
    with pytest.raises(BatchNormError, match=message):
        run(tmp_path, network=name)


def test_lenet_is_the_notes():
    model = networks.lenet()
    assert sum(p.numel() for p in model.parameters()) == 61_706 + 452
    kinds = [type(m).__name__ for m in model]
    assert kinds == (
        ["Conv2d", "BatchNorm2d", "Sigmoid", "AvgPool2d"] * 2
        + ["Flatten"]
        + ["Linear", "BatchNorm1d", "Sigmoid"] * 2
        + ["Linear"]
    )


def test_xavier_fills_convolutions_and_linear_layers():
    torch.manual_seed(0)
    model = networks.lenet()
    bias = model.conv1.bias.clone()
    networks.initialize(model, "xavier-uniform")
    bound = math.sqrt(6 / (400 + 120))
    weight = model.linear1.weight.detach()
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(model.conv1.bias, bias)


def test_objects_of_one_name_are_not_taken_for_one_another(tmp_path):
    """Two functions called <lambda>, two sets of images: a finished record is not theirs."""

    def build(width):
        return lambda: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.BatchNorm1d(784), torch.nn.Linear(784, width),
            torch.nn.ReLU(), torch.nn.Linear(width, 10),
        )  # fmt: skip

    run(tmp_path, arms=["batch"], network=build(20))
    before = contents(tmp_path)
    run(tmp_path, arms=["batch"], network=build(20))
    with pytest.raises(BatchNormError, match=r"the network .*<lambda> is not the one"):
        run(tmp_path, arms=["batch"], network=build(21))
    images = tiny.as_images()
    other = dataclasses.replace(images, train_images=1 - images.train_images)
    with pytest.raises(BatchNormError, match="the data Images is not the one"):
        run(tmp_path, arms=["batch"], network=build(20), data=other)
    assert contents(tmp_path) == before


def test_loaders_of_other_data_are_not_taken_for_one_another(tmp_path):
    train, test = tiny.loaders()
    run(tmp_path, arms=["batch"], data=Loaders(train, test))
    run(tmp_path, arms=["batch"], data=Loaders(*tiny.loaders()))
    with pytest.raises(BatchNormError, match="the data Loaders is not the one"):
        run(tmp_path, arms=["batch"], data=Loaders(train, [(x + 1, y) for x, y in test]))


def test_a_loader_with_a_random_state_of_its_own_gives_every_arm_the_same_order(tmp_path):
    train, labels, test, test_labels = tiny.images()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(train, labels), 32, shuffle=True,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    data = Loaders(loader, [(test, test_labels)])
    run(tmp_path / "first", data=data, arms=["batch", "batch-torch"])
    ours, torchs = read(tmp_path / "first").cells
    assert ours.evaluations[1].train_loss == pytest.approx(
        torchs.evaluations[1].train_loss, rel=1e-5
    )
    run(tmp_path / "second", data=data, arms=["batch-torch"])
    (alone,) = read(tmp_path / "second").cells
    assert alone.last.test_loss == torchs.last.test_loss


def test_arms_see_the_same_noise_whatever_their_evaluations_draw(tmp_path, monkeypatch):
    seen = {}
    step = training._step

    def keep(cell, inputs, labels):
        seen.setdefault(cell.config.arm, []).append(inputs.clone())
        step(cell, inputs, labels)

    monkeypatch.setattr(training, "_step", keep)
    run(tmp_path, data=Loaders(*tiny.augmented()), arms=["none", "batch"])
    for one, other in zip(seen["none"], seen["batch"], strict=True):
        assert torch.equal(one, other)


def test_persistent_workers_go_on_where_training_is(tmp_path):
    data = tiny.augmented(num_workers=1, persistent_workers=True)
    run(tmp_path, data=Loaders(*data), arms=["batch"], epochs=1)
    (cell,) = read(tmp_path).cells
    assert cell.done is not None


def test_weights_that_are_not_finite_at_the_end_are_a_divergence(tmp_path, monkeypatch):
    """The last step's loss was finite; what it left is not."""
    step = torch.optim.SGD.step
    count = []

    def overflow(self, *args, **kwargs):
        step(self, *args, **kwargs)
        count.append(1)
        if len(count) == 20:
            self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.SGD, "step", overflow)
    run(tmp_path, arms=["none"])
    assert read(tmp_path).cells[0].diverged


def test_a_float64_network(tmp_path):
    images = Images(*tiny.double_images())
    for arm in ("batch", "batch-torch", "group", "layer", "none"):
        run(tmp_path, arms=[arm], network="tiny:double", data=images, epochs=1, learning_rate=0.1)
    assert len({cell.header.initial_weights for cell in read(tmp_path).cells}) == 1


def test_a_shared_norm_leaves_every_arm_the_same_start(tmp_path):
    def network():
        norm = torch.nn.BatchNorm1d(784)
        return torch.nn.Sequential(torch.nn.Flatten(), norm, norm, torch.nn.Linear(784, 10))

    run(tmp_path, arms=["none", "batch", "group"], network=network, epochs=1)
    assert len({cell.header.initial_weights for cell in read(tmp_path).cells}) == 1


def test_examples_per_second_count_what_was_trained_on(tmp_path):
    """A sampler that draws 64 of 320: the speed is of 64 an epoch."""
    from torch.utils.data import DataLoader, RandomSampler, TensorDataset

    train, labels, test, test_labels = tiny.images()
    images = TensorDataset(train, labels)
    sampler = RandomSampler(images, num_samples=64)
    data = Loaders(DataLoader(images, 32, sampler=sampler), [(test, test_labels)])
    run(tmp_path, data=data, arms=["batch"])
    record = read(tmp_path)
    (arm,) = summarize(record)
    (cell,) = record.cells
    assert arm.examples_per_second.mean == pytest.approx(128 / cell.last.seconds)


def test_held_out_images_are_not_trained_on_and_are_measured(tmp_path):
    images = tiny.as_images()
    options = {"held_out_images": 64, "train_images": 256, "test_images": 32}
    (config,) = run(tmp_path, arms=["batch"], epochs=1, **options)
    cell = read_cell(cell_path(tmp_path, config))
    assert cell.header.steps_per_epoch == 8
    assert cell.header.test_images == 32
    assert 0 <= cell.last.held_out_accuracy <= 1
    assert 0 <= cell.last.recalibrated_held_out_accuracy <= 1
    batches = TensorBatches(images, 32, None, held_out_images=64)
    trained = torch.cat([inputs for inputs, _ in batches.train(0, 0)])
    held_out = torch.cat([inputs for inputs, _ in batches.held_out()])
    assert torch.equal(held_out, images.train_images[-64:])
    assert len(trained) == 256
    assert not (trained[:, None] == held_out[None]).flatten(2).all(2).any()


def test_held_out_images_that_are_not_there_are_said(tmp_path):
    with pytest.raises(BatchNormError, match="300 should be trained on and 64 held out"):
        run(tmp_path, train_images=300, held_out_images=64)
    with pytest.raises(BatchNormError, match="the data are loaders"):
        run(tmp_path, data=Loaders(*tiny.loaders()), held_out_images=64)


def test_fields_that_were_added_change_no_name_of_a_record():
    """The hash that the default configuration had before there were held-out images."""
    plain = CellConfig(arm="batch")
    content = {k: v for k, v in dataclasses.asdict(plain).items() if k not in ADDED}
    before = json.dumps({"format": 1, **content}, sort_keys=True).encode()
    assert plain.hash == hashlib.sha256(before).hexdigest()[:16]
    assert dataclasses.replace(plain, held_out_images=1).hash != plain.hash
    assert dataclasses.replace(plain, test_images=1).hash != plain.hash
