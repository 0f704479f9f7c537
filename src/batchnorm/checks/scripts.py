"""Run a user's script or module as Python would, with a watch around it."""

import os
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType

from batchnorm.checks.watching import Watch, watch
from batchnorm.errors import BatchNormError


def run(
    script: str, arguments: list[str], *, module: bool = False, **options: object
) -> tuple[int, Watch]:
    """Run it to its end, whatever that is; its exit status, and what was seen.

    Output, arguments, `__main__`, the first entry of `sys.path`, tracebacks and exit status are those
    of `python script arguments`.
    """
    if not module and not Path(script).is_file():
        raise BatchNormError(
            f"there is no script {script}. For a module: batchnorm watch -m package.module"
        )
    before = sys.argv, list(sys.path)
    sys.argv = [script, *arguments]
    sys.path[0] = os.getcwd() if module else str(Path(script).resolve().parent)  # noqa: PTH109
    with watch(**options) as watching:  # type: ignore[arg-type]  # watch's own
        try:
            status = _run(script, module)
        finally:
            sys.argv, sys.path = before
    return status, watching


def _run(script: str, module: bool) -> int:
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            _run_path(Path(os.path.abspath(script)))  # noqa: PTH100  # links stay
    except SystemExit as end:
        return _status(end)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # noqa: BLE001  # a script may raise anything: told as Python does
        _print(error)
        return 1
    return 0


def _run_path(path: Path) -> None:
    """As `runpy.run_path`, which would write the whole path into sys.argv."""
    main = ModuleType("__main__")
    main.__file__ = str(path)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = main
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(main))  # noqa: S102  # the user's script
    finally:
        sys.modules["__main__"] = before


def _status(end: SystemExit) -> int:
    """As the interpreter does: None is 0, a number itself, anything else is printed, and 1."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    sys.stderr.write(f"{end.code}\n")
    return 1


def _print(error: BaseException) -> None:
    """The traceback from the script's own first frame on."""
    frames = error.__traceback__
    while frames is not None and (
        frames.tb_frame.f_code.co_filename in {__file__, runpy.__file__}
        or "runpy" in frames.tb_frame.f_code.co_filename
    ):
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames or error.__traceback__)
