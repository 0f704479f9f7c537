"""Run many cells: planned beforehand, on processes or a cluster, a failed one tried again.

The cells are independent, so whatever is a `concurrent.futures.Executor` can run them, and gives
the same numbers: a cell's thread count is part of its configuration. Here processes share the
folder, and a cell whose process was killed goes on from its checkpoint. The workers of a Dask
cluster need not share anything: they hand back a finished cell's file, and one that was lost begins
again. Timings come last, one at a time, with nothing beside them.

    failures.jsonl   a line an attempt that failed: configuration, error, traceback, when
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from batchnorm.errors import BatchNormError, brief, lacking
from batchnorm.lab import cells, files
from batchnorm.lab.record import CellConfig, read_cell
from batchnorm.lab.study import Config, Probe

FAILURES = "failures.jsonl"
ATTEMPTS = 3
CONNECT_SECONDS = 10
PROBE_STEPS = 8  # of a training that is timed beforehand
PROBE_IMAGES = 512


class Board(Protocol):
    """Told of the whole grid as it goes."""

    def start(self, cells: int, seconds: float) -> None:
        """So many cells are to be run, which should take so long."""

    def finish(self, config: Config, seconds: float) -> None:
        """A cell is done; it was expected to take so many seconds of the whole's."""

    def failed(self, config: Config, error: str, attempt: int) -> None:
        """An attempt failed; there may be others."""


