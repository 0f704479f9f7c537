"""What the tests of several processes run in each of them: `python -m torch.distributed.run ranks.py NAME`.

Each function runs on every rank; what it finds wrong it raises.
"""

import contextlib
import copy
import functools
import io
import os
import sys
import warnings
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import reference

warnings.simplefilter("error")
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
DEVICE = torch.device(
    f"cuda:{RANK}" if torch.cuda.device_count() >= RANKS else "cpu"
)  # the same tests where there are GPUs
SIZES = {"even": (4, 4, 4), "uneven": (5, 2, 3), "empty": (4, 0, 3), "one": (1, 1, 1)}


def share_of(joined, kind):
    """This rank's rows of the joined batch; the joined batch is cut to what the ranks hold."""
    sizes = SIZES[kind][:RANKS]
    start = sum(sizes[:RANK])
    return joined[: sum(sizes)], slice(start, start + sizes[RANK])


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def close(mine, other, tolerance=1e-10):
    torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=tolerance)


def summed(value):
    total = value.clone()
    distributed.all_reduce(total)
    return total


def one_process(kind, dtype, *, masked=False, momentum=0.1):
    """Forward, backward and running statistics, beside the reference on the joined batch."""
    layer = batchnorm.SyncBatchNorm(3, momentum=momentum).to(DEVICE, dtype)
    nn.init.uniform_(layer.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
    joined, mine = share_of(randn(12, 3, 4, 2) * 2 + 3, kind)
    dy = randn(12, 3, 4, 2, seed=1)[: len(joined)]
    joined, dy = joined.to(dtype), dy.to(dtype)
    keep = torch.ones(len(joined), 4, 2, dtype=torch.bool, device=DEVICE)
    if masked:
        keep = randn(12, 4, 2, seed=2)[: len(joined)] > 0
        if kind != "empty":  # where another process has nothing
            keep[: SIZES[kind][0]] = False  # nothing is left on the first rank
    packed = [t.double().movedim(1, -1)[keep] for t in (joined, dy)]
    wide = joined.double() if not masked else packed[0]
    wide_dy = dy.double() if not masked else packed[1]
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    y, mean, var = reference.forward(wide, weight, bias)
    dx, dweight, dbias = reference.backward(wide_dy, wide, weight)
    count = wide.numel() // 3
    share = 1.0 if momentum is None else momentum
    running = reference.update_running(
        torch.zeros_like(mean), torch.ones_like(var), mean, var, count, share
    )
    x = joined[mine].clone().requires_grad_()
    found = layer(x, mask=keep[mine]) if masked else layer(x)
    found.backward(dy[mine])
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    if masked:
        laid = [torch.zeros(*keep.shape, 3, dtype=torch.float64, device=DEVICE) for _ in range(2)]
        for each, values in zip(laid, (y, dx), strict=True):
            each[keep] = values
        y, dx = (each.movedim(-1, 1) for each in laid)
    close(found.detach(), y[mine], tolerance)
    close(x.grad, dx[mine], tolerance)
    close(summed(layer.weight.grad.double()), dweight, tolerance * count**0.5)
    close(summed(layer.bias.grad.double()), dbias, tolerance * count**0.5)
    close(layer.running_mean, running[0], tolerance)
    close(layer.running_var, running[1], tolerance)
    assert layer.num_batches_tracked == 1


def equal_to_one_process():
    for kind in SIZES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            one_process(kind, dtype)
        one_process(kind, torch.float64, masked=True)
    one_process("uneven", torch.float64, momentum=None)


def every_rank_has_the_same_bits():
    layer = batchnorm.SyncBatchNorm(3).to(DEVICE)
    for seed in range(3):
        joined, mine = share_of(randn(12, 3, 4, seed=seed, dtype=torch.float32) + 100, "uneven")
        layer(joined[mine])
    everyone = [torch.empty_like(layer.running_var) for _ in range(RANKS)]
    distributed.all_gather(everyone, layer.running_var)
    assert all(torch.equal(each, everyone[0]) for each in everyone)


def axes_and_channels_that_are_masked():
    joined, mine = share_of(randn(12, 4, 3) + 1, "uneven")
    keep = randn(12, 4, 3, seed=3)[: len(joined)] > 0
    twin = batchnorm.BatchNorm(3).double().to(DEVICE)
    expected = twin(joined, mask=keep, axis=-1)
    layer = batchnorm.SyncBatchNorm(3).double().to(DEVICE)
    close(layer(joined[mine], mask=keep[mine], axis=-1), expected[mine])
    close(layer.running_var, twin.running_var)


def groups():
    """Two groups of one and of the rest: each is a batch of its own."""
    members = [[0], list(range(1, RANKS))]
    mine = [distributed.new_group(ranks) for ranks in members][RANK > 0]
    layer = batchnorm.SyncBatchNorm(3, process_group=mine).double().to(DEVICE)
    whole, rows = share_of(randn(12, 3, 4), "uneven")
    y = layer(whole[rows])
    first = SIZES["uneven"][0]
    joined = whole[:first] if RANK == 0 else whole[first:]
    expected = reference.forward(joined)[0]
    at = slice(None) if RANK == 0 else slice(rows.start - first, rows.stop - first)
    close(y.detach(), expected[at])
    twin = copy.deepcopy(layer)
    assert twin.process_group is mine
    twin(whole[rows])


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)
    ).to(DEVICE, torch.float64)


