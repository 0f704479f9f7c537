"""What the arms put in the place of batch normalization."""

import copy

import pytest
import timm.layers
import torch
from torch import nn

import batchnorm
import tiny
from batchnorm.lab import arms, networks
from batchnorm.lab.arms import ARMS
from batchnorm.lab.note import NoteBatchNorm

KINDS = {
    "none": (nn.Identity, nn.Identity),
    "batch": (batchnorm.BatchNorm2d, batchnorm.BatchNorm1d),
    "batch-torch": (nn.BatchNorm2d, nn.BatchNorm1d),
    "batch-note": (NoteBatchNorm, NoteBatchNorm),
    "group": (nn.GroupNorm, nn.GroupNorm),
    "layer": (nn.GroupNorm, nn.GroupNorm),
    "batch-noise": (nn.Sequential, nn.Sequential),
    "batch-population": (arms.PopulationNorm, arms.PopulationNorm),
    "ghost": (batchnorm.GhostBatchNorm, batchnorm.GhostBatchNorm),
    **{
        f"ghost-{size}": (batchnorm.GhostBatchNorm, batchnorm.GhostBatchNorm)
        for size in arms.GHOST_SIZES
    },
    "renorm": (batchnorm.RenormBatchNorm, batchnorm.RenormBatchNorm),
    "estimator": (batchnorm.EstimatorBatchNorm, batchnorm.EstimatorBatchNorm),
    "frozen": (batchnorm.FrozenBatchNorm, batchnorm.FrozenBatchNorm),
    "split": (batchnorm.SplitBatchNorm, batchnorm.SplitBatchNorm),
    "sync": (batchnorm.SyncBatchNorm, batchnorm.SyncBatchNorm),
}


@pytest.mark.parametrize("arm", ARMS)
def test_every_place_holds_the_arms_layer(arm):
    model, places = arms.apply(networks.lenet(), arm)
    assert places == ["norm1", "norm2", "norm3", "norm4"]
    of_images, of_features = KINDS[arm]
    assert [type(model.get_submodule(place)) for place in places] == [
        of_images,
        of_images,
        of_features,
        of_features,
    ]
    assert model(torch.rand(4, 1, 28, 28)).shape == (4, 10)


def test_ghosts_have_the_sizes_of_their_names():
    found = {
        arm: arms.apply(networks.lenet(), arm)[0].norm2.ghost_size
        for arm in ARMS
        if arm.startswith("ghost")
    }
    assert found == {"ghost": 32, "ghost-16": 16, "ghost-64": 64, "ghost-256": 256}


def test_parameters_are_those_that_the_note_counts():
    counts = {
        arm: sum(p.numel() for p in arms.apply(networks.lenet(), arm)[0].parameters())
        for arm in ("none", "batch", "batch-note")
    }
    assert counts == {"none": 61_706, "batch": 61_706 + 452, "batch-note": 61_706 + 8}


@pytest.mark.parametrize(
    "arm",
    ["batch", "batch-torch", "group", "layer", "ghost", "renorm", "estimator", "frozen", "sync"],
)
def test_weight_and_bias_start_from_the_networks_own(arm):
    model, _ = arms.apply(tiny.network(), arm)
    assert model.norm1.weight.tolist() == [1.0] * 8
    assert model.norm2.weight.tolist() == [0.0] * 8


@pytest.mark.parametrize("arm", ["split", "sync"])
def test_one_domain_in_one_process_is_the_plain_layer(arm):
    torch.manual_seed(0)
    model = tiny.network()
    model.dropout.p = 0
    twin, _ = arms.apply(copy.deepcopy(model), "batch")
    model, _ = arms.apply(model, arm)
    assert len(list(model.parameters())) == len(list(twin.parameters()))
    for training in (True, True, False):
        x = torch.rand(6, 1, 28, 28)
        torch.testing.assert_close(model.train(training)(x), twin.train(training)(x))


def test_frozen_is_the_network_s_own_map_and_nothing_trains():
    model = tiny.network()
    model.norm1.running_mean.fill_(3)
    model.norm1.running_var.fill_(4)
    model.dropout.p = 0
    expected = copy.deepcopy(model).eval()
    model, _ = arms.apply(model, "frozen")
    x = torch.rand(6, 1, 28, 28)
    torch.testing.assert_close(model.train()(x), expected(x))
    assert not list(model.norm1.parameters())
    bare, _ = arms.apply(nn.Sequential(nn.BatchNorm1d(3, affine=False)), "frozen")
    assert bare[0].weight.tolist() == [1.0] * 3


