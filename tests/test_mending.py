"""check(fix=True): what it mends goes on working, and what it cannot do safely it leaves and says."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import batchnorm
import rules as cases
from batchnorm import BatchNormError
from batchnorm.checks.checking import Examining
from batchnorm.model.weights import Checkpoint
from commands import folder, invoke_unwrapped  # noqa: F401  # a fixture


def images(count=4):
    return [
        torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(count)
    ]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip
    return cases.trained(model, images())


def test_a_checkpoint_keeps_the_bias_that_its_model_has(tmp_path):
    model = network()
    with torch.no_grad():
        model[0].bias += 3
    model = cases.trained(model, images())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    expected = model(images()[0])
    read = Checkpoint(tmp_path / "w.pt")
    read.load_into(model)
    examining = Examining(model, images(), None, None, "note", None, None, None)
    found = examining.mended(into_a_file=True)
    read.write(tmp_path / "m.pt", model)
    again = network()
    again.load_state_dict(torch.load(tmp_path / "m.pt"))
    torch.testing.assert_close(again(images()[0]), expected, rtol=1e-5, atol=1e-5)
    assert any("BN014 1: a checkpoint does not hold it" in line for line in found.left)
    assert "BN014" in {f.rule for f in found}


def test_a_checkpoint_is_not_written_of_a_model_that_lost_a_part(tmp_path):
    model = network()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    read = Checkpoint(tmp_path / "w.pt")
    read.load_into(model)
    model[0].bias = None
    with pytest.raises(BatchNormError, match=r"the model has lost 0\.bias"):
        read.write(tmp_path / "m.pt", model)
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.usefixtures("folder")
def test_what_a_file_cannot_hold_is_still_found():
    status, said = invoke_unwrapped("check", "faulty:build", "--fix", "--to", "m.pt")
    assert status == 3
    assert "left: BN011 1: a checkpoint does not hold it" in said
    assert "fixed:" not in said


def test_statistics_that_classify_better_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)).eval()
    x = torch.randn(64, 2, 1, 1) + 3
    x[:, 0] += 4 * (torch.arange(64) % 2)[:, None, None]
    model[2].weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    model[2].bias.data = torch.tensor([5.0, -5.0])
    model[1].num_batches_tracked.fill_(1000)
    loader = list(zip(x.split(32), (torch.arange(64) % 2).split(32), strict=True))
    found = batchnorm.check(model, loader, level="note", fix=True)
    assert not found.fixed
    assert not model[1].running_mean.any()


def test_only_the_layer_that_is_named_is_recalibrated():
    model = network()
    model[4].running_var[0] = -1
    before = copy.deepcopy(model[1].state_dict())
    found = batchnorm.check(model, [x + 0.3 for x in images()], fix=True, select="BN008")
    assert any(line == "BN008: 4 recalibrated on the loader's data" for line in found.fixed)
    torch.testing.assert_close(model[1].state_dict(), before, rtol=0, atol=0)
    assert int(model[4].num_batches_tracked) == 4
    assert (model[4].running_var > 0).all()


@pytest.mark.parametrize(("samples", "read"), [(32, 2 + 2 + 2), (None, 8 + 625 + 8)])
def test_no_more_is_read_than_was_said_of_a_loader_without_end(samples, read):
    model, count = network(), [0]
    model[4].running_mean += 2

    class Endless:
        def __iter__(self):
            while True:
                count[0] += 1
                yield images(1)[0]

    found = batchnorm.check(model, Endless(), fix=True, samples=samples)
    assert any("recalibrated" in line for line in found.fixed)
    assert count[0] == read


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return (self.norm(y), self.head(y)) if self.training else self.norm(y)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, x):
        if x.mean() > 100:
            return x
        return self.block(x) + self.block[0].bias.view(1, -1, 1, 1)


def hooked():
    model = network()
    model[0].register_forward_hook(lambda *_: None)
    model[3].bias = None
    return model


@pytest.mark.parametrize("build", [Auxiliary, Untraceable, hooked])
def test_a_bias_that_somebody_may_use_is_left(build):
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    found = batchnorm.check(model, select="BN014", level="note", fix=True)
    assert [f.rule for f in found] == ["BN014"]
    assert "cannot be seen from the graph in both modes" in found.left[0]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_model_that_never_ran_keeps_the_statistics_of_its_start():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    found = batchnorm.check(model, select="BN014", level="note", fix=True)
    assert found.fixed
    assert model[0].bias is None
    assert not model[1].running_mean.any()


def test_that_old_checkpoints_do_not_fit_is_said():
    model = network()
    old = copy.deepcopy(model.state_dict())
    found = batchnorm.check(model, select="BN014", level="note", fix=True)
    assert any("checkpoints made before hold 0.bias" in line for line in found.fixed)
    with pytest.raises(RuntimeError, match=r"0\.bias"):
        model.load_state_dict(old)


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ],
    ids=["sgd", "adamw", "foreach", "fused"],
)
def test_an_optimizer_that_has_stepped_steps_on_in_float(build):
    model, x = network().bfloat16().train(), images()[0].bfloat16()
    optimizer = build(model.parameters())
    for k in range(2):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if k == 0:
            batchnorm.check(model, None, optimizer, select="BN020", fix=True)
    state = optimizer.state[model[1].weight]
    assert {v.dtype for v in state.values() if isinstance(v, torch.Tensor)} == {torch.float32}
    assert model[1].weight.isfinite().all()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    ids=["lambda", "plateau"],
)
def test_a_scheduler_steps_on(schedule):
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
    scheduler = schedule(optimizer)
    found = batchnorm.check(model, None, optimizer, select="BN023", level="note", fix=True)
    assert len(optimizer.param_groups) == 1
    assert "a scheduler has a rate for each group" in found.left[0]
    for loss in (1.0, 2.0):
        optimizer.step()
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[loss] * plateau)


def test_names_go_with_their_parameters():
    model = network().train()
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.1, weight_decay=1e-2)
    batchnorm.check(model, None, optimizer, select=["BN014", "BN023"], level="note", fix=True)
    groups = optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [1e-2, 0.0]
    assert groups[0]["param_names"] == ["0.weight", "3.weight", "6.weight", "6.bias"]
    assert groups[1]["param_names"] == ["1.weight", "1.bias", "4.weight", "4.bias"]
    own = dict(model.named_parameters())
    for group in groups:
        for parameter, name in zip(group["params"], group["param_names"], strict=True):
            assert parameter is own[name]
