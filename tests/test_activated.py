"""BatchNormAct1d, 2d, 3d: the norm, the sum and the activation, whatever is done to the norm."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import batchnorm
from batchnorm import BatchNormError
from batchnorm.kernels.activations import ACTIVATIONS
from tolerance import bound

KINDS = {
    batchnorm.BatchNormAct1d: (8, 3),
    batchnorm.BatchNormAct2d: (4, 3, 5, 6),
    batchnorm.BatchNormAct3d: (2, 3, 3, 4, 5),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_norm_then_the_sum_then_the_activation(kind, activation, training):
    torch.manual_seed(0)
    layer = kind(3, activation=activation).train(training)
    twin = copy.deepcopy(layer.norm).double()
    x, residual = torch.randn(KINDS[kind]), torch.randn(KINDS[kind])
    for behind in (None, residual):
        leaf, other = (v.clone().requires_grad_() for v in (x, x.double()))
        y = layer(leaf, behind)
        z = F.batch_norm(
            other, twin.running_mean, twin.running_var, twin.weight, twin.bias, training
        )
        z = z if behind is None else z + behind
        z = z if activation is None else ACTIVATIONS[activation](z)
        (dx,) = torch.autograd.grad(y.sin().sum(), leaf)
        (exact,) = torch.autograd.grad(z.sin().sum(), other)
        allowed = bound(torch.float32, x.numel() // 3, 8.0)
        torch.testing.assert_close(y.double(), z, rtol=0, atol=allowed)
        torch.testing.assert_close(dx.double(), exact, rtol=0, atol=4 * allowed)
    for name in ("running_mean", "running_var"):
        mine, exact = getattr(layer.norm, name), getattr(twin, name)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.BatchNormAct2d(4, activation="silu"))
    model(torch.randn(8, 3, 8, 8) + 2)
    return model


@pytest.mark.parametrize(
    "change",
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        lambda model: batchnorm.convert(model, to="torch"),
        lambda model: batchnorm.convert(model, fuse=True),
        batchnorm.fold,
        batchnorm.freeze,
        fx.symbolic_trace,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.compile(model, backend="eager", fullgraph=True),
    ],
)
def test_what_is_done_to_the_norm_leaves_the_activation(change):
    model, x = network().eval(), torch.randn(4, 3, 8, 8)
    expected = model(x)
    torch.testing.assert_close(
        change(copy.deepcopy(model)).eval()(x), expected, rtol=1e-4, atol=1e-5
    )


def test_the_norm_s_calls_are_seen():
    model, x, seen = network().eval(), torch.randn(4, 3, 8, 8), []
    expected = model(x)
    with model[1].norm.register_forward_hook(lambda *_: seen.append("own")):
        assert torch.allclose(model(x), expected, atol=1e-6)
    note = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    with note:
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert seen == ["own", "Conv2d", "BatchNorm2d", "BatchNormAct2d", "Sequential"]
    batchnorm.recalibrate(model, [torch.randn(64, 3, 8, 8)])
    assert int(model[1].norm.num_batches_tracked) == 1


def test_a_plain_norm_s_state_dict_loads():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain[1].running_mean.normal_()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.BatchNormAct2d(4))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[1].norm.running_mean, plain[1].running_mean)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert "'relu'" in repr(model)


def test_what_it_does_not_take_is_said():
    with pytest.raises(BatchNormError, match="got activation='swish' and wants one of relu"):
        batchnorm.BatchNormAct2d(4, activation="swish")
    layer = batchnorm.BatchNormAct2d(3)
    with pytest.raises(BatchNormError, match="expected 4D input"):
        layer(torch.randn(4, 3))
    with pytest.raises(BatchNormError, match="residual"):
        layer(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 5))
