"""Run a user's script or module as Python would, with a watch around it.

The command starts this file anew, in an interpreter that has loaded nothing yet: what the script does
before its `import torch` (OMP_NUM_THREADS, CUDA_VISIBLE_DEVICES) has its effect, and the watch begins
where torch has been loaded. So nothing but the standard library is imported here at first.
"""

import builtins
import importlib.abc
import importlib.machinery
import json
import os
import runpy
import subprocess
import sys
import threading
import zipfile
import zipimport
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

if TYPE_CHECKING:
    from batchnorm.checks.watching import Watch

STDIN = "-"  # the script is what comes there, as behind python


def start(script: str, arguments: list[str], options: dict[str, Any]) -> NoReturn:
    """Become the script's interpreter: the same process, with this one's flags."""
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001  # as multiprocessing does
    command = [sys.executable, *flags, __file__, json.dumps(options), script, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # its exec returns to the shell before the script has ended
        raise SystemExit(subprocess.call(command))  # noqa: S603  # the user's own script
    os.execv(sys.executable, command)  # noqa: S606  # likewise


def main() -> int:
    """In the new interpreter: run, then report; the exit status."""
    options = json.loads(sys.argv[1])
    script, arguments, module = sys.argv[2], sys.argv[3:], options.pop("module")
    reporting = {name: options.pop(name) for name in ("json_file", "page", "guard", "whole")}
    process = os.getpid()
    with _Beginning(options) as beginning:
        status = run(script, arguments, module=module)
        if os.getpid() != process:
            return status  # a child that the script forked, of which nothing is told
        _await_threads()
    failure = beginning.failure
    if beginning.watching is None and failure is None and "torch" in sys.modules:
        failure = "the script loaded torch past sys.meta_path"
    try:
        from batchnorm import doctor  # noqa: PLC0415  # loads torch

        return doctor.report(beginning.watching, failure, status, **reporting)
    except Exception as error:  # noqa: BLE001  # ours: the script's status stays
        with suppress(OSError, ValueError):
            sys.stderr.write(f"batchnorm watch: no report: {type(error).__name__}: {error}\n")
        return status


def _await_threads() -> None:
    """As Python does at its end: pools are told that nothing more comes, then all threads are joined.

    A pool that nobody shut down would wait for ever.
    """
    told: list[Callable[[], object]] = getattr(threading, "_threading_atexits", [])
    while told:
        told.pop()()  # once, as Python would
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()


class _Beginning(importlib.abc.MetaPathFinder):
    """Begins to watch once torch has been loaded, and batchnorm too where it loads torch."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.watching: Watch | None = None
        self.failure: str | None = None
        self._options = options
        self._inside = ExitStack()
        self._loading: list[str] = []
        self._begun = False  # before what it loads has been loaded, batchnorm among it

    def __enter__(self) -> Self:
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        self._inside.close()

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """What the other finders find, with a call behind the module's own code."""
        if fullname not in {"torch", "batchnorm"} or path is not None:
            return None
        others = [each for each in sys.meta_path if each is not self]
        specs = (each.find_spec(fullname, path, target) for each in others)
        spec = next((each for each in specs if each is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def load(module: ModuleType) -> None:
            self._loading.append(fullname)
            try:
                run(module)
            finally:
                self._loading.remove(fullname)
            self._begin()

        spec.loader.exec_module = load  # type: ignore[method-assign]  # of this one instance
        return spec

    def _begin(self) -> None:
        if self._loading or self._begun:
            return
        self._begun = True
        try:
            from batchnorm.checks.watching import watch  # noqa: PLC0415  # loads torch

            self.watching = self._inside.enter_context(watch(**self._options))
        except Exception as error:  # noqa: BLE001  # ours, and not the script's
            self.failure = f"{type(error).__name__}: {error}"


def run(script: str, arguments: list[str], *, module: bool = False) -> int:
    """Run it to its end, whatever that is; its exit status.

    Output, arguments, `__main__`, the first entry of `sys.path`, tracebacks and exit status are those
    of `python script arguments`. They stay so: what the script leaves to `atexit` looks for them,
    too.
    """
    sys.argv = [script, *arguments]
    if not sys.flags.safe_path:  # with it Python put no folder there, else this file's
        sys.path[0] = str(first_of_the_path(script, module=module))
    try:
        _runner(script, module)()
    except SystemExit as end:
        return _status(end)
    except BaseException as error:  # noqa: BLE001  # a script may raise anything: told as Python does
        sys.excepthook(type(error), error, _of_the_script(error))
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def first_of_the_path(script: str, *, module: bool) -> Path | str:
    """Where Python looks first for what the script imports."""
    if module:
        return Path.cwd()
    if script == STDIN:
        return ""
    whole = Path(script).is_dir() or zipfile.is_zipfile(script)
    return Path(script).absolute() if whole else Path(script).resolve().parent


def _runner(script: str, module: bool) -> Callable[[], object]:
    if module:
        return lambda: runpy.run_module(script, run_name="__main__", alter_sys=True)
    if script == STDIN:
        return lambda: _run_code(sys.stdin.buffer.read(), "<stdin>")
    path = os.path.abspath(script)  # noqa: PTH100  # links stay
    if zipfile.is_zipfile(script):
        archive = zipimport.zipimporter(path)
        name = os.path.join(path, "__main__.py")  # noqa: PTH118  # inside the archive
        return lambda: _run_code(archive.get_source("__main__") or "", name, archive)
    if Path(script).is_dir():
        path = os.path.join(path, "__main__.py")  # noqa: PTH118  # as above
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    return lambda: _run_code(Path(path).read_bytes(), path, loader)


def _run_code(source: bytes | str, name: str, loader: object = None) -> None:
    """As `runpy.run_path`, which would write the whole path into sys.argv."""
    main_module = ModuleType("__main__")
    vars(main_module).update(__builtins__=builtins, __annotations__={})  # as Python has it
    if loader is not None:
        vars(main_module).update(__file__=name, __loader__=loader, __cached__=None)
    sys.modules["__main__"] = main_module
    exec(compile(source, name, "exec"), vars(main_module))  # noqa: S102  # the user's script


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


if __name__ == "__main__":
    sys.exit(main())
