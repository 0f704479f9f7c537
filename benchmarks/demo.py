"""The whole demo beside the same demo on torch.nn: `batchnorm compare`, from its start to its last file.

    python benchmarks/demo.py [--rounds 3] [--epochs 10] [--json FILE] [--markdown FILE]

Each run is a process of its own and ends with the page, the pictures and the animations; the arms are
none and batch, or none and batch-torch. In turn, every round beginning with another; a number is the
median of the rounds' ratios.
"""

import statistics
import subprocess
import sys
import tempfile
import time

import figures
from batchnorm.lab.environment import environment
from batchnorm.views import markdown

ARMS = ("batch-torch", "batch")
TARGET = 0.75
HEADER = ("epochs", "torch.nn s", "ours s", "ours ÷ torch.nn", "target")


def seconds(arm: str, epochs: int) -> float:
    """Wall clock of one run, into a folder that goes afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "batchnorm", "compare", "--arms", f"none,{arm}"]
        start = time.perf_counter()
        subprocess.run(  # noqa: S603  # our own command
            [*command, "--epochs", str(epochs), "--out", folder], check=True, capture_output=True
        )
        return time.perf_counter() - start


def measure(rounds: int, epochs: int) -> dict[str, list[float]]:
    """Seconds of both, a number a round."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in figures.in_turn(ARMS, rounds):
        times[arm].append(seconds(arm, epochs))
        print(f"{arm}: {times[arm][-1]:.1f} s", flush=True)
    return times


def main() -> None:
    """Measure, print, write."""
    parser = figures.parser(__doc__, "demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    for name in ("rounds", "epochs"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is {value} and should be a whole number from 1")
    figures.check(options, "demo")
    where = environment()
    line = (
        f"{figures.measured_on(where)}; medians of {options.rounds} rounds in turn, in brackets "
        "the least and the most"
    )
    print(line)
    times = measure(options.rounds, options.epochs)
    theirs, ours = (times[arm] for arm in ARMS)
    ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
    row = (
        str(options.epochs),
        *(f"{statistics.median(each):.1f}" for each in (theirs, ours)),
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{TARGET:.2f}",
    )
    table = markdown.table(HEADER, [row], words=0)
    print(table)
    figures.save(options.json, {"environment": where, "seconds": times})
    figures.publish(options, "demo", line, table)


if __name__ == "__main__":
    main()
