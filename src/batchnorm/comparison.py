"""`compare`: train a network with and without batch normalization, record it, show it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.lab import grid, networks
from batchnorm.lab.data import Images, Loaders, gather
from batchnorm.lab.progress import Progress
from batchnorm.lab.record import Record, read
from batchnorm.lab.summary import ArmSummary, summarize, write_summary, write_table
from batchnorm.views import animation, console, curves, fonts, page
from batchnorm.views.words import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a comparison found: its record, and the views of it."""

    record: Record
    words: Words = field(default_factory=Words)

    def __repr__(self) -> str:
        return f"Comparison of {', '.join(self.record.arms)} in {self.folder}"

    @property
    def folder(self) -> Path:
        """Where the record, the pictures and the page lie."""
        return self.record.folder

    @property
    def summary(self) -> dict[str, ArmSummary]:
        """Each arm's last evaluation over its seeds."""
        return {summary.arm: summary for summary in summarize(self.record)}

    def plot(self) -> "Figure":
        """Draw accuracies and losses against the epoch."""
        return curves.draw(self.record, self.words)

    def animate(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Draw the curves as they grew, as a GIF; by default `compare.gif` in the folder."""
        path = Path(path) if path is not None else self.folder / "compare.gif"
        animation.compare(self.record, path, self.words)
        return path

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write the page, one offline file; by default `report.html` in the folder."""
        path = Path(path) if path is not None else self.folder / "report.html"
        page.save(self.record, path, self.words)
        return path

    def _repr_html_(self) -> str:
        return page.html(self.record, self.words)

    def write(self) -> None:
        """Write every file of the folder that is made from the record."""
        write_summary(self.record, self.folder / "summary.json")
        write_table(self.record, self.folder / "table.csv")
        curves.save(self.record, self.folder / "curves.svg", self.words)
        animation.write(self.record, self.folder, self.words)
        self.save()


def compare(
    network: str | networks.Network = "lenet",
    arms: Sequence[str] = ("none", "batch"),
    *,
    seeds: int = 1,
    epochs: int = 10,
    out: str | os.PathLike[str] | None = None,
    data: str | Images | Loaders | Sequence[Any] = "fashion-mnist",
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    threads: int | None = None,
    initialization: str | None = None,
    language: str = "en",
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Train a network with each arm in the place of its batch norm, from the same weights.

    Each cell (an arm from a seed) sees the same initial weights and the same order of data as the
    others of its seed. What is trained is recorded as it goes; a cell that was interrupted goes on
    from its last checkpoint, a finished one is not trained again.

    Args:
        network: "lenet"; `package.module:function`; or a function that returns a torch module
            with batch norm in it.
        arms: names from `batchnorm.lab.arms.ARMS`.
        seeds: how many seeds; they are seed, seed + 1, ….
        epochs: passes over the training images.
        out: the folder of the record; by default one below `runs` that is named after the
            configuration, so that the same call goes on with the same record.
        data: "fashion-mnist"; `package.module:function`; four tensors (train images, train labels,
            test images, test labels), or `Images` of them; two loaders (train, test), or `Loaders`.
        data_dir: where Fashion-MNIST is looked for first.
        seed: the first seed.
        threads: of torch, by default as many as it uses now. Part of the configuration: numbers
            of different thread counts differ.
        initialization: "xavier-uniform" (the default of lenet), "kaiming-normal", or "as-built"
            (the default of other networks).
        language: of the pictures and the page, "en" or "zh".
        progress: where progress is shown; by default on standard error.
        **options: other fields of `CellConfig`: batch_size, learning_rate, optimizer, schedule,
            momentum, weight_decay, evaluations_per_epoch, recalibration_images, train_images,
            held_out_images, test_images, ghost_size (of the arm ghost), device.

    Returns:
        The comparison; every file of its folder is written.

    Raises:
        BatchNormError: an unknown name, a number out of range, a folder of another configuration,
            a network or data function that fails, no font for the language.
    """
    words = Words(language)
    fonts.family(words)  # said before the training, not after it
    if not isinstance(data, str):
        data = gather(data, "compare got as data")
    common, build = grid.configure(network, data, epochs, threads, initialization, options)
    plan = grid.plan(common, arms, range(seed, seed + seeds))
    folder = Path(out) if out is not None else grid.default_folder(common)
    with grid.alone_in(folder):
        grid.run(plan, build, data, data_dir, folder, progress or console.Console(words))
        return report(folder, language=language)


def report(folder: str | os.PathLike[str], *, language: str = "en") -> Comparison:
    """Make the pictures, the tables and the page of a folder again, from its record alone."""
    comparison = Comparison(read(folder), Words(language))
    comparison.write()
    return comparison
