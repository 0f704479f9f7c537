"""accumulate: micro-batches in lockstep beside the large batch, in float64, up to rounding."""

import copy
import threading

import pytest
import timm.layers
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNormError
from batchnorm.variants.accumulation import Joint, Recipes


class Block(nn.Module):
    """A residual block, with a norm that is called twice."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.shared = norm(4), norm(4)

    def forward(self, x):
        y = F.relu(self.norm(self.first(x)))
        y = self.shared(self.second(y))
        return F.relu(self.shared(y) + x)


def network(norm=nn.BatchNorm2d, act=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), act(), Block(norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False, momentum=None),
    ).double()  # fmt: skip


def batch(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 7, generator=generator, dtype=torch.float64) + 1
    return x, torch.randint(5, (count,), generator=generator)


def loss_of(total):
    def loss_fn(model, data):
        x, labels = data
        return F.cross_entropy(model(x), labels, reduction="sum") / total

    return loss_fn


def split(data, sizes):
    return list(zip(*(each.split(sizes) for each in data), strict=True))


def assert_the_large_batch(model, sizes, *, large=None, data=None, tolerance=1e-11):
    """Loss, every gradient and every running statistic."""
    large = copy.deepcopy(model) if large is None else large
    data = batch(sum(sizes)) if data is None else data
    loss_fn = loss_of(sum(sizes))
    loss = batchnorm.accumulate(model, loss_fn, split(data, sizes))
    exact = loss_fn(large, data)
    loss.backward()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=tolerance)
    for (name, mine), other in zip(model.named_parameters(), large.parameters(), strict=True):
        largest = max(1.0, other.grad.abs().max().item())
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=tolerance, atol=tolerance * largest, msg=name
        )
    for mine, other in zip(model.buffers(), large.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


KINDS = {
    "torch's": nn.BatchNorm2d,
    "ours": batchnorm.BatchNorm2d,
    "ours with an activation": batchnorm.BatchNormAct2d,
    "timm's": timm.layers.BatchNormAct2d,
}


@pytest.mark.parametrize("sizes", [[6], [2, 2, 2], [1, 4, 1]])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_is_the_large_batch(kind, sizes):
    assert_the_large_batch(network(kind), sizes)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5).filter(lambda s: sum(s) > 1))
def test_however_it_is_split(sizes):
    assert_the_large_batch(network(batchnorm.BatchNorm2d), sizes)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.LeakyReLU])
def test_fused_and_in_place(act):
    model = network(act=act)
    large = copy.deepcopy(model)
    batchnorm.convert(model, fuse=True)
    assert_the_large_batch(model, [2, 1, 3], large=large)
    if act is not nn.Sigmoid:
        assert_the_large_batch(network(act=lambda: act(inplace=True)), [3, 3])


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2)])
def test_fused_with_a_pooling(pool):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), pool, nn.Flatten(), nn.Linear(24, 5)
    ).double()
    large = copy.deepcopy(model)
    batchnorm.convert(model, fuse=True)
    assert "pooling" in str(batchnorm.changes(model))
    assert_the_large_batch(model, [2, 1, 3], large=large)


def test_a_resnet():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).double()
    data = torch.randn(6, 3, 64, 64, dtype=torch.float64), torch.randint(5, (6,))
    assert_the_large_batch(model, [2, 2, 2], data=data, tolerance=1e-8)


def test_several_steps_under_autocast_and_with_a_frozen_layer():
    model, large = (network(batchnorm.BatchNorm2d).float() for _ in range(2))
    for each in (model, large):
        batchnorm.freeze(each, "3.norm")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, large)]
    for seed in range(3):
        x, labels = batch(6, seed)
        data = x.float(), labels
        with torch.autocast("cpu", torch.bfloat16):
            loss = batchnorm.accumulate(model, loss_of(6), split(data, [2, 2, 2]))
            exact = loss_of(6)(large, data)
        for optimizer, value in zip(optimizers, (loss, exact), strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert model[1].running_mean.dtype == torch.float32
    assert model[1].num_batches_tracked == 3
    # half's digits over three steps
    torch.testing.assert_close(loss, exact, rtol=3e-2, atol=3e-2)


def test_what_one_after_another_does_is_something_else():
    """The oracle can fail: torch's usual accumulation is off by far more than rounding."""
    model, large = network(), network()
    data = batch(6)
    for part in split(data, [2, 2, 2]):
        loss_of(6)(model, part).backward()
    loss_of(6)(large, data).backward()
    assert (model[0].weight.grad - large[0].weight.grad).abs().max() > 1e-3


