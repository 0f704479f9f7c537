"""The frozen layer beside torchvision's, and beside checkpoints as detectron2 writes them."""

import copy

import pytest
import torch
import torchvision
from torch import nn

import batchnorm
from batchnorm import reference
from tolerance import assert_near

STATE = ("weight", "bias", "running_mean", "running_var")


def values():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(3, generator=generator) + 0.5 for name in STATE}


def images():
    return torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(1))


def expected(state, eps):
    exact = {name: value.double() for name, value in state.items()}
    mean, var = exact["running_mean"], exact["running_var"]
    return reference.normalize(images().double(), mean, var, exact["weight"], exact["bias"], eps)


def saved(state, version):
    """A state dict of a layer named "norm", as a class of that version writes it."""
    whole = {f"norm.{name}": value for name, value in state.items()}
    dictionary = copy.copy(nn.Module().state_dict())  # an OrderedDict with metadata
    dictionary.update(whole)
    if version is not None:
        dictionary._metadata = {"norm": {"version": version}}
    else:
        dictionary._metadata = {}
    return dictionary


def loaded(state, version, eps=1e-5):
    model = nn.Module()
    model.norm = batchnorm.FrozenBatchNorm(3, eps=eps)
    model.load_state_dict(saved(state, version))  # strict
    return model.norm


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.0])
@pytest.mark.parametrize("training", [True, False])
def test_beside_torchvision_s(eps, training):
    theirs = torchvision.ops.FrozenBatchNorm2d(3, eps=eps)
    for name, value in values().items():
        setattr(theirs, name, value)
    layer = batchnorm.FrozenBatchNorm(3, eps=eps).train(training)
    layer.load_state_dict(theirs.state_dict())
    assert_near(layer(images()), expected(values(), eps), 1)
    torch.testing.assert_close(layer(images()), theirs(images()), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(layer.state_dict())
    assert not list(layer.parameters())


@pytest.mark.parametrize("version", [None, 1, 3])
def test_four_values_are_read_as_they_are(version):
    assert_near(loaded(values(), version, 1e-3)(images()), expected(values(), 1e-3), 1)


def test_a_variance_of_version_2_was_used_without_eps():
    """detectron2's before version 3: y = (x − mean) / √var · weight + bias."""
    assert_near(loaded(values(), 2, 1e-3)(images()), expected(values(), 0.0), 1)


def test_torch_s_layers_are_of_version_2_too_and_had_eps():
    """detectron2's upgrade took eps off these as well."""
    norm = nn.BatchNorm2d(3, eps=1e-3).eval()
    for name, value in values().items():
        getattr(norm, name).data.copy_(value)
    model = nn.ModuleDict({"norm": norm})
    other = nn.ModuleDict({"norm": batchnorm.FrozenBatchNorm(3, eps=1e-3)})
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other["norm"](images()), norm(images()).detach())


def test_caffe2_s_weight_and_bias_alone_are_the_whole_map():
    state = {name: values()[name] for name in ("weight", "bias")}
    layer = loaded(state, None, eps=1e-2)
    shape = (1, 3, 1, 1)
    exact = images().double() * state["weight"].double().view(shape) + state["bias"].view(shape)
    assert_near(layer(images()), exact, 1)


def test_a_new_layer_is_the_identity():
    x = images()
    assert_near(batchnorm.FrozenBatchNorm(3, eps=1e-2)(x), x.double(), 1)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 2, 3, 4)])
def test_gradients_of_any_rank_go_through(shape):
    layer = batchnorm.FrozenBatchNorm(3, dtype=torch.float64)
    layer.load_state_dict({k: v.double() for k, v in values().items()})
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


def test_a_missing_value_of_a_new_checkpoint_is_missed():
    state = values()
    del state["running_var"]
    with pytest.raises(RuntimeError, match=r"Missing key.*running_var"):
        loaded(state, 3)


def test_the_tools_know_it():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), batchnorm.FrozenBatchNorm(3), nn.ReLU()).eval()
    model[1].load_state_dict(values())
    y = model(images())
    assert [n.target for n in torch.fx.symbolic_trace(model).graph.nodes][1:-1] == ["0", "1", "2"]
    assert batchnorm.summary(model)[0].mode == "constant"
    torch.testing.assert_close(batchnorm.fold(model, images())(images()), y, rtol=1e-4, atol=1e-5)
    batchnorm.convert(model)
    assert isinstance(model[1], batchnorm.BatchNorm)
    torch.testing.assert_close(model.train()(images()), y)
    assert "FrozenBatchNorm(3, eps=1e-05)" in repr(batchnorm.FrozenBatchNorm(3))
