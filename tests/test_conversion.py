"""Other layers in the place of batch norm: the same objects inside, and an account."""

import copy

import pytest
import timm.layers
import torch
import torchvision
from torch import nn

import batchnorm
from batchnorm import BatchNormError
from batchnorm.model.conversion import KINDS


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8, eps=1e-3, momentum=0.3), nn.ReLU(), norm(8))
    for i in (1, 3):
        nn.init.uniform_(model[i].weight, 0.5, 2)
        nn.init.normal_(model[i].bias)
        model[i].running_mean.normal_()
        model[i].running_var.uniform_(0.5, 2)
    return model


def images():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_torchs_to_ours_and_back_keeps_numbers_and_objects(name, training):
    shape = {"BatchNorm1d": (4, 3), "BatchNorm2d": (4, 3, 5, 5), "BatchNorm3d": (2, 3, 3, 3, 3)}
    model = nn.Sequential(getattr(nn, name)(3, momentum=None)).train(training)
    twin = copy.deepcopy(model)
    held, tensors = model[0], [*model.parameters(), *model.buffers()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    called = []
    model[0].register_forward_hook(lambda *_: called.append(1))
    assert batchnorm.convert(model) is model
    assert type(model[0]) is getattr(batchnorm, name)
    assert model[0] is held
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    x = torch.randn(shape[name])
    torch.testing.assert_close(model(x), twin(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-6)
    model(x).square().sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert called
    assert type(batchnorm.convert(model, "torch")[0]) is getattr(nn, name)


def test_to_sync_and_back():
    model = network().eval()
    expected = model(images())
    weight = model[1].weight
    batchnorm.convert(model, "sync")
    assert type(model[1]) is batchnorm.SyncBatchNorm
    assert model[1].weight is weight
    assert not model[1].training
    torch.testing.assert_close(model(images()), expected)
    batchnorm.convert(model)
    assert type(model[1]) is batchnorm.BatchNorm2d
    torch.testing.assert_close(model(images()), expected)
    model = nn.Sequential(batchnorm.BatchNorm(8))
    model(torch.randn(2, 8, 3))
    batchnorm.convert(model, "torch")
    reason = str(batchnorm.changes(model))
    assert "of any rank, and torch.nn has a layer for each" in reason


@pytest.mark.parametrize(("to", "groups"), [("group", 2), ("layer", 1), ("instance", 8)])
def test_to_statistics_of_each_sample(to, groups):
    model = network().eval()
    weight, x = model[3].weight, model[2](model[1](model[0](images())))
    batchnorm.convert(model, to)
    expected = nn.functional.group_norm(x, groups, weight, model[3].bias, 1e-5)
    torch.testing.assert_close(model[3](x), expected)
    assert model[3].weight is weight
    assert not model[3].training
    assert model[1].eps == 1e-3


def test_to_none():
    model = batchnorm.convert(network(), "none")
    assert type(model[1]) is type(model[3]) is nn.Identity


def test_hooks_of_a_layer_that_is_replaced_are_called():
    model, called = network(), []
    model[1].register_forward_hook(lambda *_: called.append("after"))
    model[1].register_forward_pre_hook(lambda *_: called.append("before"))
    batchnorm.convert(model, "group")(images())
    assert called == ["before", "after"]


def test_a_layer_that_is_shared_stays_shared():
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)})
    for to in ("ours", "torch", "sync", "group"):
        batchnorm.convert(model, to)
        assert model["a"] is model["b"][0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Sigmoid])
@pytest.mark.parametrize("drop", [None, nn.Dropout])
def test_timms_norm_with_an_activation_keeps_it(act, drop, training):
    model = nn.Sequential(timm.layers.BatchNormAct2d(3, act_layer=act, drop_layer=drop))
    twin = copy.deepcopy(model)
    batchnorm.convert(model)
    assert isinstance(model[0], timm.layers.BatchNormAct2d)
    assert isinstance(model[0], batchnorm.layers.Forward)
    pickled = copy.deepcopy(model)
    for each in (model, pickled):
        other = copy.deepcopy(twin)
        torch.manual_seed(1)
        y = each.train(training)(images())
        torch.manual_seed(1)
        torch.testing.assert_close(y, other.train(training)(images()))
        torch.testing.assert_close(each.state_dict(), other.state_dict())
    batchnorm.convert(model, "torch")
    assert type(model[0]) is timm.layers.BatchNormAct2d


