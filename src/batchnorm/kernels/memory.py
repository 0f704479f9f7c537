"""Memory of large outputs: kept when an output ends, and handed out again.

glibc returns what is larger than 32 MB to the system as soon as it is freed, and the first touch of
fresh pages takes longer than to normalize them. A block comes back when its storage ends, with the last
tensor, view or saved variable on it, and idle blocks are lent to the system, which takes their pages
when it is short of memory.
"""

import os

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from batchnorm.errors import BatchNormError

try:
    from batchnorm.kernels import _cpu
except ImportError:  # installed without a compiler
    _cpu = None  # type: ignore[assignment]

LARGE = 32 * 2**20  # bytes; glibc itself keeps what is smaller
LIMIT = 2**30  # bytes that are kept by default
VARIABLE = "BATCHNORM_MEMORY"


def reuse_memory(limit: int) -> None:
    """Keep at most `limit` bytes of large outputs' memory for the next ones; 0: none.

    Outputs and gradients of 32 MB and more, on a CPU, take memory that an earlier one has left. By
    default a GiB is kept, or as many bytes as the environment variable BATCHNORM_MEMORY says.

    Args:
        limit: bytes of idle memory, not of what is in use. What is more is returned to the system now.

    Raises:
        BatchNormError: a limit that is no whole number from 0.
    """
    _check("reuse_memory", limit)
    if _cpu is not None:
        _cpu.keep_at_most(limit)


def _check(name: str, limit: object) -> None:
    if not isinstance(limit, int) or not 0 <= limit < 2**63:
        raise BatchNormError(
            f"{name} got {limit!r} and wants the bytes to keep, a whole number from 0. "
            f"The default is {LIMIT}; 0 switches it off."
        )


def _of_environment() -> int:
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return LIMIT
    limit = int(given) if given.isdecimal() else given
    _check(f"the environment variable {VARIABLE}", limit)
    return int(limit)


reuse_memory(_of_environment())


def empty_like(x: Tensor, dtype: int) -> Tensor:
    """Of x's shape and strides; x is dense, `dtype` its code."""
    if x.numel() * x.element_size() < LARGE or not _cpu.most_kept():
        return torch.empty_like(x)
    made = _cpu.empty(dtype, x.shape, x.stride())
    if made is None:  # torch says what is to be said of memory that is not to be had
        return torch.empty_like(x)
    return from_dlpack(made)
