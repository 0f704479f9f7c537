"""watch around a training in this process: its models, its hooks, what is a fault and what is none."""

import gc
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import batchnorm
import rules as cases
from batchnorm import BatchNormError
from batchnorm.checks import watching as watching_module


class TestWatching:
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

    def test_many_models_are_judged_to_their_end(self):
        models = [cases.network().train() for _ in range(12)]
        for k, model in enumerate(models):
            model.register_module(f"unlike{k}", nn.Identity())
        with batchnorm.watch() as watching:
            for model in models:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                for _ in range(2):
                    model(cases.images()).sum().backward()
                    optimizer.step()
            for model in models:  # too late for one that was judged already
                model[1].momentum = 0.99
                model(cases.images())
            assert len(watching.models) == len(models)
        (found,) = watching.findings()
        assert "and 11 like it" in found.model

    def test_more_models_are_judged_as_they_go(self, monkeypatch):
        monkeypatch.setattr(watching_module, "MODELS", 8)
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
        assert "watched until step 0: more than 8 models" in found.model

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
