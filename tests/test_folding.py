"""Folding: the same outputs without the norm, or a reason why it stays."""

import copy

import pytest
import timm.layers
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import fusion, parametrizations, prune

import batchnorm
from batchnorm import BatchNormError
from batchnorm.model.discovery import batch_norms


def shaken(model, seed=0):
    """In evaluation mode, with statistics and affine parameters that are not trivial."""
    torch.manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def check(model, *inputs, left=0):
    """Fold; the outputs agree, the original is as it was, and so many norms are left."""
    before = copy.deepcopy(model.state_dict())
    expected = model(*inputs)
    folded = batchnorm.fold(model, inputs)
    torch.testing.assert_close(folded(*inputs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    account = batchnorm.changes(folded)
    assert len(account.left) == left, account
    assert len(batch_norms(folded)) == left
    assert account.facts["difference_in_float64"] < 1e-9
    assert account.facts["largest_output"] == pytest.approx(expected.abs().max().item(), rel=1e-4)
    return folded


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "3d": (nn.Conv3d(4, 6, 2, dilation=2), nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed, 1d": (nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6), (2, 4, 5)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (2, 4)),
    "linear, no bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (2, 4)),
    "affine=False": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 9, 9)),
    "linear, affine=False": (nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), (2, 4)),
    "bias=False": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, bias=False), (2, 4, 9, 9)),
    "ours": (nn.Conv2d(4, 6, 3), batchnorm.BatchNorm2d(6), (2, 4, 9, 9)),
    "any rank": (nn.Conv2d(4, 6, 3), batchnorm.BatchNorm(6), (2, 4, 9, 9)),
    "sync": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 9, 9)),
    "timm's, with ReLU": (nn.Conv2d(4, 6, 3), timm.layers.BatchNormAct2d(6), (2, 4, 9, 9)),
    "torchvision's frozen": (nn.Conv2d(4, 6, 3), torchvision.ops.FrozenBatchNorm2d(6), (2, 4, 9, 9)),
    "timm's same padding": (timm.layers.Conv2dSame(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "norm", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_into_the_layer_before_it(layer, norm, shape):
    model = shaken(copy.deepcopy(nn.Sequential(layer, norm)))
    folded = check(model, torch.randn(shape))
    assert "folded into 0" in str(batchnorm.changes(folded))
    assert type(folded[0]) is type(layer)


def test_a_frozen_layer_and_a_frozen_kind_fold():
    model = shaken(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    check(batchnorm.freeze(model), torch.randn(2, 4, 9, 9))


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_into_the_norm_before_it(affine):
    model = shaken(nn.Sequential(nn.BatchNorm2d(3, affine=affine), nn.BatchNorm2d(3)))
    check(model, torch.randn(2, 3, 4, 4), left=1)


BEHIND = {
    "no padding": nn.Conv2d(3, 5, 3),
    "grouped": nn.Conv2d(3, 6, 3, groups=3, bias=False),
    "padded": nn.Conv2d(3, 5, 3, padding=(2, 1)),
    "padded by reflection": nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "valid": nn.Conv2d(3, 5, 3, padding="valid"),
    "strided and dilated": nn.Conv2d(3, 5, 3, padding=2, stride=2, dilation=2),
}


@pytest.mark.parametrize("layer", BEHIND.values(), ids=BEHIND)
def test_into_the_convolution_behind_it(layer):
    check(shaken(nn.Sequential(nn.BatchNorm2d(3), copy.deepcopy(layer))), torch.randn(2, 3, 9, 9))


def test_into_the_linear_layer_behind_it():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
    )
    check(shaken(model), torch.randn(5, 3))


def test_through_dropout_but_not_through_dropout_that_is_on():
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(), nn.BatchNorm2d(4)))
    check(model, torch.randn(2, 3, 5, 5))
    model[1].train()
    assert "a Dropout" in str(batchnorm.changes(batchnorm.fold(model)))


LEFT = {
    "padded behind a scale of 0": (
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1)), "a scale of 0",
    ),
    "same padding behind": (
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding="same")), "pads 'same'",
    ),
    "a transposed convolution behind": (
        nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 5, 3)), "ConvTranspose2d behind it",
    ),
    "an activation between": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "1 beside it is a ReLU",
    ),
    "batch statistics": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "keeps no running statistics",
    ),
    "weight norm": (
        nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        "parametrized",
    ),
    "a standardized weight": (
        nn.Sequential(timm.layers.StdConv2d(3, 4, 3), nn.BatchNorm2d(4)),
        "does more than its weight says",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "reason"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_folded_safely_is_left_with_the_reason(model, reason):
    model = shaken(model)
    if "scale" in reason and hasattr(model[0], "running_mean"):
        nn.init.zeros_(model[0].weight)
    folded = check(model, torch.randn(2, 3, 9, 9), left=1)
    assert reason in str(batchnorm.changes(folded))


def test_a_norm_with_a_hook_stays_and_the_hook_is_called():
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    called = []
    model[2].register_forward_hook(lambda *_: called.append("relu"))
    folded = check(model, torch.randn(2, 3, 5, 5))
    called.clear()
    folded(torch.randn(2, 3, 5, 5))
    assert called == ["relu"]
    model[1].register_forward_hook(lambda *_: called.append("norm"))
    check(model, torch.randn(2, 3, 5, 5), left=1)


def test_a_convolution_with_a_hook_stays():
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].register_forward_pre_hook(lambda _, args: args)
    folded = check(model, torch.randn(2, 3, 5, 5), left=1)
    assert "0 has forward hooks" in str(batchnorm.changes(folded))


