"""Probes for the tests of the engine, found by their names in whatever process runs them."""

import time
from pathlib import Path


def square(seed, images):
    assert images is None
    return {"value": float(seed**2), "curve": [0.0, float(seed)]}


def noise(seed, images):  # noqa: ARG001
    """What torch's random state gives, which the seed decides."""
    import torch

    return {"value": torch.rand(1).item(), "threads": torch.get_num_threads()}


def fails_at_first(seed, images, *, folder):  # noqa: ARG001
    marker = Path(folder) / f"tried-{seed}"
    if not marker.exists():
        marker.touch()
        raise OSError("the disk was busy")
    return {"value": float(seed)}


def fails_always(seed, images):  # noqa: ARG001
    raise KeyError("nothing there")


def not_finite(seed, images):  # noqa: ARG001
    return {"value": float("nan"), "curve": [1.0, float("inf")]}


def timed(seed, images, *, folder, name):  # noqa: ARG001
    """Leaves when it ran, by the clock that all processes share."""
    start = time.time()
    time.sleep(0.2)
    (Path(folder) / f"{name}-{seed}").write_text(f"{start} {time.time()}")
    return {"value": 0.0}
