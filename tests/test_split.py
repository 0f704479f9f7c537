"""Split batch normalization beside a plain norm for each domain."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import BatchNormError


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    nn.init.uniform_(model[1].weight, 0.5, 2)
    return batchnorm.convert(model, to="split", domains=("clean", "noisy"), **options)


def images(shift=0.0):
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2 + shift


@pytest.mark.parametrize("shared", [False, True])
def test_each_domain_is_a_norm_of_its_own(shared):
    """Outputs, statistics and gradients of two domains are those of two plain norms."""
    torch.manual_seed(0)
    layer = batchnorm.SplitBatchNorm(3, domains=("clean", "noisy"), shared=shared)
    plain = {name: batchnorm.BatchNorm(3) for name in ("clean", "noisy")}
    for shift in range(3):
        for place, (name, twin) in enumerate(plain.items()):
            x = images(shift + 5 * place)
            with batchnorm.domain(layer, name):
                y = layer(x)
            z = twin(x)
            torch.testing.assert_close(y, z)
            y.sin().sum().backward()
            z.sin().sum().backward()
    for name, twin in plain.items():
        own = layer.domains[name]
        torch.testing.assert_close(own.running_mean, twin.running_mean)
        torch.testing.assert_close(own.running_var, twin.running_var)
        if not shared:
            torch.testing.assert_close(own.weight.grad, twin.weight.grad)
    if shared:
        both = sum(twin.weight.grad for twin in plain.values())
        torch.testing.assert_close(layer.norm.weight.grad, both)


@pytest.mark.parametrize(("shared", "count"), [(False, 4), (True, 2)])
def test_weight_and_bias_are_shared_or_not(shared, count):
    layer = batchnorm.SplitBatchNorm(3, shared=shared)
    for each in (layer, copy.deepcopy(layer), layer.to(torch.float64)):
        assert len(list(each.parameters())) == count
        assert (each.domains["main"].weight is each.domains["auxiliary"].weight) == shared


@pytest.mark.parametrize("shared", [False, True])
def test_converted_domains_start_alike_and_part(shared):
    model = network(shared=shared)
    before = copy.deepcopy(model[1].domains["clean"].state_dict())
    torch.testing.assert_close(model[1].domains["noisy"].state_dict(), before)
    with batchnorm.domain(model, "noisy"):
        model(images(3.0))
    torch.testing.assert_close(model[1].domains["clean"].state_dict(), before, rtol=0, atol=0)
    assert int(model[1].domains["noisy"].num_batches_tracked) == 1


def test_contexts_nest_and_come_back_whatever_happens():
    model = network()
    with batchnorm.domain(model, "noisy"):
        with contextlib.suppress(KeyError), batchnorm.domain(model, "clean"):
            assert model[1].domain == "clean"
            raise KeyError
        assert {model[1].domain, model[3].domain} == {"noisy"}
    assert {model[1].domain, model[3].domain} == {"clean"}


def test_a_traced_model_asks_for_the_domain_at_each_call():
    model = network().eval()
    model[1].domains["noisy"].running_mean.fill_(3)
    traced = torch.fx.symbolic_trace(model)
    for name in ("clean", "noisy"):
        with batchnorm.domain(model, name):
            torch.testing.assert_close(traced(images()), model(images()))


def test_back_to_the_domain_that_is_on():
    model = network().eval()
    model[1].domains["noisy"].running_mean.fill_(3)
    with batchnorm.domain(model, "noisy"):
        expected = model(images())
        batchnorm.convert(model, to="torch")
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(images()), expected)


def test_freezing_and_synchronising_reach_the_domains():
    model = batchnorm.freeze(network().train())
    assert not model[1].domains["noisy"].training
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert type(synced[1].norm) is nn.SyncBatchNorm
    frozen = batchnorm.convert(network(), to="frozen")
    assert isinstance(frozen[1], batchnorm.SplitBatchNorm)
    assert not any(p.requires_grad for p in frozen[1].parameters())


def test_what_replaced_a_domain_s_norm_is_left():
    model = network()
    model[1].domains["clean"] = nn.GroupNorm(2, 4)
    batchnorm.convert(model, to="torch")
    (left,) = batchnorm.changes(model).left
    assert (left.layer, left.what) == ("1", "its domain 'clean' is a GroupNorm")


def test_recalibration_is_of_the_domain_that_is_on():
    model = network()
    with batchnorm.domain(model, "noisy"):
        batchnorm.recalibrate(model, [images(3.0)])
    x = model[0](images(3.0))
    torch.testing.assert_close(model[1].domains["noisy"].running_mean, x.mean((0, 2, 3)))
    assert not model[1].domains["clean"].running_mean.any()
    left = [entry.layer for entry in batchnorm.changes(model).left]
    assert left == ["1.domains.clean", "3.domains.clean"]


@pytest.mark.parametrize("domains", [(), ("a", "a"), "main"])
def test_domains_that_make_no_sense_are_said(domains):
    with pytest.raises(BatchNormError, match="wants one or more names, each once"):
        batchnorm.SplitBatchNorm(3, domains=domains)


def test_a_domain_that_is_not_there_is_said():
    with (
        pytest.raises(BatchNormError, match="the layer 1 has the domains clean, noisy"),
        batchnorm.domain(network(), "night"),
    ):
        pass
    with (
        pytest.raises(BatchNormError, match=r"the model has no SplitBatchNorm\. Convert it first"),
        batchnorm.domain(nn.BatchNorm2d(3), "night"),
    ):
        pass