def under_ddp():
    """Three steps of a converted model under DDP are those of one process with the joined batch."""
    twin, model = network(), network()
    batchnorm.convert(model, "sync")
    parallel = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    for step in range(3):
        joined, mine = share_of(randn(12, 2, 8, 8, seed=step), "uneven")
        for optimizer in optimizers:
            optimizer.zero_grad()
        # DDP averages over the ranks: the joined batch's mean is the sum of shares, times the ranks
        (parallel(joined[mine]).square().sum() * RANKS / len(joined)).backward()
        (twin(joined).square().sum() / len(joined)).backward()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        close(mine, other.double(), 1e-8)
    batchnorm.convert(model, "torch")
    assert type(model[1]) is nn.BatchNorm2d
    x = randn(2, 2, 8, 8)
    close(model.eval()(x), twin.eval()(x), 1e-8)


def compiled_and_saved():
    warnings.simplefilter("default")  # the compiler's own, about gradients of what is no leaf
    layer = batchnorm.SyncBatchNorm(3).to(DEVICE)
    twin = copy.deepcopy(layer)
    x = randn(4, 3, 5, seed=RANK, dtype=torch.float32)
    compiled = torch.compile(nn.Sequential(nn.Tanh(), layer), backend="aot_eager")
    close(compiled(x), nn.Sequential(nn.Tanh(), twin)(x).double(), 1e-5)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    nn.BatchNorm1d(3).load_state_dict(torch.load(buffer, weights_only=True))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    close(layer.running_var, layer.running_var.double())


def one_value_in_all_processes():
    """One rank has one value per channel and the others none: torch's error, or the choice."""
    layer = batchnorm.SyncBatchNorm(3, momentum=None).to(DEVICE, torch.float64)
    model = nn.Sequential(layer)
    layer(randn(4, 3, seed=RANK))
    before = copy.deepcopy(layer.state_dict())
    x = randn(1 if RANK == RANKS - 1 else 0, 3)
    with expected("Expected more than 1 value per channel when training, got one in all processes"):
        layer(x)
    batchnorm.single_values(model)
    y = model(x.requires_grad_())
    close(y.detach(), copy.deepcopy(model).eval()(x).detach(), 0)
    y.sum().backward()
    close(x.grad, (layer.weight * (layer.running_var + layer.eps).rsqrt()).detach().expand_as(x))
    with batchnorm.one_update(model):
        close(model(x).detach(), y.detach(), 0)
    for mine, other in zip(layer.state_dict().values(), before.values(), strict=True):
        assert torch.equal(mine, other)
    model(randn(1, 3, seed=RANK)).sum().backward()  # one value each: several together
    assert layer.num_batches_tracked == 2
    batchnorm.single_values(model, "error")
    with expected("'SyncBatchNorm number 1'"):
        model(x)


