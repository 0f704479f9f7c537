"""Every operation on every shape, in every setting."""

from collections.abc import Callable

import torch

from batchnorm.errors import BatchNormError
from batchnorm.lab.environment import environment
from batchnorm.speed.cases import DTYPES, QUICK, SHAPES, Plan
from batchnorm.speed.rows import Report, Row
from batchnorm.speed.settings import SETTINGS, apart, available


def bench(
    *,
    settings: tuple[str, ...] | None = None,
    threads: tuple[int, ...] | None = None,
    dtype: str = "float32",
    rounds: int | None = None,
    compiled: bool = False,
    quick: bool = False,
    told: Callable[[Row], object] = lambda _: None,
) -> Report:
    """Time every operation on every shape, in every setting.

    Args:
        settings: of SETTINGS, by default those that this system's allocator has; with `quick` the
            first.
        threads: counts of torch's threads; by default one, and all; with `quick` all.
        dtype: of the inputs: float32, bfloat16, float16, float64.
        rounds: measurements of each, in turn; 9, or 5 with `quick`.
        compiled: torch.compile, too: it compiles every shape and operation anew.
        quick: the shapes that take seconds.
        told: called with each row as soon as it is known.

    Returns:
        The report; what was measured before an interruption is in it.

    Raises:
        BatchNormError: an unknown setting or dtype, fewer than one round or thread.
    """
    settings = settings or available()[: 1 if quick else None]
    everyone = torch.get_num_threads()
    plan = Plan(
        QUICK if quick else SHAPES,
        dtype,
        threads or tuple(sorted({everyone if quick else 1, everyone})),
        (5 if quick else 9) if rounds is None else rounds,
        compiled,
    )
    _check(plan, settings)
    report = Report(plan, settings, environment())
    try:
        for setting in settings:
            for row in apart(plan, setting):
                report.rows.append(row)
                told(row)
    except KeyboardInterrupt:
        report.interrupted = True
    except BatchNormError as error:
        report.failure = str(error)
    return report


def _check(plan: Plan, settings: tuple[str, ...]) -> None:
    here = available()
    for setting in settings:
        if setting not in SETTINGS:
            known = ", ".join(SETTINGS)
            raise BatchNormError(f"there is no setting {setting!r}; there are {known}.")
        if setting not in here:
            raise BatchNormError(
                f"the setting {setting!r} needs glibc, and this system has another C library. "
                "Leave it out."
            )
    if plan.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise BatchNormError(f"there is no timing for dtype {plan.dtype!r}; there is {known}.")
    for name, value in (("rounds", plan.rounds), ("threads", min(plan.threads))):
        if value < 1:
            raise BatchNormError(f"{name} is {value} and should be a whole number from 1.")
