"""Python, and the commands, started anew."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run(*arguments, **options):
    """Python with these arguments, to its end."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )


def python(code, **environment):
    """What a process of its own makes of the code."""
    return run("-c", code, timeout=120, env={**os.environ, **environment})


def command(*arguments, cwd=HERE, **options):
    """`batchnorm ARGUMENTS`, by default in this folder, whose modules it can import."""
    return run("-m", "batchnorm", *map(str, arguments), timeout=300, cwd=cwd, **options)


@pytest.fixture
def interruptible():
    """In the background a shell makes its children, and theirs, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
