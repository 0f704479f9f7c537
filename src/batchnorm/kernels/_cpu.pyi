# The binding of cpu/module.cpp: addresses, 0 for none, and codes of `native`.

from collections.abc import Sequence

def forward(
    dtype: int,
    rows: bool,
    batch: int,
    channels: int,
    plane: int,
    threads: int,
    x: int,
    residual: int,
    y: int,
    weight: int,
    bias: int,
    parameters_dtype: int,
    running_mean: int,
    running_var: int,
    running_dtype: int,
    statistics: int,
    training: bool,
    momentum: float,
    eps: float,
    activation: int,
    pool: int,
    width: int,
    winner: int,
    /,
) -> None: ...
def backward(
    dtype: int,
    rows: bool,
    batch: int,
    channels: int,
    plane: int,
    threads: int,
    x: int,
    dy: int,
    extra: int,
    dx: int,
    gradient: int,
    weight: int,
    bias: int,
    parameters_dtype: int,
    dweight: int,
    dbias: int,
    statistics: int,
    training: bool,
    activation: int,
    residual: bool,
    pool: int,
    width: int,
    winner: int,
    /,
) -> None: ...
def near_zero(
    rows: bool, batch: int, channels: int, plane: int, x: int, near: float, /
) -> bool: ...
def moments(
    dtype: int,
    rows: bool,
    batch: int,
    channels: int,
    plane: int,
    threads: int,
    x: int,
    statistics: int,
    /,
) -> None: ...
def input_gradient(
    dtype: int,
    rows: bool,
    batch: int,
    channels: int,
    plane: int,
    threads: int,
    x: int,
    dy: int,
    dx: int,
    weight: int,
    weight_dtype: int,
    statistics: int,
    sums: int,
    /,
) -> None: ...
def isa() -> str: ...
def has_pool() -> bool: ...
def empty(dtype: int, sizes: Sequence[int], strides: Sequence[int], /) -> object | None: ...
def keep_at_most(bytes: int, /) -> None: ...
def most_kept() -> int: ...
def kept() -> int: ...
