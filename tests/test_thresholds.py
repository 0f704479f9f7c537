"""Each threshold of a rule: just below it is silent, just above it found; its numbers computed anew."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import batchnorm
import rules as cases
from batchnorm.checks.findings import Level
from batchnorm.checks.probing import standardized_gap
from batchnorm.model.recalibration import Moments


def levels(model, loader=None, *, select):
    found = batchnorm.check(model, loader, select=select, level="note")
    return [f.level for f in found]


@pytest.mark.parametrize(("size", "count"), [(15, 2), (16, 0)])
def test_bn007_below_16_values(size, count):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.BatchNorm1d(192)).train()
    data = [cases.images(size, seed=k) for k in range(2)]
    assert levels(model, data, select="BN007") == [Level.WARNING] * count


@pytest.mark.parametrize(("shift", "level"), [(0.49, Level.NOTE), (0.51, Level.WARNING)])
def test_bn015_half_a_deviation_apart(shift, level):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) + self.norm(x + shift)

    x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).repeat(8, 1)  # variance 1
    (found,) = batchnorm.check(Twice().eval(), [x], select="BN015", level="note")
    assert found.level is level
    assert found.numbers["shift"] == pytest.approx(shift, rel=1e-5)


@pytest.mark.parametrize(("steps", "found"), [(15, False), (17, True)])
def test_bn018_from_a_twentieth_of_the_steps(steps, found):
    x = torch.randn(16, 3, 20, generator=torch.Generator().manual_seed(0))
    x[0, :, -steps - 1 :] = 0  # repeats its last step so often: of 320
    assert bool(levels(nn.BatchNorm1d(3), [x], select="BN018")) == found


@pytest.mark.parametrize(
    ("mean", "found"),
    [(99, []), (101, [Level.NOTE]), (999, [Level.NOTE]), (1001, [Level.WARNING])],
)
def test_bn021_means_in_deviations(mean, found):
    x = torch.tensor([[-1.0], [1.0]]).repeat(8, 1) + mean
    assert levels(nn.BatchNorm1d(1), [x], select="BN021") == found


@pytest.mark.parametrize(("dead", "level"), [(4, Level.NOTE), (5, Level.WARNING)])
def test_bn022_half_of_the_channels(dead, level):
    model = nn.BatchNorm2d(10)
    model.running_var[:dead] = 0
    assert levels(model, select="BN022") == [level]


@pytest.mark.parametrize(("batches", "found"), [(28, True), (29, False)])
def test_bn012_a_twentieth_of_the_initial_values(batches, found):
    model = cases.network()
    cases.shifted(model)
    model[1].num_batches_tracked.fill_(batches)
    told = batchnorm.check(model, cases.loader(), select="BN012")
    assert [f.layer for f in told] == ["1"] * found
    if found:
        assert told[0].numbers["share"] == pytest.approx(0.9**28)


@pytest.mark.parametrize(("averages", "found"), [(0, False), (1, False), (2, True)])
def test_bn028_from_two_averages_on(averages, found):
    average = AveragedModel(cases.network())
    for seed in range(averages):
        average.update_parameters(cases.network(seed))
    assert bool(levels(average, select="BN028")) == found


def distributed(model, *, broadcast):
    """DistributedDataParallel as it stands in one of several processes."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module, wrapped.broadcast_buffers = model, broadcast
    return wrapped


@pytest.mark.parametrize("broadcast", [True, False])
def test_bn025_buffers_that_are_not_broadcast(broadcast):
    (*found,) = batchnorm.check(distributed(cases.network(), broadcast=broadcast), select="BN025")
    assert bool(found) == (not broadcast)
    synced = batchnorm.convert(cases.network(), to="sync")
    assert not batchnorm.check(distributed(synced, broadcast=False), select="BN025")


def loaders(count):
    data = TensorDataset(cases.images(count))
    sampler = BatchSampler(SequentialSampler(data), 16, drop_last=False)
    return DataLoader(data, 16), DataLoader(data, batch_sampler=sampler)


@pytest.mark.parametrize("place", [0, 1], ids=["batch size", "batch sampler"])
@pytest.mark.parametrize(("count", "found"), [(16 * 20, False), (16 * 20 + 1, True)])
def test_bn006_a_last_batch_of_one(place, count, found):
    """Behind the batches that are read."""
    model = cases.head(16, 48).model
    told = batchnorm.check(model, loaders(count)[place], select="BN006")
    assert [f.numbers for f in told] == [{"least": 1}] * found


def test_bn006_a_batch_of_one_in_the_middle_of_a_list():
    model, x = cases.head(16, 48).model, cases.images(16)
    told = batchnorm.check(model, [x] * 20 + [x[:1]] + [x] * 2, select="BN006")
    assert [f.numbers for f in told] == [{"least": 1}]


def test_bn006_one_value_in_a_training():
    model = cases.head(16, 48).model
    with batchnorm.watch(select="BN006") as watching:
        with pytest.raises(ValueError, match="more than 1 value"):
            model(cases.images(1))
        model(cases.images(16))
    (found,) = watching.findings()
    assert [(f.layer, f.numbers) for f in found] == [("2", {"values": 1})]


def test_the_standardized_gap_is_its_formula():
    layer = nn.BatchNorm1d(2, eps=0.5).double()
    layer.running_mean[:] = torch.tensor([1.0, -2.0])
    layer.running_var[:] = torch.tensor([3.5, 1.5])
    fresh = Moments()
    fresh.merge(torch.tensor([3.0, -2.0]), torch.tensor([15.5, 1.5]) * 9 / 10, 10)
    # (2² / 4 + ln(√16 / √4)²  +  0 + 0) / 2
    expected = ((1 + torch.tensor(2.0).log() ** 2) / 2).sqrt()
    assert standardized_gap(layer, fresh) == pytest.approx(expected.item(), rel=1e-6)


def test_what_chance_does_to_a_small_batch_is_no_drift():
    """8 samples of the very distribution: the gap is √(1.5 / 8), and chance is all of it."""
    torch.manual_seed(0)
    model = nn.BatchNorm1d(64, momentum=0.001)
    model.num_batches_tracked.fill_(10_000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with batchnorm.watch(every=1) as watching:
        for _ in range(4):
            model(torch.randn(8, 64)).sum().backward()
            optimizer.step()
    (root,) = watching._roots
    (drift,) = root.training().drift.values()
    assert drift < 0.25 < (1.5 / 8) ** 0.5
