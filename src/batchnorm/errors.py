"""The one exception that this library raises for a mistake that a user can mend, and its sentences."""

import importlib
from typing import Any

EXTRAS = {  # what `pip install batchnorm` leaves out, by the modules that are imported
    "lab": (
        "altair", "filelock", "jinja2", "matplotlib", "PIL", "pooch", "rich", "scipy", "typer",
        "vl_convert",
    ),
    "export": ("onnx", "onnxruntime", "onnxscript", "safetensors"),
    "dask": ("dask", "distributed"),
    "tensorboard": ("tensorboard",),
}  # fmt: skip


class BatchNormError(ValueError, RuntimeError):
    """What was got, what was wanted, and how to mend it, in a sentence or two.

    It is both a ``ValueError`` and a ``RuntimeError`` because torch raises the one from its Python
    half and the other from its C++ half for mistakes of the same kind; code that catches either
    from torch.nn's layers goes on working.
    """


def no_tensor(who: str, given: object) -> BatchNormError:
    """To raise where a tensor should be."""
    return BatchNormError(
        f"{who} got a {type(given).__name__} and wants a torch.Tensor, (N, C, *spatial). Convert it "
        "with torch.as_tensor."
    )


def brief(error: BaseException) -> str:
    """What an exception says, in a line."""
    first_line = str(error).strip().partition("\n")[0].removesuffix(".")
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def lacking(what: str, missing: ModuleNotFoundError) -> str:
    """That `what` needs a library which is not installed, and the extra that brings it."""
    module = str(missing.name).partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"{what} needs {module}. Install it: pip install 'batchnorm[{extra}]'"
    return f"{what} needs {module}, which is not installed."


def needed(module: str, what: str) -> Any:
    """Import a module that an extra brings and that `what` needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(lacking(what, missing), name=missing.name) from missing
