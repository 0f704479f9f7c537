"""What a comparison found, in sentences: the page opens with them."""

import math
from typing import NamedTuple

from batchnorm.lab.record import Record
from batchnorm.lab.summary import ArmSummary, Point, Spread, mean_curve, summarize
from batchnorm.views.words import Words, name

CLAIM = 0.9
LARGE = 1e7  # from here on, as of a loss that grew without bound, powers of ten are clearer


def verdict(record: Record, words: Words) -> list[str]:
    """The finding first, then what it leaves open."""
    arms = {summary.arm: summary for summary in summarize(record)}
    none, norm = arms.get("none"), with_norm(record, arms)
    sentences = []
    if none and norm and norm.recalibrated_test_accuracy.values:
        network = name(record.cells[0].config.network)
        running, again = _accuracies(norm)
        without = number(none.test_accuracy)
        sentences.append(words("both", network=network, running=running, again=again, none=without))
        if not none.diverged and not norm.diverged:
            sentences += _gain(record, none, norm, words)
            sentences += _sooner(record, none, norm, words)
    else:
        sentences += [_alone(record, summary, words) for summary in arms.values()]
    sentences += _unsure(arms, words)
    return sentences


def with_norm(record: Record, arms: dict[str, ArmSummary]) -> ArmSummary | None:
    """The arm that stands for batch normalization."""
    return next((arms[arm] for arm in record.arms if arm.startswith("batch")), None)


def _accuracies(summary: ArmSummary) -> tuple[str, str]:
    return number(summary.test_accuracy), number(summary.recalibrated_test_accuracy)


def _gain(record: Record, none: ArmSummary, norm: ArmSummary, words: Words) -> list[str]:
    """How much of the gain the running statistics hide."""
    before, running = none.test_accuracy.mean, norm.test_accuracy.mean
    again = norm.recalibrated_test_accuracy.mean
    if before is None or running is None or again is None:
        return []
    hidden, noise = again - running, sampling_error(again, record.cells[0].header.test_images)
    gain = again - before
    if hidden > noise and gain > 0:
        return [words("gain hidden", gain=f"{gain:.3f}", hidden=f"{hidden:.3f}")]
    key = "gain plain" if abs(hidden) <= noise else "gain lost" if hidden < 0 else "gain none"
    return [words(key, gain=f"{gain:+.3f}", hidden=f"{hidden:+.3f}")]


def _sooner(record: Record, none: ArmSummary, norm: ArmSummary, words: Words) -> list[str]:
    """When the arm with normalization passed the other's last accuracy, and at what speed."""
    passed = passing(record, norm.arm)
    speed, theirs = norm.examples_per_second.mean, none.examples_per_second.mean
    if passed is None or not speed or not theirs:
        return []
    there, end = passed
    return [
        words(
            "sooner",
            value=figure(end.value),
            epochs=f"{there.epoch:.1f}",
            seconds=f"{there.seconds:.0f}",
            all_epochs=f"{end.epoch:g}",
            all_seconds=f"{end.seconds:.0f}",
            speed=f"{speed / theirs:.2f}",
        )
    ]


def passing(record: Record, arm: str) -> tuple[Point, Point] | None:
    """Where an arm's running test accuracy first exceeds the last one of `none`, and that last."""
    baseline = mean_curve(record.of("none"), "test_accuracy")
    if not baseline:
        return None
    end = baseline[-1]
    points = mean_curve(record.of(arm), "test_accuracy")
    there = next((p for p in points if p.epoch > 0 and p.value > end.value), None)
    return None if there is None else (there, end)


def _alone(record: Record, summary: ArmSummary, words: Words) -> str:
    running, again = _accuracies(summary)
    key = "one recalibrated" if summary.recalibrated_test_accuracy.values else "one"
    network = name(record.cells[0].config.network)
    return words(key, network=network, arm=words(summary.arm), running=running, again=again)


def _unsure(arms: dict[str, ArmSummary], words: Words) -> list[str]:
    """What the numbers do not hold."""
    sentences = []
    for arm, summary in arms.items():
        for key, seeds in (
            ("some diverged", summary.diverged),
            ("some unfinished", summary.unfinished),
        ):
            if seeds:
                total = len(summary.seeds)
                sentences.append(words(key, arm=words(arm), count=len(seeds), total=total))
    counts = {len(summary.seeds) for summary in arms.values()}
    if counts == {1}:
        sentences.append(words("exploratory"))
    elif len(counts) == 1:
        sentences.append(words("seeds", count=counts.pop()))
    return sentences


class Answer(NamedTuple):
    """Whether a number is 0.9."""

    quantity: str
    number: str
    error: str
    answer: str  # a key of the words: "yes", "within", "no"


def is_it(record: Record) -> list[Answer]:
    """The note's claim beside our numbers; nothing where it is not the note's experiment."""
    arms = {summary.arm: summary for summary in summarize(record)}
    cell, norm = record.cells[0], with_norm(record, arms)
    if norm is None or (cell.config.network, cell.config.data) != ("lenet", "fashion-mnist"):
        return []
    train, test = cell.header.train_images, cell.header.test_images
    found = (
        ("train_accuracy", norm.train_accuracy, train),
        ("test_accuracy", norm.test_accuracy, test),
        ("recalibrated_test_accuracy", norm.recalibrated_test_accuracy, test),
    )
    return [
        Answer(quantity, number(spread), f"{sampling_error(spread.mean, images):.3f}", answer)
        for quantity, spread, images in found
        if spread.mean is not None
        for answer in [_answer(spread.mean, images)]
    ]


def _answer(value: float, images: int) -> str:
    if value >= CLAIM:
        return "yes"
    return "within" if CLAIM - value <= 2 * sampling_error(value, images) else "no"


def sampling_error(share: float, images: int) -> float:
    """√(p(1−p)/n): the standard error of a share p counted on n images."""
    return math.sqrt(share * (1 - share) / images)


def number(spread: Spread, digits: int = 3) -> str:
    """Mean ± standard deviation over the seeds; a dash where there is none."""
    text = figure(spread.mean, digits)
    return text if spread.sd is None else f"{text} ± {figure(spread.sd, digits)}"


def figure(value: float | None, digits: int = 3) -> str:
    """A number with its thousands set apart; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if abs(value) < LARGE else f"{value:.{digits}g}"
