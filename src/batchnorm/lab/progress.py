"""What training tells whoever watches it."""

from typing import Protocol, Self

from batchnorm.lab.record import CellConfig, Done, Evaluation


class Progress(Protocol):
    """Told of each cell as it goes; a context, so that a display is taken down after an error."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def start(self, config: CellConfig, steps: int, step: int) -> None:
        """A cell of so many steps begins, or goes on, at `step`."""

    def step(
        self, config: CellConfig, step: int, loss: float, accuracy: float, speed: float | None
    ) -> None:
        """A step is done: loss and accuracy of the epoch so far, examples per second.

        Called after each step: must cost nothing.
        """

    def evaluation(self, config: CellConfig, evaluation: Evaluation) -> None:
        """A line was recorded."""

    def finish(self, config: CellConfig, done: Done) -> None:
        """The cell has its last line."""


class Silent:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, config: CellConfig, steps: int, step: int) -> None:
        pass

    def step(
        self, config: CellConfig, step: int, loss: float, accuracy: float, speed: float | None
    ) -> None:
        pass

    def evaluation(self, config: CellConfig, evaluation: Evaluation) -> None:
        pass

    def finish(self, config: CellConfig, done: Done) -> None:
        pass
