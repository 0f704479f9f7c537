"""`batchnorm bench`: what is timed, what counts as slower, what is written; no real time is asserted."""

import json
import re
import signal
import subprocess

import pytest
import torch
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.errors import BatchNormError
from batchnorm.speed import benching, contenders, settings, timing
from batchnorm.speed.cases import DTYPES, OPERATIONS, OVERHEAD, SHAPES, Operation, Plan, Shape
from batchnorm.speed.rows import Report, Row, chance
from batchnorm.views import markdown, speeds
from tolerance import bound

TINY = (
    Shape("features", (8, 4)),
    Shape("NCHW, large", (4, 3, 2, 2)),
    Shape("channels_last, C = 6", (4, 3, 2, 2), channels_last=True),
    Shape(OVERHEAD, (8, 4)),
)
PLAN = Plan(TINY, rounds=1)
ROWS = 3 * 16 + 3


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "LEAST", 0.0)  # every call once


@pytest.fixture
def at_once(monkeypatch):
    """The command measures tiny inputs, here, in a round."""
    monkeypatch.setattr(benching, "SHAPES", TINY)
    monkeypatch.setattr(benching, "QUICK", TINY)
    monkeypatch.setattr(benching, "apart", timing.here)


def timed(ours, theirs, floor=1e-3):
    times = {"torch": theirs, "ours": ours, "floor": [floor] * len(ours)}
    return Row("features", "8×4", "forward", "plain", "float32", 1, "default", times)


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_a_row_for_every_shape_pass_and_fusion():
    rows = list(timing.here(PLAN, "default"))
    assert len(rows) == ROWS
    assert len({(r.family, r.shape, r.step, r.fusion) for r in rows}) == ROWS
    for row in rows:
        assert set(row.times) == {"torch", "ours", "floor"}
        assert all(len(each) == 1 and each[0] > 0 for each in row.times.values())
    tiny = [(r.step, r.fusion) for r in rows if r.family == OVERHEAD]
    assert tiny == [("forward", "plain"), ("both", "plain"), ("evaluation", "plain")]


def test_the_count_of_threads_comes_back():
    before = torch.get_num_threads()
    plan = Plan(TINY[-1:], threads=(1, before + 1), rounds=1)
    rows = list(timing.here(plan, "default"))
    assert [row.threads for row in rows] == [1] * 3 + [before + 1] * 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.step}, {o.fusion}")
@pytest.mark.parametrize("shape", TINY[:3], ids=lambda s: s.name)
def test_both_compute_the_same(shape, operation, dtype):
    dtype = getattr(torch, dtype)
    calls = contenders.contenders(shape, operation, dtype)
    theirs, ours = calls["torch"](), calls["ours"]()
    if not operation.differentiated:
        theirs, ours = (theirs,), (ours,)
    assert len(theirs) == len(ours) == (3 + operation.residual) ** operation.differentiated
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype is other.dtype
        assert mine.stride() == other.stride()
        # each may be off by the bound, and a gradient is a sum of as many terms as there are samples
        scale = float(other.abs().max())
        within = 4 * bound(dtype, 16, scale)
        torch.testing.assert_close(mine, other, rtol=0, atol=within)


def test_the_floor_moves_as_many_bytes_as_the_pass_must():
    def tensors(step, fusion):
        made = contenders.contenders(TINY[0], Operation(step, fusion), torch.float32)["floor"]()
        return len(made) if isinstance(made, tuple) else 1

    assert tensors("forward", "plain") == 1
    assert tensors("backward", "sigmoid") == 1
    assert tensors("backward", "residual + ReLU") == 2  # the residual's gradient


def test_compiled_is_timed_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda way, **_: way)  # compiling takes long
    rows = list(timing.here(Plan(TINY[:1], rounds=1, compiled=True), "default"))
    assert {row.step for row in rows if "compiled" in row.times} == {
        "forward", "both", "evaluation",
    }  # fmt: skip
    assert "torch.compile ÷ ours" in speeds.legend(Report(Plan(compiled=True), ("default",), {}))


def test_a_compiler_that_fails_is_said(monkeypatch):
    def broken(_way, **_):
        def call(*_):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(BatchNormError, match=r"no C\+\+ compiler. Leave out --compile"):
        next(timing.here(Plan(TINY, rounds=1, compiled=True), "default"))


def test_ratios_are_taken_round_by_round():
    row = timed(ours=[1.0, 2.0, 4.0], theirs=[2.0, 6.0, 4.0], floor=0.5)
    assert row.ratios("torch", "ours") == [2.0, 3.0, 1.0]
    assert row.ratio() == 2.0
    assert row.quartiles == (1.5, 2.5)
    assert row.seconds("torch") == 4.0
    assert row.ratio("ours", "floor") == 4.0
    assert timed([1.0], [3.0]).quartiles == (3.0, 3.0)


