"""convert(fuse=True): the same outputs, classes, names and hooks; what is not safe stays."""

import copy
import pickle
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import batchnorm
from batchnorm import BatchNormError
from batchnorm.model import fusion
from tolerance import bound


@pytest.fixture
def calls(monkeypatch):
    """What the fused calls were given: (a residual, the activation)."""
    found = []

    def normalize(self, input, residual=None, activation=None, *mask_and_axis, pool=None):
        found.append((residual is not None, activation) if pool is None else (activation, pool))
        return batch_norm(self, input, residual, activation, *mask_and_axis, pool=pool)

    batch_norm = batchnorm.layers.Forward.normalize
    monkeypatch.setattr(batchnorm.layers.Forward, "normalize", normalize)
    return found


class Block(nn.Module):
    """A residual block: a shared ReLU, a sum written in place."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


def images(**options):
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1), **options)


def same(model, twin, x=None, modes=(True, False)):
    """Outputs, gradients and state of both agree, in training and in evaluation."""
    x = images(dtype=next(twin.parameters()).dtype) if x is None else x
    for mode in modes:
        found = []
        for each in (model, twin):
            torch.manual_seed(1)
            each.train(mode).zero_grad()
            given = x.clone().requires_grad_()
            y = each(given * 1)  # not a leaf: it may be written over
            y.square().sum().backward()
            found.append([y, given.grad, *(p.grad for p in each.parameters())])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-12)


def pair(model):
    """(fused, as it was), in float64."""
    torch.manual_seed(0)
    model = model.double()
    return batchnorm.convert(copy.deepcopy(model), fuse=True), model


def test_activation_and_residual_sum_are_taken_in(calls):
    model, twin = pair(Block())
    account = str(batchnorm.changes(model))
    assert "bn1: is now a BatchNorm2d, with relu" in account
    assert "bn2: is now a BatchNorm2d, with a residual sum, with relu" in account
    assert "downsample.1: is now a BatchNorm2d" in account
    assert batchnorm.changes(model).facts["fused"] == 2
    same(model, twin)
    assert calls[:3] == [(False, "relu"), (False, None), (True, "relu")]


def test_classes_modules_and_state_are_still_there():
    model, twin = pair(Block())
    assert isinstance(model, Block)
    assert type(model).__name__ == "Block"
    assert [n for n, _ in model.named_modules()] == [n for n, _ in twin.named_modules()]
    assert type(model.bn1) is batchnorm.BatchNorm2d
    assert list(model.state_dict()) == list(twin.state_dict())


ACTIVATIONS = {
    "relu": [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(x, inplace=True)],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [nn.Tanh(), torch.tanh, lambda x: x.tanh()],
    "silu": [nn.SiLU(), F.silu],
    "gelu": [nn.GELU(), F.gelu],
    "leaky_relu": [nn.LeakyReLU(), F.leaky_relu],
    "hardswish": [nn.Hardswish(), F.hardswish],
    None: [
        nn.LeakyReLU(0.3),
        nn.GELU(approximate="tanh"),
        lambda x: F.leaky_relu(x, 0.2),
        nn.ReLU6(),
    ],
}


class Activated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.act = act

    def forward(self, x):
        return self.act(self.norm(x))


@pytest.mark.parametrize(
    ("name", "act"), [(name, act) for name, acts in ACTIVATIONS.items() for act in acts]
)
def test_every_way_to_write_an_activation(name, act, calls):
    model, twin = pair(Activated(act))
    same(model, twin)
    assert calls == [(False, name)] * 2


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x0_5"]
)
def test_torchvisions_models(name, calls):
    model, twin = pair(torchvision.models.get_model(name, weights=None))
    taken = batchnorm.changes(model).facts["fused"]
    assert (
        taken
        == {"resnet18": 17, "densenet121": 120, "mobilenet_v3_small": 23, "shufflenet_v2_x0_5": 37}[
            name
        ]
    )
    same(model, twin, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert len([1 for call in calls if call != (False, None)]) == 2 * taken


def test_dropout_follows_the_mode_afterwards():
    model, twin = pair(torchvision.models.densenet._DenseBlock(2, 8, 2, 4, 0.5))
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    same(model, twin, x)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_hooks_are_called(calls):
    model, twin = pair(Block())
    same(model, twin)
    calls.clear()
    seen = []
    handles = [
        model.relu.register_forward_hook(lambda *_: seen.append("relu")),
        model.bn1.register_forward_hook(lambda *_: seen.append("bn1")),
    ]
    same(model, twin, modes=[True])
    assert seen == ["bn1", "relu", "relu"]
    for handle in handles:
        handle.remove()
    model.bn2.register_forward_pre_hook(lambda *_: seen.append("bn2"))
    seen.clear(), calls.clear()
    same(model, twin, modes=[True])
    assert seen == ["bn2"]
    assert calls[0] == (False, "relu")  # fused again, where nobody looks


def test_tools_see_the_norms_of_a_fused_model():
    model, twin = pair(Block())
    batches = [images(dtype=torch.float64)]
    batchnorm.recalibrate(model, batches)
    batchnorm.recalibrate(twin, batches)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    folded = batchnorm.fold(model.eval(), batches[0])
    assert len(batchnorm.changes(folded).done) == 3
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(synced(batches[0]), twin.eval()(batches[0]))
    frozen = batchnorm.freeze(model).train()
    torch.testing.assert_close(frozen(batches[0]), twin(batches[0]))
    rows = batchnorm.summary(model, batches[0])
    assert [row.calls for row in rows] == [1, 1, 1]


def test_what_changes_later_is_followed():
    model, twin = pair(Block())
    same(model, twin)
    for each in (model, twin):
        each.relu = nn.GELU()
    same(model, twin)
    for each in (model, twin):
        each.bn2 = nn.Identity()
    same(model, twin)
    for each in (model, twin):
        each.forward = lambda x: x * 2
    assert torch.equal(model(images()), images() * 2)


class Setting(Block):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.flip = False

    def forward(self, x):
        y = self.bn1(x).relu()
        return -y if self.flip else y


def test_a_setting_that_changes_is_followed():
    model, twin = pair(Setting())
    for flip in (True, False, True):
        model.flip = twin.flip = flip
        same(model, twin)
    for step in range(20):
        model.step = step
        same(model, twin)


def test_copies_and_pickles_are_fused(calls):
    model, twin = pair(torchvision.models.resnet18(weights=None))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        torch.testing.assert_close(each.eval()(x), twin.eval()(x))
        assert (True, "relu") in calls


def test_to_torch_undoes_it():
    model, _ = pair(Block())
    batchnorm.convert(model, "torch")
    assert type(model) is Block
    assert type(model.bn1) is nn.BatchNorm2d


def test_compiled_exported_and_traced_it_is_the_plain_block():
    model, twin = pair(Block())
    x = images(dtype=torch.float64)
    same(model, twin)
    expected = twin.eval()(x)
    program = torch.export.export(model.eval(), (x,))
    targets = {str(n.target) for n in program.graph.nodes}
    assert "aten.relu_.default" in targets or "aten.relu.default" in targets
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)


class Drawing(Block):
    def forward(self, x):
        return self.bn1(x).relu() if random.random() < 0.5 else x


class Counting(Block):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return self.bn1(x).relu()


class Branching(Block):
    def forward(self, x):
        return self.bn1(x).relu() if x.sum() > 0 else self.bn2(x).relu()


class Asking(Block):
    """Asks for the type of something that a graph does not know."""

    def forward(self, x):
        y = self.conv1(x)
        return self.bn1(y).relu() if isinstance(y, torch.Tensor) else y


class Drawn(Block):
    def forward(self, x):
        return self.bn1(x + torch.rand(())).relu()


class Twice(Block):
    """The norm's output is used twice; the other value is written over."""

    def forward(self, x):
        y = self.bn1(x)
        z = self.conv1(x)
        z += self.bn2(y)
        return z.relu() + y.relu()