def test_a_model_that_cannot_be_copied_is_said():
    pruned = prune.random_unstructured(nn.Conv2d(3, 4, 3), "weight", 0.5)
    with pytest.raises(BatchNormError, match=r"cannot be copied.*prune\.remove"):
        batchnorm.fold(nn.Sequential(pruned, nn.BatchNorm2d(4)).eval())


class Branches(nn.Module):
    """Registered in another order than called, with users that forbid what registration suggests."""

    def __init__(self):
        super().__init__()
        self.norm_b = nn.BatchNorm2d(4)
        self.conv_a = nn.Conv2d(3, 4, 3)
        self.norm_a = nn.BatchNorm2d(4)
        self.conv_b = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.norm_a(self.conv_a(x)) + self.norm_b(self.conv_b(x))


def test_the_graph_decides_and_not_the_order_of_registration():
    folded = check(shaken(Branches()), torch.randn(2, 3, 5, 5))
    assert [c.what for c in batchnorm.changes(folded).done] == [
        "folded into conv_b",
        "folded into conv_a",
    ]


class Twice(nn.Module):
    """One convolution, called twice, behind it one norm or two."""

    def __init__(self, *norms):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norms = nn.ModuleList(norms)

    def forward(self, x):
        return self.norms[-1](self.conv(self.norms[0](self.conv(x))))


