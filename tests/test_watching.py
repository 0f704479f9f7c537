"""watch around scripts: what Python does around them; names, memory, averaged weights."""

import copy
import gc
import os
import sys
import threading
import weakref
import zipfile

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import batchnorm
import processes
import rules as cases
from batchnorm import BatchNormError
from batchnorm.model.tracing import trace
from test_trainings import sgd, step


def watch(*arguments, cwd, text=None, **environment):
    return processes.command(
        "watch", *arguments, cwd=cwd, input=text, env={**os.environ, **environment}
    )


FAULTY = """
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.9))
model(torch.randn(4, 1, 8, 8))
print("ran")
"""


class TestScripts:
    def test_a_pool_that_nobody_shut_down_ends_with_the_script(self, tmp_path):
        (tmp_path / "a.py").write_text(
            "from concurrent.futures import ThreadPoolExecutor\n"
            "import time\n"
            "pool = ThreadPoolExecutor(2)\n"
            "pool.submit(lambda: (time.sleep(0.3), print('the last', flush=True)))\n" + FAULTY
        )
        watched = watch("a.py", cwd=tmp_path)
        assert watched.returncode == 0
        assert sorted(watched.stdout.splitlines()) == ["ran", "the last"]
        assert "BN011 warning" in watched.stderr

    def test_a_pool_of_processes_that_nobody_shut_down(self, tmp_path):
        (tmp_path / "a.py").write_text(
            "from concurrent.futures import ProcessPoolExecutor\n"
            "pool = ProcessPoolExecutor(2)\n"
            "print(pool.submit(pow, 2, 3).result())\n"
        )
        watched = watch("a.py", cwd=tmp_path)
        assert (watched.returncode, watched.stdout) == (0, "8\n")

    def test_it_begins_once_and_says_where_it_could_not(self, tmp_path):
        (tmp_path / "a.py").write_text(
            "import torch\nprint(len(torch.nn.modules.module._global_forward_pre_hooks))\n"
        )
        assert watch("a.py", cwd=tmp_path).stdout == "1\n"
        (tmp_path / "b.py").write_text("import sys\nsys.meta_path.pop(0)\nimport torch\n")
        assert "loaded torch past sys.meta_path" in watch("b.py", cwd=tmp_path).stderr

    def test_what_is_set_before_torch_is_loaded_has_its_effect(self, tmp_path):
        (tmp_path / "a.py").write_text(
            "import os, sys\n"
            "os.environ['OMP_NUM_THREADS'] = '1'\n"
            "print('torch' in sys.modules, 'batchnorm' in sys.modules)\n"
            "import torch\n"
            "print(torch.get_num_threads())\n"
        )
        assert watch("a.py", cwd=tmp_path).stdout == "False False\n1\n"

    @pytest.mark.parametrize("first", ["import batchnorm", "import torchvision", "import torch.nn"])
    def test_it_begins_whoever_loads_torch(self, tmp_path, first):
        (tmp_path / "a.py").write_text(f"{first}\n{FAULTY}")
        assert "BN011 warning" in watch("a.py", cwd=tmp_path).stderr

    def test_a_folder_an_archive_and_standard_input(self, tmp_path):
        script = f"import helper, sys\nprint(sys.argv, sys.path[0])\n{FAULTY}"
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "__main__.py").write_text(script)
        (tmp_path / "folder" / "helper.py").write_text("")
        (tmp_path / "helper.py").write_text("")
        with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
            archive.writestr("__main__.py", script)
            archive.writestr("helper.py", "")
        for name, text in (("folder", None), ("archive.zip", None), ("-", script)):
            alone = processes.run(name, "3", cwd=tmp_path, input=text)
            watched = watch(name, "3", cwd=tmp_path, text=text)
            assert watched.stdout == alone.stdout
            assert watched.returncode == alone.returncode == 0
            assert "BN011 warning" in watched.stderr

    def test_an_early_end_is_said(self, tmp_path):
        (tmp_path / "a.py").write_text(f"{FAULTY}\nraise ValueError('early')")
        watched = watch("a.py", cwd=tmp_path)
        assert watched.returncode == 1
        assert "ended early, with status 1: what follows is of what ran" in watched.stderr

    def test_what_would_fail_behind_a_training_is_refused_before_it(self, tmp_path):
        (tmp_path / "a.py").write_text(FAULTY)
        for arguments, message in (
            (["--json", "no/f.json"], "no/f.json is in no folder"),
            (["--select", "BN0O1"], "do you mean BN0"),
            (["--every", "0"], "every=0"),
            (["--level", "all"], "there is no level"),
        ):
            watched = watch(*arguments, "a.py", cwd=tmp_path)
            assert watched.returncode == 2
            assert message in watched.stderr
            assert not watched.stdout

    def test_a_page_that_cannot_be_written_costs_no_report(self, tmp_path):
        (tmp_path / "a.py").write_text(f"{FAULTY}\nimport os\nos.mkdir('f.html')")
        watched = watch("--page", "f.html", "a.py", cwd=tmp_path)
        assert watched.returncode == 2
        assert "BN011 warning" in watched.stderr
        assert "Is a directory" in watched.stderr

    def test_the_interpreter_s_options_are_the_script_s(self, tmp_path):
        (tmp_path / "a.py").write_text("import sys; print(sys.flags.optimize, sys.flags.utf8_mode)")
        options = ["-O", "-X", "utf8"]
        watched = processes.run(*options, "-m", "batchnorm", "watch", "a.py", cwd=tmp_path)
        assert watched.stdout == "1 1\n"

    def test_a_compiled_script_s_names_are_the_model_s(self, tmp_path):
        script = FAULTY.replace("model(torch", "model = torch.compile(model)\nmodel(torch")
        (tmp_path / "a.py").write_text(script)
        watched = watch("a.py", cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        assert watched.stdout == "ran\n"
        assert "model (Sequential): " in watched.stderr
        assert "_orig_mod" not in watched.stderr


def names(watching):
    return [found.model for found in watching.findings()]


def inverted():
    model = cases.network().train()
    model[1].momentum = 0.9
    return model


class TestNames:
    def test_the_variables_of_the_outermost_frame(self):
        def run(network):
            network(cases.images())

        generator, critic = inverted(), inverted()
        with batchnorm.watch() as watching:
            run(generator)
            run(critic)
            critic[4].momentum = 0.9  # or it is a copy of the other
            kinds = names(watching)
        # what is wrong with the one is wrong with the other, too
        assert kinds == ["critic (Sequential) and 1 like it (generator)"]

    def test_copies_are_told_of_once_by_all_their_names(self):
        first, second = inverted(), inverted()
        wider = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=0.9))
        models = {"a": inverted()}
        with batchnorm.watch() as watching:
            first(cases.images())
            second(cases.images())
            wider(cases.images())
            models["a"](cases.images())
        assert names(watching) == [
            "first (Sequential) and 2 like it (models['a'], second)",
            "wider (Sequential)",
        ]

    def test_the_trained_one_of_two_alike_is_told_of(self):
        teacher = inverted()
        student = copy.deepcopy(teacher)
        optimizer = sgd(student)
        with batchnorm.watch() as watching:
            teacher(cases.images())
            step(optimizer, student(cases.images()).square().mean())
        assert names(watching) == ["student (Sequential) and 1 like it (teacher)"]

    def test_a_wrapper_that_is_made_at_every_step_is_one_model(self):
        network = cases.network().train()
        network[1].reset_running_stats()
        optimizer = sgd(network)
        with batchnorm.watch(level="note") as watching:
            for _ in range(120):
                wrapper = nn.Sequential(network, nn.Identity())
                step(optimizer, wrapper(cases.images()).square().mean())
            (root,) = watching._roots
        assert root.seen.steps == 120
        assert root.seen.calls[network[1]][True, True] == 120
        assert "BN012" not in {f.rule for found in watching.findings() for f in found}

    def test_one_name_twice_is_numbered(self):
        with batchnorm.watch() as watching:
            for place in (1, 4):
                model = cases.network().train()
                model[place].momentum = 0.9
                model(cases.images())
        assert names(watching) == ["model (Sequential)", "model (Sequential) #2"]

    def test_attributes_of_a_trainer(self):
        class Trainer:
            def __init__(self):
                self.net = inverted()

            def fit(self):
                self.net(cases.images())

        trainer = Trainer()
        with batchnorm.watch() as watching:
            trainer.fit()
        assert names(watching) == ["self.net (Sequential)"]

    def test_a_module_whose_method_calls_its_parts_is_the_model(self):
        class Module(nn.Module):  # as Lightning's, whose forward nobody calls
            def __init__(self):
                super().__init__()
                self.net = inverted()

            def training_step(self, x):
                return self.net(x)

        module = Module()
        with batchnorm.watch() as watching:
            module.training_step(cases.images())
        (found,) = watching.findings()
        assert found.model == "module (Module)"
        assert [f.layer for f in found] == ["net.1"]

    def test_a_frame_s_variables_are_not_kept(self):
        def train():
            first = torch.zeros(3)
            gone = weakref.ref(first)
            model = inverted()
            model(cases.images())
            del first
            return gone() is None

        with batchnorm.watch():
            assert train()