def test_the_size_of_a_ghost_batch():
    model, _ = arms.apply(tiny.network(), "ghost", 7)
    assert model.norm1.ghost_size == model.norm2.ghost_size == 7
    assert arms.apply(tiny.network(), "ghost")[0].norm1.ghost_size == 32


def test_running_statistics_of_a_trained_network_come_along():
    model = tiny.network()
    model.norm1.running_mean.fill_(3)
    model.norm1.num_batches_tracked.fill_(9)
    arms.apply(model, "batch")
    assert model.norm1.running_mean.tolist() == [3.0] * 8
    assert model.norm1.num_batches_tracked.item() == 9


def test_a_shared_layer_stays_shared():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    arms.apply(model, "batch")
    assert isinstance(model["a"], batchnorm.BatchNorm1d)
    assert model["a"] is model["b"][0]


def test_a_network_that_is_one_layer():
    model, places = arms.apply(nn.BatchNorm2d(3), "none")
    assert isinstance(model, nn.Identity)
    assert places == [""]


@pytest.mark.parametrize(
    ("channels", "groups"), [(6, 1), (16, 4), (120, 30), (84, 21), (256, 32), (3, 1)]
)
def test_group_sizes(channels, groups):
    assert arms.group(nn.BatchNorm2d(channels)).num_groups == groups


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(batchnorm.BatchNormError, match="has no batch-norm layer"):
        arms.apply(tiny.without_norm(), "none")


def test_a_layer_without_a_rank_has_no_torch_twin():
    with pytest.raises(batchnorm.BatchNormError, match="has no rank"):
        arms.apply(nn.Sequential(batchnorm.BatchNorm(3)), "batch-torch")


class TestTheNotesDefects:
    """Each is there on purpose; the experiments show what it costs."""

    def test_scalar_weight_and_bias(self):
        assert [p.numel() for p in NoteBatchNorm().parameters()] == [1, 1]

    def test_statistics_are_not_in_the_state_dict(self):
        layer = NoteBatchNorm()
        layer(torch.randn(8, 3))
        assert set(layer.state_dict()) == {"weight", "bias"}

    def test_evaluation_before_training_multiplies_by_316(self):
        with torch.no_grad():
            y = NoteBatchNorm()(torch.ones(2, 3))
        torch.testing.assert_close(y, torch.full((2, 3), 1e-5**-0.5))

    def test_grad_mode_is_the_switch(self):
        layer, x = NoteBatchNorm().eval(), torch.randn(64, 3) * 2 + 5
        y = layer(x)
        torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))

    def test_momentum_weighs_the_old_value_and_the_variance_is_biased(self):
        layer, x = NoteBatchNorm(), torch.randn(4, 3, 5, 5)
        layer(x)
        torch.testing.assert_close(layer.running_var, 0.1 * x.var((0, 2, 3), correction=0))


def test_an_activation_that_belongs_to_a_norm_stays_behind_every_arm():
    for arm in ARMS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), timm.layers.BatchNormAct2d(4))
        model[1].weight.requires_grad_(False)
        x = torch.randn(8, 1, 6, 6)
        expected = model.eval()(x)
        model, places = arms.apply(model, arm)
        assert places == ["1.norm"]
        y = model.eval()(x)
        assert y.min() == 0
        if arm.startswith("ghost") or arm in {"batch", "batch-torch", "renorm"}:
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        if arm in {"batch", "batch-torch"}:
            assert not model.get_submodule("1.norm").weight.requires_grad


def test_population_norm_uses_in_training_what_evaluation_uses():
    torch.manual_seed(0)
    layer, x = arms.batch_population(nn.BatchNorm1d(3)), torch.randn(16, 3) * 2 + 1
    layer.norm.momentum = 0.25
    y = layer(x)
    mean = 0.25 * x.mean(0)
    var_unbiased = 0.75 + 0.25 * x.var(0)
    torch.testing.assert_close(y, (x - mean) / (var_unbiased + 1e-5).sqrt())
    torch.testing.assert_close(layer.eval()(x), y)


def test_no_gradient_passes_through_the_statistics_of_population_norm():
    layer, x = arms.batch_population(nn.BatchNorm1d(3)), torch.randn(16, 3, requires_grad=True)
    layer(x)[:, 1].sum().backward()
    scale = (layer.norm.running_var[1] + 1e-5).rsqrt()
    torch.testing.assert_close(x.grad[:, 1], scale.expand(16))
