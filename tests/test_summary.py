"""summary: what batch norm a model has, what stands around it, what it costs."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import batchnorm


class Block(nn.Module):
    """A shared norm, a residual, a norm that is never called, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.last = batchnorm.BatchNorm2d(3, track_running_stats=False)
        self.idle = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        y = self.norm(self.conv(y))
        return self.dropout(self.last(y + x))


def test_neighbours_calls_values_and_state():
    model = Block()
    norm, last, idle = batchnorm.summary(model, torch.randn(2, 3, 4, 5))
    assert (norm.layer, norm.kind, norm.channels, norm.mode) == ("norm", "BatchNorm2d", 3, "train")
    assert (norm.before, norm.behind) == ("conv", "relu, add")
    assert (last.before, last.behind) == ("add", "dropout")
    assert (norm.calls, norm.values) == (2, 40)
    assert idle.health == ("never trained", "not called")
    assert (idle.before, idle.calls, idle.values, idle.time) == ("?", 0, None, 0.0)
    assert last.health == ("no running statistics",)


def test_nothing_changes():
    model = Block().train()
    model.dropout.eval()
    state, seed = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    batchnorm.summary(model, torch.randn(2, 3, 4, 5, generator=torch.Generator()))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert [m.training for m in (model, model.norm, model.dropout)] == [True, True, False]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_raises_is_left_as_it_was():
    model = Block()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        batchnorm.summary(model, torch.randn(2, 4, 4, 5))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_drift_is_the_distance_of_the_means():
    model = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12))
    model[0].running_mean.copy_(torch.tensor([1.0, 2.0]))
    model[0].running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([[3.0, 2.0], [7.0, 6.0]])  # means 5 and 4: (4 / 2)² and (2 / 1)²
    (row,) = batchnorm.summary(model, x)
    assert row.drift == pytest.approx(2.0)


def test_memory_is_what_autograd_keeps():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    (row,) = batchnorm.summary(model, torch.randn(2, 3, 16, 16))
    # kept: the input, 6 KB a channel of 3; the convolution's output, which the norm keeps, with
    # mean and 1 / std; the ReLU's output
    values = 2 * 16 * 16 * 4
    norm = 8 * values + 2 * 8 * 4
    assert row.memory == pytest.approx(norm / (3 * values + norm + 8 * values), rel=1e-3)
    assert 0 < row.time < 1


HEALTH = {
    "few values": (lambda _: None, "few values per channel: 8"),
    "constant": (lambda m: m.running_var[:2].fill_(1e-9), "running variance below eps in 2 of 3"),
    "not finite": (lambda m: m.running_mean.fill_(float("nan")), "not finite"),
    "a weight of 0": (lambda m: m.weight.data[1:].zero_(), "weight 0 in 2 of 3"),
    "half": (lambda m: m.bfloat16(), "statistics in bfloat16"),
}


@pytest.mark.parametrize(("spoil", "health"), HEALTH.values(), ids=HEALTH)
def test_what_is_odd_is_said(spoil, health):
    model = nn.BatchNorm2d(3)
    model.running_mean.add_(0.5)
    spoil(model)
    (row,) = batchnorm.summary(model, torch.randn(2, 3, 2, 2, dtype=model.weight.dtype))
    assert any(health in each for each in row.health)


def test_kinds_and_modes():
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3), torchvision.ops.FrozenBatchNorm2d(3),
        batchnorm.BatchNorm(), nn.SyncBatchNorm(3),
    )  # fmt: skip
    batchnorm.freeze(model, "0")
    model[1].eval()
    found = batchnorm.summary(model)
    assert [row.mode for row in found] == ["frozen", "eval", "train", "train", "constant"]
    assert [row.channels for row in found] == [3, 3, None, 3, 3]
    assert "has not learned its size" in found[2].health


def test_it_prints_what_differs_and_what_is_the_same():
    model = torchvision.models.resnet18(weights=None)
    found = batchnorm.summary(model, torch.randn(2, 3, 64, 64))
    text = str(found)
    assert text.startswith("ResNet: 20 batch-norm layers, 20 with something odd, ")
    assert "% of the memory kept for backward" in text
    assert "every layer: kind BatchNorm2d, mode train, calls 1" in text
    assert list(found.columns) == [
        "layer",
        "channels",
        "between",
        "values",
        "drift",
        "time",
        "memory",
        "health",
    ]
    assert found.columns["between"][:3] == ["conv1 → relu", "conv1 → relu", "conv2 → add"]
    assert 0.3 < sum(row.memory for row in found) < 0.7
    assert len(found[2:4]) == 2


def test_no_norm_and_no_trace():
    assert "no batch norm" in str(batchnorm.summary(nn.Linear(2, 2), torch.randn(1, 2)))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    found = batchnorm.summary(Branching())
    assert "could not be traced: the model" in str(found)
    assert found[0].before == "?"