def test_a_convolution_with_two_norms_is_left_and_fx_gets_it_wrong():
    model = shaken(Twice(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    x = torch.randn(2, 3, 4, 4)
    folded = check(model, x, left=2)
    assert "conv before it is called elsewhere, too" in str(batchnorm.changes(folded))
    assert (optimization.fuse(copy.deepcopy(model))(x) - model(x)).abs().max() > 0.1


def test_a_pair_that_is_called_twice_as_a_pair_is_folded():
    norm = nn.BatchNorm2d(3)
    check(shaken(Twice(norm, norm)), torch.randn(2, 3, 4, 4))


class Residual(nn.Module):
    """The convolution's output is needed without the norm, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


def test_an_output_with_two_users_is_left():
    check(shaken(Residual()), torch.randn(2, 3, 5, 5), left=1)


class Untraceable(nn.Module):
    """Control flow on values; its part can be traced by itself, unless it reaches inside."""

    def __init__(self, reaches_inside=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.own = nn.BatchNorm2d(3)
        self.reaches_inside = reaches_inside

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        x = self.own(x)
        y = self.body(x)
        return y + self.body[0](x) if self.reaches_inside else y


def test_where_control_flow_forbids_tracing_the_parts_are_folded_and_the_rest_named():
    folded = check(shaken(Untraceable()), torch.randn(2, 3, 5, 5), left=1)
    assert "left  own: not in what could be traced" in str(batchnorm.changes(folded))
    folded = check(shaken(Untraceable(reaches_inside=True)), torch.randn(2, 3, 5, 5), left=2)
    assert "called 2 times, 1 of them" in str(batchnorm.changes(folded))


def test_a_linear_layer_over_the_last_axis_is_left():
    """(N, L, F) with L = F: the norm's channels are axis 1, the layer's features axis 2."""
    model = shaken(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    folded = check(model, torch.randn(2, 5, 4), left=1)
    assert "its input is not (N, C)" in str(batchnorm.changes(folded))
    assert "pass inputs=" in str(batchnorm.changes(batchnorm.fold(model)))


def test_where_torchs_own_functions_fail():
    linear, norm = nn.Linear(4, 6).eval(), nn.BatchNorm1d(6, affine=False).eval()
    with pytest.raises(TypeError):
        fusion.fuse_linear_bn_eval(linear, norm)
    conv, norm = nn.ConvTranspose2d(4, 6, 3, groups=2).eval(), nn.BatchNorm2d(6).eval()
    with pytest.raises(RuntimeError):
        fusion.fuse_conv_bn_eval(conv, norm, transpose=True)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(BatchNormError, match=r"in training mode.*model\.eval"):
        batchnorm.fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].train()
    assert "in training mode" in str(batchnorm.changes(batchnorm.fold(model)))


def test_a_weight_that_another_layer_shares_stays_its_own():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    check(shaken(model), torch.randn(2, 3, 4, 4))


def test_dropout_of_a_folded_densenet_still_follows_train():
    """A retraced model would have its training flags baked in."""
    torch.manual_seed(0)
    model = torchvision.models.densenet._densenet(8, (2, 2), 16, None, False, drop_rate=0.5)
    folded = check(shaken(model), torch.randn(1, 3, 64, 64), left=6)
    x = torch.randn(1, 3, 64, 64)
    assert type(folded) is type(model)
    assert torch.equal(folded(x), folded(x))


@pytest.mark.parametrize("inputs", ["tensor", "tuple", "dict"])
def test_inputs_of_every_kind(inputs):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return {"out": (self.norm(self.conv(x)), 3)}

    x = torch.randn(2, 3, 5, 5)
    given = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[inputs]
    folded = batchnorm.fold(shaken(Model()), given)
    assert batchnorm.changes(folded).facts["difference"] < 1e-5
    assert len(batchnorm.changes(folded).done) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype):
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    folded = batchnorm.fold(model, torch.randn(2, 3, 5, 5).to(dtype))
    assert folded[0].weight.dtype == dtype
    facts = batchnorm.changes(folded).facts
    assert facts["difference"] < 20 * torch.finfo(dtype).eps
    assert facts["difference_in_float64"] < 1e-12


def test_trained_on_or_not_stays_as_it_was():
    model = shaken(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    model[0].weight.requires_grad_(False)
    folded = batchnorm.fold(model)
    assert not folded[0].weight.requires_grad
    folded = batchnorm.fold(shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    assert folded[0].bias.requires_grad


kinds = st.lists(
    st.sampled_from(["conv", "padded", "norm", "relu", "depthwise", "dropout"]),
    min_size=2,
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(kinds, st.integers(0, 1000))
def test_any_sequence_of_layers_keeps_its_outputs(names, seed):
    assume("norm" in names)
    torch.manual_seed(seed)
    make = {
        "conv": lambda: nn.Conv2d(4, 4, 2), "padded": lambda: nn.Conv2d(4, 4, 3, padding=1),
        "norm": lambda: nn.BatchNorm2d(4), "relu": nn.ReLU,
        "depthwise": lambda: nn.Conv2d(4, 4, 1, groups=4, bias=False), "dropout": nn.Dropout,
    }  # fmt: skip
    model = shaken(nn.Sequential(*(make[name]() for name in names)), seed)
    x = torch.randn(2, 4, 12, 12)
    folded = batchnorm.fold(model, x)
    expected = model(x)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-5 * scale)


class ReadsTheWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) + nn.functional.conv2d(x, self.conv.weight)


class ReadsTheBias(ReadsTheWeight):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.conv.bias[:, None, None]


class ReadsTheStatistics(ReadsTheWeight):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn.running_mean[:, None, None]


class ReadsTheWeightBehind(ReadsTheWeight):
    def forward(self, x):
        return self.conv(self.bn(x)) + nn.functional.conv2d(x, self.conv.weight)


@pytest.mark.parametrize(
    "kind", [ReadsTheWeight, ReadsTheBias, ReadsTheStatistics, ReadsTheWeightBehind]
)
@pytest.mark.parametrize("with_inputs", [True, False])
def test_a_layer_whose_parameters_are_read_by_others_stays(kind, with_inputs):
    model, x = shaken(kind()), torch.randn(2, 3, 5, 5)
    folded = batchnorm.fold(model, x if with_inputs else None)
    assert "are read by the code around it" in str(batchnorm.changes(folded))
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


class Reaches(nn.Module):
    """Control flow, and a reach into a part."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.block(x) + self.block[0](x) if x.sum() > -1e9 else x


def test_what_cannot_be_proved_without_inputs_is_said(caplog):
    model, x = shaken(Reaches()), torch.randn(2, 3, 5, 5)
    assert "pass inputs=" in str(batchnorm.changes(batchnorm.fold(model)))
    assert "pass inputs=" in caplog.text
    folded = batchnorm.fold(model, x)
    assert "called 2 times, 1 of them" in str(batchnorm.changes(folded))
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_a_compiled_model_is_folded_as_it_is_written():
    model, x = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), torch.randn(2, 3, 5, 5)
    folded = batchnorm.fold(torch.compile(model, backend="eager"), x)
    assert type(folded) is nn.Sequential
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_lists_and_data_parallel_are_looked_into():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            pair = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.parts = nn.ModuleList([nn.ModuleDict({"a": pair})])

        def forward(self, x):
            return self.parts[0]["a"](x) if x.sum() > -1e9 else x

    check(shaken(Listed()), torch.randn(2, 3, 5, 5))
    check(shaken(nn.DataParallel(Listed().parts[0]["a"])), torch.randn(2, 3, 5, 5))