def test_the_sign_test():
    assert chance([0.9] * 5) == 1 / 32
    assert chance([0.9] * 4 + [1.1]) == 6 / 32
    assert chance([1.1] * 5) == 1.0


@pytest.mark.parametrize(
    ("ours", "slower"),
    [
        ([2.0] * 5, True),
        ([2.0] * 4, False),  # one in 16 by chance
        ([1.02] * 9, False),  # within the margin
        ([1.1] * 8 + [0.9], True),
        ([1.1] * 6 + [0.9] * 3, False),  # one in 4 by chance
        ([0.5] * 9, False),
    ],
)
def test_slower_is_more_than_the_margin_and_than_chance(ours, slower):
    assert timed(ours, [1.0] * len(ours)).slower is slower


def test_what_looks_slower_is_measured_again(monkeypatch):
    rounds = []

    def measure(_calls, count):
        rounds.append(count)
        ours = 2.0 if count == 5 else 1.0
        return {"torch": [1.0] * count, "ours": [ours] * count, "floor": [1.0] * count}

    monkeypatch.setattr(timing, "measure", measure)
    row = next(timing.here(Plan(TINY, rounds=5), "default"))
    assert rounds == [5, 15]
    assert not row.slower
    assert len(row.times["ours"]) == 15


def test_every_round_begins_with_another():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = timing.measure(calls, 3)
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert order[:6] == list("aabbcc")  # made, then timed for the count of repeats, which is 1 here
    assert order[6:] == list("abcbcacab")


