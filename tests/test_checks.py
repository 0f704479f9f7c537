"""check: whatever the model, it comes back as it was; levels and choices; what is mended."""

import collections
import copy
import json
import random
from contextlib import ExitStack
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import batchnorm
import rules as cases
from batchnorm import BatchNormError
from batchnorm.checks import probing
from batchnorm.checks import rules as registry
from batchnorm.checks.findings import Level


class TestTheModelComesBack:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = torchvision.models.mobilenet_v3_small(weights=None).train()
        model.features[0][1].eval()
        return model

    def snapshot(self, model):
        return (
            copy.deepcopy(model.state_dict()),
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            [p.grad for p in model.parameters()],
            torch.random.get_rng_state(),
        )

    def same(self, before, after):
        torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
        assert before[1:5] == after[1:5]
        assert torch.equal(before[5], after[5])

    def test_bit_for_bit(self, model):
        data = [torch.randn(4, 3, 32, 32, generator=torch.Generator()) for _ in range(2)]
        before = self.snapshot(model)
        batchnorm.check(model, data, torch.optim.SGD(model.parameters(), lr=0.1), level="note")
        self.same(before, self.snapshot(model))

    @pytest.mark.parametrize("error", [ValueError("the disk"), KeyboardInterrupt()])
    def test_also_when_the_loader_raises(self, model, error):
        def loader():
            yield torch.randn(4, 3, 32, 32, generator=torch.Generator())
            raise error

        before = self.snapshot(model)
        if isinstance(error, ValueError):
            found = batchnorm.check(model, loader())
            assert "ValueError: the disk" in str(found.skipped)
        else:
            with pytest.raises(KeyboardInterrupt):
                batchnorm.check(model, loader())
        self.same(before, self.snapshot(model))

    def test_a_loader_with_a_generator_shuffles_as_it_would(self, model):
        generator = torch.Generator().manual_seed(3)
        data = torch.randn(16, 3, 32, 32, generator=torch.Generator())
        loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)
        state, drawn = generator.get_state(), random.getstate()
        batchnorm.check(model, loader)
        assert torch.equal(generator.get_state(), state)
        assert random.getstate() == drawn

    @pytest.mark.parametrize("loader", [None, [torch.randn(4, 3)]], ids=["trace", "batches"])
    @pytest.mark.parametrize("how", ["in place", "by data", "into data"])
    def test_a_forward_that_writes_into_parameters(self, how, loader):
        """As MoCo, whose forward moves its second encoder."""

        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(3)
                self.norm.weight.requires_grad_(requires_grad=False)

            def forward(self, x):
                weight = self.norm.weight
                if how == "in place":
                    weight.mul_(2)
                elif how == "by data":
                    weight.data = weight.data * 2
                else:
                    weight.data.mul_(2)
                return self.norm(x)

        model = Writes().train()
        place = model.norm.weight.data_ptr()
        batchnorm.check(model, loader, level="note")
        assert torch.equal(model.norm.weight, torch.ones(3))
        assert model.norm.weight.data_ptr() == place

    def test_what_is_held_through_containers_and_helpers(self):
        class Helper:
            def __init__(self):
                self.count, self.draws = 0, random.Random(1)

        class Holds(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.helper = nn.BatchNorm2d(3), Helper()
                self.nested, self.pair = {"a": [0]}, (torch.zeros(1), [torch.zeros(1)])
                self.counter, self.array = collections.Counter(y=1), np.zeros(2)
                self.last, self.order = (
                    collections.deque([7], maxlen=1),
                    collections.OrderedDict(a=1, b=2),
                )

            def forward(self, x):
                self.helper.count += 1
                self.helper.draws.random()
                self.nested["a"][0] += 1
                self.pair[0].add_(1)
                self.pair[1][0].add_(1)
                self.counter["x"] += 1
                self.array += 1
                self.last.append(1)
                self.order.move_to_end("a")
                return self.norm(x)

        model, drawn = Holds().eval(), random.Random(1).getstate()
        for loader in (None, [torch.randn(4, 3, 2, 2)]):
            batchnorm.check(model, loader, level="note")
            assert (model.helper.count, model.nested, model.counter) == (0, {"a": [0]}, {"y": 1})
            assert model.helper.draws.getstate() == drawn
            assert not model.pair[0].any()
            assert not model.pair[1][0].any()
            assert not model.array.any()
            assert list(model.last) == [7]
            assert list(model.order) == ["a", "b"]

    def test_batches_that_a_forward_writes_into(self):
        class Doubles(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(3)

            def forward(self, x):
                return self.norm(x.mul_(2))

        data = [cases.images() for _ in range(2)]
        batchnorm.check(Doubles().eval(), data)
        assert all(torch.equal(x, cases.images()) for x in data)

    def test_data_that_draw_by_generators_of_their_own(self, model):
        class Data(torch.utils.data.Dataset):
            def __init__(self):
                self.torch, self.python = torch.Generator().manual_seed(0), random.Random(1)
                self.numpy, self.old = np.random.default_rng(1), np.random.RandomState(1)

            def states(self):
                old = self.old.get_state()
                return (
                    self.torch.get_state().tolist(), self.python.getstate(),
                    self.numpy.bit_generator.state, (old[1].tolist(), *old[2:]),
                )  # fmt: skip

            def __len__(self):
                return 8

            def __getitem__(self, _):
                drawn = self.python.random() + self.numpy.random() + self.old.rand()
                return torch.randn(3, 32, 32, generator=self.torch) + drawn

        data = Data()
        before = data.states()
        batchnorm.check(model, torch.utils.data.DataLoader(data, 4))
        assert data.states() == before

    def test_an_interruption_between_a_hook_and_its_removal(self, model, monkeypatch):
        class Interrupted(ExitStack):
            def enter_context(self, _):
                raise KeyboardInterrupt

        monkeypatch.setattr(probing, "ExitStack", Interrupted)
        before = self.snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            batchnorm.check(model, [torch.randn(4, 3, 32, 32, generator=torch.Generator())])
        self.same(before, self.snapshot(model))

    def test_what_a_forward_keeps_in_the_module_comes_back(self):
        class Keeps(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.n, self.seen, self.later = nn.BatchNorm1d(3), 0, [], None
                self.moving = torch.zeros(3)
                self.register_buffer("mean", torch.zeros(3))

            def forward(self, x):
                print("a pass")  # noqa: T201  # as a user's forward may
                self.last = x
                self.n += 1
                self.seen.append(self.n)
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
                self.moving += 1
                self.later = self.later or nn.Linear(3, 3)
                self.norm.weight.data = self.norm.weight.data * 1.0
                return self.later(self.norm(x))

            def train(self, mode=True):
                self.n += 100  # as LoRA, which merges its weights
                return super().train(mode)

        model = Keeps()
        weight = model.norm.weight.data_ptr()
        for loader in (None, [torch.randn(8, 3) for _ in range(3)]):
            batchnorm.check(model, loader, level="note")
            assert "last" not in vars(model)
            assert (model.n, model.seen, model.later) == (0, [], None)
            assert type(model.mean) is torch.Tensor
            assert not model.mean.any()
            assert not model.moving.any()
            assert model.norm.weight.data_ptr() == weight
            assert "later" not in dict(model.named_children())

    def test_a_graph_is_traced_without_a_word(self, capsys):
        class Prints(nn.Sequential):
            def forward(self, x):
                print("a pass")  # noqa: T201  # as a user's forward may
                return super().forward(x)

        batchnorm.check(Prints(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), level="note")
        assert not capsys.readouterr().out

    def test_also_when_the_model_raises(self, model):
        before = self.snapshot(model)
        found = batchnorm.check(model, [torch.randn(4, 5, 32, 32, generator=torch.Generator())])
        assert "a batch could not be passed" in str(found.skipped)
        self.same(before, self.snapshot(model))


def test_the_layer_that_explains_the_gap_is_named_first():
    model = cases.network()
    model[4].running_mean += 2
    found = batchnorm.check(model, cases.loader(), select=["BN001"])
    whole, first, *rest = found
    assert whole.layer == ""
    assert first.layer == "4"
    assert first.numbers["share"] == pytest.approx(1, abs=1e-3)
    assert not rest


def test_statistics_that_classify_better_than_the_data_s_are_a_note():
    """As a network that was trained with frozen statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)).eval()
    x = torch.randn(64, 2, 1, 1) + 3
    x[:, 0] += 4 * (torch.arange(64) % 2)[:, None, None]
    model[2].weight.data = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    model[2].bias.data = torch.tensor([5.0, -5.0])  # right with running mean 0 and variance 1
    model[1].num_batches_tracked.fill_(1000)
    loader = list(zip(x.split(32), (torch.arange(64) % 2).split(32), strict=True))
    assert not batchnorm.check(model, loader, select=["BN001"])
    (finding, *_) = batchnorm.check(model, loader, select=["BN001"], level="note")
    assert finding.level is Level.NOTE
    assert finding.numbers["accuracy"][0] > finding.numbers["accuracy"][1]


class TestKindsOfModels:
    def test_no_norm(self):
        found = batchnorm.check(nn.Linear(2, 2), [torch.randn(4, 2)])
        assert not found
        assert "nothing found" in str(found)

    def test_lazy(self):
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), batchnorm.BatchNorm())
        batchnorm.check(model)
        found = batchnorm.check(model, [torch.randn(4, 3, 8, 8)])
        assert "run one batch first" in str(found.skipped)
        assert nn.parameter.is_lazy(model[0].weight)

    def test_scripted(self):
        with pytest.warns(FutureWarning, match="torch.jit.script"):
            model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
        found = batchnorm.check(model, [torch.randn(4, 3, 8, 8)])
        assert "scripted" in found.skipped["(the model)"]

    def test_batches_of_an_unknown_kind_leave_the_static_rules(self):
        model = cases.network()
        model[1].momentum = 0.99
        found = batchnorm.check(model, [object()])
        assert "got a batch of type object" in str(found.skipped)
        assert [f.rule for f in found] == ["BN011"]

    def test_noise_at_evaluation_is_no_dependence_on_the_batch(self):
        class Noisy(nn.Sequential):
            def forward(self, x):
                return super().forward(x) + torch.randn(len(x), 1)

        model = Noisy(cases.network(), nn.Flatten())
        assert not batchnorm.check(model, cases.loader(), select="BN033")

    def test_a_loader_for_evaluation_says_nothing_of_the_training(self):
        model = cases.trained(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8)))
        data = list(cases.images(5).split(4))
        assert not batchnorm.check(model.eval(), data, select=["BN006", "BN007"])
        found = batchnorm.check(model.train(), data, select=["BN006", "BN007"])
        assert [f.rule for f in found] == ["BN006", "BN007"]

    def test_compiled(self):
        model = torch.compile(cases.network(), backend="eager")
        assert not batchnorm.check(model, cases.loader())

    def test_dicts(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(3)

            def forward(self, image):
                return {"scores": self.norm(image).mean((2, 3))}

        model = Model().eval()
        data = [{"image": x, "name": "a"} for x in cases.images().split(16)]
        found = batchnorm.check(model, data)
        assert {f.rule for f in found} == {"BN009"}
        assert "BN021" in found.checked  # a rule that needs batches

    def test_frozen(self):
        model = batchnorm.freeze(cases.network()).train()
        assert not batchnorm.check(model, cases.loader())

    def test_a_model_that_asks_who_calls(self):
        found = batchnorm.check(torchvision.models.detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None), level="error")  # fmt: skip
        assert not found


@pytest.mark.parametrize("name", ["resnet18", "timm mobilenetv3_small_050", "timm repvgg_a0"])
def test_healthy_models_of_others_give_nothing(name):
    torch.manual_seed(0)
    if name.startswith("timm"):
        model = timm.create_model(name.split()[1])
    else:
        model = torchvision.models.get_model(name, weights=None)
    model = cases.trained(model, [cases.images(24, 64, seed) for seed in range(2)])
    data = [cases.images(24, 64, seed) for seed in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
    for mode in (False, True):
        found = batchnorm.check(model.train(mode), data, optimizer)
        assert not found, found


class TestChoice:
    def test_levels(self):
        model = nn.Sequential(nn.BatchNorm2d(4)).train()
        assert not batchnorm.check(model)
        found = batchnorm.check(model, level="note")
        assert {f.rule for f in found} == {"BN009"}
        assert found.worst is Level.NOTE

    def test_select_and_ignore(self):
        model = cases.network()
        model[1].momentum = 0.99
        model[1].running_var.fill_(-1)
        assert [f.rule for f in batchnorm.check(model)] == ["BN008", "BN011"]
        assert [f.rule for f in batchnorm.check(model, select="BN011")] == ["BN011"]
        assert [f.rule for f in batchnorm.check(model, ignore=["BN011"])] == ["BN008"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"level": "high"}, "there are note, warning, error"),
            ({"select": ["BN999"]}, "there is no rule 'BN999'"),
            ({"ignore": ["X"]}, "there is no rule 'X'"),
        ],
    )
    def test_what_is_not_there_is_said(self, options, message):
        with pytest.raises(BatchNormError, match=message):
            batchnorm.check(nn.BatchNorm2d(3), **options)

    def test_not_a_model(self):
        with pytest.raises(BatchNormError, match=r"got a dict and wants a torch\.nn\.Module"):
            batchnorm.check({})

    def test_another_package_adds_rules(self, monkeypatch, tmp_path):
        (tmp_path / "theirs.py").write_text(
            "from batchnorm.checks.rules import Evidence, rule\n"
            "@rule('XY001', 'Too many channels.', remedy='pass')\n"
            "def too_many(subject):\n"
            "    '''More than two.'''\n"
            "    for name, layer in subject.layers.items():\n"
            "        if layer.num_features > 2:\n"
            "            yield Evidence(name, f'{layer.num_features} channels')\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        entry = EntryPoint("theirs", "theirs", registry.GROUP)
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [entry] * (group == registry.GROUP)
        )
        monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
        registry._load.cache_clear()
        try:
            (found,) = batchnorm.check(nn.BatchNorm2d(3), select="XY")
            assert found.evidence == "3 channels"
        finally:
            registry._load.cache_clear()

    def test_a_rule_that_raises_is_told_and_the_others_go_on(self, monkeypatch):
        monkeypatch.setattr(registry, "_RULES", dict(registry.all_rules()))

        @registry.rule("BN900", "Broken.", remedy="pass")
        def broken(subject):
            """It raises."""
            yield subject.there_is_none

        found = batchnorm.check(cases.network())
        assert "could not be checked: AttributeError" in found.skipped["BN900"]
        assert "BN011" in found.checked

        with pytest.raises(BatchNormError, match="the rule BN900 is there already"):

            @registry.rule("BN900", "Another.", remedy="pass")
            def another(_subject):
                """It is another."""
                yield from ()


def test_fix_mends_and_says_what_it_did():
    model = cases.network()
    model[1].momentum = 0.99
    model[4].running_var.fill_(-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-2)
    found = batchnorm.check(model, cases.loader(), optimizer, level="note", fix=True)
    assert model[1].momentum == pytest.approx(0.01)
    assert (model[4].running_var > 0).all()
    assert any("BN023 1: weight and bias do not decay" in line for line in found.fixed)
    assert any("recalibrated" in line for line in found.fixed)
    assert {f.rule for f in found} <= {"BN034"}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len(list(model.parameters()))


def test_fix_leaves_good_channels_and_a_loader_that_is_read_once():
    model = cases.network()
    model[4].running_var[0] = -1
    model[4].running_mean[1:] = 5
    kept = model[4].running_mean[1:].clone()
    model[1].momentum = 1.0
    model[1].num_batches_tracked.fill_(1000)
    found = batchnorm.check(
        model, iter(cases.loader()), select=["BN008", "BN011"], level="note", fix=True
    )
    assert any("in 1 channels, the others as they were" in line for line in found.fixed)
    assert "BN011 1: momentum 1 may be meant" in found.left
    assert any("not recalibrated: what is read once" in line for line in found.left)
    assert torch.equal(model[4].running_mean[1:], kept)
    assert model[1].momentum == 1.0


@pytest.mark.parametrize(("wrong", "right"), [(0.99, 0.01), (0.5, 0.1), (1.5, 0.1), (1.0, 1.0)])
def test_fix_turns_a_momentum_that_was_meant_the_other_way(wrong, right):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=wrong))
    batchnorm.check(model, select="bn011", level="note", fix=True)
    assert model[0].momentum == right


def test_a_bias_that_somebody_else_reads_is_not_dead():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x)) + self.conv.bias.view(1, -1, 1, 1)

    tied = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    tied[2].bias = tied[0].bias
    for model in (Read(), tied):
        assert not batchnorm.check(model, select="BN014", level="note")


def test_a_dead_bias_leaves_the_outputs_as_they_were():
    model = cases.trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = cases.images()
    expected = model.eval()(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = batchnorm.check(model, None, optimizer, level="note", fix=True)
    assert any("the bias before it is gone" in line for line in found.fixed)
    assert model[0].bias is None
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert len(optimizer.param_groups[0]["params"]) == 3


def test_json_is_json_whatever_a_rule_says(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry.all_rules()))

    @registry.rule("BN901", "Odd numbers.", remedy="pass")
    def odd(_subject):
        """It says what JSON does not know."""
        numbers = {"a": float("inf"), "b": torch.float32, "c": (1, None), "d": 0.5}
        yield registry.Evidence("", "odd", numbers)

    @registry.rule("BN902", "Nonsense.", remedy="pass")
    def nonsense(_subject):
        """It gives something else."""
        yield 3

    @registry.rule("BN903", "Wants the moon.", needs=("moon",), remedy="pass")
    def moon(_subject):
        """It cannot be asked."""
        yield from ()

    found = batchnorm.check(cases.network(), select="BN90")
    numbers = json.loads(found.to_json())["findings"][0]["numbers"]
    assert numbers == {"a": "inf", "b": "torch.float32", "c": [1, None], "d": 0.5}
    assert "AttributeError" in found.skipped["BN902"]
    assert found.skipped["BN903"] == "needs moon"


def test_they_print_and_give_json():
    model = cases.network()
    model[1].momentum = 0.99
    found = batchnorm.check(model)
    text = str(found)
    assert text.startswith("Sequential: 1 warning\n")
    assert "BN011 warning: A momentum that forgets" in text
    assert "  1: momentum 0.99" in text
    content = json.loads(found.to_json())
    assert content["findings"][0]["layer"] == "1"
    assert content["findings"][0]["fixable"]
    assert found[:1] == [found[0]]
