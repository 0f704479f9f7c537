"""The main job from end to end, from Python and as a command, on data that fits a test."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

import batchnorm
import tiny
from batchnorm import BatchNormError
from batchnorm.comparison import Comparison, report
from batchnorm.lab.progress import Silent
from batchnorm.lab.record import CELLS, read
from commands import result_of
from processes import HERE, command, interruptible, python  # noqa: F401  # one is a fixture
from trained import contents

FILES = {
    "summary.json",
    "table.csv",
    "curves.svg",
    "without.gif",
    "with.gif",
    "compare.gif",
    "report.html",
}
SMALL = {"batch_size": 32, "threads": 2, "progress": Silent()}
OPTIONS = ["--data", "tiny:images", "--batch-size", "32", "--threads", "2", "--epochs", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One finished comparison."""
    out = tmp_path_factory.mktemp("comparison")
    result = command("compare", *OPTIONS, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "with BN" in result.stdout
    return out


def test_the_folder_holds_what_is_promised(folder):
    assert FILES | {CELLS} <= {path.name for path in folder.iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    cells = {cell.config.arm: cell for cell in read(folder).cells}
    assert set(summary["arms"]) == {"none", "batch"} == set(cells)
    for arm, cell in cells.items():
        assert summary["arms"][arm]["test_accuracy"]["values"] == [cell.last.test_accuracy]
        assert summary["arms"][arm]["parameters"] == cell.header.parameters
    rows = (folder / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(len(cell.evaluations) for cell in cells.values())
    for name in ("without.gif", "with.gif", "compare.gif"):
        with Image.open(folder / name) as picture:
            assert picture.n_frames > 1


def test_a_finished_comparison_is_not_run_again(folder):
    before = {path: path.read_bytes() for path in (folder / CELLS).iterdir()}
    result = command("compare", *OPTIONS, "--out", folder)
    assert result.returncode == 0
    assert {path: path.read_bytes() for path in (folder / CELLS).iterdir()} == before


def test_report_makes_everything_again_from_the_records_alone(folder, tmp_path):
    copy = tmp_path / "copy"
    (copy / CELLS).mkdir(parents=True)
    for path in (folder / CELLS).glob("*.jsonl"):
        (copy / CELLS / path.name).write_bytes(path.read_bytes())
    result = command("report", copy)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in copy.iterdir()} >= FILES
    again = command("report", copy)
    assert again.returncode == 0
    for name in FILES:
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name


def test_four_tensors_are_data_in_python_too(tmp_path):
    options = {"epochs": 1, "batch_size": 32, "out": tmp_path, "threads": 1}
    data = tiny.images(64, 32)
    result = batchnorm.compare("lenet", ["batch"], data=list(data), **options)
    assert result.summary["batch"].test_accuracy is not None
    with pytest.raises(BatchNormError, match="got as data a Tensor; wanted are four tensors"):
        batchnorm.compare("lenet", ["batch"], data=data[0], **options)


def test_from_python(tmp_path):
    result = batchnorm.compare(
        tiny.network, ["none", "batch"], seeds=2, epochs=1, data=tiny.as_images(),
        out=tmp_path, learning_rate=0.1, **SMALL,
    )  # fmt: skip
    assert isinstance(result, Comparison)
    assert result.summary["batch"].seeds == [0, 1]
    assert result.summary["batch"].test_accuracy.sd is not None
    assert result.folder == tmp_path
    assert result.plot().axes
    assert result.animate(tmp_path / "mine.gif").stat().st_size > 0
    assert report(tmp_path).record == result.record


def kill_when(process, folder, lines, signal_number):
    """Wait until the records hold so many lines, then send the signal."""
    deadline = time.monotonic() + 120
    while sum(len(p.read_text().splitlines()) for p in folder.glob("cells/*.jsonl")) < lines:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal_number)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("number", "lines", "status"),
    [(signal.SIGKILL, 4, -signal.SIGKILL), (signal.SIGKILL, 9, -signal.SIGKILL), (signal.SIGINT, 5, 130)],
)  # fmt: skip
def test_killed_for_real_it_goes_on_and_ends_with_the_same_numbers(
    tmp_path, folder, number, lines, status
):
    cut = tmp_path / "cut"
    line = [sys.executable, "-m", "batchnorm", "compare", *OPTIONS, "--out", str(cut)]
    with subprocess.Popen(line, cwd=HERE, stderr=subprocess.PIPE, text=True) as process:
        kill_when(process, cut, lines, number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == status
    if number == signal.SIGINT:
        assert "interrupted. The same command goes on" in said
    assert not (cut / "summary.json").exists()
    result = command("compare", *OPTIONS, "--out", cut)
    assert result.returncode == 0, result.stderr
    assert contents(cut) == contents(folder)


def test_two_processes_do_not_share_a_folder(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".lock"):
        result = command("compare", *OPTIONS, "--out", tmp_path)
    assert result.returncode == 2
    assert "another process is at work" in result.stderr


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, folder):
    """A limit on a file's size stands for the full disk: the write fails the same way."""
    result = command("compare", *OPTIONS, "--out", tmp_path, preexec_fn=limit_file_size)
    assert result.returncode == 2
    assert one_line(result.stderr)
    assert "File too large" in result.stderr
    result = command("compare", *OPTIONS, "--out", tmp_path)
    assert result.returncode == 0
    assert contents(tmp_path) == contents(folder)


