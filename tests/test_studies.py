"""Studies: data that are run by one engine, anywhere, with the same numbers; and judged."""

import csv
import dataclasses
import json
import os
import signal

import psutil
import pytest

import processes
from batchnorm import BatchNormError, studies
from batchnorm.lab import cells, engine, networks, results
from batchnorm.lab import studies as library
from batchnorm.lab.effects import (
    At,
    Best,
    Difference,
    EpochsTo,
    Gap,
    Level,
    Outcome,
    Reach,
    Table,
)
from batchnorm.lab.engine import FAILURES, Workers
from batchnorm.lab.record import CELLS, CellConfig
from batchnorm.lab.statistics import Rule
from batchnorm.lab.study import SIZES, Arm, Probe, Question, Size, Study, Text
from commands import result_of
from trained import without_times

SMALL = {
    "data": "tiny:images", "batch_size": 32, "epochs": 2, "held_out_images": 64,
    "evaluations_per_epoch": 1, "recalibration_images": 64,
}  # fmt: skip
TRAININGS = Study(
    name="tiny",
    claim=Text("It helps.", "有用。"),
    source="a test",
    arms=(
        Arm("none", Text("without", "无"), {"arm": "none"}),
        Arm("batch", Text("with", "有"), {"arm": "batch"}),
    ),
    sizes={"normal": Size(2, SMALL, {"learning_rate": (0.1, 1.0)})},
    questions=(
        Question(
            "higher", Text("Higher.", "更高。"),
            Difference("test_accuracy", "batch", "none", Best()), Rule(low=0),
        ),
    ),
)  # fmt: skip


