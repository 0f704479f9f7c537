"""Memory of large outputs: it comes back when the last of its users ends, and not before."""

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch

import batchnorm
from batchnorm.errors import BatchNormError
from batchnorm.kernels import native
from processes import python

SIZES = (2, 64, 256, 256)  # 32 MiB in float32
BYTES = 32 * 2**20
GIB = 2**30


@pytest.fixture(autouse=True)
def limit():
    before = native._cpu.most_kept()
    batchnorm.reuse_memory(0)
    batchnorm.reuse_memory(GIB)
    yield
    gc.collect()
    batchnorm.reuse_memory(0)
    batchnorm.reuse_memory(before)


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return torch.randn(SIZES)


def normalized(x, **kwargs):
    return batchnorm.batch_norm(x, None, None, training=True, **kwargs)


def kept():
    return native._cpu.kept()


def test_an_output_takes_what_an_earlier_one_left(x):
    y = normalized(x)
    expected, place = y.clone(), y.data_ptr()
    assert kept() == 0
    del y
    assert kept() == BYTES
    again = normalized(x)
    assert again.data_ptr() == place
    assert kept() == 0
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_dtype_and_strides_are_the_inputs(x, dtype, last):
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.cat([x, x]).to(dtype).contiguous(memory_format=form)
    y = normalized(x)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())
    assert not y.untyped_storage().resizable()  # it is of ours
    batchnorm.reuse_memory(0)
    assert torch.equal(normalized(x), y)


def test_smaller_ones_are_torchs(x):
    y = normalized(x[:, :, :255])
    assert y.untyped_storage().resizable()


def test_a_view_keeps_it(x):
    y = normalized(x)
    part = y[1, 3:5]
    expected = part.clone()
    del y
    assert kept() == 0
    other = normalized(x.neg())
    assert torch.equal(part, expected)
    assert other.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()
    del part
    assert kept() == BYTES


def test_a_numpy_array_keeps_it(x):
    array = normalized(x).numpy()
    expected = array[0, 0].copy()
    normalized(x.neg())
    assert (array[0, 0] == expected).all()
    del array
    gc.collect()
    assert kept() == 2 * BYTES


def test_a_saved_variable_keeps_it(x):
    leaf = x.clone().requires_grad_()
    scale = torch.full((), 2.0, requires_grad=True)
    y = normalized(leaf)
    expected = y.detach().sum()
    z = (y * scale).sum()  # saves y
    del y
    with torch.no_grad():
        normalized(x.neg())  # would write over it
    (gradient,) = torch.autograd.grad(z, scale)
    torch.testing.assert_close(gradient, expected)


def test_gradients_are_the_same(x):
    def gradients():
        torch.manual_seed(1)
        leaf, residual = (v.requires_grad_() for v in (x.clone(), torch.randn(SIZES)))
        weight = torch.rand(64).requires_grad_()
        for _ in range(2):  # the second in the first one's memory
            y = batchnorm.batch_norm(
                leaf, None, None, weight, None, True, residual=residual, activation="gelu"
            )
            found = torch.autograd.grad(y.square().sum(), [leaf, residual, weight])
        return found

    with_it = gradients()
    assert not with_it[0].untyped_storage().resizable()
    batchnorm.reuse_memory(0)
    for mine, theirs in zip(with_it, gradients(), strict=True):
        assert torch.equal(mine, theirs)


def test_threads_share_it(x):
    expected = [normalized(x * k + k) for k in range(4)]
    right = []

    def work(k):
        right.append(all(torch.equal(normalized(x * k + k), expected[k]) for _ in range(5)))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert not worker.is_alive()
    assert right == [True] * 4


FORK = """
import os, threading, torch, batchnorm
from batchnorm.kernels import native
x = torch.randn(2, 64, 256, 256)
make = lambda: batchnorm.batch_norm(x, None, None, training=True)
y, idle = make(), make()
first = y[0, 0].numpy().copy()
del idle
over = threading.Event()
def busy():  # somebody may hold the lock at the fork
    while not over.is_set():
        native._cpu.kept()
worker = threading.Thread(target=busy)
worker.start()
for _ in range(20):
    if (child := os.fork()) == 0:
        mine = native._cpu.kept() == 0  # what is idle is the parent's
        again = make()
        mine = mine and abs(again.numpy()[0, 0] - first).max() < 1e-5
        y.numpy()[:] = 0  # of the child's copy
        del again
        os._exit(0 if mine and native._cpu.kept() == 32 * 2**20 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
over.set()
worker.join()
assert (y[0, 0].numpy() == first).all() and native._cpu.kept() == 32 * 2**20
print("right")
"""


@pytest.mark.filterwarnings("ignore")
def test_a_forked_child_has_its_own():
    found = python(FORK)
    assert found.stdout.strip() == "right", found.stderr


