"""Batch normalization in PyTorch: the layer, what a model needs because of it, a laboratory.

`import batchnorm` loads the layer and the tools for whole models; the laboratory (`compare`) loads when it is first used.
"""

from typing import TYPE_CHECKING, Any

from batchnorm.errors import BatchNormError
from batchnorm.functional import batch_norm
from batchnorm.kernels import backend
from batchnorm.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.model.account import Change, Changes, changes
from batchnorm.model.conversion import convert
from batchnorm.model.folding import fold
from batchnorm.model.freezing import freeze, freeze_like, no_update, unfreeze
from batchnorm.model.inventory import summary
from batchnorm.model.masking import masked
from batchnorm.model.parameters import param_groups
from batchnorm.model.recalibration import recalibrate

if TYPE_CHECKING:
    from batchnorm.comparison import compare

__version__ = "0.1.0.dev0"
__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormError",
    "Change",
    "Changes",
    "backend",
    "batch_norm",
    "changes",
    "compare",
    "convert",
    "fold",
    "freeze",
    "freeze_like",
    "masked",
    "no_update",
    "param_groups",
    "recalibrate",
    "summary",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    if name == "compare":
        try:
            from batchnorm.comparison import compare  # noqa: PLC0415  # loads the laboratory
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                f"batchnorm.compare needs {missing.name}. Install it: pip install 'batchnorm[lab]'",
                name=missing.name,
            ) from missing
        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
