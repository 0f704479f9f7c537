"""Population statistics of whole models, and what `update_bn` and others do wrong."""

import copy
import logging

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm
from batchnorm import BatchNormError, reference
from tolerance import assert_near


def data(count=96, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def network(norm=nn.BatchNorm2d):
    """Three norms, the last behind dropout; the statistics start wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False), norm(5), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    for i in (1, 4, 9):
        nn.init.uniform_(model[i].weight, 0.5, 2)
        nn.init.normal_(model[i].bias)
        model[i].running_mean.fill_(7)
    return model


def exactly(model, x):
    """The statistics of every norm in float64, layer by layer, over all of x at once."""
    x, found = x.double(), {}
    for name, layer in copy.deepcopy(model).double().named_children():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            mean, var_biased = reference.moments(x)
            count = x.numel() // x.shape[1]
            found[name] = (mean, var_biased * count / (count - 1))
            # the population's statistics, as evaluation will use them: the variance is unbiased
            x = reference.normalize(x, *found[name], layer.weight, layer.bias, layer.eps)
        else:
            x = layer.eval()(x)
    return found


def statistics(model):
    return {
        name: (m.running_mean.clone(), m.running_var.clone())
        for name, m in model.named_modules()
        if getattr(m, "running_mean", None) is not None
    }


def assert_statistics(model, expected, rtol=1e-5):
    for name, (mean, var) in expected.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(
            layer.running_mean, mean.to(layer.running_mean), rtol=rtol, atol=1e-5
        )
        torch.testing.assert_close(
            layer.running_var, var.to(layer.running_var), rtol=rtol, atol=1e-5
        )


splits = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@settings(deadline=None, max_examples=25)
@given(splits)
def test_the_first_layers_statistics_do_not_depend_on_the_split(sizes):
    x, model = data(sum(sizes)), network()
    batchnorm.recalibrate(model, x.split(sizes))
    expected = exactly(model, x)
    assert_statistics(model, {"1": expected["1"]})


@settings(deadline=None, max_examples=25)
@given(splits)
def test_exactly_no_layers_statistics_do(sizes):
    assume(sum(sizes) > 1)
    x, model = data(sum(sizes)), network()
    batchnorm.recalibrate(model, x.split(sizes), exact=True)
    assert_statistics(model, exactly(model, x), rtol=1e-4)


def test_in_one_pass_deeper_layers_see_what_they_see_in_training():
    """One batch: its statistics are those that training mode with momentum 1 leaves behind."""
    model, twin = network(), network()
    batchnorm.recalibrate(model, [data()])
    twin.train()[6].eval()
    for i in (1, 4, 9):
        twin[i].momentum = 1.0
    twin(data())
    assert_statistics(model, statistics(twin))


def test_far_from_zero_no_digit_is_lost_in_any_layout():
    x = data() + 1e4
    model = nn.Sequential(nn.BatchNorm2d(3))
    expected = exactly(model, x)["0"]
    for form in (torch.contiguous_format, torch.channels_last):
        batchnorm.recalibrate(model, [piece.contiguous(memory_format=form) for piece in x.split(7)])
        assert_near(model[0].running_mean, expected[0], x.numel() // 3)
        torch.testing.assert_close(model[0].running_var, expected[1].float(), rtol=1e-5, atol=0)


class Shared(nn.Module):
    """One norm, called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.second(self.norm(self.first(x))))


def test_a_layer_that_is_called_twice_gets_the_statistics_of_both_calls():
    x = torch.randn(50, 3)
    model = Shared().eval()
    batchnorm.recalibrate(model, [x])
    with torch.no_grad():
        one = model.first(x)
        two = model.second(
            nn.functional.batch_norm(one, None, None, model.norm.weight, model.norm.bias, True)
        )
    both = torch.cat([one, two])
    torch.testing.assert_close(model.norm.running_mean, both.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.norm.running_var, both.var(0), rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_called_twice_does_not_depend_on_the_split_when_exact():
    x = torch.randn(60, 3)
    found = []
    for sizes in ([60], [1, 9, 50], [20] * 3):
        model = Shared()
        batchnorm.recalibrate(model, x.split(sizes), exact=True)
        found.append(model.norm.running_var)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)


