"""Experiments that test one claim each, with error bars.

Each study is a module with a `STUDY`; the recalibration study has a record of its own.
"""

import importlib
from typing import TYPE_CHECKING

from batchnorm.errors import BatchNormError

if TYPE_CHECKING:
    from batchnorm.lab.study import Study

# name: what it asks, in a line of the command's help. Loading a study loads SciPy: not for --help
NAMES = {
    "learning-rate": "Does batch norm allow larger learning rates?",
    "residual": "Does that hold for a small ResNet, too?",
    "matched-rates": "Does its gain come from the larger rates? (Bjorck et al.)",
    "fixed-moments": "Are mean and variance of its output fixed, and by what?",
    "axes": "Is each pixel a sample, over the channel or the feature axis?",
    "position": "Before the activation, after it, or on the input only?",
    "linear": "Is it a linear transform?",
    "noise": "Does it work by the noise, or in spite of it? (Santurkar et al., Luo et al.)",
    "ghost-size": "Do small groups close the gap of a large batch? (Hoffer et al.)",
    "regularizer": "Is it a decay of its weights, weaker with larger batches? (Luo et al.)",
    "dropout": "Should it be mixed with dropout? (Li et al.)",
    "epochs": "Does it need fewer epochs?",
    "speed": "Does it process more examples a second? (timed alone)",
    "fast": "In how many seconds is it 0.9, at best?",
    "nine-tenths": "Is the test accuracy 0.9 after ten epochs?",
    "defects": "What do the defects of the note's layer do?",
    "gradient-growth": "Does it make gradients explode at initialization? (Yang et al.)",
    "figure-1": "Ioffe & Szegedy's Figure 1: sooner, and with steadier inputs?",
    "predictiveness": "Are gradients more predictable with it? (Santurkar et al.)",
    "only-norms": "What can be learned by weight and bias alone? (Frankle et al.)",
}


def find(name: str) -> "Study":
    """The study of this name."""
    if name not in NAMES:
        raise BatchNormError(f"there is no study called {name!r}. Known are {', '.join(NAMES)}.")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    study: Study = module.STUDY
    return study
