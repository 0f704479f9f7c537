"""Where a cell runs: numbers say where they come from."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import batchnorm


def environment() -> dict[str, Any]:
    """Where a cell runs."""
    return {
        "batchnorm": batchnorm.__version__,
        "backend": batchnorm.backend(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name; platform.processor() knows only its architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