class TestWhereUpdateBnIsWrong:
    """torch.optim.swa_utils.update_bn of the installed version, and ours."""

    def test_it_overwrites_frozen_layers(self):
        for tool, kept in (
            (lambda m: update_bn([data()], m), False),
            (lambda m: batchnorm.recalibrate(m, [data()]), True),
        ):
            model = network().train()
            model[1].eval()
            before = statistics(model)["1"]
            tool(model)
            assert torch.equal(model[1].running_mean, before[0]) == kept
            assert model[1].training != kept

    def test_it_weighs_a_batch_of_two_like_one_of_a_hundred(self):
        x = torch.cat([data(100), data(2, seed=9) + 50])
        expected = exactly(network(), x)["1"][0].float()
        theirs, ours = network(), network()
        update_bn(x.split([100, 2]), theirs)
        batchnorm.recalibrate(ours, x.split([100, 2]))
        assert (theirs[1].running_mean - expected).abs().max() > 1
        torch.testing.assert_close(ours[1].running_mean, expected, rtol=1e-5, atol=1e-5)

    def test_it_leaves_dropout_on(self):
        on = []
        model = network().eval()
        model[6].register_forward_hook(lambda module, _args, _out: on.append(module.training))
        update_bn([data()], model)
        batchnorm.recalibrate(model, [data()])
        assert on == [True, False]

    def test_it_does_not_restore_a_model_whose_loader_raises(self):
        def broken():
            yield data()
            raise OSError("the disk went away")

        theirs, ours = network().eval(), network().eval()
        before = statistics(ours)
        with pytest.raises(OSError, match="went away"):
            update_bn(broken(), theirs)
        assert theirs.training
        assert theirs[1].momentum is None
        with pytest.raises(OSError, match="went away"):
            batchnorm.recalibrate(ours, broken())
        assert not any(module.training for module in ours.modules())
        assert ours[1].momentum == 0.1
        assert_statistics(ours, before, rtol=0)
        assert not any(m._forward_pre_hooks for m in ours.modules())


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exact", [False, True])
def test_an_interruption_leaves_the_model_as_it_was(error, exact):
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before, buffer = statistics(model), model[4].running_mean

    class Interrupted:
        def __iter__(self):
            yield data()
            raise error

    with pytest.raises(error):
        batchnorm.recalibrate(model, Interrupted(), exact=exact)
    assert [module.training for module in model.modules()] == modes
    assert_statistics(model, before, rtol=0)
    assert model[4].running_mean is buffer


def test_buffers_and_parameters_stay_the_objects_they_were():
    model = network()
    tensors = [*model.parameters(), *model.buffers()]
    assert batchnorm.recalibrate(model, [data()]) is model
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert model[1].num_batches_tracked == 1


def test_values_that_are_not_finite_change_nothing():
    model = network()
    before = statistics(model)
    x = data()
    x[3, 1] = float("nan")
    with pytest.raises(BatchNormError, match="the layer 1 got values that are not finite"):
        batchnorm.recalibrate(model, x.split(32))
    assert_statistics(model, before, rtol=0)


@pytest.mark.parametrize("prior", [0.0, 0.25, 0.9])
def test_a_prior_keeps_its_share_of_the_old_statistics(prior):
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].running_mean.fill_(5)
    model[0].running_var.fill_(9)
    batchnorm.recalibrate(model, data().split(20), prior=prior)
    mean, var = exactly(model, data())["0"]
    assert_statistics(model, {"0": (prior * 5 + (1 - prior) * mean, prior * 9 + (1 - prior) * var)})


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images, *, scale=1.0):
        return self.norm(input=images * scale)


def test_batches_of_every_shape():
    x = data()
    expected = exactly(nn.Sequential(nn.BatchNorm2d(3)), x)["0"]
    loaders = [
        x.split(40),
        [(piece, "labels") for piece in x.split(40)],
        [[piece, torch.zeros(len(piece))] for piece in x.split(40)],
        DataLoader(TensorDataset(x, torch.zeros(96)), batch_size=40),
        (piece for piece in x.split(40)),
    ]
    for loader in loaders:
        model = nn.Sequential(nn.BatchNorm2d(3))
        batchnorm.recalibrate(model, loader)
        assert_statistics(model, {"0": expected})
        assert batchnorm.changes(model).facts["samples"] == 96
        assert batchnorm.changes(model).facts["batch_sizes"] == [16, 40]
    model = Keywords()
    batchnorm.recalibrate(model, [{"images": x, "labels": [1], "scale": 1.0}])
    assert_statistics(model, {"norm": expected})
    batchnorm.recalibrate(model, [{"pixels": x}], forward=lambda m, batch: m(batch["pixels"] * 2))
    assert_statistics(model, {"norm": (expected[0] * 2, expected[1] * 4)})


def test_no_more_than_the_samples_are_read():
    told = []
    model = network()
    batchnorm.recalibrate(model, data().split(20), samples=30, progress=told.append)
    assert told == [20, 40]
    assert_statistics(model, {"1": exactly(model, data()[:40])["1"]})