class TestMemory:
    def test_folds_that_are_over_leave_model_and_optimizer(self):
        def fold():
            model = inverted()
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(3):
                step(optimizer, model(cases.images()).square().mean())
            return weakref.ref(model), weakref.ref(optimizer)

        with batchnorm.watch() as watching:
            folds = [fold() for _ in range(3)]
            gc.collect()
            assert [optimizer() is None for _, optimizer in folds] == [True] * 3
            # the last waits for the next
            assert [model() is None for model, _ in folds] == [True, True, False]
            assert len(watching.models) == 1
        (found,) = watching.findings()
        assert [f.rule for f in found] == ["BN011"]

    def test_an_optimizer_s_groups_are_judged_when_it_is_gone(self):
        model = cases.network().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        with batchnorm.watch(level="note", select="BN023") as watching:
            step(optimizer, model(cases.images()).square().mean())
            del optimizer
        (found,) = watching.findings()
        assert {f.layer for f in found} == {"1", "4"}

    def test_a_part_that_goes_on_alone_is_met_again(self):
        model = inverted()
        other = cases.network().train()
        with batchnorm.watch() as watching:
            model(cases.images())
            part = model[:2]
            del model
            other(cases.images())
            part(cases.images())
            assert len(watching.models) == 2


class Averaged:
    """A training at a large rate, its averaged weights evaluated after every epoch."""

    def __init__(self, averaged, prepare):
        torch.manual_seed(0)
        self.model = cases.network().train()
        self.averaged = averaged(self.model)
        self.prepare = prepare

    def run(self):
        images = [10 * cases.images(32, seed=k) for k in range(4)]
        optimizer = sgd(self.model, 0.3)
        with batchnorm.watch(select="BN028") as watching:
            for _ in range(10):
                for x in images:
                    step(optimizer, (self.model(x) - x.mean((1, 2, 3))[:, None]).square().mean())
                    self.averaged.update_parameters(self.model)
                self.prepare(images, self.averaged)
                self.averaged.eval()
                with torch.no_grad():
                    [self.averaged(x) for x in images]
        return {f.rule for found in watching.findings() for f in found}


