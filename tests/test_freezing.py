"""A freeze that survives train(), two switches, and everything back afterwards."""

import copy
import functools
import pickle

import pytest
import timm.layers
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import BatchNormError

LAYERS = [nn.BatchNorm2d, batchnorm.BatchNorm2d, nn.SyncBatchNorm, timm.layers.BatchNormAct2d]


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Conv2d(4, 5, 3), norm(5))
    for i in (1, 3):
        model[i].running_mean.normal_()
        model[i].running_var.uniform_(0.5, 2)
        model[i].momentum = 0.3
    return model


def images(seed=1):
    return torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, expected):
    assert list(model.state_dict()) == list(expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("norm", LAYERS)
def test_a_freeze_survives_train(norm):
    model = network(norm).eval()
    expected, before = model(images()), state(model)
    assert batchnorm.freeze(model) is model
    model.train().eval().train()
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)
    assert_state(model, before)
    assert isinstance(model[1], norm)
    assert model[0].training
    assert not model[1].training


@pytest.mark.parametrize("norm", [LAYERS[0], LAYERS[1], LAYERS[3]])
def test_unfreeze_gives_everything_back(norm):
    model, twin = network(norm).train(), network(norm).train()
    model[1].weight.requires_grad_(False)
    twin[1].weight.requires_grad_(False)
    hooked = []
    model[1].register_forward_hook(lambda *_: hooked.append(1))
    batchnorm.freeze(model, parameters=True)
    assert not any(p.requires_grad for p in model[3].parameters())
    model(images())
    batchnorm.unfreeze(model)
    assert type(model[1]) is norm
    assert model[1].training
    assert model[1].track_running_stats
    assert model[1].momentum == 0.3
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in twin.parameters()
    ]
    torch.testing.assert_close(model(images()), twin(images()), rtol=0, atol=0)
    assert_state(model, state(twin))
    assert len(hooked) == 2
    assert "_switches" not in vars(model[1])


def test_the_batch_is_used_and_the_statistics_stay():
    model, twin = network().train(), network().train()
    before = state(model)
    batchnorm.freeze(model, use=False, update=False)
    torch.testing.assert_close(model(images()), twin(images()), rtol=0, atol=0)
    assert_state(model, before)
    model.eval()
    torch.testing.assert_close(model(images()), network().eval()(images()), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_the_statistics_are_used_and_move(momentum):
    model = network().train()
    model[1].momentum = momentum
    twin = copy.deepcopy(model)  # its statistics move as torch moves them
    batchnorm.freeze(model, "1", update=True)
    expected = twin[1].eval()(twin[0](images()))
    x = model[0](images())
    y = model[1](x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    y.sum().backward()  # the statistics that normalized are still there for it
    twin[1].train()(twin[0](images()))
    torch.testing.assert_close(model[1].state_dict(), twin[1].state_dict(), rtol=1e-5, atol=1e-6)
    model.eval()
    before = state(model)
    model(images())
    assert_state(model, before)


def test_gradients_reach_the_weights_of_a_frozen_layer():
    model = network().train()
    batchnorm.freeze(model)
    model(images()).square().sum().backward()
    assert model[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_stay_frozen_by_themselves(norm, twin):
    model = batchnorm.freeze(network(norm))
    other = twin(model).train()
    assert not other[1].training
    batchnorm.unfreeze(model)
    assert not other[1].training
    torch.testing.assert_close(other(images()), network(norm).eval()(images()), rtol=0, atol=0)
    batchnorm.unfreeze(other)
    assert type(other[1]) is norm


def test_the_switches_travel_in_the_state_dicts_metadata(tmp_path):
    model = network()
    batchnorm.freeze(model, "1")
    batchnorm.freeze(model, "3", use=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    other = network()
    other.load_state_dict(loaded, strict=True)
    assert other.train()[1].training
    batchnorm.freeze_like(other, loaded)
    other.train()
    assert [other[i].training for i in (1, 3)] == [False, True]
    before = state(other)
    other(images())
    assert_state(other, before)
    with pytest.raises(BatchNormError, match="without metadata, as safetensors"):
        batchnorm.freeze_like(other, dict(loaded))
    with pytest.raises(BatchNormError, match="froze '1', and the model has no batch norm"):
        batchnorm.freeze_like(nn.Linear(1, 1), loaded)


def test_layers_are_chosen_by_name():
    model = nn.ModuleDict({"stem": network(), "head": network()})
    batchnorm.freeze(model, "stem.*")
    assert {c.layer for c in batchnorm.changes(model).done} == {"stem.1", "stem.3"}
    model.train()
    assert not model["stem"][1].training
    assert model["head"][1].training
    batchnorm.freeze(model, ["head.1", "head.3"])
    batchnorm.unfreeze(model, "*.3")
    assert [c.layer for c in batchnorm.changes(model).done] == ["stem.3", "head.3"]


def test_nothing_frozen_is_said(caplog):
    model = network()
    batchnorm.freeze(model, "nowhere.*")
    assert "nothing to do" in caplog.text
    frozen = timm.layers.FrozenBatchNormAct2d(3)
    assert "is frozen for good" in str(batchnorm.changes(batchnorm.freeze(nn.Sequential(frozen))))


def test_the_switches_of_an_unfrozen_layer_are_refused():
    with pytest.raises(BatchNormError, match="Call unfreeze"):
        batchnorm.freeze(network(), use=False, update=True)


def test_a_layer_that_is_shared_stays_shared():
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    batchnorm.freeze(model)
    assert model[0] is model[2] is norm


def test_a_frozen_model_is_traced_compiled_and_exported():
    model = batchnorm.freeze(network()).train()
    expected = network().eval()(images())
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected)
    exported = torch.export.export(model.eval(), (images(),))
    torch.testing.assert_close(exported.module()(images()), expected)


def test_recalibrate_leaves_a_frozen_layer_alone():
    model = batchnorm.freeze(network(), "1").eval()
    before = state(model)
    batchnorm.recalibrate(model, [images()])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[3].running_mean, before["3.running_mean"])
    assert batchnorm.changes(model).left[0].what == "frozen by freeze"
    assert not model.train()[1].training


class TestNoUpdate:
    @pytest.mark.parametrize("norm", [LAYERS[0], LAYERS[1], LAYERS[3]])
    def test_the_batch_normalizes_and_the_statistics_stay(self, norm):
        model, twin = network(norm).train(), network(norm).train()
        before = state(model)
        with batchnorm.no_update(model) as same:
            assert same is model
            x = images()
            torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)
            model(torch.full_like(x, float("nan")))
        assert_state(model, before)
        model(images(2))
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])

    def test_evaluation_is_as_ever(self):
        model = network().eval()
        expected = model(images())
        with batchnorm.no_update(model):
            torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)

    def test_it_ends_with_an_exception_and_nests(self):
        model = network()
        with (
            pytest.raises(KeyboardInterrupt),
            batchnorm.no_update(model),
            batchnorm.no_update(model),
        ):
            raise KeyboardInterrupt
        assert model[1].track_running_stats


