"""`watch` as a callback for Lightning."""

import sys
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback

from batchnorm.checks.findings import Findings
from batchnorm.checks.watching import Watch, watch


class WatchCallback(Callback):
    """Watch a `Trainer.fit`, and print at its end, or where it fails, what was wrong.

    `Trainer(callbacks=[WatchCallback()])`. The arguments are those of `batchnorm.watch`; `findings`
    holds what was found.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options
        self._inside = ExitStack()
        self._watch: Watch | None = None
        self.findings = Findings([], model="")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        del trainer
        self._watch = self._inside.enter_context(watch(pl_module, **self._options))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what was found."""
        del pl_module
        self._end(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say what was found until then."""
        del pl_module, exception
        self._end(trainer)

    def _end(self, trainer: Any) -> None:
        self._inside.close()
        if self._watch is None:
            return  # it failed before the first batch
        for found in self._watch.findings():
            self.findings = found
            if trainer.is_global_zero:
                sys.stderr.write(f"{found}\n")
