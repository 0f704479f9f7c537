"""The pages of docs/ whose code is run: what stands there as output is what the code prints.

    python benchmarks/pages.py [PAGE…]         # run them, and write what they print

The `python` blocks of a page are one program, run in order in an empty folder; a `text` block right
behind one holds what it prints. `python FILE.py` is written to that file, and a `console` block
runs its `$` lines.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*(ROOT / "docs" / "howto").glob("*.md"), *(ROOT / "docs").glob("tutorial*.md")]
)  # fmt: skip
BLOCK = re.compile(
    r"```(?P<kind>python|console)(?: (?P<file>\S+\.py))?\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<said>.*?)```\n)?",
    re.DOTALL,
)


def remade(page: Path) -> str:
    """The page with what its code prints now.

    Raises:
        whatever its code raises.
    """
    text, program = page.read_text(encoding="utf-8"), ModuleType("page")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        return BLOCK.sub(lambda block: _run(block, page, program), text)


def _run(block: re.Match[str], page: Path, program: ModuleType) -> str:
    """A block again, with what it says."""
    code = block["code"]
    if block["kind"] == "console":
        return f"```console\n{_in_a_shell(code)}```\n"
    if block["file"]:
        Path(block["file"]).write_text(code, encoding="utf-8")
        return block[0]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(page), "exec"), vars(program))  # noqa: S102  # our own page
    shown = f"\n```text\n{_trimmed(said.getvalue())}```\n" if said.getvalue() else ""
    return f"```python\n{code}```\n{shown}"


def _in_a_shell(code: str) -> str:
    """Each `$` line, and behind it what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    shown = []
    for line in code.splitlines():
        if line.startswith("$ "):
            done = subprocess.run(  # noqa: S602  # our own page
                line[2:], shell=True, capture_output=True, text=True, check=False, env=environment
            )
            if done.returncode:
                raise RuntimeError(f"{line} ended with {done.returncode}:\n{done.stderr}")
            shown += [line, *done.stdout.splitlines()]
    return _trimmed("\n".join(shown))


def _trimmed(text: str) -> str:
    """Without blanks at the ends of lines, which editors take away."""
    return "".join(f"{line.rstrip()}\n" for line in text.strip("\n").splitlines())


def main() -> None:
    """Run the pages and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, nargs="*", help="all by default")
    for page in parser.parse_args().pages or PAGES:
        page.write_text(remade(page.absolute()), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()
