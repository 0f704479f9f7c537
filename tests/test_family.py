"""What every member of the family has in common with batch normalization, and with each other."""

import copy
import io
import pickle

import pytest
import torch
from torch import distributed, fx, nn

import batchnorm
import tiny
from batchnorm import BatchNormError, reference
from batchnorm.model.discovery import batch_norms
from tolerance import assert_near, bound

FAMILY = {
    "ghost": (batchnorm.GhostBatchNorm, {"ghost_size": 4}),
    "renorm": (batchnorm.RenormBatchNorm, {"warmup": 0, "r_steps": 0, "d_steps": 0}),
    "split": (batchnorm.SplitBatchNorm, {"domains": ("main", "other")}),
    "estimator": (batchnorm.EstimatorBatchNorm, {"unbiased": False, "average": "debiased"}),
}
SHAPES = [(9, 3), (9, 3, 7), (9, 3, 5, 4), (5, 3, 2, 3, 3)]
EVERY = pytest.mark.parametrize("kind", FAMILY)


def made(kind, **options):
    torch.manual_seed(0)
    cls, own = FAMILY[kind]
    layer = cls(3, **own, **options)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return layer


def inner(layer):
    """The layer that holds the state."""
    return layer.norm if isinstance(layer, batchnorm.SplitBatchNorm) else layer


def network(kind=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    if kind is not None:
        batchnorm.convert(model, to=kind, **FAMILY[kind][1])
    return model


def images(count=12):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_evaluation_is_batch_normalization_with_the_running_statistics(kind, shape, dtype):
    layer = made(kind).to(torch.float64 if dtype == torch.float64 else torch.float32).eval()
    x = torch.randn(shape).to(dtype)
    held = inner(layer)
    values = (held.running_mean, held.running_var, held.weight, held.bias)
    exact = reference.normalize(x.double(), *(v.detach().double() for v in values), eps=held.eps)
    y = layer(x)
    assert y.dtype == dtype
    assert_near(y.detach(), exact, 1)


@EVERY
def test_it_is_no_batch_norm_to_others_tools(kind):
    layer = made(kind)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    assert type(model[0]) is type(layer)


@EVERY
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"momentum": 0.3}])
def test_state_dicts_are_a_batch_norm_s(kind, options):
    layer, twin = made(kind, **options), batchnorm.BatchNorm2d(3, **options)
    twin.running_mean.normal_()
    layer.load_state_dict(twin.state_dict())
    torch.testing.assert_close(state(inner(layer)), state(twin))
    if kind != "split":
        twin.load_state_dict(layer.state_dict())
        old = {k: v for k, v in twin.state_dict().items() if k != "num_batches_tracked"}
        layer.load_state_dict(dict(old))
        assert int(layer.num_batches_tracked) == 0
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    layer.load_state_dict(torch.load(buffer, weights_only=True))


@EVERY
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_their_own_way(kind, twin):
    model = network(kind).train()
    other = twin(model)
    assert type(other[1]) is type(model[1])
    torch.testing.assert_close(other(images()), model(images()))
    before = state(model)
    other(images() + 1)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_into_one_graph(kind, training):
    layer = made(kind).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(9, 3, 4, 4)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@EVERY
def test_it_compiles_into_one_graph_for_every_batch_size(kind):
    torch._dynamo.reset()
    layer = made(kind).train()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (8, 11, 13, 6):
        x = torch.randn(samples, 3, 4, 4)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ghost", "renorm", "split"])
def test_an_average_over_all_batches_compiles_into_one_graph(kind):
    layer = made(kind, momentum=None)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(9, 3, 4, 4)
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.fixture
def process_group(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@EVERY
@pytest.mark.usefixtures("process_group")
def test_ddp_trains_it(kind):
    model, twin = network(kind).train(), network(kind).train()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=kind == "split")
    for each in (parallel, twin):
        each(images()).square().sum().backward()
    torch.testing.assert_close(state(model), state(twin))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@EVERY
def test_tracing_leaves_it_whole(kind):
    model = network(kind)
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3"]
    torch.testing.assert_close(
        copy.deepcopy(traced).train()(images()), copy.deepcopy(model).train()(images())
    )


@EVERY
def test_an_export_in_evaluation_is_torch_s_operator(kind):
    exported = torch.export.export(made(kind).eval(), (torch.randn(2, 3, 4, 4),))
    assert "aten.batch_norm.default" in str(exported.graph)


@EVERY
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(kind, half):
    """Inputs of a float32 layer, autocast, and a layer that was cast: y in half, statistics near."""
    x = images()[:, :, :2]
    exact = made(kind).double()
    exact(x.to(half).double())
    layer = made(kind)
    assert layer(x.to(half)).dtype == half
    for name in ("running_mean", "running_var"):
        assert getattr(inner(layer), name).dtype == torch.float32
        allowed = bound(half, 1, 4.0)
        torch.testing.assert_close(
            getattr(inner(layer), name).double(), getattr(inner(exact), name), rtol=0, atol=allowed
        )
    with torch.autocast("cpu", dtype=half):
        assert made(kind)(x).dtype == torch.float32
    cast = made(kind).to(half)
    assert cast(x.to(half)).dtype == half
    assert inner(cast).running_mean.isfinite().all()


