"""The native kernels as they are called: by autograd, by threads and children, and by mistake."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import BatchNormError
from batchnorm.kernels import native
from batchnorm.kernels.activations import ACTIVATIONS
from kernel_fixtures import however_few_values, threads_kept  # noqa: F401  # two fixtures
from processes import python


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_gradcheck_and_double_backward(activation, training, behind):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    running = (torch.zeros(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64))

    def function(x, weight, bias, *residual):
        statistics = [v.clone() for v in running]
        return batchnorm.batch_norm(
            x, *statistics, weight, bias, training,
            residual=residual[0] if residual else None, activation=activation,
        )  # fmt: skip

    inputs = [randn(4, 3, 2), randn(3), randn(3)] + ([randn(4, 3, 2)] if behind else [])
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_one_tensor_may_be_input_and_residual():
    x = torch.randn(6, 3, 4, dtype=torch.float64).requires_grad_()

    def function(x):
        return batchnorm.batch_norm(x, None, None, training=True, residual=x, activation="silu")

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, residual = torch.randn(5, 3, 4), torch.ones(3), torch.randn(5, 3, 4)
    for which in range(3):
        for activation in (None, "relu", "silu"):
            leaves = [
                t.clone().requires_grad_(k == which) for k, t in enumerate((x, weight, residual))
            ]
            y = batchnorm.batch_norm(
                leaves[0],
                None,
                None,
                leaves[1],
                training=True,
                residual=leaves[2],
                activation=activation,
            )
            y.sum().backward()
            assert [leaf.grad is not None for leaf in leaves] == [k == which for k in range(3)]


def test_the_memory_kept_for_backward_is_the_least():
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)

    def kept(function):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function()
        return sum(storages.values()) // (x.numel() * 4), y

    for activation, large in ((None, 1), ("relu", 1), ("sigmoid", 2), ("silu", 1), ("gelu", 1)):
        count, _ = kept(
            lambda a=activation: batchnorm.batch_norm(
                x, None, None, weight, bias, True, activation=a
            )
        )
        assert count == large, activation
    assert kept(lambda: F.silu(F.batch_norm(x, None, None, weight, bias, True)))[0] == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batchnorm.BatchNorm2d(4), nn.ReLU())
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    checkpoint(model, inputs[0], use_reentrant=reentrant).sum().backward()
    twin(inputs[1]).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_batched_gradients_go_through_torchs_operators():
    x = torch.randn(6, 3, requires_grad=True)
    y = batchnorm.batch_norm(x, None, None, training=True, activation="sigmoid")
    directions = torch.randn(4, 6, 3)
    (found,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
    for each, direction in zip(found, directions, strict=True):
        (alone,) = torch.autograd.grad(y, x, direction, retain_graph=True)
        torch.testing.assert_close(each, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own
def test_forward_mode_gradients_are_torchs():
    x, tangent = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)

    def function(x):
        return batchnorm.batch_norm(x, None, None, training=True)

    _, found = torch.func.jvp(function, (x,), (tangent,))
    near = (function(x + 1e-6 * tangent) - function(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(found, near, rtol=1e-6, atol=1e-6)


def test_a_weight_that_was_changed_before_backward_is_an_error():
    x, weight = torch.randn(6, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    y = batchnorm.batch_norm(x, None, None, weight, training=True)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("threads_kept")
def test_several_python_threads_at_once():
    torch.set_num_threads(2)
    x = [torch.randn(16, 8, 40, 40, requires_grad=True) for _ in range(4)]
    expected = [F.batch_norm(each.detach(), None, None, training=True) for each in x]
    wrong = []

    def work(place):
        for _ in range(10):
            y = batchnorm.batch_norm(x[place], None, None, training=True)
            y.sum().backward()
            if not torch.allclose(y, expected[place], atol=1e-5):
                wrong.append(place)

    workers = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
    assert not wrong


FORK = """
import os, torch, batchnorm
x = torch.randn(16, 8, 60, 60)
y = batchnorm.batch_norm(x, None, None, training=True)  # the pool runs
if (child := os.fork()) == 0:
    again = batchnorm.batch_norm(x, None, None, training=True)
    # torch's own operators wait for the parent's pool, which the child does not have
    os._exit(0 if abs(again.numpy() - y.numpy()).max() < 1e-5 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.filterwarnings("ignore")
def test_a_forked_child_computes_alone():
    assert python(FORK).stdout.strip() == "0"


def test_a_default_device_is_not_that_of_the_statistics():
    layer, x = batchnorm.BatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    with torch.device("meta"):
        y = layer(x)
        y.backward(torch.ones_like(y))
        mean, _ = native.moments(x.detach())
    assert {y.device.type, x.grad.device.type, mean.device.type} == {"cpu"}


def test_without_kernels_torchs_operator_runs():
    found = python("import batchnorm; print(batchnorm.backend())", BATCHNORM_BACKEND="torch")
    assert found.stdout.strip() == "torch"


def test_an_instruction_set_that_is_not_there_is_said():
    found = python("import batchnorm", BATCHNORM_ISA="quantum")
    assert "BATCHNORM_ISA=quantum, which this processor or this build does not have" in found.stderr
    assert "BatchNormError" in found.stderr
    assert issubclass(BatchNormError, ValueError)


GOOD = (0, False, 2, 3, 4, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9, False, 2, 3, 4, 1), "dtype"),
        ((0, False, 0, 3, 4, 1), "positive"),
        ((0, False, 2, -3, 4, 1), "positive"),
        ((0, True, 2, 3, 4, 1), "rows have no plane"),
        ((0, False, 2**40, 2**40, 4, 1), "64 bits"),
    ],
)
def test_sizes_are_checked_before_an_address_is_used(sizes, message):
    statistics = torch.empty(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        native._cpu.moments(*sizes, 16, statistics.data_ptr())


def test_an_address_that_is_missing_is_said():
    with pytest.raises(ValueError, match="no address of x or statistics"):
        native._cpu.moments(*GOOD, 0, 0)