@dataclass(frozen=True)
class Workers:
    """Where cells are run: processes of this machine, or a Dask cluster's address."""

    processes: int = 1
    cluster: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be run, and how long it should take."""

    waiting: list[Config]
    done: int
    expected: dict[str, float]  # seconds of one process, by hash
    workers: int

    @property
    def seconds(self) -> float:
        """Of wall clock: cells beside each other, then the timings one by one."""
        alone = sum(self.expected[c.hash] for c in self.waiting if is_timing(c))
        return (sum(self.expected.values()) - alone) / self.workers + alone


def is_timing(config: Config) -> bool:
    """Whether nothing may run beside the cell."""
    return isinstance(config, Probe) and config.alone


def default_processes() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(configs: Iterable[Config], folder: Path, data_dir: Path | None, workers: Workers) -> Plan:
    """Check every cell, see which are done, and time a little of each kind of the others."""
    unique = list({config.hash: config for config in configs}.values())
    waiting = [config for config in unique if not cells.is_done(config, folder)]
    for config in waiting:
        cells.check(config)
    by_kind: dict[Any, Callable[[Config], float]] = {}
    expected = {}
    for config in waiting:
        kind = _kind(config)
        if kind not in by_kind:
            by_kind[kind] = _timed(config, data_dir)
        expected[config.hash] = by_kind[kind](config)
    return Plan(waiting, len(unique) - len(waiting), expected, _count(workers))


def _kind(config: Config) -> Any:
    """Cells of one kind take the same time a step, or a call."""
    if isinstance(config, CellConfig):
        return config.network, config.arm, config.batch_size, config.threads, config.device
    return config.function, config.arm, config.options, config.threads


def _timed(config: Config, data_dir: Path | None) -> Callable[[Config], float]:
    """Run a little of a cell, and return what a cell of its kind should then take, in seconds."""
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as temporary:
        folder = Path(temporary)
        if isinstance(config, Probe):
            seconds = _call(config, folder, data_dir)
            return lambda _: seconds
        small = dataclasses.replace(
            config, epochs=1, evaluations_per_epoch=1, held_out_images=0, test_images=PROBE_IMAGES,
            recalibration_images=PROBE_IMAGES, train_images=PROBE_STEPS * config.batch_size,
        )  # fmt: skip
        cells.perform(small, folder, data_dir)
        return _extrapolate(small, folder)


def _call(config: Probe, folder: Path, data_dir: Path | None) -> float:
    """Seconds of one call; one that fails takes none here, and the run will record why."""
    start = time.perf_counter()
    try:
        cells.perform(config, folder, data_dir)
    except BatchNormError:  # no data, say: every cell would fail
        raise
    except Exception:  # noqa: BLE001  # whatever the probe raises
        return 0.0
    return time.perf_counter() - start


def _extrapolate(small: CellConfig, folder: Path) -> Callable[[Config], float]:
    cell = read_cell(cells.path_of(small, folder))
    assert cell is not None  # noqa: S101  # for the type checker: it was just made
    assert cell.done is not None  # noqa: S101
    step = cell.done.seconds / cell.last.step
    images = cell.header.test_images * (3 if cell.last.recalibrated_test_loss is not None else 1)
    image = (cell.done.wall_seconds - cell.done.seconds) / (len(cell.evaluations) * images)

    def seconds(config: Config) -> float:
        assert isinstance(config, CellConfig)  # noqa: S101  # of the same kind
        trained, tested = config.train_images or 60_000, config.test_images or 10_000
        steps = config.epochs * trained / config.batch_size
        passes = 1 if images == cell.header.test_images else 2
        read = passes * (tested + config.held_out_images)
        read += (passes - 1) * config.recalibration_images
        return steps * step + (1 + config.epochs * config.evaluations_per_epoch) * read * image

    return seconds


def _count(workers: Workers) -> int:
    if workers.cluster is None:
        return workers.processes
    with _client(workers.cluster) as client:
        return max(1, len(client.nthreads()))


def run(
    planned: Plan, folder: Path, data_dir: Path | None, workers: Workers, board: Board
) -> list[Config]:
    """Run what waits; return the cells that failed each time they were tried."""
    board.start(len(planned.waiting), planned.seconds)
    beside = [config for config in planned.waiting if not is_timing(config)]
    timings = [config for config in planned.waiting if is_timing(config)]
    lost = []
    for configs, most in ((beside, planned.workers), (timings, 1)):
        if configs:
            flight = _Flight(configs, most, folder, data_dir, workers, board, planned.expected)
            lost += flight.run()
    return lost


@dataclass
class _Flight:
    """Cells on their way through an executor, at most `most` at once."""

    configs: Sequence[Config]
    most: int
    folder: Path
    data_dir: Path | None
    workers: Workers
    board: Board
    expected: dict[str, float]

    def run(self) -> list[Config]:
        """Until each is done or has failed `ATTEMPTS` times; a broken pool is made anew."""
        waiting = deque((config, 1) for config in self.configs)
        lost: list[Config] = []
        while waiting:
            with _executor(self.workers, self.most) as executor:
                lost += self._until_it_breaks(executor, waiting)
        return lost

    def _until_it_breaks(
        self, executor: Executor, waiting: deque[tuple[Config, int]]
    ) -> list[Config]:
        flying: dict[Future[bytes | None], tuple[Config, int]] = {}
        lost = []
        broken = False
        while flying or (waiting and not broken):
            # no more than are at work: who was in flight when a process died is then known
            while waiting and len(flying) < self.most and not broken:
                config, attempt = waiting.popleft()
                try:
                    flying[self._submit(executor, config)] = config, attempt
                except concurrent.futures.BrokenExecutor:  # it broke between two looks
                    waiting.appendleft((config, attempt))
                    broken = True
            finished, _ = concurrent.futures.wait(
                flying, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                config, attempt = flying.pop(future)
                error = future.exception()
                if error is None:
                    self._keep(config, future.result())
                    continue
                broken |= isinstance(error, concurrent.futures.BrokenExecutor)
                self._fail(config, error, attempt)
                if attempt < ATTEMPTS:
                    waiting.append((config, attempt + 1))
                else:
                    lost.append(config)
        return lost

    def _submit(self, executor: Executor, config: Config) -> "Future[bytes | None]":
        if self.workers.cluster is not None:
            return executor.submit(cells.perform_elsewhere, config, self.data_dir)
        return executor.submit(cells.perform, config, self.folder, self.data_dir)

    def _keep(self, config: Config, content: bytes | None) -> None:
        if content is not None:
            files.keep(content, cells.path_of(config, self.folder))
        self.board.finish(config, self.expected[config.hash] / self.most)

    def _fail(self, config: Config, error: BaseException, attempt: int) -> None:
        line = {
            "hash": config.hash,
            "config": dataclasses.asdict(config),
            "attempt": attempt,
            "error": brief(error),
            "traceback": "".join(traceback.format_exception(error)),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with (self.folder / FAILURES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.board.failed(config, brief(error), attempt)


class _Here(Executor):
    """One cell after another in this process: what is submitted has ended when submit returns."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  # an executor's future carries what was raised
            future.set_exception(error)
        return future


@contextmanager
def _executor(workers: Workers, most: int) -> Iterator[Executor]:
    if workers.cluster is not None:
        with _client(workers.cluster) as client:
            # pure=False: a result is not taken from the cluster's memory of an earlier call
            yield client.get_executor(pure=False, retries=0)
    elif workers.processes == 1:
        yield _Here()
    else:
        with _processes(min(workers.processes, most)) as executor:
            yield executor


@contextmanager
def _processes(count: int) -> Iterator[Executor]:
    """Fresh processes, not forks: torch's threads hang in a fork. An interruption ends them."""
    pool = ProcessPoolExecutor(
        count, mp_context=multiprocessing.get_context("spawn"), initializer=_ignore_interruptions
    )
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):  # noqa: SLF001  # public from Python 3.14 on
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interruptions() -> None:
    """Ctrl-C reaches every process of the terminal; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        import distributed  # noqa: PLC0415  # an extra
    except ModuleNotFoundError as missing:
        raise BatchNormError(lacking("a cluster", missing)) from missing
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise BatchNormError(
            f"no Dask scheduler answers at {address!r} ({brief(error)}). Start one with "
            "`dask scheduler`, and workers with `dask worker ADDRESS --nthreads 1`."
        ) from error
    with client:
        yield client