def under_a_checkpoint():
    """The recomputation is a call on every rank; with update_once gradients and statistics are the same."""
    layers = [nn.Linear(3, 3), batchnorm.SyncBatchNorm(3), nn.Tanh()]
    torch.manual_seed(0)
    model = nn.Sequential(*layers).to(DEVICE, torch.float64)
    twin = copy.deepcopy(model)
    xs = [randn(4 + RANK, 3, seed=RANK).requires_grad_() for _ in range(2)]
    once = functools.partial(batchnorm.update_once, model)
    checkpoint(model, xs[0], use_reentrant=False, context_fn=once).pow(3).sum().backward()
    twin(xs[1]).pow(3).sum().backward()
    close(xs[0].grad, xs[1].grad)
    for mine, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        close(mine, other.double())


def a_batch_that_moves_nothing_does_not_count():
    """momentum=None, the plain average: a mask, or nobody's samples, leave nothing."""
    layer = batchnorm.SyncBatchNorm(3, momentum=None).to(DEVICE, torch.float64)
    twin = copy.deepcopy(layer)
    nothing = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    layer(randn(4, 3), mask=nothing)
    assert layer.num_batches_tracked == 0
    for seed in range(3):
        x = randn(4, 3, seed=seed + 10 * RANK)
        layer(x)
        twin(x)
        layer(x * 100, mask=nothing)
        layer(x[:0])
    assert layer.num_batches_tracked == 3
    for mine, other in zip(layer.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)


def buffers_made_equal():
    for source in (None, 0, RANKS - 1):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2)).to(DEVICE)
        for layer in (model[0], model[1]):
            layer.running_mean.fill_(RANK)
            layer.running_var.fill_(RANK + 1)
            layer.num_batches_tracked.fill_(RANK)
        batchnorm.synchronize_buffers(model, source)
        ranks = torch.arange(RANKS, dtype=torch.float64)
        mean, var = (ranks.mean(), (ranks + 1).mean() + ranks.var(correction=0))
        if source is not None:
            mean, var = torch.tensor(float(source)), torch.tensor(source + 1.0)
        for layer in (model[0], model[1]):
            close(layer.running_mean.cpu(), mean.double().expand(len(layer.weight)), 1e-6)
            close(layer.running_var.cpu(), var.double().expand(len(layer.weight)), 1e-6)
            assert layer.num_batches_tracked == (RANKS - 1 if source is None else source)
        assert "made equal" in str(batchnorm.changes(model))
    other = nn.Sequential(nn.BatchNorm1d(3 if RANK else 4)).to(DEVICE)
    with expected("other layers than rank"):
        batchnorm.synchronize_buffers(other)


@contextlib.contextmanager
def expected(words):
    with pytest.raises(batchnorm.BatchNormError) as caught:
        yield
    assert words in str(caught.value), caught.value


def another_layer():
    """A branch that depends on the rank: the last rank leaves out the first layer."""
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(3))).to(DEVICE)
    batchnorm.convert(model, "sync")
    x = randn(4, 3, dtype=torch.float32)
    model(x)
    skip = RANK == RANKS - 1
    with expected("'1'" if skip else "'0'"):
        model[1:](x) if skip else model(x)


def another_pass():
    """The last rank goes forward once more where the others go backward."""
    model = batchnorm.convert(nn.Sequential(nn.BatchNorm1d(3)).to(DEVICE), "sync")
    x = randn(4, 3, dtype=torch.float32).requires_grad_()
    y = model(x)
    with expected("backward pass"):
        model(x) if RANK == RANKS - 1 else y.sum().backward()


def another_width():
    """The layers differ in size: what arrives is no header, or does not fit; one process says so."""
    model = nn.ModuleList(nn.BatchNorm1d(n) for n in (3, 40)).to(DEVICE)
    batchnorm.convert(model, "sync")
    which = int(RANK == RANKS - 1)
    model[which](randn(4, (3, 40)[which], dtype=torch.float32))


def one_rank_does_not_come():
    model = batchnorm.convert(nn.Sequential(nn.BatchNorm1d(3)).to(DEVICE), "sync")
    x = randn(4, 3, dtype=torch.float32)
    model(x)
    if RANK == 0:
        with expected("SyncBatchNorm '0', in the forward pass of its call 2, did not hear"):
            model(x)


if __name__ == "__main__":
    distributed.init_process_group(
        "nccl" if DEVICE.type == "cuda" else "gloo", timeout=timedelta(seconds=20)
    )
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    globals()[sys.argv[1]]()
    print(f"rank {RANK} of {RANKS}: done", flush=True)  # noqa: T201  # for the test
    os._exit(0)  # a group that lost a member waits for it at exit
