"""A process for each of an allocator's settings.

    reused        glibc keeps what was freed
    default       glibc gives a tensor over 32 MB back to the system at once, and asks for it again,
                  but for this library's own, which reuse memory
    huge-pages    THP_MEM_ALLOC_ENABLE=1, torch's own switch

They are read when a process starts, and hold for it.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from batchnorm.errors import BatchNormError
from batchnorm.speed.cases import Plan, Shape
from batchnorm.speed.rows import Row
from batchnorm.speed.timing import here

SETTINGS: dict[str, dict[str, str]] = {
    "reused": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)},
    "default": {},
    "huge-pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}


def available() -> tuple[str, ...]:
    """The settings that have an effect here: the variables are read by glibc, and by torch on Linux."""
    return tuple(SETTINGS) if platform.libc_ver()[0] == "glibc" else ("default",)


def apart(plan: Plan, setting: str) -> Iterator[Row]:
    """The rows, measured in a process of the setting, each as soon as it is known."""
    ours = {name for variables in SETTINGS.values() for name in variables}
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    # -P: a file in the current folder named like a module would be imported in its place
    command = [sys.executable, "-P", "-m", "batchnorm.speed", setting, json.dumps(asdict(plan))]
    with subprocess.Popen(  # noqa: S603  # this module
        command,
        env=variables | SETTINGS[setting],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C reaches this process alone, which ends the other
    ) as process:
        assert process.stdout is not None  # noqa: S101  # for the type checker
        try:
            for line in process.stdout:
                yield _read(line)
        except BaseException:  # an interruption, or nobody wants the rest
            process.terminate()
            raise
    if process.returncode:
        raise BatchNormError(
            f"the process that measures with {setting} memory ended with {process.returncode}. "
            "If this machine is short of memory, --quick needs little."
        )


def _read(line: str) -> Row:
    content = json.loads(line)
    if "error" in content:
        raise BatchNormError(content["error"])
    return Row(**content)


def answer(setting: str, content: str) -> None:
    """Measure in this process, and write a line a row."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)  # what a compiler may print is no row
        given = json.loads(content)
        shapes = tuple(
            Shape(each["family"], tuple(each["sizes"]), each["channels_last"])
            for each in given.pop("shapes")
        )
        plan = Plan(shapes=shapes, threads=tuple(given.pop("threads")), **given)
        try:
            for row in here(plan, setting):
                print(json.dumps(asdict(row)), file=lines, flush=True)
        except BatchNormError as error:
            print(json.dumps({"error": str(error)}), file=lines, flush=True)