class WithDefault(Block):
    def forward(self, x, mask=None):
        y = self.bn1(x).relu()
        return y if mask is None else y * mask


LEFT = [Drawing, Counting, Branching, Asking, Drawn, Twice, WithDefault]


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_not_safe_is_left(kind):
    state = random.getstate()
    model, twin = pair(kind())
    assert random.getstate() == state
    assert not isinstance(model, fusion.Fused)
    if kind is Counting:
        assert model.count == 0
    if kind not in {Drawing, Drawn}:
        same(model, twin)


class Lists(Block):
    def forward(self, xs):
        x = xs if isinstance(xs, torch.Tensor) else torch.cat(xs)
        return self.bn1(x).relu()


def test_arguments_of_several_types(calls):
    model, twin = pair(Lists())
    x = images(dtype=torch.float64)
    same(model, twin)
    torch.testing.assert_close(model([x, x]), twin([x, x]))
    torch.testing.assert_close(model((x, x, x)), twin((x, x, x)))
    assert calls == [(False, "relu")] * 4
    torch.testing.assert_close(model(xs=x), twin(xs=x))
    assert calls[-1] == (False, None)


@pytest.mark.parametrize("verb", ["freeze", "keep_float32", "single_values"])
def test_a_layer_for_which_something_was_chosen_is_left_and_told(verb):
    model = getattr(batchnorm, verb)(Block().double(), pattern="bn1")
    twin = copy.deepcopy(model)
    batchnorm.convert(model, fuse=True)
    told = {change.layer: change.what for change in batchnorm.changes(model).entries}
    assert f"not fused: {verb} chose a forward pass of its own" in told["bn1"]
    assert told["bn2"].endswith("with a residual sum, with relu")
    assert batchnorm.changes(model).facts["fused"] == 1
    same(model, twin, images(dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "activation", [None, "relu", "sigmoid", "tanh", "silu", "gelu", "hardswish"]
)
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_function_s_residual_and_activation(dtype, activation, with_residual):
    x = torch.randn(4, 3, 5, dtype=dtype)
    residual = torch.randn(4, 3, 5, dtype=dtype) if with_residual else None
    weight, bias = torch.rand(3, dtype=dtype), torch.randn(3, dtype=dtype)
    y = batchnorm.batch_norm(
        x, None, None, weight, bias, True, residual=residual, activation=activation
    )
    exact = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    exact = exact + (0 if residual is None else residual.double())
    exact = exact if activation is None else getattr(F, activation)(exact)
    tolerance = 8 * bound(dtype, 20)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_gradients_of_residual_and_activation():
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    for activation in [None, *batchnorm.kernels.ACTIVATIONS]:
        torch.autograd.gradcheck(
            lambda x, r, a=activation: batchnorm.batch_norm(
                x, None, None, training=True, residual=r, activation=a
            ),
            (x, residual),
        )


def test_a_residual_of_another_dtype_or_shape():
    x = torch.randn(4, 3, 5)
    wide = torch.randn(4, 3, 5, dtype=torch.float64)
    y = batchnorm.batch_norm(x, None, None, training=True, residual=wide)
    assert y.dtype == torch.float64
    small = torch.randn(3, 1)
    y = batchnorm.batch_norm(x, None, None, training=True, residual=small)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True) + small)
    ours = torch.vmap(lambda r: batchnorm.batch_norm(x, None, None, training=True, residual=r))
    assert ours(torch.randn(2, 4, 3, 5)).shape == (2, 4, 3, 5)


