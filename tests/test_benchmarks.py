"""benchmarks/demo.py, memory.py, networks.py and stacked.py: what they count and compare; nothing is timed."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import batchnorm
import demo
import memory
import networks
import stacked


def test_the_peak_is_counted_to_the_byte():
    def step():
        a = torch.empty(1024, 1024)
        b = torch.empty(256, 1024)
        del a
        c = torch.empty(512, 1024)
        del b, c

    assert memory._allocated(step) == 4 * 1024 * (1024 + 256)


def test_the_resident_set_rises_by_what_is_touched():
    risen = memory._resident(lambda: torch.ones(64, 1024, 1024))
    assert risen >= 255 * 2**20  # 256 MiB, and pages that were there already


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
def test_a_step_allocates_no_more_than_torch(monkeypatch, in_place):
    build = memory.Large if in_place else memory.OutOfPlace
    workload = memory.Workload(build, (4, 64, 28, 28), differentiated=True)
    monkeypatch.setitem(memory.WORKLOADS, "small", workload)
    peaks = [memory.measure("small", arm) for arm in memory.ARMS]
    assert peaks[0].statistics == 16 * 64
    assert not memory.above(peaks)
    y = 4 * 4 * 64 * 28 * 28
    if not in_place:  # what torch keeps between the norm and the activation is not there
        assert peaks[2].allocated <= peaks[0].allocated - y + peaks[0].statistics


def test_more_than_torch_is_found():
    peaks = [
        memory.Peak("w", arm, allocated, None, statistics=16)
        for arm, allocated in zip(memory.ARMS, (100, 117, 116), strict=True)
    ]
    assert [peak.arm for peak in memory.above(peaks)] == ["convert"]
    assert "| w | convert(fuse=True) | 0.0 | 1.16 |  |" in memory.table(peaks)


def test_the_arms_begin_with_the_same_weights():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    theirs, ours, fused = networks.arms_of(model).values()
    assert theirs is model
    assert type(model[1]) is nn.BatchNorm2d
    assert type(ours[1]) is batchnorm.BatchNorm2d
    assert "with relu" in str(batchnorm.changes(fused))  # in the parent's forward
    for other in (ours, fused):
        weights = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) and a is not b for a, b in weights)


def test_every_arm_trains():
    torch.manual_seed(0)
    x, labels = torch.randn(4, 3, 8, 8), torch.randint(2, (4,))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(4 * 36, 2),
    )  # fmt: skip
    arms = networks.arms_of(model)
    before = [p.clone() for p in model.parameters()]
    for arm in arms.values():
        assert networks._step(arm.train(), x, labels)() > 0
    first, *others = [list(arm.parameters()) for arm in arms.values()]
    assert not all(torch.equal(a, b) for a, b in zip(first, before, strict=True))
    for other in others:
        torch.testing.assert_close(other, first)


def test_ratios_round_by_round():
    seconds = {"torch.nn": [2.0, 3.0, 6.0], "convert": [1.0, 2.0, 2.0]}
    seconds["convert(fuse=True)"] = [1.0, 1.0, 1.0]
    row = networks.Row("n", "NCHW", "1 × 8²", 1.2, seconds)
    assert row.ratios("convert") == [2.0, 1.5, 3.0]
    assert row.cells() == [
        "n", "1 × 8²", "NCHW", "3000", "2.00 (1.50 to 3.00)", "3.00 (2.00 to 6.00)", "1.20",
    ]  # fmt: skip


def test_every_round_begins_with_another_arm():
    order = []
    ways = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
    assert networks.measure(ways, 2, 2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert "".join(order) == "ab" + "aabb" + "bbaa"


@pytest.mark.parametrize("way", ["grouped", "vmapped"])
def test_seeds_that_are_trained_at_once_have_the_losses_of_each_alone(way):
    steps = [(x.double(), y) for x, y in stacked.batches(seeds=3, steps=4)]

    def models():
        return [stacked.fitting.start("lenet", "batch", seed).double().train() for seed in range(3)]

    with torch.random.fork_rng([]):
        alone = stacked.plain(models(), steps)
        found = stacked.WAYS[way](models(), steps)
    assert alone.shape == (3, 4)
    # in float64 what is left after four steps is rounding; another seed's order is far away
    torch.testing.assert_close(found.float(), alone, rtol=1e-6, atol=1e-6)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


def test_the_demo_runs_with_both_layers_in_turn(monkeypatch, tmp_path, capsys):
    calls = []

    def run(command, **_options):
        calls.append(command)

    page = tmp_path / "page.md"
    page.write_text("<!-- demo -->\nold\n<!-- /demo -->\n")
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    seconds = iter([0, 8, 10, 16, 20, 25, 30, 40])  # starts and ends: 8, 6; 5, 10
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr("sys.argv", ["demo.py", "--rounds", "2", "--markdown", str(page)])
    demo.main()
    arms = [call[call.index("--arms") + 1] for call in calls]
    assert arms == ["none,batch-torch", "none,batch", "none,batch", "none,batch-torch"]
    assert "| 10 | 9.0 | 5.5 | 0.62 (0.50 to 0.75) | 0.75 |" in page.read_text()
    assert "batch: 6.0 s" in capsys.readouterr().out
