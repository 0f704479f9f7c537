"""Run a user's script or module as Python would, with a watch around it."""

import builtins
import os
import runpy
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

import batchnorm
from batchnorm.checks.watching import Watch, watch
from batchnorm.errors import BatchNormError


def run(
    script: str, arguments: list[str], *, module: bool = False, **options: object
) -> tuple[int, Watch | None]:
    """Run it to its end, whatever that is; its exit status, and what was seen.

    Output, arguments, `__main__`, the first entry of `sys.path`, tracebacks and exit status are those
    of `python script arguments`. They stay so: what the script leaves to `atexit` looks for them,
    too. In a child that the script forked nothing is told: None in place of what was seen.
    """
    if not module and not Path(script).is_file():
        raise BatchNormError(
            f"there is no script {script}. For a module: batchnorm watch -m package.module"
        )
    first = Path.cwd() if module else Path(script).resolve().parent
    _refuse_our_name(first)
    sys.argv = [script, *arguments]
    sys.path[:1] = [] if sys.flags.safe_path else [str(first)]
    process = os.getpid()
    with watch(**options) as watching:  # type: ignore[arg-type]  # watch's own
        status = _run(script, module)
        if os.getpid() != process:
            return status, None
        for thread in threading.enumerate():  # Python waits for these, too
            if not thread.daemon and thread is not threading.main_thread():
                thread.join()
    return status, watching


def _refuse_our_name(folder: Path) -> None:
    """A script that imports its own batchnorm.py would get this library in its place."""
    for own in (folder / "batchnorm.py", folder / "batchnorm" / "__init__.py"):
        if own.is_file() and not own.samefile(batchnorm.__file__):
            raise BatchNormError(
                f"watch got a script beside a {own.relative_to(folder)} of its own, and in this process "
                "batchnorm is this library: the script would import the wrong one. Rename it, or put "
                "`with batchnorm.watch()` into a script that does not import it."
            )


def _run(script: str, module: bool) -> int:
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            _run_path(os.path.abspath(script))  # noqa: PTH100  # links stay
    except SystemExit as end:
        return _status(end)
    except BaseException as error:  # noqa: BLE001  # a script may raise anything: told as Python does
        sys.excepthook(type(error), error, _of_the_script(error))
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _run_path(path: str) -> None:
    """As `runpy.run_path`, which would write the whole path into sys.argv."""
    main = ModuleType("__main__")
    main.__file__, main.__builtins__ = path, builtins  # type: ignore[attr-defined]  # as Python has it
    main.__loader__ = SourceFileLoader("__main__", path)
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec"), vars(main))  # noqa: S102  # the user's script


def _status(end: SystemExit) -> int:
    """As the interpreter does: None is 0, a number itself, anything else is printed, and 1."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    sys.stderr.write(f"{end.code}\n")
    return 1


def _of_the_script(error: BaseException) -> TracebackType | None:
    """The traceback from the script's own first frame on; none where it could not be compiled."""
    frames = error.__traceback__
    while frames is not None and (
        frames.tb_frame.f_code.co_filename in {__file__, runpy.__file__}
        or "runpy" in frames.tb_frame.f_code.co_filename
    ):
        frames = frames.tb_next
    error.__traceback__ = frames  # traceback.print_exception reads it there
    return frames
