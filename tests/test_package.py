"""The packages: built from the source, checked, and installed away from it into light environments.

An environment here is what `pip install batchnorm[extra]` would make: the wheel, and of the packages
that are at hand those that it asks for, and those that they ask for, linked instead of copied.
"""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import batchnorm
from batchnorm.errors import EXTRAS

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent


def run(*command, env=None, cwd=None):
    """Without what this process was told: it is a user's machine."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BATCHNORM_")}
    clean.pop("PYTHONPATH", None)
    clean |= {"NO_COLOR": "1", "COLUMNS": "200"} | (env or {})
    return subprocess.run(
        [os.fspath(word) for word in command],
        capture_output=True, text=True, check=False, env=clean, cwd=cwd,
    )  # fmt: skip


def done(result):
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def build(kind, source, to, *options, **env):
    command = ("-m", "build", f"--{kind}", "--no-isolation", "--outdir", to, *options, source)
    return run(sys.executable, *command, env=env)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    to = tmp_path_factory.mktemp("sdist")
    done(build("sdist", ROOT, to))
    (archive,) = to.iterdir()
    return archive


@pytest.fixture(scope="module")
def source(sdist, tmp_path_factory):
    """The source as it was packed."""
    to = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(to, filter="data")
    (folder,) = to.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """From the tree, whose objects are kept: the kernels take minutes to compile."""
    to = tmp_path_factory.mktemp("wheel")
    kept = "-Cbuild-dir=build/package/{wheel_tag}"
    done(build("wheel", ROOT, to, kept, BATCHNORM_REQUIRE_NATIVE="1"))
    (archive,) = to.iterdir()
    return archive


@pytest.fixture(scope="module")
def pure_wheel(source, tmp_path_factory):
    """Built from the packed source, where there is no compiler."""
    to = tmp_path_factory.mktemp("pure")
    log = done(build("wheel", source, to, CC="false", CXX="false"))
    assert "retrying" in log
    (archive,) = to.iterdir()
    return archive


def at_hand(requirement):
    there = importlib.metadata.distributions(name=requirement.name)
    fitting = [each for each in there if requirement.specifier.contains(each.version)]
    assert fitting, f"{requirement} is not installed here"
    return fitting[0]


def needed(wanted: Iterable[Requirement]) -> list[importlib.metadata.Distribution]:
    """The distributions that are wanted, and those that they want."""
    waiting, seen, found = list(wanted), set(), {}
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found[requirement.name] = distribution = at_hand(requirement)
        for text in distribution.requires or []:
            inner = Requirement(text)
            extras = requirement.extras or {""}
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(inner)
    return list(found.values())


def requirements(wheel, extras):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    wanted = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    return [
        requirement
        for requirement in wanted
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def lend(distributions, packages):
    for distribution in distributions:
        for top in {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(distribution.locate_file(top)).resolve())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that gives an environment's folder of programs, and makes it when first asked."""
    made = {}

    def install(wheel, *extras):
        if (wheel, extras) not in made:
            folder = tmp_path_factory.mktemp("-".join(["bare", *extras]))
            venv.create(folder, symlinks=True)
            python = folder / "bin/python"
            packages = done(
                run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            )
            lend(needed(requirements(wheel, extras)), Path(packages.strip()))
            pip = (sys.executable, "-m", "pip", "--python", python)
            done(run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel))
            made[wheel, extras] = python.parent
        return made[wheel, extras]

    return install


@pytest.fixture
def away(tmp_path):
    """A folder of a user's own, with data and a model in it."""
    shutil.copy(HERE / "tiny.py", tmp_path / "mine.py")
    return tmp_path


def test_the_packages_are_fit_to_upload(sdist, wheel, pure_wheel):
    checked = done(
        run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, pure_wheel)
    )
    assert checked.count("PASSED") == 3
    for each in (wheel, pure_wheel):
        done(run(sys.executable, "-m", "check_wheel_contents", "--toplevel", "batchnorm", each))