def test_wrong_arguments_are_said():
    x = torch.randn(4, 3, 5)
    with pytest.raises(BatchNormError, match="activation='swish' and wants one of relu"):
        batchnorm.batch_norm(x, None, None, training=True, activation="swish")
    for shape in [(4, 3, 6), (2, 4, 3, 5)]:
        with pytest.raises(BatchNormError, match="a residual of shape"):
            batchnorm.batch_norm(x, None, None, training=True, residual=torch.zeros(shape))
    with pytest.raises(BatchNormError, match='only "ours" can be fused'):
        batchnorm.convert(Block(), "torch", fuse=True)


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.Sigmoid()
        self.pool = pool

    def forward(self, x):
        return self.pool(self.act(self.norm(self.conv(x))))


@pytest.mark.parametrize(
    ("pool", "name"),
    [
        (nn.AvgPool2d(2), "avg"),
        (nn.AvgPool2d((2, 2), stride=2, count_include_pad=False), "avg"),
        (nn.MaxPool2d(2), "max"),
        (nn.MaxPool2d(2, stride=(2, 2)), "max"),
        (nn.AvgPool2d(3), None),
        (nn.AvgPool2d(2, stride=1), None),
        (nn.AvgPool2d(2, ceil_mode=True), None),
        (nn.AvgPool2d(2, divisor_override=3), None),
        (nn.MaxPool2d(2, padding=1), None),
        (nn.MaxPool2d(2, stride=2, dilation=2), None),
        (nn.MaxPool2d((2, 1)), None),
        (nn.AdaptiveAvgPool2d(2), None),
        (nn.LPPool2d(2, 2), None),
    ],
)
def test_a_pooling_behind_the_activation_is_taken_in(pool, name, calls):
    model, twin = pair(Pooled(pool))
    taken = "sigmoid" if name is None else f"sigmoid, with {name} pooling"
    assert f"norm: is now a BatchNorm2d, with {taken}" in str(batchnorm.changes(model))
    assert ("pooling" in str(batchnorm.changes(model))) is (name is not None)
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64)  # 7×6 behind the convolution
    same(model, twin, x)
    assert set(calls[::2]) == {(False, "sigmoid") if name is None else ("sigmoid", name)}
    model.float(), twin.float()
    torch.testing.assert_close(model(x.float()), twin(x.float()), rtol=1e-5, atol=1e-6)


