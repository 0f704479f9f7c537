"""Memory of large outputs: kept when an output ends, and handed out again.

glibc returns what is larger than 32 MB to the system as soon as it is freed, and the first touch of
fresh pages takes longer than to normalize them. A block comes back when its storage ends, with the last
tensor, view or saved variable on it, and idle blocks are lent to the system, which takes their pages
when it is short of memory.
"""

import os
from operator import index

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
        limit: bytes of idle memory, not of what is in use; less than 32 MB keep none. What is more is
            returned to the system now. With what is in use it is never more than the most that was.

    Raises:
        BatchNormError: a limit that is no whole number from 0.
    """
    bound = _checked("reuse_memory", limit)
    if _cpu is not None:
        _cpu.keep_at_most(bound if bound >= LARGE else 0)


def _checked(name: str, limit: object) -> int:
    try:
        bound = -1 if isinstance(limit, bool) else index(limit)  # type: ignore[arg-type]
    except TypeError:
        bound = -1
    if not 0 <= bound < 2**63:
        raise BatchNormError(
            f"{name} got {limit!r} and wants the bytes to keep, a whole number from 0. "
            f"The default is {LIMIT}; 0 switches it off."
        )
    return bound


def _of_environment() -> int:
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return LIMIT
    limit = int(given) if given.isdecimal() else given
    return _checked(f"the environment variable {VARIABLE}", limit)


reuse_memory(_of_environment())


def empty_like(x: Tensor, dtype: int) -> Tensor:
    """Of x's shape and strides; x is dense, `dtype` its code."""
    if x.numel() * x.element_size() < LARGE or not _cpu.most_kept():
        return torch.empty_like(x)
    made = _cpu.empty(dtype, x.shape, x.stride())
    if made is None:  # torch says what is to be said of memory that is not to be had
        return torch.empty_like(x)
    return from_dlpack(made)
