"""Batch normalization in PyTorch: the layer, what a model needs because of it, a laboratory.

`import batchnorm` loads the layers and the tools for whole models; the checks (`check`, `watch`), the
laboratory (`compare`) and other frameworks' conventions load when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from batchnorm.errors import BatchNormError, lacking
from batchnorm.functional import batch_norm
from batchnorm.kernels import backend
from batchnorm.kernels.memory import reuse_memory
from batchnorm.layers import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
)
from batchnorm.model.account import Change, Changes, changes
from batchnorm.model.accumulation import accumulate
from batchnorm.model.agreement import synchronize_buffers
from batchnorm.model.conversion import convert
from batchnorm.model.counting import one_update
from batchnorm.model.folding import fold
from batchnorm.model.freezing import freeze, freeze_like, no_update, unfreeze, update_once
from batchnorm.model.inventory import summary
from batchnorm.model.masking import masked
from batchnorm.model.parameters import param_groups
from batchnorm.model.precision import keep_float32
from batchnorm.model.recalibration import recalibrate
from batchnorm.model.single import single_values
from batchnorm.variants.along import BatchNormAlong
from batchnorm.variants.estimators import EstimatorBatchNorm
from batchnorm.variants.frozen import FrozenBatchNorm
from batchnorm.variants.ghost import GhostBatchNorm
from batchnorm.variants.renorm import RenormBatchNorm
from batchnorm.variants.split import SplitBatchNorm, domain
from batchnorm.variants.sync import SyncBatchNorm

if TYPE_CHECKING:
    from batchnorm.checks.checking import check
    from batchnorm.checks.findings import Finding, Findings
    from batchnorm.checks.watching import watch
    from batchnorm.comparison import compare
    from batchnorm.conventions import (
        from_flax,
        from_keras,
        from_note,
        from_onnx,
        to_flax,
        to_keras,
        to_note,
        to_onnx,
    )

__version__ = "0.1.0.dev0"
__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormAlong",
    "BatchNormError",
    "Change",
    "Changes",
    "EstimatorBatchNorm",
    "Finding",
    "Findings",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "RenormBatchNorm",
    "SplitBatchNorm",
    "SyncBatchNorm",
    "accumulate",
    "backend",
    "batch_norm",
    "changes",
    "check",
    "compare",
    "convert",
    "domain",
    "fold",
    "freeze",
    "freeze_like",
    "from_flax",
    "from_keras",
    "from_note",
    "from_onnx",
    "keep_float32",
    "masked",
    "no_update",
    "one_update",
    "param_groups",
    "recalibrate",
    "reuse_memory",
    "single_values",
    "summary",
    "synchronize_buffers",
    "to_flax",
    "to_keras",
    "to_note",
    "to_onnx",
    "unfreeze",
    "update_once",
    "watch",
]


_LATER = {  # loaded when first used
    "check": "batchnorm.checks.checking",
    "watch": "batchnorm.checks.watching",
    "Finding": "batchnorm.checks.findings",
    "Findings": "batchnorm.checks.findings",
    "compare": "batchnorm.comparison",
    "from_flax": "batchnorm.conventions",
    "from_keras": "batchnorm.conventions",
    "from_note": "batchnorm.conventions",
    "from_onnx": "batchnorm.conventions",
    "to_flax": "batchnorm.conventions",
    "to_keras": "batchnorm.conventions",
    "to_note": "batchnorm.conventions",
    "to_onnx": "batchnorm.conventions",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            lacking(f"batchnorm.{name}", missing), name=missing.name
        ) from missing