def test_a_pooling_that_is_watched_or_replaced_is_called(calls):
    model, twin = pair(Pooled(nn.MaxPool2d(2)))
    seen = []
    handle = model.pool.register_forward_hook(lambda *_: seen.append("pool"))
    same(model, twin, modes=[True])
    assert seen == ["pool"]
    handle.remove()
    for each in (model, twin):
        each.pool = nn.AvgPool2d(2)
    calls.clear()
    same(model, twin, modes=[True])
    assert calls[0] == ("sigmoid", "avg")


class TwoUsers(Pooled):
    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return self.pool(y).sum() + y.sum()


class Residual(Pooled):
    def forward(self, x):
        x = self.conv(x)
        return self.pool(self.act(self.norm(x) + x))


class Overwritten(Pooled):
    """The norm's input is another one when the pooling is called."""

    def forward(self, x):
        x = self.conv(x)
        y = self.act(self.norm(x))
        x *= 2
        return self.pool(y).sum() + x.sum()


@pytest.mark.parametrize("kind", [TwoUsers, Residual, Overwritten])
def test_a_pooling_that_is_not_of_the_norm_alone_is_left(kind):
    model, twin = pair(kind(nn.AvgPool2d(2)))
    assert "pooling" not in str(batchnorm.changes(model))
    if kind is not Overwritten:  # whose own backward torch refuses
        same(model, twin)
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


def test_a_pooling_over_signals_is_left():
    """To AvgPool2d (N, C, L) is one image of N channels."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.AvgPool2d(2))
    model, twin = pair(model)
    assert "with relu" in str(batchnorm.changes(model))
    assert "pooling" not in str(batchnorm.changes(model))
    same(model, twin, torch.randn(4, 3, 6, dtype=torch.float64))
