"""SyncBatchNorm in real processes, beside one process with the joined batch."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm
from batchnorm import BatchNormError, reference
from batchnorm.variants import sync

RANKS = Path(__file__).parent / "ranks.py"


def processes(name, count=2, patience=0.1, **environment):
    """Run a function of ranks.py in so many processes.

    patience: seconds between two looks for a process that failed; the others are ended then.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1",
        f"--nproc-per-node={count}", f"--monitor-interval={patience}", str(RANKS), name,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def assert_done(run, count):
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    assert all(f"rank {rank} of {count}: done" in said for rank in range(count)), said


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_it_is_one_process_with_the_joined_batch(count, backend):
    environment = {"BATCHNORM_BACKEND": "torch"} if backend == "torch" else {}
    assert_done(processes("equal_to_one_process", count, **environment), count)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("every_rank_has_the_same_bits", 3),
        ("axes_and_channels_that_are_masked", 2),
        ("groups", 3),
        ("under_ddp", 2),
        ("compiled_and_saved", 2),
        ("buffers_made_equal", 3),
        ("one_value_in_all_processes", 2),
        ("under_a_checkpoint", 2),
        ("a_batch_that_moves_nothing_does_not_count", 2),
    ],
)
def test_in_several_processes(name, count):
    assert_done(processes(name, count), count)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["another_layer", "another_pass", "one_rank_does_not_come"])
def test_calls_that_differ_end_in_an_error_that_names_the_layer(name, count):
    if name == "another_layer":
        count = 2  # the third process would wait for the first two, which have raised
    assert_done(processes(name, count), count)


def test_layers_of_other_sizes_end_too():
    """gloo ends the process whose message is too long; the other names the layer."""
    # the one that gloo ends is gone at once, and the other has to be let speak
    run = processes("another_width", patience=5)
    assert run.returncode != 0
    # it compares what came, or finds the other one gone: which comes first is chance
    assert re.search(r"SyncBatchNorm '1'( is|,) in the forward pass of its call 1", run.stderr)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    st.floats(-1e6, 1e6),
    st.integers(0, 100),
)
def test_merged_moments_are_those_of_the_joined_batch(sizes, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, generator=generator, dtype=torch.float64) + mean for n in sizes]
    moments = [torch.stack(sync.verbs.moments(part)) for part in parts]
    count, merged, squares = sync.merge(torch.stack(moments))
    joined = torch.cat(parts)
    exact_mean, exact_var = reference.moments(joined)
    assert count.tolist() == [len(joined)] * 3
    torch.testing.assert_close(merged, exact_mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(squares, exact_var * len(joined), rtol=1e-8, atol=1e-8)


def test_gradcheck_as_if_another_process_sent_something():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    weight, bias = torch.rand(2, 2, generator=generator, dtype=torch.float64)
    keep = torch.rand(5, 1, 3, generator=generator) < 0.7

    def alone(direction, mine):
        del direction
        return mine[None]

    def function(x, weight, bias):
        return sync._Synchronised.apply(x, weight, bias, keep, 1e-5, alone)[0]

    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(function, inputs)
    (dx,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class TestInOneProcess:
    def test_it_is_the_plain_layer(self):
        layer, twin = batchnorm.SyncBatchNorm(3), batchnorm.BatchNorm(3)
        x = torch.randn(4, 3, 5)
        for training in (True, False):
            assert torch.equal(layer.train(training)(x), twin.train(training)(x))
        assert torch.equal(layer.running_var, twin.running_var)
        assert list(layer.state_dict()) == list(twin.state_dict())
        with pytest.raises(BatchNormError, match="more than 1 value"):
            layer.train()(x[:1, :, :1])

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies(self, twin):
        model = batchnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), "sync")
        other = twin(model)
        assert other[0].label == "0"
        batchnorm.convert(other, "torch")
        assert type(other[0]) is nn.BatchNorm1d
        assert "_before" not in vars(other[0])
        assert type(model[0]) is batchnorm.SyncBatchNorm
        frozen = twin(batchnorm.freeze(batchnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), "sync")))
        assert not frozen.train()[0].training

    @pytest.mark.parametrize("kind", [nn.BatchNorm2d, batchnorm.BatchNorm2d, batchnorm.BatchNorm])
    def test_converted_and_back(self, kind):
        model = nn.Sequential(kind(3, eps=1e-3))
        held = model[0]
        batchnorm.convert(model, "sync")
        assert model[0] is held
        assert type(held) is batchnorm.SyncBatchNorm
        assert held.eps == 1e-3
        batchnorm.convert(model, "sync")
        batchnorm.convert(model, "ours")
        assert type(model[0]).__name__ == kind.__name__
        assert isinstance(model[0], batchnorm.layers.Forward)
        batchnorm.convert(batchnorm.convert(model, "sync"), "torch")
        if kind is batchnorm.BatchNorm:
            assert "of any rank" in str(batchnorm.changes(model))
        else:
            assert type(model[0]) is nn.BatchNorm2d

    def test_torchs_own_becomes_one_and_is_repaired_for_cpus(self):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
        batchnorm.convert(model, "sync")
        assert type(model[0]) is batchnorm.SyncBatchNorm
        batchnorm.convert(model)
        assert type(model[0]) is batchnorm.BatchNorm

    def test_a_group_is_for_sync_alone(self):
        with pytest.raises(BatchNormError, match="a process group with to='ours'"):
            batchnorm.convert(nn.BatchNorm1d(3), process_group=object())

    def test_buffers_of_one_process_stay(self, caplog):
        model = nn.Sequential(nn.BatchNorm1d(3))
        before = copy.deepcopy(model.state_dict())
        assert batchnorm.synchronize_buffers(model) is model
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
        assert "synchronize_buffers: 0 layers, 1 left" in caplog.text
        assert "no process group runs" in str(batchnorm.changes(model))