def test_what_is_in_the_packages(sdist, wheel, pure_wheel):
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "README.md", "tests/installed.py"} <= packed
    sources = (ROOT / "src/batchnorm/kernels/cpu").iterdir()
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= packed
    assert not [
        name for name in packed if re.search(r"\.(so|pyc|gz)$|^(runs|demo|\.venv|build)/", name)
    ]
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"batchnorm-{batchnorm.__version__}-{python}-{python}-")
    assert pure_wheel.name == f"batchnorm-{batchnorm.__version__}-py3-none-any.whl"
    inside = {each: set(zipfile.ZipFile(each).namelist()) for each in (wheel, pure_wheel)}
    of_source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/batchnorm").rglob("*")
        if path.suffix in {".py", ".pyi", ".typed", ".j2"}
    }
    for names in inside.values():
        assert of_source <= names
        assert not [name for name in names if name.endswith((".cpp", ".h"))]
    (kernels,) = (name for name in inside[wheel] - inside[pure_wheel] if "dist-info" not in name)
    assert re.fullmatch(r"batchnorm/kernels/_cpu\.[\w-]+\.so", kernels)


def test_the_kernels_link_neither_torch_nor_openmp(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        library = archive.extract(name, tmp_path)
    linked = re.findall(r"NEEDED.*\[(.*?)\]", done(run("readelf", "--dynamic", library)))
    assert "libc.so.6" in linked
    assert not [name for name in linked if re.search("omp|torch|c10", name)]


def test_a_compiler_that_fails_is_an_error_where_the_kernels_are_required(source, tmp_path):
    result = build("wheel", source, tmp_path, CC="false", CXX="false", BATCHNORM_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "CMake configuration failed" in result.stdout + result.stderr
    assert not list(tmp_path.iterdir())


def test_these_tests_run_the_kernels():
    """A build that fails falls back without a word: here it must not."""
    compiler = shutil.which("c++") is not None or shutil.which("clang++") is not None
    found = done(run(sys.executable, "-c", "import batchnorm; print(batchnorm.backend())")).strip()
    assert found.startswith("native, ") == compiler, (
        f"{found} runs, though there is {'a' if compiler else 'no'} compiler. See why the kernels do "
        "not build: BATCHNORM_REQUIRE_NATIVE=1 python -m pip install --verbose --editable ."
    )


def test_light_with_the_kernels(wheel, installed, away):
    programs = installed(wheel)
    assert "native, " in done(run(programs / "python", HERE / "installed.py", "native", cwd=away))
    pip = (sys.executable, "-m", "pip", "--python", programs / "python")
    assert "No broken requirements" in done(run(*pip, "check"))
    modules = [module for extra in EXTRAS.values() for module in extra]
    code = f"import importlib.util as u; print([m for m in {modules} if u.find_spec(m)])"
    there = done(run(programs / "python", "-c", code)).strip()
    assert set(re.findall(r"\w+", there)) <= {"filelock", "jinja2"}  # torch asks for them
    command = run(programs / "batchnorm", "--help", cwd=away)
    assert command.returncode == 1
    assert command.stderr.strip() == (
        "batchnorm: the command needs typer. Install it: pip install 'batchnorm[lab]'"
    )
    code = "import batchnorm; batchnorm.compare"
    assert "batchnorm.compare needs " in (said := run(programs / "python", "-c", code).stderr)
    assert said.strip().endswith("Install it: pip install 'batchnorm[lab]'")


def test_light_without_a_compiler(pure_wheel, installed, away):
    programs = installed(pure_wheel)
    done(run(programs / "python", HERE / "installed.py", "torch", cwd=away))
    code = "import logging; logging.basicConfig(level='INFO'); import batchnorm"
    said = run(programs / "python", "-c", code).stderr
    assert "batchnorm was installed without its native kernels: torch's operator runs" in said


def test_the_main_command_with_the_laboratory(wheel, installed, away):
    programs = installed(wheel, "lab")
    assert "compare" in done(run(programs / "batchnorm", "--help", cwd=away))
    version = done(run(programs / "batchnorm", "--version", cwd=away)).splitlines()
    assert version[0] == f"batchnorm: {batchnorm.__version__}"
    assert version[1].startswith("backend: native, ")
    compare = (
        programs / "batchnorm", "compare", "--data", "mine:images", "--epochs", "4",
        "--batch-size", "32", "--threads", "1", "--out", "demo",
    )  # fmt: skip
    done(run(*compare, cwd=away, env={"PYTHONPATH": str(away)}))
    made = {path.name for path in (away / "demo").iterdir()}
    assert {"report.html", "compare.gif", "curves.svg", "summary.json", "table.csv"} <= made
    code = (
        "from batchnorm.comparison import report\n"
        "s = report('demo').summary\n"
        "print(s['batch'].test_accuracy.mean)"
    )
    assert float(done(run(programs / "python", "-c", code, cwd=away))) > 0.9


FOLD = ("fold", "mine:network", "--input", "2,1,28,28", "--to")
COMPARE = (
    "compare", "--data", "mine:images", "--epochs", "1", "--threads", "1", "--out", "demo", "--quiet",
)  # fmt: skip
NEED = [  # the extra, a command that needs it, and what is there afterwards
    ("export", (*FOLD, "model.onnx"), "model.onnx"),
    ("export", (*FOLD, "model.safetensors"), "model.safetensors"),
    ("tensorboard", (*COMPARE, "--tensorboard", "events"), "events/*/*/events.out.tfevents.*"),
]


@pytest.mark.parametrize(("extra", "command", "made"), NEED)
def test_an_extra_is_asked_for_by_its_name(extra, command, made, wheel, installed, away):
    result = run(
        installed(wheel, "lab") / "batchnorm", *command, cwd=away, env={"PYTHONPATH": str(away)}
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().endswith(f"Install it: pip install 'batchnorm[{extra}]'")
    assert not list(away.glob(made))


@pytest.mark.parametrize(("extra", "command", "made"), NEED)
def test_an_extra_is_enough(extra, command, made, wheel, installed, away):
    programs = installed(wheel, "lab", extra)
    done(run(programs / "batchnorm", *command, cwd=away, env={"PYTHONPATH": str(away)}))
    assert list(away.glob(made))


CLUSTER = ("study", "axes", "--quick", "--out", "studies", "--cluster", "tcp://127.0.0.1:1")


def test_a_cluster_asks_for_dask(wheel, installed, away):
    result = run(installed(wheel, "lab") / "batchnorm", *CLUSTER, cwd=away)
    assert result.returncode == 2
    assert result.stderr.strip().endswith(
        "a cluster needs distributed. Install it: pip install 'batchnorm[dask]'"
    )


def test_dask_is_enough_for_a_cluster(wheel, installed, away):
    result = run(installed(wheel, "lab", "dask") / "batchnorm", *CLUSTER, cwd=away)
    assert "no Dask scheduler answers at 'tcp://127.0.0.1:1'" in result.stderr


TYPED = """
import torch
from torch import Tensor, nn

import batchnorm

layer: nn.BatchNorm2d = batchnorm.BatchNorm2d(3)
y: Tensor = batchnorm.batch_norm(torch.ones(2, 3), None, None, training=True)
model: nn.Module = batchnorm.recalibrate(nn.Sequential(layer), [torch.ones(2, 3, 4, 4)])
found: batchnorm.Findings = batchnorm.check(model)
with batchnorm.watch(model) as watching:
    print(watching.findings(), batchnorm.compare(seeds=1).folder)
"""
WRONG = [
    ("BatchNorm2d(3)", "BatchNorm2d('3')"),
    ("training=True", "training=True, activtion='relu'"),
    ("compare(seeds=1)", "compare(seeds='one')"),
    ("found: batchnorm.Findings", "found: int"),
]


def test_a_user_s_types_are_checked(wheel, installed, away):
    programs = installed(wheel)

    def mypy(program):
        (away / "program.py").write_text(program)
        return run(
            sys.executable, "-m", "mypy", "--strict", "--python-executable", programs / "python",
            "--cache-dir", away / "cache", "program.py", cwd=away,
        )  # fmt: skip

    done(mypy(TYPED))
    for right, wrong in WRONG:
        assert right in TYPED
        result = mypy(TYPED.replace(right, wrong))
        assert result.stdout.splitlines()[-1].startswith("Found 1 error"), wrong + result.stdout


@pytest.mark.parametrize(
    ("platform", "architecture", "tag"),
    [
        ("linux", "x86_64", "manylinux_x86_64"),
        ("linux", "aarch64", "manylinux_aarch64"),
        ("macos", "arm64", "macosx_arm64"),
        ("windows", "AMD64", "win_amd64"),
    ],
)
def test_the_wheels_of_a_release(platform, architecture, tag):
    plan = ("-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform)
    planned = done(run(sys.executable, *plan, "--archs", architecture, ROOT))
    assert planned.split() == [f"cp3{minor}-{tag}" for minor in (11, 12, 13, 14)]