def test_each_setting_has_a_process_with_its_variables(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(options["env"])
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # a setting of the caller's is not "reused"
    rows = list(settings.apart(Plan(TINY[-1:], rounds=1), "reused"))
    assert [row.setting for row in rows] == ["reused"] * 3
    (environment,) = started
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert "THP_MEM_ALLOC_ENABLE" not in environment


def test_nobody_wants_the_rest(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    # large inputs: it would be busy for minutes
    monkeypatch.setattr(json, "loads", lambda _: {"error": "enough"})  # at the first row
    with pytest.raises(BatchNormError, match="enough"):
        next(settings.apart(Plan((*TINY, *SHAPES), rounds=1), "default"))
    assert started[0].returncode == -signal.SIGTERM


def test_a_process_that_dies_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(settings.SETTINGS, "default", {"PYTHONHOME": str(tmp_path)})
    with pytest.raises(BatchNormError, match="with default memory ended with 1"):
        list(settings.apart(PLAN, "default"))


@pytest.mark.usefixtures("at_once")
def test_the_command_prints_where_then_the_tables_then_the_verdict():
    result = invoke("--quick", "--rounds", 1, "--settings", "default", "--threads", "1")
    assert result.exit_code == 0, result.output
    head, *_ = lines = result.stdout.splitlines()
    assert "cores" in head
    assert f"torch {torch.__version__}" in lines[1]
    assert re.search(r"float32; threads 1; memory default; medians of 1 rounds", lines[2])
    assert "default memory, 1 thread" in result.stdout
    assert "residual" in result.stdout
    assert "ours µs" in result.stdout
    assert f"{ROWS} measured; fewer than five rounds cannot show" in result.stdout


@pytest.mark.usefixtures("at_once")
def test_something_slower_is_named_and_ends_with_1(monkeypatch):
    right = timing.measure

    def slow(calls, rounds):
        found = right(calls, 1)
        return {name: [2.0 if name == "ours" else 1.0] * rounds for name in found}

    monkeypatch.setattr(timing, "measure", slow)
    result = invoke("--quick", "--settings", "default", "--threads", "1")
    assert result.exit_code == 1
    assert f"slower than torch eager in {ROWS} of {ROWS}" in result.stdout
    assert "8×4, forward, plain, float32, 1 thread, default: torch ÷ ours 0.50" in result.stdout
    assert "!0.50 · 2.00" in result.stdout


def test_nowhere_slower():
    report = Report(Plan(), ("default",), {}, [timed([1.0] * 9, [2.0] * 9)])
    assert report.status == 0
    assert speeds.verdict(report) == ["nowhere slower than torch eager: 1 measured"]


@pytest.mark.usefixtures("at_once")
def test_an_interruption_keeps_what_was_measured(monkeypatch, tmp_path):
    right = timing.here

    def interrupted(plan, setting):
        rows = right(plan, setting)
        yield next(rows)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(benching, "apart", interrupted)
    path = tmp_path / "rows.json"
    page = tmp_path / "page.md"
    page.write_text("<!-- bench float32 -->\nold\n<!-- /bench float32 -->\n")
    result = invoke("--quick", "--rounds", 1, "--json", path, "--markdown", page)
    assert result.exit_code == 130
    assert "interrupted: this is what had been measured" in result.stdout
    content = json.loads(path.read_text())
    assert content["interrupted"] is True
    assert [row["step"] for row in content["rows"]] == ["forward", "backward"]
    assert "old" in page.read_text()  # half a table is not published


@pytest.mark.usefixtures("at_once")
def test_what_was_measured_before_a_failure_is_shown(monkeypatch):
    right = timing.here

    def failing(plan, setting):
        yield next(right(plan, setting))
        raise BatchNormError("short of memory.")

    monkeypatch.setattr(benching, "apart", failing)
    result = invoke("--quick", "--rounds", 1)
    assert result.exit_code == 2
    assert "8×4" in result.stdout
    assert "ended early: short of memory." in result.stdout


@pytest.mark.usefixtures("at_once")
def test_files(monkeypatch, tmp_path):
    monkeypatch.setattr(benching, "available", lambda: ("default",))
    page = tmp_path / "page.md"
    page.write_text("# Speed\n<!-- bench bfloat16 -->\n<!-- /bench bfloat16 -->\nafter\n")
    result = invoke(
        "--rounds", 1, "--threads", "1,2", "--dtype", "bfloat16",
        "--json", tmp_path / "rows.json", "--picture", tmp_path / "speed.svg", "--markdown", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["environment"]["torch"] == str(torch.__version__)
    assert len(content["rows"]) == 2 * ROWS
    first = content["rows"][0]
    assert (first["shape"], first["dtype"], first["threads"]) == ("8×4", "bfloat16", 1)
    assert first["medians"]["ours"] == first["times"]["ours"][0]
    theirs, ours = first["times"]["torch"][0], first["times"]["ours"][0]
    assert first["torch_to_ours"]["median"] == theirs / ours
    assert first["ours_to_floor"] == ours / first["times"]["floor"][0]
    picture = (tmp_path / "speed.svg").read_text()
    assert "<svg" in picture
    assert "#ffffff" not in picture.partition("<defs>")[2].partition("</defs>")[0]
    text = page.read_text()
    assert text.startswith("# Speed\n<!-- bench bfloat16 -->\n\n- ")
    assert text.endswith("<!-- /bench bfloat16 -->\nafter\n")
    assert "| class | shape | with | forward | backward | both | evaluation |" in text
    assert "**default memory, 2 threads**" in text


def test_the_picture_is_the_same_for_the_same_rows(tmp_path):
    rows = [timed([1.0], [2.0])]
    report = Report(Plan(), ("default",), {}, rows)
    for name in ("a.svg", "b.svg"):
        speeds.save(report, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    (dot,) = [
        line
        for line in speeds.draw(report).axes[0].lines
        if line.get_marker() == "o"
    ]  # fmt: skip
    assert list(dot.get_xdata()) == [2.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dtype", "int8"], "there is no timing for dtype 'int8'; there is float32"),
        (["--settings", "fast"], "there is no setting 'fast'; there are reused, default"),
        (["--threads", "all"], "--threads is 'all' and should be whole numbers"),
        (["--threads", "0"], "threads is 0 and should be a whole number from 1"),
        (["--rounds", "0"], "rounds is 0 and should be a whole number from 1"),
        (["--picture", "x.gif"], "--picture x.gif should end in one of .svg, .png, .pdf"),
        (["--markdown", "README.md", "--dtype", "float64"], "has no place for this table"),
        (["--markdown", "nowhere.md"], "No such file or directory (nowhere.md)"),
        (["--markdown", "README.md", "--compile"], "<!-- bench float32 compiled -->"),
    ],
)
@pytest.mark.usefixtures("at_once")
def test_bad_options_get_a_sentence(arguments, sentence, monkeypatch):
    monkeypatch.setattr(benching, "apart", lambda *_: pytest.fail("it began to measure"))
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_without_glibc_only_the_default(monkeypatch):
    monkeypatch.setattr(settings.platform, "libc_ver", lambda: ("", ""))
    assert settings.available() == ("default",)
    with pytest.raises(BatchNormError, match="'reused' needs glibc"):
        benching.bench(settings=("reused",))


def test_a_page_keeps_what_is_not_the_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\n<!-- /x -->\nb\n<!-- y -->\nz\n<!-- /y -->\n")
    markdown.refresh(page, "x", "one")
    markdown.refresh(page, "x", "two")
    assert page.read_text() == (
        "a\n<!-- x -->\n\ntwo\n\n<!-- /x -->\nb\n<!-- y -->\nz\n<!-- /y -->\n"
    )
    assert markdown.table(["a", "b"], [["c", "1"]]) == "| a | b |\n| --- | --: |\n| c | 1 |"
