"""Python, started anew."""

import os
import subprocess
import sys


def python(code, **environment):
    """What a process of its own makes of the code."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