def test_gradcheck_of_the_joint_node():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    for activation in (None, "silu", "tanh"):
        inputs = [randn(3), randn(3), randn(2, 3, 4), randn(1, 3, 4), randn(3, 3, 2)]
        assert torch.autograd.gradcheck(
            lambda w, b, *xs, a=activation: Joint.apply(w, b, 1e-5, a, *xs)[:3], inputs
        )


def kept(function):
    """Bytes of the storages that a graph keeps, without the parameters'."""
    storages = {}

    original = Recipes.pack

    def pack(self, t):
        value = original(self, t)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipes, "pack", pack)
        graph = function()
    return sum(storages.values()), graph


def test_a_fused_layer_s_output_is_not_kept():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(
            layer
            for _ in range(4)
            for layer in (
                nn.Conv2d(8, 8, 3, padding=1, bias=False),
                batchnorm.BatchNormAct2d(8, activation="relu"),
            )
        )
    )
    x = torch.randn(8, 8, 32, 32)
    parts = [(each, None) for each in x.split(2)]

    def loss_fn(model, data):
        return model(data[0]).mean(dim=(1, 2, 3)).sum()

    size, graph = kept(lambda: batchnorm.accumulate(model, loss_fn, parts))
    large = x.numel() * 4
    # the input of the first convolution, and of each norm: what torch keeps are twice as many
    assert 5 * large <= size < 5.2 * large
    graph.backward()


def test_everything_is_given_back():
    model = network(batchnorm.BatchNorm2d)
    before = threading.active_count()
    batchnorm.accumulate(model, loss_of(4), split(batch(4), [2, 2])).backward()
    assert threading.active_count() == before
    assert all("normalize" not in vars(m) and "forward" not in vars(m) for m in model.modules())
    assert model[0].weight.grad is not None
    expected = copy.deepcopy(model).eval()(batch(2)[0])
    torch.testing.assert_close(model.eval()(batch(2)[0]), expected)
    # in evaluation the norms have nothing to join
    loss = batchnorm.accumulate(model, loss_of(4), split(batch(4), [2, 2]))
    assert loss.item() == pytest.approx(loss_of(4)(model, batch(4)).item())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        if x[0, 0] > 0:
            x = self.first(x)
        return self.second(x)


def ones(sign):
    return torch.full((2, 3), float(sign)) + torch.rand(2, 3) / 2


def checkpointed(reentrant):
    return lambda m, x: checkpoint(m, x, use_reentrant=reentrant).sum()


@pytest.mark.parametrize(
    ("model", "loss_fn", "batches", "message"),
    [
        (nn.BatchNorm1d(3), lambda m, x: m(x).sum(), [], "no micro-batch"),
        (Branching(), lambda m, x: m(x).sum(), [ones(1), ones(-1)], "'first', 'second' together"),
        (
            Branching(), lambda m, x: m(x).sum() if x[0, 0] > 0 else x.sum(), [ones(-1), ones(1)],
            "1 of 2 micro-batches came to 'first'",
        ),
        (nn.BatchNorm1d(3), lambda m, x: m(x).sum(), [ones(1)[:1]], "more than 1 value"),
        (nn.BatchNorm1d(3), checkpointed(False), [ones(1)], "inside a checkpoint"),
        (
            nn.BatchNorm1d(3), checkpointed(True), [ones(1).requires_grad_()] * 2,
            "inside a checkpoint",
        ),
        (
            batchnorm.BatchNorm1d(3),
            lambda m, x: m(x, mask=torch.ones(2, dtype=torch.bool)).sum(),
            [ones(1)], "called with a mask",
        ),
        (
            nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3)), lambda m, x: m(x).sum(),
            [ones(1)], "synchronised over processes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_refused(model, loss_fn, batches, message):
    with pytest.raises(BatchNormError, match=message):
        batchnorm.accumulate(model, loss_fn, batches)
    assert all("forward" not in vars(m) for m in model.modules())


def test_an_error_in_one_micro_batch_is_raised_and_ends_the_others():
    def loss_fn(model, data):
        y = model(data[0])
        if len(data[0]) == 1:
            raise ZeroDivisionError("mine")
        return y.sum()

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="mine"):
        batchnorm.accumulate(network(), loss_fn, split(batch(6), [2, 1, 3]))
    assert threading.active_count() == before


def test_nothing_to_join_is_said(caplog):
    model = nn.Linear(3, 1)
    batchnorm.accumulate(model, lambda m, x: m(x).sum(), [ones(1), ones(1)]).backward()
    assert "no norm in the model takes" in caplog.text
    assert model.weight.grad is not None
