"""What readers of the family found: each of these was wrong once."""

import signal
import threading
import time

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import BatchNormError
from processes import interruptible  # noqa: F401  # a fixture


class Viewed(nn.Module):
    """What follows the norm keeps a view of what it gives."""

    def __init__(self, view):
        super().__init__()
        self.norm = batchnorm.BatchNorm1d(4)
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.view = view

    def forward(self, x):
        return self.view(self.norm(x)) * self.weight


@pytest.mark.parametrize(
    "view", [lambda y: y.transpose(1, 2), lambda y: y[:, :, :1], lambda y: y.flatten(0, 1)[:4]]
)
def test_accumulate_keeps_views_of_what_a_norm_gives(view):
    torch.manual_seed(0)
    model = Viewed(view).double()
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    parts = x.split(3)
    if view(x).shape[0] == 4:  # of every micro-batch the first rows: joined by hand
        y = model.norm(x)
        (view(y[:3]) * model.weight).square().sum().add(
            (view(y[3:]) * model.weight).square().sum()
        ).backward()
    else:
        model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    batchnorm.accumulate(model, lambda m, batch: m(batch).square().sum(), parts).backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-10)


def test_accumulate_through_flatten():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3)).double()
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    batchnorm.accumulate(model, lambda m, batch: m(batch).square().sum(), x.split(2)).backward()
    for parameter, grad in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-10, atol=1e-10)


def share(model, batch):
    return model(batch).square().sum()


def frozen_but_moving():
    return batchnorm.freeze(nn.Sequential(batchnorm.BatchNorm1d(3)), use=True, update=True)


@pytest.mark.parametrize(
    ("model", "loss", "said"),
    [
        (nn.Sequential(batchnorm.GhostBatchNorm(3)), share, "'0' is a GhostBatchNorm"),
        (nn.Sequential(batchnorm.RenormBatchNorm(3)), share, "'0' is a RenormBatchNorm"),
        (frozen_but_moving(), share, "'0' is frozen, and its statistics move"),
        (nn.Sequential(batchnorm.BatchNorm1d(3)), lambda *_: None, "loss_fn gave NoneType"),
        (nn.Sequential(batchnorm.BatchNorm1d(3)), lambda m, b: m(b), "loss_fn gave shape"),
        (nn.Sequential(batchnorm.BatchNorm1d(4)), share, "got 3 channels"),
    ],
)
def test_what_accumulate_does_not_take_is_said(model, loss, said):
    with pytest.raises(BatchNormError, match=said):
        batchnorm.accumulate(model, loss, torch.randn(8, 3).split(4))
    if "channels" in said:
        assert int(model[0].num_batches_tracked) == 0


def test_accumulate_in_an_accumulate_is_said():
    model, x = nn.Sequential(batchnorm.BatchNorm1d(3)), torch.randn(8, 3)

    def nested(model, batch):
        return batchnorm.accumulate(model, share, batch.split(2))

    with pytest.raises(BatchNormError, match="in an accumulate already"):
        batchnorm.accumulate(model, nested, x.split(4))
    assert not vars(model[0]).keys() & {"normalize", "forward"}


class Slow(nn.Module):
    """Ctrl-C arrives in the first of its passes."""

    def __init__(self):
        super().__init__()
        self.interrupt = [signal.SIGINT]

    def forward(self, x):
        if self.interrupt:
            signal.pthread_kill(threading.main_thread().ident, self.interrupt.pop())
        time.sleep(0.3)
        return x


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_accumulate_leaves_no_thread_behind():
    norms = [batchnorm.BatchNorm1d(3) for _ in range(3)]
    model = nn.Sequential(norms[0], Slow(), norms[1], norms[2])
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        batchnorm.accumulate(model, share, torch.randn(8, 3).split(2))
    assert threading.active_count() == before
    seen = [int(norm.num_batches_tracked) for norm in norms]
    time.sleep(0.5)
    assert seen == [int(norm.num_batches_tracked) for norm in norms]
    assert seen[2] == 0


def test_one_update_in_another_is_said_and_the_layer_stays():
    layer = batchnorm.BatchNorm1d(3)
    mean, x = layer.running_mean, torch.randn(8, 3) * 2 + 5
    with (
        batchnorm.one_update(layer),
        pytest.raises(BatchNormError, match="is on for '' already"),
        batchnorm.one_update(layer),
    ):
        pass
    assert layer.running_mean is mean
    assert layer.momentum == 0.1
    with batchnorm.one_update(layer):
        layer(x)
    torch.testing.assert_close(mean, 0.1 * x.mean(0))


def test_one_value_inside_one_update_takes_the_running_statistics():
    layer, one = batchnorm.BatchNorm1d(3), torch.ones(1, 3)
    batchnorm.single_values(layer)
    outside = layer(one)
    with batchnorm.one_update(layer):
        assert torch.equal(layer(one), outside)
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize(
    "layer",
    [
        batchnorm.RenormBatchNorm(3),
        batchnorm.EstimatorBatchNorm(3, average="cumulative"),
        frozen_but_moving(),
    ],
)
def test_a_rule_of_its_own_is_refused_by_one_update(layer):
    with pytest.raises(BatchNormError, match="by a rule of its own"), batchnorm.one_update(layer):
        pass


def test_a_convert_that_fails_leaves_the_fused_model():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    batchnorm.convert(model, fuse=True)
    kind = type(model)
    with pytest.raises(BatchNormError, match="ghost_size=0"):
        batchnorm.convert(model, to="ghost", ghost_size=0)
    assert type(model) is kind


def test_a_momentum_that_takes_nothing_cannot_be_debiased():
    with pytest.raises(BatchNormError, match="more than 0 and at most 1"):
        batchnorm.EstimatorBatchNorm(3, momentum=0.0, average="debiased")


@pytest.mark.parametrize("name", ["train", "keys", "a.b"])
def test_a_domain_that_cannot_be_named_so_is_said(name):
    with pytest.raises(BatchNormError, match="got a domain"):
        batchnorm.SplitBatchNorm(3, domains=("main", name))


@pytest.mark.parametrize(
    "layer",
    [batchnorm.EstimatorBatchNorm(3, unbiased=False), batchnorm.RenormBatchNorm(3)],
)
def test_a_biased_variance_loses_no_second_factor(layer):
    layer(torch.randn(8, 3))
    with pytest.raises(BatchNormError, match="biased already"):
        batchnorm.to_keras(layer, count=8)


def test_a_nan_beneath_the_mask_reaches_no_gradient_in_evaluation():
    layer, x = batchnorm.BatchNorm1d(3).eval(), torch.randn(8, 3)
    x[0] = torch.nan
    keep = torch.arange(8) > 0
    layer(x, mask=keep).sum().backward()
    assert layer.weight.grad.isfinite().all()