@pytest.mark.parametrize("kind", ["ghost", "split", "estimator"])  # renorm's are in its own tests
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_gradients_are_the_derivative(kind, shape):
    layer = made(kind).double()

    def run(x, weight, bias):
        held = {"weight": weight, "bias": bias}
        prefix = "domains.main." if kind == "split" else ""
        return torch.func.functional_call(layer, {prefix + k: v for k, v in held.items()}, (x,))

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (v.detach().requires_grad_() for v in (inner(layer).weight, inner(layer).bias))
    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@EVERY
def test_the_memory_format_and_views_make_no_difference(kind):
    x = torch.randn(18, 3, 8, 6)[::2, :, 1::2]
    expected = made(kind)(x.contiguous())
    last = x.contiguous(memory_format=torch.channels_last)
    for each in (x, last, x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(made(kind)(each), expected, rtol=1e-5, atol=1e-5)
    assert made(kind)(last).is_contiguous(memory_format=torch.channels_last)


@EVERY
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (9, 3, 0, 4)])
def test_an_empty_batch_leaves_the_statistics(kind, shape):
    layer = made(kind)
    before = inner(layer).running_mean.clone(), inner(layer).running_var.clone()
    assert layer(torch.randn(shape)).shape == shape
    torch.testing.assert_close(inner(layer).running_mean, before[0], rtol=0, atol=0)
    torch.testing.assert_close(inner(layer).running_var, before[1], rtol=0, atol=0)


@EVERY
def test_one_value_per_channel_is_refused_and_nothing_moves(kind):
    layer = made(kind)
    before = state(layer)
    with pytest.raises(BatchNormError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))
    torch.testing.assert_close(state(layer), before, rtol=0, atol=0)


@EVERY
@pytest.mark.parametrize(
    ("shape", "message"), [((4, 5), "got 5 channels"), ((3,), "expected 2D or more input")]
)
def test_a_wrong_shape_is_said(kind, shape, message):
    with pytest.raises(BatchNormError, match=message):
        made(kind)(torch.randn(shape))


@EVERY
def test_a_rank_that_the_converted_layer_did_not_take_is_said(kind):
    with pytest.raises(BatchNormError, match=r"expected 4D input \(got 2D input"):
        network(kind)[1](torch.randn(4, 4))


@EVERY
def test_nan_stays_in_its_channel(kind):
    layer, x = made(kind), torch.randn(9, 3, 4)
    x[0, 1, 0] = float("nan")
    y = layer(x)
    assert y[:, [0, 2]].isfinite().all()
    assert y[0, 1].isnan().all()
    assert inner(layer).running_mean.isnan().tolist() == [False, True, False]


@EVERY
def test_torchscript_is_refused(kind):
    with (
        pytest.warns(FutureWarning, match="deprecated"),
        pytest.raises(BatchNormError, match="cannot be compiled by TorchScript"),
    ):
        torch.jit.script(made(kind))


def test_a_comparison_trains_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = ["ghost", "renorm", "estimator", "split", "sync", "frozen"]
    result = batchnorm.compare(
        tiny.network, arms, data=tiny.as_images(), seeds=1, epochs=2, batch_size=64,
        learning_rate=0.1, threads=1, ghost_size=8,
    )  # fmt: skip
    assert {cell.config.ghost_size for cell in result.record.cells} == {8}
    assert set(result.summary) == set(arms)
    constants = [cell for cell in result.record.cells if cell.config.arm == "frozen"]
    assert constants[0].last.recalibrated_test_accuracy is None  # nothing to recalibrate
    for arm in arms[:-1]:  # constants train no better than nothing
        (accuracy,) = result.summary[arm].recalibrated_test_accuracy.values
        assert accuracy > 0.4  # ten patterns, of which chance finds one