def ema(model, *, use_buffers, decay=0.99):
    return AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers
    ).train()


class TestAveragedWeights:
    def test_copied_statistics_are_found(self):
        assert Averaged(lambda m: ema(m, use_buffers=False), lambda *_: None).run() == {"BN028"}

    def test_copied_statistics_of_weights_close_by_are_none(self):
        close = Averaged(lambda m: ema(m, use_buffers=False, decay=0.5), lambda *_: None)
        assert not close.run()

    def test_averaged_statistics_are_none(self):
        assert not Averaged(lambda m: ema(m, use_buffers=True), lambda *_: None).run()

    def test_statistics_taken_anew_are_none(self):
        averaged = Averaged(lambda m: ema(m, use_buffers=False), update_bn)
        assert not averaged.run()

    def test_a_teacher_that_gave_its_statistics_to_a_frozen_student_is_none(self):
        teacher = cases.network().eval()
        student = batchnorm.freeze(copy.deepcopy(teacher)).train()
        optimizer = sgd(student)
        with batchnorm.watch(select="BN028") as watching:
            for _ in range(5):
                x = 5 + cases.images()
                step(optimizer, (student(x) - teacher(x).detach()).square().mean())
        assert not any(watching.findings())


class TestSaying:
    def test_too_few_batches_are_a_note_until_they_are_used(self):
        model = cases.network().train()
        model[1].reset_running_stats()
        optimizer = sgd(model)
        with batchnorm.watch(select="BN012") as watching:
            for _ in range(5):
                step(optimizer, model(cases.images()).square().mean())
            (before,) = watching.findings()
            model.eval()(cases.images())
        (after,) = watching.findings()
        assert [list(map(str, before)), before.lowered] == [[], ["BN012"]]
        assert [f.layer for f in after] == ["1"]

    def test_a_lowered_level(self):
        model = nn.Sequential(nn.BatchNorm2d(3))
        found = batchnorm.check(model, select="BN009")
        assert not found
        assert "only a note here: BN009; the level note tells why" in str(found)
        assert "only a note" not in str(batchnorm.check(model, select="BN009", level="note"))

    def test_rules_that_were_not_asked(self):
        found = batchnorm.check(cases.network(), select=["BN001", "BN023", "BN029", "BN014"])
        assert found.unasked == "2 without optimizer"

    def test_a_typing_error_is_answered_by_what_is_near(self):
        with pytest.raises(BatchNormError, match="do you mean BN0") as caught:
            batchnorm.check(nn.BatchNorm2d(3), select="BN0O1")
        assert len(str(caught.value)) < 200

    def test_other_threads_print_while_a_model_is_traced(self, capsys):
        class Printing(nn.Sequential):
            def forward(self, x):
                sys.stdout.write("from the model\n")
                other = threading.Thread(target=sys.stdout.write, args=("from another thread\n",))
                other.start()
                other.join()
                return super().forward(x)

        trace(Printing(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))
        assert capsys.readouterr().out == "from another thread\n"