def contents(folder):
    """Every cell's lines, by file, without times and where they ran."""
    return {
        path.name: [_plain(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (folder / CELLS).glob("*.json*")
    }


def _plain(line):
    return without_times({k: v for k, v in line.items() if k != "environment"})


class Quiet:
    """Says nothing."""

    def start(self, cells, seconds):
        pass

    def finish(self, config, seconds):
        pass

    def failed(self, config, error, attempt):
        pass


def run(study, folder, workers=None, board=None, size="normal"):
    workers = workers or Workers()
    planned = study.cells(size)
    folder.mkdir(exist_ok=True)
    plan = engine.plan([each.config for each in planned], folder, None, workers)
    lost = engine.run(plan, folder, None, workers, board or Quiet())
    return planned, lost


def probes(function, seeds=3, **changes):
    """A study of one arm of a probe of the tests."""
    options = {k: v for k, v in changes.items() if k != "alone"}
    return Study(
        name="probes", claim=Text("A.", "甲。"), source="", arms=(Arm("one", Text("1", "一"), {}),),
        sizes={"normal": Size(seeds, options)}, questions=(), function=f"probes:{function}",
        alone=changes.get("alone", False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The tiny study, run in this process."""
    folder = tmp_path_factory.mktemp("once")
    planned, lost = run(TRAININGS, folder)
    assert lost == []
    assert len(contents(folder)) == 8 == len(planned)
    return folder


# the studies as data


@pytest.mark.parametrize("name", library.NAMES)
def test_every_study_is_whole(name):
    study = library.find(name)
    assert study.name == name
    assert set(study.sizes) == set(SIZES)
    assert study.sizes["normal"].seeds >= 10
    for text in (study.claim, *(q.claim for q in study.questions), *(a.label for a in study.arms)):
        assert text.en
        assert text.zh
    for size in SIZES:
        planned = study.cells(size, seeds=1)
        for each in planned:
            cells.check(each.config)
        table = Table([])
        arms = {arm.name for arm in study.arms}
        for question in study.questions:
            assert question.effect.points(table).keys() <= arms
        power = results.power(study, study.sizes[size].seeds)
        assert power["detectable"] is not None, "no verdict would be possible"


def test_an_unknown_study_is_named():
    with pytest.raises(BatchNormError, match=r"there is no study called 'x'\. Known are learning"):
        library.find("x")


def test_studies_that_ask_for_the_same_cells_share_them():
    one, other = (
        {each.config.hash for each in library.find(name).cells("quick")}
        for name in ("learning-rate", "matched-rates")
    )
    assert one == other


def test_arms_of_a_seed_share_everything_but_their_changes():
    first, second = (each.config for each in TRAININGS.cells("normal", seeds=1)[:2])
    assert isinstance(first, CellConfig)
    assert (first.arm, second.arm) == ("none", "batch")
    assert dataclasses.replace(first, arm="batch") == second
    assert first.threads == 1  # so that the numbers do not depend on how many run beside it


def test_seeds_and_data_can_be_asked_for():
    planned = TRAININGS.cells("normal", seeds=3, data="tiny:colour_images")
    assert {each.seed for each in planned} == {0, 1, 2}
    assert {each.config.data for each in planned} == {"tiny:colour_images"}
    with pytest.raises(BatchNormError, match="seeds is 0"):
        TRAININGS.cells("normal", seeds=0)


def test_the_threads_of_a_probe_are_not_an_option_of_its_function():
    (planned,) = probes("square", seeds=1, threads=2, a=1).cells("normal")
    assert planned.config.threads == 2
    assert planned.config.options == (("a", 1),)


def test_the_hash_of_a_probe_is_its_content():
    probe = Probe("probes:square", "one", 3, (("a", 1),))
    assert probe.hash == Probe("probes:square", "one", 3, (("a", 1),)).hash
    others = [
        dataclasses.replace(probe, seed=4), dataclasses.replace(probe, options=(("a", 2),)),
        dataclasses.replace(probe, threads=2), dataclasses.replace(probe, data="tiny:images"),
    ]  # fmt: skip
    assert len({probe.hash, *(other.hash for other in others)}) == 5


# effects


def table():
    """Two arms at three rates from two seeds: `batch` is best at 10, `none` at 1."""
    held_out = {"none": {0.1: 0.5, 1.0: 0.7, 10.0: 0.1}, "batch": {0.1: 0.6, 1.0: 0.8, 10.0: 0.82}}
    return Table(
        [
            Outcome(
                arm, {"learning_rate": rate}, seed, "",
                {
                    "held_out_accuracy": value, "test_accuracy": value + 0.01 * (seed + 1),
                    "diverged": float(value < 0.2),
                },
                {"epoch": [0.0, 1.0, 2.0], "test_accuracy": [0.1, None, value]},
            )
            for arm, rates in held_out.items() for rate, value in rates.items() for seed in (0, 1)
        ]
    )  # fmt: skip


def test_each_arm_at_its_best_is_chosen_by_held_out_images():
    effect = Difference("test_accuracy", "batch", "none", Best())
    assert effect.per_seed(table()) == pytest.approx({0: 0.12, 1: 0.12})
    assert effect.points(table()) == {"batch": {"learning_rate": 10}, "none": {"learning_rate": 1}}


def test_a_choice_by_test_images_would_be_seen():
    found = table()
    swapped = Table(
        [
            dataclasses.replace(
                o, values={**o.values, "test_accuracy": 1 - o.values["test_accuracy"]}
            )
            for o in found.outcomes
        ]
    )
    assert Best().point(swapped, "batch") == {"learning_rate": 10.0}
    assert Best("test_accuracy").point(swapped, "batch") == {"learning_rate": 0.1}


def test_matched_is_where_the_other_arm_is_best():
    effect = Difference("test_accuracy", "batch", "none", Best(of="none"))
    assert effect.per_seed(table()) == pytest.approx({0: 0.1, 1: 0.1})


def test_the_largest_usable_rate_is_in_powers_of_ten():
    effect = Reach("learning_rate", "batch", "none")
    assert effect.per_seed(table()) == pytest.approx({0: 1, 1: 1})


def test_levels_gaps_and_ratios():
    at = At({"learning_rate": 0.1})
    level = Level("held_out_accuracy", "batch", at)
    assert level.per_seed(table()) == {0: 0.6, 1: 0.6}
    gap = Gap(level, Level("held_out_accuracy", "none", at))
    assert gap.per_seed(table()) == pytest.approx({0: 0.1, 1: 0.1})
    ratio = Difference("held_out_accuracy", "batch", "none", at, ratio=True)
    assert ratio.per_seed(table()) == pytest.approx({0: 0.1823, 1: 0.1823}, abs=1e-4)


def test_epochs_to_a_target():
    outcome = table().at("batch", {"learning_rate": 1.0})[0]
    assert EpochsTo(0.1)(outcome) == 0
    assert EpochsTo(0.8)(outcome) == 2
    assert EpochsTo(0.9)(outcome) == 2  # never: the last epoch, which does not flatter


def test_a_seed_that_one_arm_lacks_is_left_out():
    found = Table([o for o in table().outcomes if (o.arm, o.seed) != ("none", 1)])
    assert list(Difference("test_accuracy", "batch", "none", Best()).per_seed(found)) == [0]


def test_a_quantity_that_cells_do_not_give_is_named():
    with pytest.raises(BatchNormError, match="measures 'colour', which its cells do not give"):
        Level("colour", "batch", Best()).per_seed(table())


# the engine


class Killer(Quiet):
    """Kills a process of the pool when the first cell is done, and knows that it did."""

    def __init__(self, victims):
        self.victims, self.killed = victims, 0

    def finish(self, config, seconds):  # noqa: ARG002
        if not self.killed:
            self.killed = self.victims()[0]
            os.kill(self.killed, signal.SIGKILL)


def pool():
    """The worker processes that this one has started."""
    return [
        child.pid
        for child in psutil.Process().children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]


def test_two_processes_one_of_them_killed_give_the_numbers_of_one(once, tmp_path):
    killer = Killer(pool)
    _, lost = run(TRAININGS, tmp_path / "two", Workers(2), killer)
    assert killer.killed
    assert lost == []
    assert contents(tmp_path / "two") == contents(once)


def test_a_cluster_one_of_whose_workers_is_killed_gives_the_numbers_of_one(once, tmp_path):
    import distributed

    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options, silence_logs=50) as cluster:
        address = cluster.scheduler_address
        killer = Killer(lambda: [worker.pid for worker in cluster.workers.values()])
        _, lost = run(TRAININGS, tmp_path / "cluster", Workers(cluster=address), killer)
    assert killer.killed
    assert lost == []
    assert contents(tmp_path / "cluster") == contents(once)


def test_a_cluster_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CONNECT_SECONDS", 1)
    with pytest.raises(
        BatchNormError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:1'"
    ):
        run(probes("square"), tmp_path, Workers(cluster="tcp://127.0.0.1:1"))


def test_a_finished_cell_is_not_run_again(once):
    before = {path: path.stat().st_mtime_ns for path in (once / CELLS).iterdir()}
    plan = engine.plan([p.config for p in TRAININGS.cells("normal")], once, None, Workers())
    assert (plan.waiting, plan.done, plan.seconds) == ([], 8, 0)
    run(TRAININGS, once)
    assert {path: path.stat().st_mtime_ns for path in (once / CELLS).iterdir()} == before


def test_a_probe_has_its_seed_and_its_threads(tmp_path):
    planned, _ = run(probes("noise"), tmp_path)
    found = [cells.outcome(each, tmp_path).values for each in planned]
    assert len({values["value"] for values in found}) == 3
    assert {values["threads"] for values in found} == {1}
    planned, _ = run(probes("noise"), tmp_path / "again")
    assert [cells.outcome(each, tmp_path / "again").values for each in planned] == found


def test_a_number_that_is_not_finite_is_none(tmp_path):
    (each,), _ = run(probes("not_finite", seeds=1), tmp_path)
    found = cells.outcome(each, tmp_path)
    assert found.values == {"value": None}
    assert found.curves == {"curve": [1.0, None]}


def test_a_cell_that_failed_is_recorded_and_tried_again(tmp_path):
    study = probes("fails_at_first", folder=str(tmp_path))
    configs = [each.config for each in study.cells("normal")]
    plan = engine.Plan(configs, 0, {config.hash: 1.0 for config in configs}, 1)
    assert engine.run(plan, tmp_path, None, Workers(), Quiet()) == []
    assert all(cells.is_done(config, tmp_path) for config in configs)
    lines = [json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines()]
    assert [line["hash"] for line in lines] == [config.hash for config in configs]
    assert {line["error"] for line in lines} == {"OSError: the disk was busy"}
    assert all("fails_at_first" in line["traceback"] for line in lines)


def test_a_cell_that_always_fails_does_not_stop_the_others(tmp_path):
    bad = probes("fails_always", seeds=1).cells("normal")[0].config
    good = [each.config for each in probes("square").cells("normal")]
    plan = engine.Plan([bad, *good], 0, {c.hash: 1.0 for c in (bad, *good)}, 1)
    assert engine.run(plan, tmp_path, None, Workers(), Quiet()) == [bad]
    assert all(cells.is_done(config, tmp_path) for config in good)
    lines = [json.loads(line) for line in (tmp_path / FAILURES).read_text().splitlines()]
    assert [line["attempt"] for line in lines] == [1, 2, 3]


def test_nothing_runs_beside_a_timing(tmp_path):
    beside = probes("timed", folder=str(tmp_path), name="beside").cells("normal")
    alone = probes("timed", seeds=2, folder=str(tmp_path), name="alone", alone=True).cells("normal")
    configs = [each.config for each in (*alone, *beside)]
    plan = engine.Plan(configs, 0, {config.hash: 1.0 for config in configs}, 2)
    assert plan.seconds == 2 + 3 / 2
    engine.run(plan, tmp_path, None, Workers(2), Quiet())
    spans = {
        path.name: tuple(map(float, path.read_text().split())) for path in tmp_path.glob("*-[0-9]")
    }
    assert len(spans) == 5
    for name in ("alone-0", "alone-1"):
        start, end = spans[name]
        others = [span for other, span in spans.items() if other != name]
        assert all(stop <= start or end <= begin for begin, stop in others)


def test_the_plan_says_how_long_it_takes(tmp_path):
    config = TRAININGS.cells("normal")[0].config
    longer = dataclasses.replace(config, epochs=20)
    plan = engine.plan([config, longer], tmp_path, None, Workers())
    assert plan.waiting == [config, longer]
    assert 5 < plan.expected[longer.hash] / plan.expected[config.hash] < 10
    assert not (tmp_path / CELLS).exists()


def test_what_cannot_be_run_is_said_before_anything_is(tmp_path):
    config = dataclasses.replace(TRAININGS.cells("normal")[0].config, arm="bach")
    with pytest.raises(BatchNormError, match="there is no arm called 'bach'"):
        engine.plan([config], tmp_path, None, Workers())


# results


def test_the_result_holds_every_number_and_the_verdict(once):
    planned = TRAININGS.cells("normal")
    result = results.conclude(TRAININGS, "normal", planned, once)
    assert len(result["cells"]) == 8
    assert result["missing"] == []
    (question,) = result["questions"]
    at = question["points"]
    by_hand = {
        str(seed): value("batch", at, seed, result) - value("none", at, seed, result)
        for seed in (0, 1)
    }
    assert question["per_seed"] == pytest.approx(by_hand)
    assert question["effect"] == pytest.approx(sum(by_hand.values()) / 2)
    assert question["verdict"] == "inconclusive"
    assert question["exploratory"]
    assert result["power"] == {"smallest_p": 0.5, "detectable": None}
    cell = result["cells"][0]
    assert len(cell["curves"]["epoch"]) == 3
    assert cell["values"]["held_out_accuracy"] == cell["curves"]["held_out_accuracy"][-1]


def value(arm, points, seed, result):
    (cell,) = [
        cell
        for cell in result["cells"]
        if (cell["arm"], cell["seed"], cell["point"]) == (arm, seed, points[arm])
    ]
    return cell["values"]["test_accuracy"]


def test_results_are_written_and_read_again(once, tmp_path):
    result = results.conclude(TRAININGS, "normal", TRAININGS.cells("normal"), once)
    results.write([result], tmp_path)
    assert results.read(tmp_path) == [json.loads(json.dumps(result))]
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert verdicts["tiny"]["questions"][0]["verdict"] == "inconclusive"
    rows = list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert {row["arm"] for row in rows} == {"none", "batch"}
    assert (tmp_path / "verdicts.csv").read_text().count("inconclusive") == 1


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}', "{}"])
def test_a_result_that_is_none_is_said(tmp_path, content):
    (tmp_path / results.FOLDER).mkdir()
    (tmp_path / results.FOLDER / "a.json").write_text(content)
    with pytest.raises(BatchNormError, match=r"is not the result of a study|has the format 99"):
        results.read(tmp_path)


# the command


def command(*arguments):
    return processes.command("study", *arguments, env={**os.environ, "COLUMNS": "160"})


def test_the_command_runs_a_study_and_prints_its_verdict(tmp_path):
    result = command("gradient-growth", "--quick", "--out", tmp_path, "--processes", 1)
    assert result.returncode == 0, result.stderr
    assert "16 cells to run (0 are done)" in result.stderr
    assert "16 of 16 cells" in result.stderr
    assert "80 of 100 cases" in result.stderr
    assert result.stdout.count("supported") == 2
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())["gradient-growth"]["questions"]
    assert [question["verdict"] for question in verdicts] == ["supported", "supported"]
    assert verdicts[0]["effect"] == pytest.approx(1.21, abs=0.02)
    again = command("gradient-growth", "--quick", "--out", tmp_path, "--lang", "zh")
    assert "待运行 0 个单元（已完成 16 个）" in again.stderr
    assert again.stdout.count("成立") == 2


def test_a_dry_run_leaves_nothing(tmp_path):
    result = command(
        "axes", "--quick", "--dry-run", "--data", "tiny:images", "--out", tmp_path / "o"
    )
    assert result.returncode == 0, result.stderr
    assert "8 cells to run" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "o").exists()


def test_the_studies_are_listed():
    result = result_of("study", "--list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(library.NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--budget", 1e-6],
            "the plan takes about 0 minutes, and the budget of a quick run is 1e-06",
        ),
        (["--processes", 0], "processes is 0 and should be a whole number from 1"),
        (["--full"], "the study got --quick and --full"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(tmp_path, arguments, message):
    result = result_of("study", "gradient-growth", "--quick", "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / CELLS).exists()


def test_cells_that_are_lost_are_said_and_the_rest_is_judged(tmp_path, monkeypatch):
    broken = dataclasses.replace(probes("fails_always", seeds=1), sizes={"quick": Size(1)})
    monkeypatch.setattr(library, "find", lambda _name: broken)
    request = studies.Request(["probes"], "quick", tmp_path, processes=1)
    with pytest.raises(BatchNormError, match="1 cells failed 3 times; the verdicts are without"):
        studies.run(request)
    (result,) = results.read(tmp_path)
    assert len(result["missing"]) == 1


# networks


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_takes_the_images(name):
    import torch

    _, build = networks.find(name)
    assert build()(torch.rand(4, 1, 28, 28)).shape == (4, 10)


def test_only_the_norms_are_trained():
    model = networks.NETWORKS["lenet-only-norms"]()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"norm{i}.{p}" for i in (1, 2, 3, 4) for p in ("weight", "bias")]


def test_where_the_norms_and_the_dropout_stand():
    after = list(networks.NETWORKS["lenet-norm-after"]()._modules)
    assert all(after.index(f"activation{i}") + 1 == after.index(f"norm{i}") for i in (1, 2, 3, 4))
    alone = list(networks.NETWORKS["lenet-norm-input"]()._modules)
    assert [name for name in alone if "norm" in name] == ["norm0"] == alone[:1]
    before = list(networks.NETWORKS["lenet-dropout-before-0.2"]()._modules)
    assert [name for name in before if "dropout" in name] == ["dropout1", "dropout2", "dropout3"]
    behind = list(networks.NETWORKS["lenet-dropout-after-0.5"]()._modules)
    assert behind[-2:] == ["dropout4", "linear3"]