class FrozenBatchNorm2d(nn.Module):
    """As in detectron2: everything is a buffer."""

    def __init__(self, num_features, eps=1e-4):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


FROZEN = {
    "detectron2's": FrozenBatchNorm2d,
    "torchvision's": torchvision.ops.FrozenBatchNorm2d,
    "timm's": timm.layers.FrozenBatchNormAct2d,
}


@pytest.mark.parametrize("to", ["ours", "torch", "frozen"])
@pytest.mark.parametrize("kind", FROZEN.values(), ids=FROZEN)
def test_others_frozen_kinds_become_norms_that_are_frozen(kind, to):
    options = {"apply_act": False} if kind is timm.layers.FrozenBatchNormAct2d else {}
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8, eps=1e-3, **options)).train()
    model[1].running_var.uniform_(0.5, 2)
    expected, state = model(images()), dict(model.state_dict())
    batchnorm.convert(model, to)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(model[1], batchnorm.BatchNorm2d) == (to != "torch")
    torch.testing.assert_close(model.train()(images()), expected)
    assert not model[1].weight.requires_grad
    found = model.state_dict()
    assert found.pop("1.num_batches_tracked") == 0
    torch.testing.assert_close(dict(found), state, rtol=0, atol=0)
    assert batchnorm.unfreeze(model)[1].training


def test_to_frozen_is_frozen_with_its_parameters():
    model = batchnorm.convert(network(), "frozen").train()
    assert not model[1].training
    assert not model[1].weight.requires_grad


def test_what_does_more_than_batch_norm_is_left_or_keeps_its_activation():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8)).eval()
    batchnorm.convert(model, "sync")
    assert "a BatchNormAct2d with an activation of its own" in str(batchnorm.changes(model))
    batchnorm.convert(model, "none")
    torch.testing.assert_close(model(images()), model[0](images()).relu())

    class Squared(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).square()

    model = nn.Sequential(Squared(3))
    batchnorm.convert(model)
    assert type(model[0]) is Squared
    assert "may do more than batch norm" in str(batchnorm.changes(model))


def test_frozen_layers_stay_frozen_and_are_left_where_they_cannot():
    model = batchnorm.freeze(network(), "1")
    batchnorm.convert(model)
    account = batchnorm.changes(model)
    assert not account.left
    assert isinstance(model[1], batchnorm.BatchNorm2d)
    assert not model.train()[1].training
    batchnorm.convert(model, to="group")
    account = batchnorm.changes(model)
    assert [entry.layer for entry in account.left] == ["1"]
    assert "unfreeze it first" in account.left[0].what


def test_layers_are_chosen_by_name_and_a_model_may_be_a_norm():
    model = batchnorm.convert(network(), pattern="3")
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[3]) is batchnorm.BatchNorm2d
    assert type(batchnorm.convert(nn.BatchNorm2d(3), "group")) is nn.GroupNorm


def test_an_unknown_kind_is_said():
    with pytest.raises(BatchNormError, match="to='weight' and wants one of ours, torch, sync"):
        batchnorm.convert(network(), "weight")
    assert set(KINDS) == {
        "ours", "torch", "sync", "group", "layer", "instance", "frozen", "ghost", "renorm", "split",
        "estimator", "none",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_torchvisions_models_keep_their_numbers(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    twin = copy.deepcopy(model)
    batchnorm.convert(model)
    assert not batchnorm.changes(model).left
    x = torch.randn(2, 3, 64, 64)
    for mode in (True, False):
        torch.manual_seed(1)
        y = model.train(mode)(x)
        torch.manual_seed(1)
        exact = copy.deepcopy(twin).double().train(mode)(x.double())
        # no farther from float64 than torch's own, but for a factor: rounding is spread by chance
        error, other = ((z.double() - exact).abs().max() for z in (y, twin.train(mode)(x)))
        assert error < 4 * other + 1e-6