def one_line(stderr: str) -> bool:
    """What went wrong is the last line, and nothing before it is a traceback."""
    return "Traceback" not in stderr and stderr.splitlines()[-1].startswith("batchnorm: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "none,bach"], "there is no arm called 'bach'. Known are none, batch"),
        (["--arms", ","], "0 arms"),
        (["--epochs", "0"], "epochs is 0 and should be a whole number from 1"),
        (["--seeds", "0"], "0 seeds"),
        (["--batch-size", "1"], "batch_size is 1 and should be a whole number from 2"),
        (["--learning-rate", "-1"], "learning_rate is -1.0 and should be a finite number from 0"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--network", "tiny:raises"], "raised KeyError"),
        (["--network", "tiny:nowhere"], "nowhere"),
        (["--network", "no_such_module:f"], "no_such_module"),
        (["--data", "tiny:raises"], "raised KeyError"),
        (["--data", "tiny:colour_images"], "raised RuntimeError: Given groups=1"),
        (["--data", "tiny:eleven_classes"], "raised IndexError: Target 10 is out of bounds"),
        (["--data", "tiny:breaking"], "a loader (Breaking) raised OSError: the disk is gone. What"),
        (["--data", "tiny:one_image"], "there is 1 training image, and a batch wants 2"),
        (["--seed", "99999999999999999999"], "99999999999999999999"),
        (["--threads", "100000000000"], "threads is 100000000000 and should be at most 4096"),
        (["--device", "meta"], "the device 'meta' computes nothing"),
        (["--out", "tiny.py"], "File exists (tiny.py). What is recorded stays; the same command"),
        (["--data", "tiny:no_test_batches"], "the test loader (list) gives no batch"),
        (["--network", "tiny:no_parameters"], "raised ValueError: optimizer got an empty"),
        (["--out", "/dev/null/here"], "Not a directory (/dev/null/here"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_status_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(HERE)
    result = result_of("compare", *OPTIONS, "--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert one_line(result.stderr), result.stderr
    assert message in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("arguments", [["--schedule", "linear"], ["--epochs", "many"]])
def test_an_option_that_does_not_parse_has_status_2(arguments):
    result = result_of("compare", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_a_record_of_another_version_is_said_and_not_touched(tmp_path, folder):
    (tmp_path / CELLS).mkdir()
    path = tmp_path / CELLS / "0.jsonl"
    line = next((folder / CELLS).glob("*.jsonl")).read_text().splitlines()[0]
    for content in (line.replace('"parameters"', '"weights"'), line[: len(line) // 2], "[1]", "3"):
        path.write_text(content + "\n")
        for arguments in (["report", tmp_path], ["compare", *OPTIONS, "--out", tmp_path]):
            result = result_of(*arguments)
            assert result.exit_code == 2
            assert one_line(result.stderr)
            assert "is not a record of this version" in result.stderr
        assert path.read_text() == content + "\n"


def test_report_of_a_folder_without_a_record(tmp_path):
    result = result_of("report", tmp_path)
    assert result.exit_code == 2
    assert "holds no record of a comparison" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["compare"], ["report"]])
def test_help(arguments):
    result = command(*arguments, "--help", env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"})
    assert result.returncode == 0
    words = re.sub(r"\s+", " ", result.stdout)
    if arguments == ["compare"]:
        for name in (
            "--arms",
            "--network",
            "--schedule",
            "--threads",
            "--quiet",
            "--out",
        ):
            assert name in words
    else:
        assert "batch normalization" in words or "record" in words


def test_importing_the_package_does_not_load_the_laboratory():
    code = (
        "import torch, sys; before = set(sys.modules); import batchnorm;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    result = python(code)
    assert result.stdout.strip() == "['batchnorm']"


def test_without_the_laboratorys_libraries_what_to_install_is_said(tmp_path):
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "import batchnorm\n"
        "try: batchnorm.compare\n"
        "except ModuleNotFoundError as error: print(error)\n"
        f"sys.argv = ['batchnorm', 'report', {str(tmp_path)!r}]\n"
        "from batchnorm.cli import main; main()"
    )
    result = python(code)
    assert (
        "batchnorm.compare needs jinja2. Install it: pip install 'batchnorm[lab]'" in result.stdout
    )
    assert result.returncode == 2
    assert "batchnorm: the command needs jinja2" in result.stderr
    assert "Traceback" not in result.stderr