def test_parameters_of_norms_do_not_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(5), nn.Linear(5, 2))
    model[3].weight.requires_grad_(False)
    decaying, kept = batchnorm.param_groups(model, 1e-4)
    assert decaying["weight_decay"] == 1e-4
    assert kept["weight_decay"] == 0.0
    assert [id(p) for p in decaying["params"]] == [
        id(model[0].weight),
        id(model[0].bias),
        id(model[3].bias),
    ]
    assert [id(p) for p in kept["params"]] == [id(p) for i in (1, 2) for p in model[i].parameters()]
    decaying, kept = batchnorm.param_groups(model, 1e-4, biases=True)
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight)]
    torch.optim.SGD(batchnorm.param_groups(model, 1e-4), lr=0.1)


def test_a_shared_parameter_is_in_one_group_once():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    model.again = model[0]
    groups = batchnorm.param_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == 3
    assert batchnorm.param_groups(nn.Linear(2, 2), 0.1)[0]["weight_decay"] == 0.1


def test_where_timms_unfreeze_loses_momentum_and_counter_ours_does_not():
    from timm.utils.model import freeze_batch_norm_2d, unfreeze_batch_norm_2d

    theirs, ours = network(), network()
    for model in (theirs, ours):
        model[1].num_batches_tracked.fill_(41)
    theirs = unfreeze_batch_norm_2d(freeze_batch_norm_2d(theirs))
    batchnorm.unfreeze(batchnorm.freeze(ours))
    assert (theirs[1].momentum, theirs[1].num_batches_tracked.item()) == (0.1, 0)
    assert (ours[1].momentum, ours[1].num_batches_tracked.item()) == (0.3, 41)


@pytest.mark.parametrize("of", [nn.BatchNorm2d, batchnorm.BatchNorm2d])
def test_update_once_at_a_checkpoint(of):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), of(4), nn.ReLU())
    twin = copy.deepcopy(block)
    x = torch.randn(8, 3, 6, 6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    once = functools.partial(batchnorm.update_once, block)
    checkpoint(block, inputs[0], use_reentrant=False, context_fn=once).square().sum().backward()
    twin(inputs[1]).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for mine, other in zip(block.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert block[1]._buffers.keys() == twin[1]._buffers.keys()


def test_no_update_holds_for_a_frozen_layer_that_updates():
    layer = batchnorm.freeze(nn.BatchNorm2d(3), update=True).train()
    before = layer.running_mean.clone()
    with batchnorm.no_update(layer):
        layer(torch.randn(4, 3, 2, 2))
    assert torch.equal(layer.running_mean, before)
    layer(torch.randn(4, 3, 2, 2))
    assert not torch.equal(layer.running_mean, before)


VERBS = {
    "recalibrate": lambda model: batchnorm.recalibrate(model, []),
    "freeze": batchnorm.freeze,
    "unfreeze": batchnorm.unfreeze,
    "no_update": lambda model: batchnorm.no_update(model).__enter__(),
    "masked": lambda model: batchnorm.masked(model, torch.tensor([2])).__enter__(),
    "fold": batchnorm.fold,
    "convert": batchnorm.convert,
    "summary": batchnorm.summary,
}


@pytest.mark.parametrize(("verb", "call"), VERBS.items(), ids=VERBS)
def test_what_is_no_model_is_said(verb, call):
    with pytest.raises(BatchNormError, match=rf"^{verb} got a dict and wants a torch\.nn\.Module"):
        call({"state": 1})


def test_what_is_no_pattern_is_said():
    with pytest.raises(BatchNormError, match="got the pattern 3 and wants a name"):
        batchnorm.freeze(nn.BatchNorm2d(3), 3)