class TestTheModelTools:
    @EVERY
    def test_convert_keeps_the_objects_and_evaluation_there_and_back(self, kind):
        model = network().eval()
        expected, before = model(images()), state(model)
        parameters, called = list(model.parameters()), []
        model[1].register_forward_hook(lambda *_: called.append(1))
        norm = model[1].weight, model[1].running_mean
        batchnorm.convert(model, to=kind, **FAMILY[kind][1])
        assert isinstance(model[1], FAMILY[kind][0])
        assert not model[1].training
        assert (inner(model[1]).weight, inner(model[1]).running_mean) == norm
        torch.testing.assert_close(model(images()), expected)
        assert called
        batchnorm.convert(model, to="torch")
        assert type(model[1]) is nn.BatchNorm2d
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
        torch.testing.assert_close(model(images()), expected)
        assert len(called) == 2

    @EVERY
    def test_to_ours_and_to_another_member(self, kind):
        model = network(kind)
        assert type(batchnorm.convert(model)[1]) is batchnorm.BatchNorm2d
        batchnorm.convert(model, to=kind)
        for other, (cls, options) in FAMILY.items():
            assert isinstance(batchnorm.convert(model, to=other, **options)[1], cls)
        assert type(batchnorm.convert(model, to="group")[1]) is nn.GroupNorm

    @EVERY
    def test_freeze_and_unfreeze(self, kind):
        model = network(kind).eval()
        expected, before = model(images()), state(model)
        batchnorm.freeze(model)
        torch.testing.assert_close(model.train()(images()), expected)
        copy.deepcopy(model)(images())
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
        assert isinstance(model[1], FAMILY[kind][0])
        batchnorm.unfreeze(model)
        twin = network(kind).train()
        torch.testing.assert_close(model(images()), twin(images()))
        torch.testing.assert_close(state(model), state(twin))

    @EVERY
    def test_a_frozen_member_s_statistics_may_move(self, kind):
        model = batchnorm.freeze(network(kind), update=True).train()
        before = inner(model[1]).running_mean.clone()
        model(images())
        moved = model[0](images()).mean((0, 2, 3))
        torch.testing.assert_close(inner(model[1]).running_mean, 0.9 * before + 0.1 * moved)

    @EVERY
    def test_no_update_normalizes_alike_and_moves_nothing(self, kind):
        model, twin = network(kind).train(), network(kind).train()
        before = state(model)
        with batchnorm.no_update(model):
            y = model(images())
        torch.testing.assert_close(y, twin(images()))
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)

    @EVERY
    def test_recalibrate(self, kind):
        model = network(kind).train()
        batchnorm.recalibrate(model, images().split(4))
        x = model[0](images())
        torch.testing.assert_close(inner(model[1]).running_mean, x.mean((0, 2, 3)))
        torch.testing.assert_close(inner(model[1]).running_var, x.var((0, 2, 3)))
        assert not batchnorm.changes(model).left or kind == "split"

    @EVERY
    def test_summary_and_param_groups_know_it(self, kind):
        model = network(kind)
        rows = batchnorm.summary(model, images())
        assert rows[0].layer.startswith("1")
        assert rows[0].mode == "train"
        assert rows[0].values == 12 * 6 * 6
        names = {id(p) for n, p in model.named_parameters() if n.startswith("1.")}
        decays, kept = batchnorm.param_groups(model, 0.1)
        assert {id(p) for p in kept["params"]} == names
        assert kept["weight_decay"] == 0
        assert len(decays["params"]) == 4

    @EVERY
    def test_fold_is_right_or_leaves_it(self, kind):
        model = network(kind).eval()
        folded = batchnorm.fold(model, images())
        torch.testing.assert_close(folded(images()), model(images()), rtol=1e-4, atol=1e-5)
        assert bool(batchnorm.changes(folded).done) == (kind != "split")

    @EVERY
    def test_check_leaves_it_as_it_was(self, kind):
        model = network(kind).train()
        before = state(model)
        batchnorm.check(model, images().split(4))
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)

    @pytest.mark.parametrize(("average", "told"), [("exponential", True), ("debiased", False)])
    def test_watch_sees_it_and_knows_what_its_average_forgets(self, average, told):
        model = batchnorm.convert(network(), to="estimator", average=average)
        model[1].reset_running_stats()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with batchnorm.watch() as watching:
            for _ in range(3):
                model(images()).square().mean().backward()
                optimizer.step()
            model.eval()(images())
        assert watching.models == [model]
        rules = {finding.rule for found in watching.findings() for finding in found}
        assert ("BN012" in rules) == told

    @EVERY
    def test_update_once(self, kind):
        model, twin = network(kind).train(), network(kind).train()
        first, again = batchnorm.update_once(model)
        with first:
            model(images())
        with again:
            model(images())
        twin(images())
        torch.testing.assert_close(state(model), state(twin))

    def test_options_that_do_not_fit_are_said(self):
        for to, options, message in (
            ("ours", {"ghost_size": 3}, "to=\"?'?ours.* only ghost, renorm, split, estimator"),
            ("ghost", {"r_max": 3}, "got r_max and wants ghost_size"),
            ("split", {"size": 3}, "got size and wants domains, shared"),
        ):
            with pytest.raises(BatchNormError, match=message):
                batchnorm.convert(network(), to=to, **options)

    def test_what_cannot_be_converted_is_left(self):
        bare = nn.BatchNorm2d(3, track_running_stats=False)
        for to in ("renorm", "estimator"):
            batchnorm.convert(nn.Sequential(bare), to=to)
        model = nn.Sequential(bare, batchnorm.BatchNorm())
        batchnorm.convert(model, to="renorm")
        left = [entry.what for entry in batchnorm.changes(model).left]
        assert "keeps no running statistics" in left[0]
        assert "has not learned its size" in left[1]

    def test_without_statistics_evaluation_takes_the_batch_s(self):
        layer = batchnorm.GhostBatchNorm(3, ghost_size=4, track_running_stats=False).eval()
        x = torch.randn(9, 3, 4)
        torch.testing.assert_close(layer(x), reference.forward(x)[0], rtol=1e-5, atol=1e-5)
        assert batch_norms(nn.Sequential(layer)) == {"0": layer}