@pytest.mark.parametrize("norm", [batchnorm.BatchNorm2d, nn.SyncBatchNorm, nn.BatchNorm2d])
def test_every_kind_of_layer(norm):
    model = network(norm).eval()
    batchnorm.recalibrate(model, data().split(32))
    assert_statistics(model, {"1": exactly(network(), data())["1"]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_summed_in_float(dtype):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    x = data(4000).to(dtype)
    batchnorm.recalibrate(model, x.split(100))
    mean, var = exactly(model, x)["0"]
    eps = max(torch.finfo(dtype).eps, 1e-14)  # one rounding; in float64 those of the sums
    torch.testing.assert_close(model[0].running_mean, mean.to(dtype), rtol=eps, atol=0)
    torch.testing.assert_close(model[0].running_var, var.to(dtype), rtol=eps, atol=0)


def test_a_batch_of_one_value_per_channel_counts_too():
    """update_bn and training mode raise here."""
    x = torch.randn(7, 3)
    model = nn.Sequential(nn.BatchNorm1d(3))
    batchnorm.recalibrate(model, x.split([1, 5, 1]))
    assert_statistics(model, {"0": (x.mean(0), x.var(0))})


def test_an_empty_batch_changes_nothing():
    x = data()
    model = nn.Sequential(nn.BatchNorm2d(3))
    batchnorm.recalibrate(model, [x[:0], x, x[:0]])
    assert_statistics(model, {"0": exactly(model, x)["0"]})


def test_the_account_names_what_was_left_and_why(caplog):
    model = nn.ModuleDict(
        {"used": nn.BatchNorm2d(3), "unused": nn.BatchNorm2d(3), "without": nn.BatchNorm2d(3, track_running_stats=False), "frozen": nn.BatchNorm2d(3).eval()}
    )  # fmt: skip
    with caplog.at_level(logging.INFO, "batchnorm"):
        batchnorm.recalibrate(model, [data()], forward=lambda m, x: m["used"](x))
    assert "recalibrate: 1 layers, 3 left" in caplog.text
    account = batchnorm.changes(model)
    assert [entry.layer for entry in account.done] == ["used"]
    reasons = {entry.layer: entry.what for entry in account.left}
    assert reasons["unused"] == "not called by these batches"
    assert reasons["without"] == "keeps no running statistics"
    assert reasons["frozen"].startswith("frozen")
    assert account.facts == {"samples": 96, "batch_sizes": [96], "exact": False, "prior": 0.0}
    assert "used: 3456 values per channel" in str(account)


def test_nothing_to_do_is_said(caplog):
    model = nn.Linear(3, 3)
    assert batchnorm.recalibrate(model, []) is model
    assert "no such batch norm in the model, nothing to do" in caplog.text


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: batchnorm.recalibrate(m, []), "a loader without a batch"),
        (lambda m: batchnorm.recalibrate(m, [data()], prior=1.0), "prior=1.0 and wants a share"),
        (lambda m: batchnorm.recalibrate(m, [data()], samples=0), "samples=0"),
        (lambda m: batchnorm.recalibrate(m, iter([data()]), exact=True), "read only once"),
        (lambda m: batchnorm.recalibrate(m, ["text"]), "a batch of type str"),
        (lambda _: batchnorm.recalibrate(batchnorm.BatchNorm(), [data()]), "not learned its size"),
        (batchnorm.changes, "no operation of batchnorm was run on this object"),
    ],
)
def test_what_cannot_be_done_is_said(call, said):
    with pytest.raises(BatchNormError, match=said):
        call(network())


def worker(rank, folder, fails):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    x = data()[:60] if rank == 0 else data()[60:]

    def batches():
        yield from x.split(17)
        if fails and rank == 1:
            raise OSError("the disk went away")

    for exact in (False, True):
        model = network()
        try:
            batchnorm.recalibrate(model, list(x.split(17)) if exact else batches(), exact=exact)
            torch.save(model.state_dict(), f"{folder}/{rank}-{exact}.pt")
        except (BatchNormError, OSError) as error:
            with open(f"{folder}/{rank}.txt", "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(str(error) + "\n")
    torch.distributed.destroy_process_group()


def test_processes_agree_to_the_bit_on_the_statistics_of_all_their_data(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path), False), nprocs=2)
    for exact in (False, True):
        first, second = (torch.load(tmp_path / f"{rank}-{exact}.pt") for rank in (0, 1))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    model = network()
    model.load_state_dict(first)
    assert_statistics(model, exactly(model, data()), rtol=1e-4)


def test_where_one_process_fails_all_say_so(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path), True), nprocs=2)
    assert (tmp_path / "1.txt").read_text() == "the disk went away\n"
    assert "another process raised OSError: the disk went away" in (tmp_path / "0.txt").read_text()


def test_a_compiled_model_runs_as_it_is_written():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    twin = copy.deepcopy(model)
    batches = [torch.randn(8, 3, 6, 6)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(batches[0])
    batchnorm.recalibrate(compiled, batches)
    torch.testing.assert_close(
        model[1].running_mean, batchnorm.recalibrate(twin, batches)[1].running_mean
    )
    compiled(batches[0])  # in one graph still