def test_no_more_is_kept_than_the_limit(x):
    batchnorm.reuse_memory(2 * BYTES)
    several = [normalized(x) for _ in range(4)]
    place = several[3].data_ptr()
    while several:
        del several[0]
        assert kept() <= 2 * BYTES
    assert kept() == 2 * BYTES
    batchnorm.reuse_memory(BYTES)  # the oldest goes
    assert kept() == BYTES
    assert normalized(x).data_ptr() == place
    larger = normalized(torch.cat([x, x]))
    del larger  # larger than the limit
    assert kept() == BYTES


def test_a_block_that_would_be_half_empty_is_not_taken(x):
    twice, once = normalized(torch.cat([x, x])), normalized(x)
    del twice
    y = normalized(x)
    assert kept() == 2 * BYTES
    del y, once
    assert kept() == 4 * BYTES


SIZES_IN_TURN = """
import torch, batchnorm
from batchnorm.kernels import native
x = torch.randn(2, 64, 512, 256)
for size in (512, 400, 300, 450, 350, 256) * 2:
    y = batchnorm.batch_norm(x[:, :, :size].contiguous(), None, None, training=True)
    print(y.untyped_storage().nbytes() + native._cpu.kept())
    del y
"""


def test_with_what_is_used_it_is_never_more_than_the_most_that_was(x):
    # or every size would leave a block behind
    del x
    found = [int(line) for line in python(SIZES_IN_TURN).stdout.split()]
    assert len(found) == 12
    assert max(found) <= found[0] + 2**21  # rounded up to a huge page


def test_the_switch(x):
    batchnorm.reuse_memory(0)
    y = normalized(x)
    assert y.untyped_storage().resizable()  # torch's own
    del y
    assert kept() == 0


@pytest.mark.parametrize(
    ("given", "found"), [("0", 0), ("1", 0), ("123456789", 123456789), ("", GIB)]
)
def test_the_environment_sets_it(given, found):
    code = "import batchnorm; from batchnorm.kernels import native; print(native._cpu.most_kept())"
    assert int(python(code, BATCHNORM_MEMORY=given).stdout) == found


def test_a_wrong_environment_is_said():
    message = "the environment variable BATCHNORM_MEMORY got '1 GB' and wants the bytes to keep"
    assert message in python("import batchnorm", BATCHNORM_MEMORY="1 GB").stderr


def test_a_limit_of_numpy_s(x):
    batchnorm.reuse_memory(np.int64(2 * BYTES))
    del x
    assert native._cpu.most_kept() == 2 * BYTES


@pytest.mark.parametrize("limit", [-1, 1.5, "1G", 2**63, True])
def test_a_wrong_limit_is_said(limit):
    with pytest.raises(BatchNormError, match=r"reuse_memory got .* a whole number from 0"):
        batchnorm.reuse_memory(limit)


def test_an_exception_gives_it_back(x):
    leaf = x.clone().requires_grad_()

    def stop(_):
        raise KeyError("stop")

    y = normalized(leaf)
    y.register_hook(stop)
    with pytest.raises(KeyError, match="stop"):
        y.sum().backward()
    del y
    gc.collect()
    assert kept() == BYTES
    assert leaf.grad is None


def test_a_tensor_that_nobody_takes_gives_it_back():
    made = native._cpu.empty(0, SIZES, torch.empty(SIZES, device="meta").stride())
    assert kept() == 0
    del made
    assert kept() == BYTES


@pytest.mark.parametrize(
    ("sizes", "strides", "message"),
    [
        ((2,), (1, 1), "as many strides"),
        ((2, 0), (1, 1), "must be positive"),
        ((2,), (-1,), "no stride negative"),
        ((2**40,), (2**40,), "64 bits"),
        ((2**61,), (1,), "64 bits"),
    ],
)
def test_sizes_are_checked(sizes, strides, message):
    with pytest.raises(ValueError, match=message):
        native._cpu.empty(0, sizes, strides)


def test_without_it_torchs_is_taken(x, monkeypatch):
    assert native._cpu.empty(0, (2**48,), (1,)) is None  # a petabyte
    monkeypatch.setattr(native._cpu, "empty", lambda *_: None)
    assert normalized(x).untyped_storage().resizable()


def test_what_else_is_done_with_a_tensor(x):
    y = normalized(x)
    assert not y.is_pinned()
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone()):
        assert torch.equal(other, y)
        assert other.untyped_storage().resizable()  # torch's own
    expected = y.clone()
    assert torch.equal(y.share_memory_(), expected)
    y = normalized(x)
    assert y.resize_(64, 256).shape == (64, 256)  # smaller: as ever
    with pytest.raises(RuntimeError, match="resiz"):
        y.resize_(*SIZES, 2)  # larger: it is not torch's to move
    with torch.inference_mode():
        assert normalized(x).is_inference()
