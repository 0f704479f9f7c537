"""check and watch: every rule finds its fault, says nothing of its twin, and leaves no trace."""

import collections
import copy
import gc
import importlib.util
import json
import random
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import EntryPoint
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._dynamo.utils import counters
from typer.testing import CliRunner

import batchnorm
from batchnorm import BatchNormError
from batchnorm.checks import probing
from batchnorm.checks import rules as registry
from batchnorm.checks import watching as watching_module
from batchnorm.checks.findings import Level
from batchnorm.cli import app

ROOT = Path(__file__).parent.parent


def load_rules():
    """benchmarks/rules.py."""
    spec = importlib.util.spec_from_file_location("rule_cases", ROOT / "benchmarks" / "rules.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["rule_cases"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


cases = load_rules()


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.rule)
def test_each_rule_finds_its_fault_and_is_silent_on_its_twin_and_after_the_remedy(case):
    result = cases.examine(case)
    assert result.holds(case), result


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.rule)
def test_a_healthy_twin_gives_no_other_finding(case):
    if case.level is Level.NOTE:
        return  # its twin may have faults of other kinds, as it is in training mode
    torch.manual_seed(0)
    twin = case.healthy()
    if twin.train is None:
        found = batchnorm.check(twin.model, twin.loader, twin.optimizer)
        assert not found, found


def test_every_rule_has_a_case_and_a_page():
    rules = registry.all_rules()
    assert {case.rule for case in cases.CASES} == set(rules)
    for identifier, rule in rules.items():
        assert rule.title.endswith(".")
        assert len(rule.explanation) > 100, identifier
        compile(rule.remedy, identifier, "exec")
        assert f"## {identifier}\n" in (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


def test_docs_are_those_of_the_rules():
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    for rule in registry.all_rules().values():
        assert rule.explanation in page, rule.identifier
        assert rule.remedy in page


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
    expected = {mode: model.train(mode)(x) for mode in (False, True)}
    model = cases.trained(model)
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


MODULE = """
import torch, torchvision
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.99))
    return model.train()

def all_three():
    model = build()
    return model, loader(), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)

def loader():
    return [torch.randn(16, 3, 8, 8) for _ in range(3)]

def number():
    return 3

def raises():
    raise KeyError("a")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    (tmp_path / "faulty.py").write_text(MODULE)
    return tmp_path


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


class TestTheCommand:
    @pytest.mark.usefixtures("folder")
    def test_it_prints_and_ends_by_severity(self):
        status, said = invoke("check", "faulty:build")
        assert status == 3
        assert "BN011 warning A momentum that forgets" in said
        assert "layer.momentum = 1 - layer.momentum" in said
        assert invoke("check", "faulty:build", "--ignore", "BN011")[0] == 0
        status, said = invoke("check", "faulty:all_three", "--level", "note", "--json")
        assert status == 3
        assert "BN023" in said

    def test_errors_end_with_4_and_the_page_is_written(self, folder):
        import faulty

        model = faulty.build()
        model[1].running_var.fill_(-1)
        torch.save(model.state_dict(), "w.pt")
        arguments = ["check", "faulty:build", "--checkpoint", "w.pt", "--page", "found.html"]
        assert invoke(*arguments)[0] == 4
        page = (folder / "found.html").read_text(encoding="utf-8")
        assert "BN008" in page
        assert "http" not in page.replace("http-equiv", "")
        mended = ["--data", "faulty:loader", "--fix", "--to", "m.pt"]
        status, said = invoke(*arguments[:4], *mended, "--ignore", "BN011")
        assert status == 0, said
        assert "fixed: BN008" in said
        assert (torch.load("m.pt")["1.running_var"] > 0).all()

    def test_explain(self):
        status, said = invoke("check", "--explain", "bn016")
        assert status == 0
        assert "Activation checkpointing updates the running statistics twice." in said
        assert "the half-life is half of what it was meant to be" in said

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["check"], "wants package.module:function"),
            (["check", "faulty:number"], "gave a int"),
            (["check", "faulty:raises"], "raised KeyError"),
            (["check", "faulty:build", "--level", "high"], "there is no level"),
            (["check", "faulty:build", "--select", "BN999"], "there is no rule"),
            (["check", "--explain", "BN999"], "there is no rule"),
            (["check", "faulty:build", "--to", "a.pt"], "each wants the other"),
            (["check", "faulty:build", "--fix"], "each wants the other"),
            (["watch", "none.py"], "there is no script none.py"),
        ],
    )
    @pytest.mark.usefixtures("folder")
    def test_what_a_user_can_mend(self, arguments, message):
        status, said = invoke(*arguments)
        assert status == 2
        assert message in said


SCRIPT = """
import sys, torch
from torch import nn

print("arguments", sys.argv, __name__, __file__)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.9), nn.Flatten(), nn.Linear(144, 2))
{compiled}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(60):
    x = torch.randn(8, 1, 8, 8)
    loss = nn.functional.cross_entropy(model(x), (x.mean((1, 2, 3)) > 0).long())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, loss.item())
{end}
"""


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


ENDS = {
    "well": "",
    "a status": "sys.exit(7)",
    "a message": "sys.exit('bad')",
    "an error": "raise KeyError('a')",
}


AROUND = """
import atexit, os, sys, threading, time, torch
from torch import nn
atexit.register(lambda: print("atexit", sys.argv, sys.modules["__main__"].__loader__.path[-8:]))
sys.excepthook = lambda kind, error, frames: print("hook", kind.__name__, file=sys.stderr)
class Net(nn.Sequential):
    def forward(self, x):
        print("forward", __builtins__.__name__)
        self.cache = super().forward(x)
        return self.cache
model = Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.99))
model(torch.randn(4, 3, 8, 8))
threading.Thread(target=lambda: (time.sleep(0.3), print("later", sys.argv))).start()
sys.stdout.flush()
if os.fork() == 0:
    sys.exit(7)
os.wait()
if sys.argv[1] == "raise":
    raise ValueError("at the end")
if sys.argv[1] == "interrupt":
    raise KeyboardInterrupt
if sys.argv[1] == "close":
    os.close(2)
    sys.exit(5)
"""


class TestWatching:
    @pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
    def test_output_status_and_numbers_are_the_script_s(self, tmp_path, end):
        (tmp_path / "train.py").write_text(SCRIPT.format(end=end, compiled=""))
        alone = run("train.py", "--rate", "3", cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", "--rate", "3", cwd=tmp_path)
        assert watched.stdout == alone.stdout
        assert watched.returncode == alone.returncode
        assert "BN011 warning" in watched.stderr
        if alone.stderr:  # the same traceback, but for the path that Python prints absolute
            assert alone.stderr.splitlines()[-1] in watched.stderr

    @pytest.mark.parametrize("end", ["", "raise", "interrupt", "close"])
    def test_what_python_does_around_a_script(self, tmp_path, end):
        (tmp_path / "train.py").write_text(AROUND)
        alone = run("train.py", end, cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", end, cwd=tmp_path)
        assert sorted(watched.stdout.splitlines()) == sorted(alone.stdout.splitlines())
        shown = {-2: 130}  # ended by a signal: what a shell makes of it
        assert watched.returncode == shown.get(alone.returncode, alone.returncode)
        assert alone.stderr.strip() in watched.stderr
        assert watched.stderr.count("BN011") == (0 if end == "close" else 2)  # and in --explain

    @pytest.mark.parametrize("command", ["module", "console"])
    def test_modules_are_looked_for_where_python_looks(self, tmp_path, command):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.py").write_text("import sys; print(sys.path)")
        start = "import sys; from batchnorm.cli import main; sys.argv[0] = 'batchnorm'; main()"
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "start.py").write_text(start)
        how = ["-m", "batchnorm"] if command == "module" else ["bin/start.py"]
        alone = run("sub/a.py", cwd=tmp_path)
        watched = run(*how, "watch", "sub/a.py", cwd=tmp_path)
        assert watched.stdout == alone.stdout

    def test_a_batchnorm_of_the_script_s_own_is_said(self, tmp_path):
        (tmp_path / "batchnorm.py").write_text("x = 1")
        (tmp_path / "train.py").write_text("print('ran')")
        start = "import sys; from batchnorm.cli import main; main()"
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "start.py").write_text(start)
        watched = run("bin/start.py", "watch", "train.py", cwd=tmp_path)
        assert watched.returncode == 2
        assert "beside a batchnorm.py of its own" in watched.stderr
        assert not watched.stdout

    def test_a_script_that_cannot_be_compiled(self, tmp_path):
        (tmp_path / "train.py").write_text("x = (")
        alone = run("train.py", cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", cwd=tmp_path)
        assert watched.returncode == alone.returncode == 1
        assert watched.stderr.startswith(alone.stderr)

    def test_a_compiled_model_is_watched(self, tmp_path):
        script = SCRIPT.format(end="", compiled="model = torch.compile(model, backend='eager')")
        (tmp_path / "train.py").write_text(script)
        alone = run("train.py", cwd=tmp_path)
        watched = run("-m", "batchnorm", "watch", "train.py", cwd=tmp_path)
        assert watched.stdout == alone.stdout
        assert "BN011 warning" in watched.stderr, watched.stderr

    def test_modules_files_and_guarding(self, tmp_path):
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "train.py").write_text(SCRIPT.format(end="", compiled=""))
        watched = run(
            "-m", "batchnorm", "watch", "--guard", "--json", "f.json", "--page", "f.html", "-m",
            "package.train", cwd=tmp_path,
        )  # fmt: skip
        assert watched.returncode == 3
        (content,) = json.loads((tmp_path / "f.json").read_text())
        assert {f["rule"] for f in content["findings"]} >= {"BN011"}
        assert "BN011" in (tmp_path / "f.html").read_text()

    def test_no_norm_is_said(self, tmp_path):
        (tmp_path / "a.py").write_text("print('nothing')")
        watched = run("-m", "batchnorm", "watch", "a.py", cwd=tmp_path)
        assert watched.stdout == "nothing\n"
        assert "no model with batch norm" in watched.stderr

    def test_several_models_and_a_part_that_is_called_by_itself(self):
        first, second = cases.network().train(), cases.network().train()
        with batchnorm.watch() as watching:
            first[:2](cases.images())  # a slice is a module of its own, of the same parts
            first(cases.images())
            second(cases.images())
        assert len(watching.models) >= 2
        assert {id(first), id(second)} <= {id(model) for model in watching.models}

    def test_hooks_go_also_when_the_training_raises(self):
        model = cases.network()
        from torch.nn.modules import module as torch_module

        watching = batchnorm.watch()
        with pytest.raises(ZeroDivisionError), watching:
            model(cases.images() / (1 // 0))
        assert not torch_module._global_forward_hooks
        assert not torch_module._global_forward_pre_hooks

    @pytest.mark.parametrize("how", ["module", "method", "function"])
    def test_whatever_is_compiled_is_seen_and_compiled_once(self, how, recwarn):
        model = cases.network().train()
        model[1].momentum = 0.99
        run = model
        with batchnorm.watch(every=2) as watching:
            if how == "module":
                run = torch.compile(model, backend="eager")
            elif how == "method":
                model.compile(backend="eager")
            else:
                run = torch.compile(lambda x: model(x) + 1, backend="eager")
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            counters.clear()
            for _ in range(5):
                run(cases.images()).sum().backward()
                optimizer.step()
        assert counters["stats"]["unique_graphs"] == 1
        (found,) = watching.findings()
        assert "BN011" in {f.rule for f in found}
        assert not [w for w in recwarn if "global hooks" in str(w.message)]

    def test_a_model_run_by_its_forward_is_one_model(self):
        model = cases.network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with batchnorm.watch() as watching:
            for _ in range(3):
                model.forward(cases.images()).sum().backward()
                optimizer.step()
        (found,) = watching.findings()
        assert found.model == "model (Sequential)"

    def test_what_goes_wrong_in_a_hook_is_not_the_training_s(self, monkeypatch):
        broken = Mock(side_effect=ZeroDivisionError)
        monkeypatch.setattr(watching_module.Observed, "see", broken)
        monkeypatch.setattr(watching_module.Observed, "step", broken)
        model = cases.network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with batchnorm.watch() as watching:
            model(cases.images()).sum().backward()
            optimizer.step()
        (found,) = watching.findings()
        assert "ZeroDivisionError" in str(found.skipped)

    def test_transforms_go_through(self):
        model = batchnorm.freeze(cases.network()).train()
        with batchnorm.watch(every=1):
            torch.func.vmap(model)(cases.images().unsqueeze(1))
            graph = torch.fx.experimental.proxy_tensor.make_fx(model)(cases.images())
        assert "detach" not in graph.code

    def test_many_models_are_judged_as_they_go(self):
        held = []
        with batchnorm.watch() as watching:
            for k in range(20):
                model = cases.network().train()
                held.append(model)
                model.register_module(f"unlike{k}", nn.Identity())
                model[1].momentum = 0.99
                model(cases.images())
            assert len(watching.models) == watching_module.MODELS
        (found,) = watching.findings()  # alike: told of once
        assert [f.rule for f in found][:1] == ["BN011"]

    def test_a_module_that_is_gone_is_forgotten(self):
        with batchnorm.watch() as watching:
            for _ in range(50):
                nn.Linear(2, 2)(torch.zeros(1, 2))
            gc.collect()
            assert len(watching._roles) < 5

    def test_a_norm_that_comes_later_is_its_model_s(self):
        model = cases.network().train()
        with batchnorm.watch() as watching:
            model(cases.images())
            model.append(nn.BatchNorm2d(8, momentum=0.99))
            model[-1](torch.randn(4, 8, 3, 3))
        (found,) = watching.findings()
        assert "BN011" in {f.rule for f in found}

    def test_every_0_is_said(self):
        with pytest.raises(BatchNormError, match="every=0"), batchnorm.watch(every=0):
            pass

    def test_statistics_taken_anew_are_no_evaluation_in_training_mode(self):
        model = cases.network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with batchnorm.watch(model) as watching:
            for _ in range(40):
                model(cases.images()).square().mean().backward()
                optimizer.step()
            torch.optim.swa_utils.update_bn(cases.loader(), model)
        (found,) = watching.findings()
        assert not {f.rule for f in found} & {"BN002", "BN005", "BN012"}, found

    def test_one_evaluation_does_not_hide_the_others(self):
        model = cases.network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with batchnorm.watch(model) as watching, torch.no_grad():
            for k in range(40):
                with torch.enable_grad():
                    model(cases.images()).square().mean().backward()
                optimizer.step()
                if k % 10 == 9:
                    for _ in range(5):
                        model(cases.images())
            model.eval()(cases.images())
            model.train()
        (found,) = watching.findings()
        assert found[0].rule == "BN002"

    def test_weights_without_their_counter_are_no_fault(self):
        model = cases.network().train()
        for layer in (model[1], model[4]):
            layer.num_batches_tracked.zero_()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with batchnorm.watch(model, select="BN012") as watching:
            model(cases.images()).square().mean().backward()
            optimizer.step()
        assert not watching.findings()[0]

    def test_a_last_small_batch_is_no_small_batch(self):
        model = cases.head(32, 64).model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with batchnorm.watch(model, select="BN007") as watching:
            for x in cases.images(69).split(32):
                model(x).square().mean().backward()
                optimizer.step()
        assert not watching.findings()[0]

    def test_who_unfreezes_on_purpose_is_left_alone(self):
        model = cases.network().train()
        model[1].requires_grad_(requires_grad=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with batchnorm.watch(model, select="BN004") as watching:
            for k in range(10):
                model.train()
                model[1].train(k > 4).requires_grad_(k > 4)
                model(cases.images()).square().mean().backward()
                optimizer.step()
        assert not watching.findings()[0]

    def test_halves_that_take_turns_are_not_frozen_and_a_frozen_backbone_is(self):
        whole = nn.ModuleList([cases.network(), cases.network()]).train()
        outer = nn.Sequential()
        outer.halves = whole
        outer.forward = lambda x: whole[0](x).mean() + whole[1](x).mean()
        optimizer = torch.optim.SGD(whole.parameters(), lr=0.001)
        with batchnorm.watch(outer, select="BN003") as watching:
            for k in range(40):
                for place, half in enumerate(whole):
                    half.requires_grad_(place == k % 2)
                outer(cases.images()).backward()
                optimizer.step()
        assert not watching.findings()[0]
        backbone, head = (
            cases.network().train().requires_grad_(requires_grad=False),
            nn.LazyLinear(2),
        )
        head(backbone(cases.images()).flatten(1))
        optimizer = torch.optim.SGD(head.parameters(), lr=0.001)
        with batchnorm.watch(select="BN003") as watching:
            for _ in range(12):
                head(backbone(cases.images()).flatten(1)).sum().backward()
                optimizer.step()
        (found,) = watching.findings()
        assert {f.layer for f in found} == {"1", "4"}

    def test_reentrant_checkpoints_are_no_passes_without_gradients(self):
        model = cases.Checkpointed(use_reentrant=True).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        with batchnorm.watch(model, select="BN005", level="note") as watching:
            for _ in range(5):
                model(cases.images().requires_grad_()).sum().backward()
                optimizer.step()
        assert not watching.findings()[0]

    def test_a_model_that_raises_does_not_confuse_the_depth(self):
        model = cases.network().train()
        with batchnorm.watch(model) as watching:
            for _ in range(3):
                with pytest.raises(RuntimeError):
                    model(torch.randn(2, 5, 8, 8))
            model(cases.images())
        (root,) = watching._roots
        assert root.seen.forwards[True, True] == 4

    def test_the_layers_gaps_become_scalars(self):
        class Writer:
            def __init__(self):
                self.scalars = []

            def add_scalar(self, tag, value, step):
                self.scalars.append((tag, value, step))

        writer, model = Writer(), cases.network().train()
        with batchnorm.watch(model, every=5, writer=writer):
            cases.steps(cases.Situation(model), 20)
        tags = {tag for tag, _, _ in writer.scalars}
        assert tags == {"batchnorm/1/gap", "batchnorm/4/gap"}
        assert {step for _, _, step in writer.scalars} >= {5, 10, 15}
        assert all(0 <= value < 10 for _, value, _ in writer.scalars)

    @pytest.mark.filterwarnings("ignore")  # Lightning's own: few workers, few batches
    @pytest.mark.parametrize("fails", [False, True])
    def test_lightning_s_callback(self, tmp_path, capsys, fails):
        import lightning
        from torch.utils.data import DataLoader

        from batchnorm.checks.callback import WatchCallback

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = cases.network()
                self.model[1].momentum = 0.9

            def training_step(self, batch, index):
                if fails and index == 2:
                    raise ValueError("here")
                return self.model(batch[0]).square().mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01)

        callback = WatchCallback(select=["BN011"])
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[callback],
        )  # fmt: skip
        loader = DataLoader(torch.utils.data.TensorDataset(cases.images()), 16)
        if fails:
            with pytest.raises(ValueError, match="here"):
                trainer.fit(Module(), loader)
        else:
            trainer.fit(Module(), loader)
        assert [f.layer for f in callback.findings] == ["model.1"]
        assert "BN011 warning" in capsys.readouterr().err


def load_scripts():
    """benchmarks/scripts.py."""
    spec = importlib.util.spec_from_file_location(
        "five_scripts", ROOT / "benchmarks" / "scripts.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


five = load_scripts()
FOUND = {
    "1": "BN002 error",
    "2": "BN011 warning",
    "3": "BN003 warning",
    "4": "BN006 error",
    "5": "BN016 warning",
}


@pytest.mark.parametrize("pair", five.pairs(), ids=lambda pair: pair[0].stem)
def test_the_five_scripts_are_found_and_repaired(pair):
    broken, repaired = pair
    assert FOUND[broken.name[0]] in five.run(broken)
    assert "BN0" not in five.run(repaired)
    page = (ROOT / "docs" / "five-scripts.md").read_text(encoding="utf-8")
    assert f"$ batchnorm watch {broken.name}" in page
    assert f"$ batchnorm watch {repaired.name}" in page
