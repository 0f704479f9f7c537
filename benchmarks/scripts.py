"""Five broken training scripts under `batchnorm watch`, and the same repaired: docs/five-scripts.md.

    python benchmarks/scripts.py

What is shown is the terminal's own output.
"""

import difflib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "five-scripts.md"
HEAD = """\
# Five broken training scripts

As people write them, under `batchnorm watch`, and repaired. The scripts are in [examples](../examples/README.md);
this page is made by `python benchmarks/scripts.py`, and what it shows is the terminal's own output.
"""


def pairs() -> list[tuple[Path, Path]]:
    """The broken ones, and the repaired."""
    repaired = sorted(EXAMPLES.glob("*_repaired.py"))
    return [(path.with_name(path.name.replace("_repaired", "")), path) for path in repaired]


def run(script: Path) -> str:
    """What the terminal shows, the frames of torch in a traceback left out."""
    command = [sys.executable, "-m", "batchnorm", "watch", script.name]
    done = subprocess.run(  # noqa: S603  # our own scripts
        command, cwd=EXAMPLES, capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    return "\n".join([f"$ batchnorm watch {script.name}", *_shortened(done.stdout + done.stderr)])


def _shortened(text: str) -> list[str]:
    lines, inside = [], False
    for line in text.rstrip().splitlines():
        if line.startswith("  File"):
            inside = "site-packages" in line
        elif not line.startswith("    "):
            inside = False
        if not inside:
            lines.append(line.replace(str(EXAMPLES) + os.sep, ""))
    return lines


def page() -> str:
    """Every script: what it says of itself, the report, the repair, the report after it."""
    text = [HEAD]
    for place, (broken, repaired) in enumerate(pairs(), start=1):
        code = broken.read_text(encoding="utf-8").splitlines()
        again = repaired.read_text(encoding="utf-8").splitlines()
        change = [
            line
            for line in difflib.unified_diff(code, again, n=1, lineterm="")
            if not line.startswith(("---", "+++", "@@")) and '"""' not in line
        ]
        text += [
            f"## {place}. {code[0].strip(chr(34))}\n",
            f"[{broken.name}](../examples/{broken.name})\n",
            f"```\n{run(broken)}\n```\n",
            "```diff\n" + "\n".join(change) + "\n```\n",
            f"```\n{run(repaired)}\n```\n",
        ]
    return "\n".join(text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
