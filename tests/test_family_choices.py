"""What is chosen for a layer holds for every member of the family, and goes with it through `convert`."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import BatchNormError
from batchnorm.model.discovery import batch_norms

OPTIONS = {
    "ghost": {"ghost_size": 4},
    "renorm": {"d_max": 0.1, "warmup": 0, "r_steps": 0, "d_steps": 0},
    "split": {"domains": ("main", "other")},
    "estimator": {"unbiased": False},
}
MEMBERS = [*OPTIONS, "sync", "ours", "torch"]


def network(kind="torch"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3))
    nn.init.uniform_(model[0].weight, 0.5, 2)
    nn.init.uniform_(model[0].bias)
    model[0].running_mean.uniform_()
    model[0].running_var.uniform_(0.5, 2)
    return batchnorm.convert(model, to=kind, **OPTIONS.get(kind, {}))


def rows(count=8):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1)) + 1


def the_norm(model):
    return next(iter(batch_norms(model).values()))


def keeps_float32(model):
    twin = copy.deepcopy(model).bfloat16()
    assert the_norm(twin).running_var.dtype == the_norm(twin).weight.dtype == torch.float32
    assert torch.equal(the_norm(twin).running_mean, the_norm(model).running_mean)
    assert twin(rows().bfloat16()).dtype == torch.bfloat16


def takes_one_value(model):
    twin = copy.deepcopy(model).train()
    before = copy.deepcopy(twin.state_dict())
    expected = copy.deepcopy(twin).eval()(rows(1))
    torch.testing.assert_close(twin(rows(1)), expected, rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), before, rtol=0, atol=0)


def is_frozen(model):
    twin = copy.deepcopy(model).train()
    before = copy.deepcopy(twin.state_dict())
    torch.testing.assert_close(twin(rows()), copy.deepcopy(twin).eval()(rows()), rtol=0, atol=0)
    torch.testing.assert_close(twin.state_dict(), before, rtol=0, atol=0)
    assert not the_norm(twin).weight.requires_grad


def is_frozen_and_moves(model):
    twin = copy.deepcopy(model).train()
    norm = the_norm(twin)
    before = norm.running_mean.clone()
    torch.testing.assert_close(twin(rows()), copy.deepcopy(model).eval()(rows()), rtol=0, atol=0)
    torch.testing.assert_close(norm.running_mean, before.lerp(rows().mean(0), norm.momentum))
    assert norm.weight.requires_grad


def leaves_its_statistics(model):
    twin = copy.deepcopy(model).train()
    before = copy.deepcopy(twin.state_dict())
    y = twin(rows())
    torch.testing.assert_close(twin.state_dict(), before, rtol=0, atol=0)
    assert not torch.allclose(y, copy.deepcopy(model).eval()(rows()))


CHOICES = {
    "float32": (batchnorm.keep_float32, keeps_float32),
    "single": (batchnorm.single_values, takes_one_value),
    "frozen": (lambda m: batchnorm.freeze(m, parameters=True), is_frozen),
    "moving": (lambda m: batchnorm.freeze(m, update=True), is_frozen_and_moves),
    "paused": (lambda m: batchnorm.freeze(m, use=False), leaves_its_statistics),
}
EVERY_CHOICE = pytest.mark.parametrize("choice", CHOICES)


@EVERY_CHOICE
@pytest.mark.parametrize("kind", MEMBERS)
def test_a_choice_holds_for_every_member(kind, choice):
    choose, holds = CHOICES[choice]
    model = choose(network(kind))
    assert batchnorm.changes(model).done
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        holds(twin)


@EVERY_CHOICE
@pytest.mark.parametrize("to", MEMBERS)
@pytest.mark.parametrize("kind", MEMBERS)
def test_a_choice_survives_conversion_in_every_direction(kind, to, choice):
    choose, holds = CHOICES[choice]
    model = choose(network(kind))
    batchnorm.convert(model, to=to, **OPTIONS.get(to, {}))
    if (kind, to) == ("split", "split"):
        assert "already" in str(batchnorm.changes(model))
    else:
        assert type(model[0]).__name__ == type(network(to)[0]).__name__ or (kind, to) == (
            "split",
            "sync",
        )
    holds(model)
    batchnorm.convert(model, to="torch")
    holds(model)
    batchnorm.unfreeze(batchnorm.keep_float32(batchnorm.single_values(model, "error"), keep=False))
    assert type(model[0]) is nn.BatchNorm1d
    assert model[0].weight.requires_grad
    assert model[0].track_running_stats
    assert model.train()[0].training


@EVERY_CHOICE
def test_all_domains_of_a_split_norm_keep_it(choice):
    choose, holds = CHOICES[choice]
    model = batchnorm.convert(choose(network()), to="split")
    with batchnorm.domain(model, "auxiliary"):
        holds(nn.Sequential(copy.deepcopy(model[0].norm)))


def test_a_conversion_that_fails_leaves_the_choices():
    model = batchnorm.freeze(batchnorm.single_values(network()))
    with pytest.raises(BatchNormError, match="got size and wants ghost_size"):
        batchnorm.convert(model, to="ghost", size=3)
    takes_one_value(batchnorm.unfreeze(copy.deepcopy(model)))
    assert not model.train()[0].training


@pytest.mark.parametrize("to", ["group", "none"])
def test_what_has_no_statistics_cannot_stay_frozen(to):
    model = batchnorm.convert(batchnorm.freeze(network()), to=to)
    assert "unfreeze it first" in str(batchnorm.changes(model))
    assert not model.train()[0].training


@pytest.mark.parametrize(("shared", "count"), [(False, 2), (True, 0)])
def test_new_parameters_of_a_split_norm_are_said(shared, count, caplog):
    caplog.set_level(logging.INFO, "batchnorm")
    model = network()
    optimized = {id(p) for p in model.parameters()}
    batchnorm.convert(model, to="split", domains=("main", "night"), shared=shared)
    assert sum(id(p) not in optimized for p in model.parameters()) == count
    told = f"{count} parameters of further domains are new, and no optimizer made before knows them"
    assert (told in caplog.text) == (not shared)
    assert (told in str(batchnorm.changes(model))) == (not shared)
    assert ("the parameters of night are new" in str(batchnorm.changes(model))) == (not shared)


@pytest.mark.parametrize("pattern", ["*", "0"])
def test_every_domain_of_a_split_norm_is_synchronised(pattern):
    model = network("split")
    parameters = [id(p) for p in model.parameters()]
    batchnorm.convert(model, "sync", pattern)
    norms = batch_norms(model)
    assert {name: type(norm) for name, norm in norms.items()} == dict.fromkeys(
        ("0.domains.main", "0.domains.other"), batchnorm.SyncBatchNorm
    )
    assert [norm.label for norm in norms.values()] == list(norms)
    assert [id(p) for p in model.parameters()] == parameters
    batchnorm.convert(model, "ours")
    assert type(model[0]) is batchnorm.BatchNorm1d
    assert "of the domain 'main'; without other" in str(batchnorm.changes(model))


@pytest.mark.parametrize("to", ["torch", "ours"])
@pytest.mark.parametrize("half", [False, True])
def test_constants_lead_back_to_a_layer_with_the_same_numbers(to, half):
    layer = batchnorm.FrozenBatchNorm(3, eps=1e-3)
    for buffer in layer.buffers():
        buffer.uniform_(0.5, 2)
    model, x = nn.Sequential(layer), torch.randn(2, 3, 4, 5)
    expected = model(x)
    if half:
        batchnorm.keep_float32(model)
    batchnorm.convert(model, to=to)
    account = str(batchnorm.changes(model))
    assert isinstance(model[0], nn.BatchNorm2d if to == "torch" else batchnorm.BatchNorm)
    assert ", frozen" in account
    assert (", for (N, C, H, W)" in account) == (to == "torch")
    torch.testing.assert_close(model.train()(x), expected)
    assert (model.bfloat16()[0].weight.dtype == torch.float32) == half


def test_frozen_and_back_is_told():
    model = network()
    x = rows()
    expected = copy.deepcopy(model).eval()(x)
    batchnorm.convert(model, to="frozen")
    assert "is now a BatchNorm1d, frozen" in str(batchnorm.changes(model))
    torch.testing.assert_close(model.train()(x), expected)
    batchnorm.convert(model, to="ours")
    assert "is now a BatchNorm1d, frozen" in str(batchnorm.changes(model))
    torch.testing.assert_close(model.train()(x), expected)
    batchnorm.unfreeze(model)
    assert model[0].training
    assert model[0].weight.requires_grad


def test_a_frozen_layer_takes_masks_and_axes_where_its_kind_does():
    x, keep = torch.randn(4, 5, 3), torch.rand(4, 5) < 0.5
    constants = batchnorm.FrozenBatchNorm(3)
    constants.load_state_dict(network()[0].state_dict())
    ours = batchnorm.convert(batchnorm.convert(network()), to="frozen").train()[0]
    for layer in (constants, ours):
        y = (x - constants.running_mean) / (constants.running_var + 1e-5).sqrt()
        y = torch.where(keep[..., None], y * constants.weight + constants.bias, 0)
        torch.testing.assert_close(layer(x, axis=-1, mask=keep), y)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        batchnorm.convert(network(), to="frozen")[0](rows(), mask=torch.ones(8, dtype=torch.bool))


def test_others_constants_follow_casts_and_say_so():
    import torchvision

    model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3))
    batchnorm.keep_float32(model)
    assert "a FrozenBatchNorm2d, which follows casts" in str(batchnorm.changes(model))


@pytest.mark.parametrize(
    ("options", "momentum"), [({}, 0.1), ({"momentum": 0.01}, 0.01), ({"momentum": None}, None)]
)
def test_renorm_keeps_a_trained_layer_s_count_and_momentum(options, momentum):
    model = network()
    model[0].num_batches_tracked.fill_(20_000)
    batchnorm.convert(model, to="renorm", **options)
    layer = model[0]
    assert layer.momentum == momentum
    assert layer.num_batches_tracked == 20_000
    r_limit, d_limit = layer.limits()
    assert r_limit.item() == pytest.approx(1 + 2 * 15_000 / 35_000)
    assert d_limit.item() == pytest.approx(5 * 15_000 / 20_000)
    account = str(batchnorm.changes(model))
    assert f"0 batches of warm-up after 20000, momentum {momentum}" in account
    assert ("the paper's: momentum=0.01" in account) == (momentum != 0.01)
    fresh = batchnorm.convert(network(), to="renorm")
    assert "5000 batches of warm-up after 0" in str(batchnorm.changes(fresh))


def test_a_conversion_that_fails_gives_every_layer_its_choices_back():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None))
    batchnorm.keep_float32(batchnorm.single_values(model))
    batchnorm.freeze(model, parameters=True)
    classes, switches = [type(layer) for layer in model], [layer._switches for layer in model]
    with pytest.raises(BatchNormError, match="momentum"):
        batchnorm.convert(model, to="estimator", average="debiased")
    assert [type(layer) for layer in model] == classes
    assert [layer._switches for layer in model] == switches
    is_frozen(nn.Sequential(model[0]))
    keeps_float32(nn.Sequential(model[0]))
    takes_one_value(batchnorm.unfreeze(copy.deepcopy(nn.Sequential(model[0]))))
    assert [p.requires_grad for p in batchnorm.unfreeze(model).parameters()] == [True] * 4


def tied():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    return model


def frozen_one_by_one(model):
    for layer in batch_norms(model).values():
        batchnorm.freeze(layer, parameters=True)


FREEZING = {
    "at once": lambda model: batchnorm.freeze(model, parameters=True),
    "twice": lambda model: batchnorm.freeze(
        batchnorm.freeze(model, parameters=True), parameters=True
    ),
    "one by one": frozen_one_by_one,
    "converted": lambda model: batchnorm.convert(model, to="frozen"),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("how", FREEZING)
@pytest.mark.parametrize(
    "make",
    [tied, lambda: batchnorm.convert(network(), to="split", domains=("a", "b"), shared=True)],
    ids=["tied", "split"],
)
def test_a_shared_weight_trains_again_when_unfrozen(make, how, trained):
    model = make()
    weight, bias = model.parameters()
    bias.requires_grad_(trained)
    FREEZING[how](model)
    assert not weight.requires_grad
    assert not bias.requires_grad
    batchnorm.unfreeze(copy.deepcopy(model))
    assert not weight.requires_grad
    batchnorm.unfreeze(model)
    assert weight.requires_grad
    assert bias.requires_grad == trained


def test_a_shared_weight_trains_again_after_a_conversion():
    model = batchnorm.freeze(network(), parameters=True)
    batchnorm.convert(model, to="split", domains=("a", "b"), shared=True)
    assert not any(p.requires_grad for p in model.parameters())
    batchnorm.unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
